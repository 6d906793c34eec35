"""Steering vectors as GGUF control vectors: what llama.cpp reads, and what comes back."""

from __future__ import annotations

from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

import mergelab as ml
from mergelab.errors import CheckpointError, OutputError, SiteError
from mergelab.interp import SteeringVector


def vector(site: str = "blocks.3.resid_post", width: int = 8, seed: int = 0) -> SteeringVector:
    values = np.random.default_rng(seed).normal(size=width).astype(np.float32)
    return SteeringVector(jnp.asarray(values), jnp.float32(5.0), site, "gemma3_text")


def test_a_vector_is_a_control_vector_at_strength_1(tmp_path: Path) -> None:
    path = ml.save_steering(vector(), tmp_path / "v.gguf")
    reader = gguf.GGUFReader(path)
    values = {key: field.contents() for key, field in reader.fields.items()}
    assert values["general.architecture"] == "controlvector"
    assert values["controlvector.model_hint"] == "gemma3" and values["controlvector.layer_count"] == 1
    (tensor,) = reader.tensors
    assert tensor.name == "direction.3" and tensor.tensor_type == gguf.GGMLQuantizationType.F32
    added = vector().edit(1.0)(jnp.zeros((1, 1, 8)))[0, 0]
    np.testing.assert_allclose(np.asarray(tensor.data), added, rtol=1e-6)
    assert np.linalg.norm(tensor.data) == pytest.approx(5.0, rel=1e-6)


def test_vectors_of_several_sites_come_back(tmp_path: Path) -> None:
    given = {f"blocks.{n}.resid_post": vector("", seed=n) for n in (4, 1, 2)}
    found = ml.load_steering(ml.save_steering(given, tmp_path / "v.gguf", model_type="qwen2"))
    assert list(found) == [f"blocks.{n}.resid_post" for n in (1, 2, 4)]
    zeros = jnp.zeros((1, 1, 8))
    for site, one in found.items():
        assert one.site == site and one.model_type == "qwen2"
        for strength in (1.0, -0.5):
            np.testing.assert_allclose(
                one.edit(strength)(zeros), given[site].edit(strength)(zeros), rtol=1e-5, atol=1e-6
            )


def test_what_a_block_reads_is_what_the_one_before_it_wrote(tmp_path: Path) -> None:
    path = ml.save_steering(vector("blocks.3.resid_pre"), tmp_path / "v.gguf")
    assert list(ml.load_steering(path)) == ["blocks.2.resid_post"]


@pytest.mark.parametrize(
    ("site", "words"),
    [
        ("", "does not say its site"),
        ("blocks.3.mlp.out", "is for the site 'blocks.3.mlp.out'"),
        ("blocks.0.resid_post", "no control vector can steer"),
        ("blocks.1.resid_pre", "no control vector can steer"),
    ],
)
def test_sites_that_no_control_vector_has_are_refused(site: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(SiteError, match=words):
        ml.save_steering(vector(site), tmp_path / "v.gguf")
    assert not list(tmp_path.iterdir())


def test_files_are_kept_and_other_files_refused(tmp_path: Path) -> None:
    path = ml.save_steering(vector(), tmp_path / "v.gguf")
    with pytest.raises(OutputError, match="is there already"):
        ml.save_steering(vector(seed=1), path)
    ml.save_steering(vector(seed=1), path, overwrite=True)
    (found,) = ml.load_steering(path).values()
    assert not np.allclose(found.vector, np.asarray(vector().edit(1.0)(jnp.zeros((1, 1, 8))))[0, 0])
    with pytest.raises(CheckpointError, match="is a control vector, not a model"):
        ml.load_model(path)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("direction.1", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="'llama', not a control vector"):
        ml.load_steering(tmp_path / "m.gguf")


def test_widths_of_a_file_agree(tmp_path: Path) -> None:
    given = {"blocks.1.resid_post": vector(""), "blocks.2.resid_post": vector("", width=9)}
    with pytest.raises(SiteError, match="9 wide, the others are not"):
        ml.save_steering(given, tmp_path / "v.gguf")
