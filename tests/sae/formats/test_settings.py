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
