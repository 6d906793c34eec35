"""What other programs' settings say wrongly is said all at once; `config.json` wins over names of folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from mergelab.errors import CheckpointError
from mergelab.sae import load_cross_layer_transcoder, load_sae

RELEASED = Path(__file__).parent / "released" / "google" / "gemma-scope-2-1b-pt"
CLT = RELEASED / "clt" / "width_262k_l0_medium_affine"
CROSSCODER = RELEASED / "crosscoder" / "layer_7_13_17_width_262k_l0_medium"


def _folder(path: Path, cfg: dict[str, Any], weights: str = "sae_weights.safetensors") -> Path:
    arrays = {"W_enc": np.ones((4, 8)), "b_enc": np.zeros(8), "W_dec": np.ones((8, 4)), "b_dec": np.zeros(4)}
    if weights == "sae.safetensors":
        names = {"W_enc": "encoder.weight", "b_enc": "encoder.bias"}
        arrays = {names.get(name, name): value for name, value in arrays.items()}
        arrays["encoder.weight"] = np.ascontiguousarray(arrays["encoder.weight"].T)
    path.mkdir()
    save_file({name: value.astype(np.float32) for name, value in arrays.items()}, path / weights)
    (path / "cfg.json").write_text(json.dumps(cfg))
    return path


def test_all_faults_of_a_file_are_said_at_once(tmp_path: Path) -> None:
    wrong: dict[str, Any] = {
        "architecture": "topk", "k": 0, "d_in": 4, "d_sae": 8, "apply_b_dec_to_input": "yes",
        "normalize_activations": "batch", "reshape_activations": 3, "metadata": [],
    }  # fmt: skip
    with pytest.raises(CheckpointError) as caught:
        load_sae(_folder(tmp_path / "saelens", wrong))
    said = [fault.partition("cfg.json: ")[2].partition(" is ")[0] for fault in caught.value.faults]
    expected = {"k", "apply_b_dec_to_input", "normalize_activations", "reshape_activations", "metadata"}
    assert set(said) == expected and len(said) == len(expected)
    coder = {"activation": "softmax", "k": -1, "d_in": 4, "num_latents": 8, "transcode": "no"}
    with pytest.raises(CheckpointError) as caught:
        load_sae(_folder(tmp_path / "sparsify", coder, "sae.safetensors"), format="sparsify")
    assert len(caught.value.faults) == 3
    # One alone is the one sentence it was.
    right = {**wrong, "k": 2, "normalize_activations": "none", "reshape_activations": "none", "metadata": {}}
    with pytest.raises(CheckpointError) as caught:
        load_sae(_folder(tmp_path / "one", right))
    assert "apply_b_dec_to_input is 'yes', but true or false was expected; correct it" in str(caught.value)
    assert load_sae(_folder(tmp_path / "none", {**right, "apply_b_dec_to_input": True})).config.k == 2


def _said(path: Path, **kwargs: Any) -> tuple[str, ...]:
    with pytest.raises(CheckpointError) as caught:
        load_sae(path, **kwargs)
    return caught.value.faults


LLAMA = Path(__file__).parent / "released" / "fnlp" / "Llama3_1-8B-Base-LXR-8x" / "Llama3_1-8B-Base-L3R-8x"


def test_llama_scope_says_all_that_is_wrong(tmp_path: Path) -> None:
    shutil.copytree(LLAMA, tmp_path / "a")
    right = json.loads((LLAMA / "hyperparams.json").read_text())
    wrong = {
        "act_fn": "relu", "jump_relu_threshold": -1, "sparsity_include_decoder_norm": "yes", "d_sae": 25,
        "apply_decoder_bias_to_pre_encoder": 0, "dataset_average_activation_norm": {"in": 0, "out": "2"},
    }  # fmt: skip
    (tmp_path / "a" / "hyperparams.json").write_text(json.dumps(right | wrong))
    said = " ".join(_said(tmp_path / "a"))
    assert len(_said(tmp_path / "a")) == 7
    assert all(key in said for key in wrong) and "activation_norm.in" in said and "norm.out" in said
    del right["dataset_average_activation_norm"]
    (tmp_path / "a" / "hyperparams.json").write_text(json.dumps(right | {"act_fn": "relu"}))
    assert ["r1_distill" in one for one in _said(tmp_path / "a")] == [True, False]


@pytest.mark.parametrize(
    ("name", "wrong", "count"),
    [
        ("AutoEncoder", {"activation_dim": 9, "dict_size": "many"}, 2),
        ("AutoEncoderNew", {"activation_dim": 9, "dict_size": 3.5}, 2),
        ("GatedAutoEncoder", {"activation_dim": 9, "dict_size": 25}, 2),
        ("AutoEncoderTopK", {"activation_dim": 9, "dict_size": 25}, 2),
        ("BatchTopKSAE", {"k": 0, "activation_dim": 9, "dict_size": 25}, 3),
        ("MatryoshkaBatchTopKSAE", {"k": "few", "activation_dim": 9, "dict_size": 25}, 3),
        ("JumpReluAutoEncoder", {"activation_dim": 9, "dict_size": 25}, 2),
        ("BatchTopKSAE", {"dict_class": "CrossCoder"}, 1),
    ],
)
def test_dictionary_learning_says_all_that_is_wrong(
    tmp_path: Path, name: str, wrong: dict[str, Any], count: int
) -> None:
    recorded = Path(__file__).parent / "recorded" / f"dictionary_learning_{name}"
    shutil.copytree(recorded, tmp_path / "a")
    config = json.loads((recorded / "config.json").read_text())
    config["trainer"] |= wrong
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    said = _said(tmp_path / "a")
    assert len(said) == count and all(key in " ".join(said) for key in wrong)


def test_an_sae_of_several_tokens_is_refused_with_the_reason(tmp_path: Path) -> None:
    temporal = {"architecture": "temporal", "d_in": 4, "d_sae": 8, "n_heads": 2}
    with pytest.raises(
        CheckpointError, match="'temporal', whose codes of a token depend on the tokens before"
    ):
        load_sae(_folder(tmp_path / "sae", temporal))


def _copied(source: Path, out: Path, config: Any) -> Path:
    shutil.copytree(source, out)
    (out / "config.json").write_text(json.dumps(config))
    return out


MLP = "model.layers.{}.pre_feedforward_layernorm.output", "model.layers.{}.post_feedforward_layernorm.output"


@pytest.mark.parametrize("form", ["list", "pattern", "first"])
def test_sites_across_layers_are_those_of_the_config(tmp_path: Path, form: str) -> None:
    made = {
        "list": lambda name: [name.format(i) for i in range(3)],
        "pattern": lambda name: name.replace("{}", "{layer}"),
        "first": lambda name: name.format(0),
    }[form]
    config = {"hf_hook_point_in": made(MLP[0]), "hf_hook_point_out": made(MLP[1]), "affine_connection": True}
    place = _copied(CLT, tmp_path / "renamed", {**config, "model_name": "google/gemma-3-1b-pt"})
    found = load_cross_layer_transcoder(place)
    assert found.reads == tuple(f"blocks.{i}.mlp.input" for i in range(3))
    assert found.writes == tuple(f"blocks.{i}.mlp.out" for i in range(3))
    assert found.metadata["model_name"] == "google/gemma-3-1b-pt"
    one = load_sae(place / "params_layer_1.safetensors")
    assert one.config.reads == ("blocks.1.mlp.input",)
    assert load_cross_layer_transcoder(_copied(CLT, tmp_path / "bare", {})).reads is None  # the control


def test_a_crosscoders_layers_are_those_of_the_config(tmp_path: Path) -> None:
    hooks = [f"model.layers.{i}.output" for i in (2, 5, 9)]
    place = _copied(
        CROSSCODER, tmp_path / "own name", {"hf_hook_point_in": hooks, "hf_hook_point_out": hooks}
    )
    found = load_cross_layer_transcoder(place)
    assert found.reads == found.writes == tuple(f"blocks.{i}.resid_post" for i in (2, 5, 9))
    assert found.is_crosscoder


def test_what_a_config_says_wrongly_of_layers_is_said_at_once(tmp_path: Path) -> None:
    wrong = {
        "architecture": "relu", "affine_connection": "yes", "hf_hook_point_in": ["a"], "hf_hook_point_out": 3,
    }  # fmt: skip
    with pytest.raises(CheckpointError) as caught:
        load_cross_layer_transcoder(_copied(CLT, tmp_path / "a", wrong))
    assert len(caught.value.faults) == 4 and "each of 3 layers" in str(caught.value)
    with pytest.raises(CheckpointError, match="affine_connection is true, but a layer has no affine_skip"):
        load_cross_layer_transcoder(_copied(CROSSCODER, tmp_path / "b", {"affine_connection": True}))
