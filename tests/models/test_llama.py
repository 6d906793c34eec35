"""The Llama family: reference logits, positions, refusals, and files that survive the round trip."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mergelab.errors import CheckpointError, OutputError
from mergelab.quickstart import small_llama
from mergelab.quickstart.small_llama import LlamaConfig
from tests.models.tiny_models import weights

SMALL = LlamaConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=32,
    rope_theta=500.0,
    rms_norm_eps=1e-5,
)
CONFIGS = {
    "grouped-query, untied": SMALL,
    "multi-query, tied": replace(SMALL, num_key_value_heads=1, tie_word_embeddings=True),
    "multi-head, wide heads": replace(SMALL, num_key_value_heads=4, head_dim=10, rope_theta=10000.0),
}
TOKENS = np.array([[3, 14, 15, 9, 26, 5, 35, 8, 58, 9], [60, 0, 0, 1, 2, 3, 5, 8, 13, 21]], np.int32)
RECORDED = Path(__file__).with_name("llama_logits.json")


def write(folder: Path, config: LlamaConfig, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    fields = {name: value for name, value in (config.to_hf() | changes).items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(weights(config.model), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def logits(config: LlamaConfig, params: small_llama.Params, tokens: np.ndarray = TOKENS) -> np.ndarray:
    return np.asarray(jax.jit(partial(small_llama.apply, config))(params, tokens))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_recorded_ones(name: str, tmp_path: Path) -> None:
    config, params = small_llama.load(write(tmp_path, CONFIGS[name]))
    assert config == CONFIGS[name]
    recorded = json.loads(RECORDED.read_text())[name]
    np.testing.assert_allclose(logits(config, params)[:, -1, :12], recorded, rtol=0, atol=1e-4)
    other = logits(replace(config, rope_theta=config.rope_theta * 2), params)
    assert np.abs(other[:, -1, :12] - recorded).max() > 1e-2


@pytest.mark.oracle
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    import torch
    import transformers

    config, params = small_llama.load(write(tmp_path / "theirs", CONFIGS[name]))
    small_llama.save(params, config, tmp_path / "ours")
    for folder in ("theirs", "ours"):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32)
        with torch.no_grad():
            expected = model(torch.tensor(TOKENS, dtype=torch.int64)).logits.numpy()
        found = logits(config, params)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
        assert (found.argmax(-1) == expected.argmax(-1)).all()
        recorded = json.loads(RECORDED.read_text())[name]
        np.testing.assert_allclose(expected[:, -1, :12], recorded, rtol=0, atol=1e-4)


@pytest.mark.oracle
def test_a_folder_written_by_transformers_loads(tmp_path: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_theta=1234.0,
            initializer_range=0.3,
        )
    )
    theirs.save_pretrained(tmp_path)
    config, params = small_llama.load(tmp_path)
    assert config.rope_theta == 1234.0
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS % 50, dtype=torch.int64)).logits.numpy()
    np.testing.assert_allclose(logits(config, params, TOKENS % 50), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_saving_restores_names_bytes_and_config(name: str, tmp_path: Path) -> None:
    source = write(tmp_path / "source", CONFIGS[name])
    config, params = small_llama.load(source)
    small_llama.save(params, config, tmp_path / "copy", {"tokenizer.json": b"{}"})
    original, copy = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "copy"))
    assert original.keys() == copy.keys()
    assert all(original[key].tobytes() == copy[key].tobytes() for key in original)
    assert small_llama.load(tmp_path / "copy")[0] == config
    assert (tmp_path / "copy" / "tokenizer.json").read_bytes() == b"{}"
    with pytest.raises(OutputError):
        small_llama.save(params, config, tmp_path / "copy")


def test_fresh_parameters_fill_the_table_and_nothing_else() -> None:
    for config in CONFIGS.values():
        params = small_llama.init(config, seed=1)
        shapes = {tuple(k.key for k in path): leaf.shape for path, leaf in jax.tree.leaves_with_path(params)}
        assert shapes == {leaf.path: leaf.shape for leaf in small_llama.leaves(config)}
    one, again, other = (small_llama.init(SMALL, seed=seed) for seed in (1, 1, 2))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one, again))
    assert not jnp.array_equal(one["embed"]["embedding"], other["embed"]["embedding"])


def test_the_future_does_not_reach_the_past() -> None:
    params = small_llama.init(SMALL, seed=0)
    changed = TOKENS.copy()
    changed[:, 6] += 1
    before, after = logits(SMALL, params), logits(SMALL, params, changed)
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert np.abs(before[:, 6:] - after[:, 6:]).max() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "scaled rotary positions.*load_model"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "type 'llama3' lack 'factor'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 5e5}}, "type 'dynamic'"),
        ({"attention_bias": True}, "biases.*load_model"),
        ({"mlp_bias": True}, "biases.*load_model"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'.*'silu'"),
        ({"model_type": "mistral"}, "model_type = 'mistral'"),
        ({"hidden_size": "absent"}, "lacks the field 'hidden_size'"),
        ({"hidden_size": 48}, r"embed_tokens.*\[61, 24\].*\[61, 48\]"),
        ({"num_hidden_layers": 3}, r"lacks the tensor 'model.layers.2.input_layernorm.weight'"),
        ({"num_hidden_layers": 1}, r"has the tensor 'model.layers.1"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused_by_name(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        small_llama.load(write(tmp_path, SMALL, **changes))


@pytest.mark.parametrize("field", ["sliding_window", "num_heads"])
def test_a_field_that_means_nothing_here_is_named_in_a_warning(field: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=f"'{field}'.*unknown here"):
        small_llama.load(write(tmp_path, SMALL, **{field: 4}))


def test_newer_configs_keep_theta_in_rope_parameters(tmp_path: Path) -> None:
    newer = {"rope_theta": "absent", "rope_parameters": {"rope_type": "default", "rope_theta": 777.0}}
    assert small_llama.load(write(tmp_path, SMALL, **newer))[0].rope_theta == 777.0
