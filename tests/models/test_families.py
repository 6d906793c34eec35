"""Every family computes what transformers computes: padded, grouped, windowed, scaled, tied and untied."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mergelab.errors import CheckpointError
from mergelab.models.families import FAMILIES, model_from_config
from mergelab.models.model import Model, Params
from mergelab.models.table import check_table, stored_shapes
from tests.models.tiny_models import CONFIGS, MASK, TOKENS, params_of, tiny, weights, write
from tests.models.transformers_outputs import RECORDED, RECORDED_RECURRENT, values


@cache
def recorded() -> dict[str, list[dict[str, Any]]]:
    return {**json.loads(RECORDED.read_text()), **json.loads(RECORDED_RECURRENT.read_text())}


def forward(model: Model) -> Callable[..., np.ndarray]:
    """The compiled forward pass `(params, tokens, mask) -> logits or hidden states`."""

    @jax.jit
    def outputs(params: Params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        output = model.apply(params, tokens, mask=mask)
        found = output.logits if model.family.architecture.causal else output.hidden
        assert found is not None
        return found

    return lambda *arguments: np.asarray(outputs(*arguments))


def differences(found: np.ndarray, name: str) -> float:
    """The largest difference from the recorded values, infinite if an argmax differs."""
    largest = 0.0
    for row, real, expected in zip(found, MASK, recorded()[name], strict=True):
        if row[real].argmax(-1).tolist() != expected["argmax"]:
            return np.inf
        largest = max(largest, np.abs(row[expected["at"], :24] - np.array(expected["values"])).max())
    return float(largest)


def test_every_family_is_tried() -> None:
    assert {config["model_type"] for config in CONFIGS.values()} == FAMILIES.keys()
    assert recorded().keys() == CONFIGS.keys()


# The first member of each family; `test_family_variants.py` runs the others.
FIRST = [*{config["model_type"]: name for name, config in reversed(CONFIGS.items())}.values()][::-1]


@pytest.mark.parametrize("name", FIRST)
def test_outputs_are_the_recorded_ones(name: str) -> None:
    model, params = tiny(name)
    run = forward(model)
    assert differences(run(params, TOKENS, MASK), name) <= 1e-4
    # Controls: without the mask, and with rows exchanged, the comparison fails.
    assert differences(run(params, TOKENS, np.ones_like(MASK)), name) > 1e-2
    assert differences(run(params, TOKENS[[0, 2, 1]], MASK), name) > 1e-2


@pytest.mark.oracle
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", name)
    expected = values(folder, TOKENS, MASK)
    assert differences(expected, name) <= 1e-5
    model, params = tiny(name)
    found = forward(model)(params, TOKENS, MASK)
    np.testing.assert_allclose(found[MASK], expected[MASK], rtol=0, atol=1e-4)
    assert (found[MASK].argmax(-1) == expected[MASK].argmax(-1)).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_is_one_to_one_and_is_what_the_module_makes(name: str) -> None:
    model = model_from_config(CONFIGS[name])
    check_table(model.table())
    made = jax.eval_shape(lambda: model.init(0))
    shapes = {tuple(key.key for key in path): leaf.shape for path, leaf in jax.tree.leaves_with_path(made)}
    assert shapes == {leaf.path: leaf.shape for leaf in model.table()}
    assert all(len(leaf.axes) == len(leaf.shape) for leaf in model.table())


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_models_saved_without_a_head_have_no_prefix(name: str) -> None:
    model, params = tiny(name)
    tensors = weights(model)
    prefix = model.family.prefix
    bare = {key.removeprefix(prefix): value for key, value in tensors.items()}
    assert bare.keys() != tensors.keys()
    assert model.for_tensors(tensors.keys()) == model
    fitted = model.for_tensors(bare.keys())
    assert stored_shapes(fitted.table()).keys() == bare.keys()
    same = jax.tree.map(lambda a, b: bool((a == b).all()), params, params_of(fitted, bare))
    assert jax.tree.all(same)


def test_a_pooler_is_read_where_there_is_one() -> None:
    model = model_from_config(CONFIGS["bert"])
    names = [name for name in stored_shapes(model.table()) if "pooler" not in name]
    without = model.for_tensors(names)
    assert "pooled" in model.sites() and "pooled" not in without.sites()
    assert set(stored_shapes(without.table())) == set(names)


@pytest.mark.parametrize(
    ("name", "tensor", "unused"),
    [
        ("gpt2", "h.0.attn.bias", True),
        ("gpt2", "h.0.attn.c_attn.bias", False),
        ("gpt_neox", "gpt_neox.layers.0.attention.masked_bias", True),
        ("gpt_neox", "gpt_neox.layers.0.attention.dense.bias", False),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", True),
        ("bert", "cls.predictions.bias", True),
        ("bert", "bert.pooler.dense.bias", False),
    ],
)
def test_buffers_of_old_files_are_known(name: str, tensor: str, unused: bool) -> None:
    assert model_from_config(CONFIGS[name]).is_unused(tensor) is unused


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"model_type": "lama"}, r"'lama' \(did you mean 'llama'\?\).*docs/models.md"),
        ("llama", {"model_type": None}, "model_type None"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'.*'silu'"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type 'dynamic'.*'yarn'"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "'linear' lack 'factor'"),
        ("llama", {"head_dim": 5}, "rotates 5 of 5 components"),
        (
            "phi3",
            {"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1]}},
            "1 numbers",
        ),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True"),
        ("llama", {"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ("gpt2", {"activation_function": "mish"}, "activation_function = 'mish'"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("gemma3", {"layer_types": ["full_attention"]}, "1 layer_types for 2 layers"),
        ("gemma3", {"layer_types": ["full_attention", "chunked"]}, "layer type 'chunked'"),
        ("gemma3", {"sliding_window": None}, "no sliding_window"),
        ("bert", {"position_embedding_type": "relative_key"}, "'relative_key'.*'absolute'"),
        ("mixtral", {"hidden_size": None}, "lacks the field 'hidden_size'"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused_by_name(
    name: str, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        model_from_config(CONFIGS[name] | changes, "some/config.json")


def test_fields_of_training_and_storage_change_nothing() -> None:
    extra = {"attention_dropout": 0.1, "torch_dtype": "bfloat16", "use_cache": False, "eos_token_id": [1, 2]}
    assert model_from_config(CONFIGS["qwen3"] | extra) == model_from_config(CONFIGS["qwen3"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_biases": True}, r"field 'attention_biases' \(did you mean 'attention_bias'\?\)"),
        ({"nonsense": 1, "other": None}, "fields 'nonsense', 'other', unknown here: they are ignored"),
        ({"rope_scaling": {"type": "linear", "factor": 1.0, "beta": 1}}, "fields unknown here: 'beta'"),
        ({"sliding_window": 4096}, "'sliding_window'"),
    ],
)
def test_what_nothing_is_known_of_is_ignored_with_a_warning(changes: dict[str, Any], message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        found = model_from_config(CONFIGS["llama"] | changes)
    if "rope_scaling" not in changes:
        assert found == model_from_config(CONFIGS["llama"])


def test_all_that_is_wrong_with_a_config_is_said_at_once() -> None:
    wrong = {"hidden_act": "gelu", "rms_norm_eps": 0, "rope_scaling": {"type": "dynamic"}, "vocab_size": None}
    with pytest.raises(CheckpointError) as error:
        model_from_config(CONFIGS["llama"] | wrong)
    for name in ("hidden_act", "rms_norm_eps", "dynamic", "vocab_size"):
        assert sum(name in fault for fault in error.value.faults) == 1


def test_old_and_new_spellings_of_positions_agree() -> None:
    old = model_from_config(CONFIGS["gemma3"])
    new = {key: value for key, value in CONFIGS["gemma3"].items() if not key.startswith("rope")}
    new["rope_parameters"] = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    }
    assert model_from_config(new) == old
    swapped = {"full_attention": new["rope_parameters"]["sliding_attention"], "sliding_attention": {}}
    assert model_from_config(new | {"rope_parameters": swapped}) != old
