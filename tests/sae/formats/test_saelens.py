"""Files of SAELens, version 3 to 6: codes, reconstructions and hooks are those that SAELens recorded."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mergelab.errors import CheckpointError
from mergelab.sae.formats import load_sae, save_sae, site_of
from mergelab.sae.sae import SAE
from tests.sae.formats.saelens_cases import Case, D, N, cases, inputs, tensors_of, whitening

HERE = Path(__file__).parent
CASES = cases()
ANSWERS = load_file(HERE / "saelens.safetensors")
HOOKS = json.loads((HERE / "saelens_hooks.json").read_text())


def _write(folder: Path, case: Case, **changes: Any) -> Path:
    folder.mkdir()
    save_file(tensors_of(case), folder / "sae_weights.safetensors")
    cfg = {key: value for key, value in {**case.cfg, **changes}.items() if value is not ...}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    if case.factor is not None:
        scaler = {"scaling_factor": case.factor, "has_whitening": False}
        (folder / "activation_scaler.json").write_text(json.dumps(scaler))
    if case.whitens:
        save_file(whitening(), folder / "activation_whitening.safetensors")
    return folder


def _loaded(folder: Path, case: Case) -> SAE:
    """The SAE; a factor that stands nowhere is missed in a warning."""
    scaled = case.cfg.get("normalize_activations") in (True, "expected_average_only_in")
    missing = scaled and case.factor is None
    with pytest.warns(UserWarning, match="norm_scaling_factor") if missing else contextlib.nullcontext():
        return load_sae(folder)


def test_every_case_has_an_answer() -> None:
    assert set(HOOKS) == set(CASES) and {name.split("/")[0] for name in ANSWERS} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_files_mean_what_saelens_makes_of_them(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    sae = _loaded(_write(tmp_path / "sae", case), case)
    x = jnp.asarray(inputs())
    codes = sae.encode(x)
    np.testing.assert_allclose(codes, ANSWERS[f"{name}/codes"], atol=2e-5, rtol=2e-5)
    # SAELens divides by a standard deviation + 1e-5, and multiplies by one without.
    np.testing.assert_allclose(sae(x), ANSWERS[f"{name}/out"], atol=1e-4, rtol=3e-5)
    assert 0 < np.asarray(codes != 0).mean() < 1
    assert sae.config.metadata["hook_name"] == HOOKS[name]
    assert sae.config.reads == (None if site_of(HOOKS[name]) is None else (site_of(HOOKS[name]),))
    assert sae.is_autoencoder == ("transcoder" not in case.tensors)


def test_answers_tell_the_cases_apart() -> None:
    """What a reader would get that overlooks an option is not what was recorded."""
    for one, other in (
        ("v3_topk", "v3_standard"),
        ("v3_topk_layer_norm", "v3_topk"),
        ("v5_constant_norm", "v3_standard"),
        ("v5_finetuned", "v3_standard"),
        ("v6_topk_rescaled", "v6_topk_none"),
        ("v6_transcoder_layer_norm", "v6_transcoder_none"),
        ("v6_skip_transcoder_none", "v6_transcoder_none"),
        ("v6_batchtopk_checkpoint_True", "v6_batchtopk_checkpoint_False"),
        ("v6_gated_whitened_True", "v6_gated_whitened_False"),
        *(
            (f"v6_{kind}_keeps_b_dec", f"v6_{kind}_none")
            for kind in ("standard", "gated", "topk", "jumprelu")
        ),
        *((f"v6_{kind}_scaled", f"v6_{kind}_none") for kind in ("standard", "gated", "topk", "jumprelu")),
    ):
        assert np.abs(ANSWERS[f"{one}/out"] - ANSWERS[f"{other}/out"]).max() > 0.01, (one, other)


_WRITTEN = ("_none", "_constant_norm_rescale", "_rescaled", "_finetuned", "_layer_norm", "_checkpoint_True")


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith(_WRITTEN)])
def test_what_was_read_is_written_to_the_same_function(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    sae = _loaded(_write(tmp_path / "sae", case), case)
    save_sae(sae, tmp_path / "again", "saelens")
    back = load_sae(tmp_path / "again")
    x = jnp.asarray(inputs())
    np.testing.assert_allclose(back(x), sae(x), atol=1e-4)
    cfg = json.loads((tmp_path / "again" / "cfg.json").read_text())
    assert cfg["metadata"]["sae_lens_version"] >= "6" and cfg["metadata"]["hook_name"] == HOOKS[name]


def test_the_metadata_of_any_version_is_kept(tmp_path: Path) -> None:
    old = CASES["v3_topk"]
    found = load_sae(_write(tmp_path / "old", old, neuronpedia_id="x/1", seqpos_slice=[0, 5])).config.metadata
    assert (found["model_name"], found["context_size"], found["prepend_bos"]) == ("gpt2", 128, True)
    assert found["neuronpedia_id"] == "x/1" and found["seqpos_slice"] == [0, 5]
    # Before version 6 a file that says nothing of BOS was read with it.
    assert load_sae(_write(tmp_path / "silent", old, prepend_bos=...)).config.metadata["prepend_bos"] is True
    new = CASES["v6_topk_none"]
    kept = {**new.cfg["metadata"], "prepend_bos": False, "context_size": 256}
    found = load_sae(_write(tmp_path / "new", new, metadata=kept)).config.metadata
    assert (found["prepend_bos"], found["context_size"]) == (False, 256)


def test_a_dictionary_of_one_head_is_of_no_whole_site(tmp_path: Path) -> None:
    case = CASES["v3_standard"]
    head = _write(tmp_path / "a", case, hook_name="blocks.2.attn.hook_z", hook_head_index=3)
    assert load_sae(head).config.reads is None


def test_a_factor_in_the_settings_is_folded(tmp_path: Path) -> None:
    case = CASES["v6_standard_expected_average_only_in"]
    sae = load_sae(_write(tmp_path / "sae", case, norm_scaling_factor=0.37))
    np.testing.assert_allclose(sae(jnp.asarray(inputs())), ANSWERS["v6_standard_scaled/out"], atol=1e-4)


def test_thresholds_of_early_trainings_are_logarithms(tmp_path: Path) -> None:
    case = CASES["v6_jumprelu_none"]
    path = _write(tmp_path / "sae", case)
    arrays = tensors_of(case)
    arrays["log_threshold"] = np.log(arrays.pop("threshold"))
    save_file(arrays, path / "sae_weights.safetensors")
    np.testing.assert_allclose(
        load_sae(path).encode(jnp.asarray(inputs())), ANSWERS["v6_jumprelu_none/codes"], atol=2e-5
    )


def test_a_decoder_row_of_zeros_is_no_division_by_zero(tmp_path: Path) -> None:
    case = CASES["v6_topk_rescaled"]
    path = _write(tmp_path / "sae", case)
    arrays = tensors_of(case)
    arrays["W_dec"][2] = 0
    save_file(arrays, path / "sae_weights.safetensors")
    assert np.isfinite(np.asarray(load_sae(path)(jnp.asarray(inputs())))).all()


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("v3_standard", {"architecture": "temporal"}, "architecture is 'temporal', whose codes of a token"),
        ("v3_standard", {"activation_fn_str": "tanh-relu"}, "activation_fn_str is 'tanh-relu', but one of"),
        ("v3_topk", {"activation_fn_kwargs": {}}, "k is missing, but a whole number"),
        ("v3_topk", {"activation_fn_kwargs": {"k": 2.5}}, "activation_fn_kwargs.k is 2.5, but a whole"),
        ("v3_topk", {"activation_fn_kwargs": {"k": 3, "signed": True}}, "signed is true"),
        ("v3_topk", {"activation_fn_kwargs": [3]}, r"activation_fn_kwargs is \[3\]"),
        ("v5_gated", {"activation_fn_str": "topk"}, "'topk', but the architecture is 'gated'"),
        ("v6_topk_none", {"k": 13}, "k is 13, but the SAE has only 12 latents"),
        ("v6_topk_none", {"k": ...}, "k is missing"),
        ("v6_standard_none", {"normalize_activations": "l2"}, "normalize_activations is 'l2', but one of"),
        ("v6_standard_none", {"reshape_activations": "hook_z"}, "'hook_z', but hook_name is"),
        ("v6_transcoder_none", {"apply_b_dec_to_input": True}, "apply_b_dec_to_input is true"),
        ("v6_transcoder_none", {"d_out": 7}, "d_out is 7, but the tensors have 5"),
        ("v6_standard_none", {"d_sae": 13}, "d_sae is 13, but the tensors have 12"),
        ("v6_standard_none", {"architecture": "gated"}, "has no tensors 'b_gate', 'r_mag', 'b_mag'"),
        ("v6_standard_none", {"architecture": "jumprelu"}, "has no tensor 'threshold'"),
        ("v6_standard_none", {"architecture": "skip_transcoder", "apply_b_dec_to_input": False}, "'W_skip'"),
        ("v6_standard_none", {"architecture": "batchtopk"}, "has no topk_threshold"),
        ("v6_standard_none", {"normalize_activations": "covariance_whitening"}, "activation_whitening"),
        ("v6_standard_scaled", {"norm_scaling_factor": -1}, "norm_scaling_factor is -1, but a number"),
        ("v5_finetuned", {"finetuning_scaling_factor": False}, "scaling_factor has values other than 1"),
        ("v5_finetuned", {"finetuning_scaling_factor": "no"}, "finetuning_scaling_factor is 'no'"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_rightly_is_refused_by_name(
    tmp_path: Path, name: str, changes: dict[str, Any], words: str
) -> None:
    path = _write(tmp_path / "sae", CASES[name], **changes)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_sae(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 600


def test_matrices_beside_a_file_fit_it(tmp_path: Path) -> None:
    path = _write(tmp_path / "sae", CASES["v6_standard_whitened_True"])
    arrays = whitening()
    for name, wrong in (("mean", np.zeros(D + 1)), ("matrix", np.zeros((D, N)))):
        held = {**arrays, name: wrong.astype(np.float32)}
        save_file(held, path / "activation_whitening.safetensors")
        with pytest.raises(CheckpointError, match=rf"activation_whitening.*{name} has shape"):
            load_sae(path)
