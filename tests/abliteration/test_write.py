"""The streamed edit of a folder gives the weights of the in-memory edit, and no half-written folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mergelab.abliteration.ablation import Ablation
from mergelab.abliteration.removal import KeepNorms, Removed, abliterate_params, orthogonalize
from mergelab.abliteration.write import write_abliterated
from mergelab.checkpoints import open_checkpoint, read_whole
from mergelab.errors import CheckpointError, MergelabError, NonFiniteError, OutputError, SiteError
from mergelab.interp.vectors import unit
from mergelab.models.families import model_from_config
from mergelab.models.load import load_model
from mergelab.models.model import Model
from mergelab.models.residual_stream import writers
from mergelab.models.table import get_leaf
from tests.models.tiny_models import CONFIGS, write


def some_ablation(model: Model, embeddings: float = 1.0) -> Ablation:
    """Another direction for every block, and shares above and below 1."""
    layers, width = model.config.n_layers, model.config.d_model
    rng = np.random.default_rng(7)
    directions = unit(jnp.asarray(rng.normal(size=(layers + 1, width)), jnp.float32))
    shares = jnp.asarray(rng.uniform(0.3, 1.2, (2, layers)), jnp.float32)
    return Ablation(directions, jnp.float32(embeddings), shares[0], shares[1])


def written(source: Path, out: Path, ablation: Ablation, **options: Any) -> Path:
    checkpoint = open_checkpoint(source)
    model = model_from_config(checkpoint.config, str(source)).for_tensors(checkpoint.tensors)
    return write_abliterated(model, checkpoint, out, ablation, **options)


NO_SUM = {"opt, narrow embeddings, norms on the stream", "bloom", "gemma4", "gemma4, experts"}
NO_SUM |= {"gemma4, embeddings per layer, shared keys"}
"""Models with norms or factors on the stream."""


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_stores_its_writers_as_plain_matrices(name: str) -> None:
    model = model_from_config(CONFIGS[name])
    if not model.family.architecture.causal:
        return
    if name in NO_SUM:
        with pytest.raises(SiteError, match="is no sum of what its embeddings and layers added"):
            writers(model)
        return
    for writer in writers(model):
        assert writer.leaf.layout.view == writer.leaf.layout.stored_shape
        assert writer.leaf.axes[-1] == "embed"
        assert writer.leaf.hf_shape[writer.leaf.layout.axes[-1][0]] == model.config.d_model


@pytest.mark.parametrize("keep_norms", [None, "written", "coordinate"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma2"])
def test_the_folder_holds_the_in_memory_edit(name: str, keep_norms: KeepNorms, tmp_path: Path) -> None:
    source = write(tmp_path / "model", name)
    (source / "tokenizer.json").write_text("{}")
    model, params = load_model(source)
    ablation = some_ablation(model)
    done: list[int] = []
    out = written(
        source,
        tmp_path / "out",
        ablation,
        keep_norms=keep_norms,
        files={"README.md": b"card"},
        progress=done.append,
    )
    expected = abliterate_params(model, params, ablation, keep_norms=keep_norms)
    _, found = load_model(out)
    for leaf in model.table():
        np.testing.assert_allclose(get_leaf(found, leaf), get_leaf(expected, leaf), atol=2e-6)
    changed = {w.leaf.hf_names for w in writers(model)}
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    same = {n for n in before if before[n].tobytes() == after[n].tobytes()}
    assert same == before.keys() - {n for names in changed for n in names}
    assert sum(done) == sum(x.nbytes for x in before.values())
    assert {p.name for p in out.iterdir()} == {
        "README.md",
        "mergelab.json",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("keep_norms", [None, "written", "coordinate"])
def test_blocks_are_the_whole(dtype: Any, keep_norms: KeepNorms, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(37, 24)).astype(dtype)  # [in, width]
    r = np.asarray(unit(jnp.asarray(rng.normal(size=24), jnp.float32)))
    save_file({"in": matrix, "out": np.ascontiguousarray(matrix.T)}, tmp_path / "m.safetensors")
    tensors = open_checkpoint(tmp_path / "m.safetensors").tensors
    expected = np.asarray(orthogonalize(jnp.asarray(matrix), jnp.asarray(r), 0.8, keep_norms=keep_norms))
    for name, axis in (("in", 1), ("out", 0)):
        for block in (1, 100, 1 << 20):
            removed = Removed(tensors[name], r, 0.8, axis, keep_norms, block=block)
            found = read_whole(removed)
            assert found.dtype == dtype and found.shape == tensors[name].shape
            pieces = np.empty_like(found).reshape(-1)
            for start in range(0, found.size, 77):  # of any rows, in any order: the same bytes
                removed.read_into(start, pieces[start : start + 77])
            removed.read_into(5, pieces[5:200])
            assert pieces.tobytes() == found.tobytes()
            found = (found if axis == 1 else found.T).astype(np.float32)
            tolerance = 1e-6 if dtype == np.float32 else 2e-2  # one unit in the last place of bfloat16
            np.testing.assert_allclose(found, expected.astype(np.float32), atol=tolerance)
            assert np.abs(found - matrix.astype(np.float32)).max() > 0.1


def test_a_stored_copy_of_a_tied_embedding_is_edited_with_it(tmp_path: Path) -> None:
    source = write(tmp_path / "model", "gpt2")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].copy()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    model, _ = load_model(source)
    out = written(source, tmp_path / "out", some_ablation(model))
    found = load_file(out / "model.safetensors")
    np.testing.assert_array_equal(found["lm_head.weight"], found["transformer.wte.weight"])
    assert np.abs(found["lm_head.weight"] - tensors["lm_head.weight"]).max() > 0.01


def test_an_interrupted_write_is_resumed_and_never_shows(tmp_path: Path) -> None:
    source = write(tmp_path / "model", "llama")
    model, _ = load_model(source)
    ablation = some_ablation(model)
    whole = written(source, tmp_path / "whole", ablation)
    seen: list[int] = []

    def fail(count: int) -> None:
        seen.append(count)
        if len(seen) >= 2:  # the writers are a few tensors ahead of what is told
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(source, tmp_path / "out", ablation, progress=fail)
    assert not (tmp_path / "out").exists()
    other = some_ablation(model, embeddings=0.5)
    with pytest.raises(OutputError, match="the directions or their weights differ"):
        written(source, tmp_path / "out", other, resume=True)
    again: list[int] = []
    out = written(source, tmp_path / "out", ablation, resume=True, progress=again.append)
    assert sum(again) < sum(x.nbytes for x in load_file(out / "model.safetensors").values())
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_faults_name_the_tensor(tmp_path: Path) -> None:
    source = write(tmp_path / "model", "llama")
    model, _ = load_model(source)
    ablation = some_ablation(model)
    with pytest.raises(OutputError, match="is an input of this command"):
        written(source, source, ablation)
    with pytest.raises(MergelabError, match=r"expected \[3, 24\]"):
        written(source, tmp_path / "out", Ablation.everywhere(jnp.ones(24), 3))
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"

    def replaced(change: dict[str, np.ndarray]) -> None:
        save_file({**tensors, **change}, source / "model.safetensors", metadata={"format": "pt"})

    replaced({name: tensors[name].astype(np.int8)})
    with pytest.raises(CheckpointError, match=f"{name}' is int8.*dequantize"):
        written(source, tmp_path / "out", ablation)
    replaced({name: np.where(tensors[name] > 1, np.nan, tensors[name]).astype(np.float32)})
    with pytest.raises(NonFiniteError, match=f"'{name}' holds NaN"):
        written(source, tmp_path / "out", ablation)
    del tensors[name]
    replaced({})
    with pytest.raises(CheckpointError, match=f"lacks the tensor '{name}'"):
        written(source, tmp_path / "out", ablation)
    (source / "config.json").write_text(json.dumps(CONFIGS["bert"]))
    with pytest.raises(MergelabError):
        written(source, tmp_path / "out", ablation)


MATRIX, TABLE = "model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"
RECORDED: dict[KeepNorms, dict[str, list[float]]] = {
    None: {
        MATRIX: [0.10921832, 0.14370441, -1.0585657, -0.45003352],
        TABLE: [-0.64429975, 0.040161144, 0.029277025, -0.20601636],
    },
    "written": {
        MATRIX: [0.11035527, 0.14373411, -1.05927, -0.46032688],
        TABLE: [-0.64802438, 0.040393312, 0.029446274, -0.20720732],
    },
    "coordinate": {
        MATRIX: [0.11429697, 0.15038666, -1.107789, -0.47096005],
        TABLE: [-0.66534871, 0.043822955, 0.029868659, -0.21139883],
    },
}
"""Values that the writer before the merge engine's wrote; where recorded, both gave the same bytes."""


@pytest.mark.parametrize("keep_norms", RECORDED)
def test_the_edited_values_are_those_on_record(keep_norms: KeepNorms, tmp_path: Path) -> None:
    source = write(tmp_path / "model", "gemma2")  # sandwich blocks: gains stand before the stream
    directions = np.linspace(-1, 1, 3 * 24, dtype=np.float32).reshape(3, 24)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    shares = jnp.asarray([0.75, 1.25], jnp.float32)
    ablation = Ablation(jnp.asarray(directions), jnp.float32(1), shares, shares)
    out = written(source, tmp_path / "out", ablation, keep_norms=keep_norms)
    before, found = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    for name, values in RECORDED[keep_norms].items():
        np.testing.assert_allclose(found[name][3, :4], values, rtol=0, atol=3e-7)
        assert np.abs(before[name][3, :4] - values).max() > 0.03


def test_the_output_has_what_every_output_of_the_engine_has(tmp_path: Path) -> None:
    source = write(tmp_path / "model", "llama")
    model, _ = load_model(source)
    whole = written(source, tmp_path / "whole", some_ablation(model))
    cut = written(
        source, tmp_path / "cut", some_ablation(model), shard_bytes=9000, sha256=True, threads=1, memory=10**6
    )
    tensors = open_checkpoint(cut).tensors
    assert len(list(cut.glob("*.safetensors"))) == (cut / "SHA256SUMS").read_text().count("\n") > 1
    for name, tensor in open_checkpoint(whole).tensors.items():
        assert read_whole(tensors[name]).tobytes() == read_whole(tensor).tobytes()
    receipts = [json.loads((out / "mergelab.json").read_text())["tensors"] for out in (whole, cut)]
    assert receipts[0] == receipts[1] and receipts[0].keys() == tensors.keys()
