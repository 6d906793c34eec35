"""Files are recognized by what is in them, under any name, in any container; several SAEs in one folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mergelab.checkpoints import open_pickled, read_whole
from mergelab.checkpoints.torch_pickle import write_pickled
from mergelab.errors import CheckpointError
from mergelab.sae.formats import FORMATS, load_sae, save_sae
from mergelab.sae.formats.detect import recognized
from mergelab.sae.formats.file_format import FileFormat, Files, open_weights
from mergelab.sae.sae import SAE, SAEConfig

RECORDED = Path(__file__).parent / "recorded"
D, N = 4, 6


def _sae(activation: str = "topk", **config: Any) -> SAE:
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((D, N), (N,), (N, D), (D,))]
    k = 2 if activation == "topk" else None
    threshold = jnp.ones(N) if activation == "jump_relu" else None
    return SAE(*arrays, SAEConfig(activation, k, **config), threshold=threshold).checked()


SAES = {
    "mergelab": _sae(),
    "saelens": _sae(),
    "sparsify": _sae(subtract_b_dec=True),
    "dictionary_learning": _sae("relu"),
    "openai": _sae("relu"),
    "gemma-scope": _sae("jump_relu"),
}


def _tree(path: Path) -> dict[str, Any]:
    """What a weights file holds, ready to be written as a torch file."""
    opened = open_weights(path)
    arrays = {name: np.array(read_whole(tensor)) for name, tensor in opened.tensors.items()}
    plain = {name: value for name, value in opened.values.items() if isinstance(value, str | dict)}
    return {name: a.astype(np.int64) if a.dtype.kind == "i" else a for name, a in arrays.items()} | plain


@pytest.mark.parametrize("name", SAES)
def test_a_file_is_recognized_under_any_name_and_in_any_container(tmp_path: Path, name: str) -> None:
    sae, path = SAES[name], tmp_path / ("sae.pt" if name == "openai" else "sae")
    save_sae(sae, path, name)
    weights = path if name == "openai" else path / FORMATS[name].weights
    tree, folder = _tree(weights), weights.parent
    plain = {key: value for key, value in tree.items() if isinstance(value, np.ndarray)}
    weights.unlink()
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, D)), jnp.float32)
    for other in ("model.bin", "weights.ckpt", "x.safetensors", "x.npz", "odd.safetensors"):
        if other == "x.safetensors":
            save_file(plain, folder / other)
        elif other == "x.npz":
            np.savez(folder / other, **plain)
        else:
            write_pickled(folder / other, tree)
        if name == "mergelab" and not other.endswith(("x.safetensors", "x.npz")):
            (folder / other).unlink()  # our own weights are read in parts, so they are safetensors
            continue
        if name == "mergelab":
            shutil.move(folder / other, folder / "renamed.safetensors")
            save_file(plain, folder / "renamed.safetensors")
            other = "renamed.safetensors"
        for place in (folder, folder / other):
            found = recognized(Files(place))
            assert found is not None and found[0].name == name, (place, found)
            np.testing.assert_allclose(load_sae(place)(x), sae(x), atol=1e-5)
        (folder / other).unlink()


def test_a_torch_file_with_the_name_of_another_container_is_read(tmp_path: Path) -> None:
    shutil.copytree(RECORDED / "dictionary_learning_AutoEncoderTopK", tmp_path / "a")
    (tmp_path / "a" / "ae.pt").rename(tmp_path / "a" / "ae.safetensors")
    assert load_sae(tmp_path / "a").config.k == 4


@pytest.mark.parametrize("name", ["AutoEncoder", "GatedAutoEncoder", "MatryoshkaBatchTopKSAE"])
def test_classes_that_tensors_tell_need_no_settings(tmp_path: Path, name: str) -> None:
    recorded = RECORDED / f"dictionary_learning_{name}"
    shutil.copy(recorded / "ae.pt", tmp_path / "ae.pt")
    expected = load_file(recorded / "expected.safetensors")
    np.testing.assert_allclose(
        load_sae(tmp_path).encode(jnp.asarray(expected["x"])), expected["codes"], atol=2e-5
    )


@pytest.mark.parametrize("name", ["AutoEncoderTopK", "BatchTopKSAE"])
def test_classes_of_the_same_tensors_do(tmp_path: Path, name: str) -> None:
    shutil.copy(RECORDED / f"dictionary_learning_{name}" / "ae.pt", tmp_path / "ae.pt")
    with pytest.raises(CheckpointError, match=r"config.json"):
        load_sae(tmp_path, format="dictionary_learning")


def test_settings_of_another_format_are_not_passed_over(tmp_path: Path) -> None:
    """Tensors of Gemma Scope's names in a file of SAELens whose settings are lost are not Gemma Scope's."""
    save_sae(_sae("jump_relu", subtract_b_dec=True), tmp_path / "a", "saelens")
    (tmp_path / "a" / "cfg.json").write_text('{"d_in": 4')
    with pytest.raises(CheckpointError, match=r"cfg.json"):
        load_sae(tmp_path / "a")
    (tmp_path / "a" / "cfg.json").unlink()
    with pytest.raises(CheckpointError, match=r"not an SAE of a known format"):
        load_sae(tmp_path / "a")


def test_what_a_file_holds_is_said_where_it_is_of_no_format(tmp_path: Path) -> None:
    save_file({"weight": np.ones((2, 2), np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    for place in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(CheckpointError, match=r"not an SAE of a known format.*weight"):
            load_sae(place)
    (tmp_path / "text.txt").write_text("hello, hello, hello")
    with pytest.raises(CheckpointError, match=r"text.txt"):
        load_sae(tmp_path / "text.txt")


def _root(path: Path) -> Path:
    """What sparsify leaves: a folder for each hookpoint, and one with a seed."""
    for layer in (5, 9, 10):
        save_sae(_sae(transcoder=False), path / f"layers.{layer}", "sparsify")
    save_sae(_sae(transcoder=True), path / "layers.5.mlp" / "seed1", "sparsify")
    (path / "config.json").write_text("{}")
    return path


def test_one_of_several_is_named(tmp_path: Path) -> None:
    root = _root(tmp_path / "run")
    for sae_id in ("layers.5", "blocks.5.resid_post"):
        assert load_sae(root, sae_id).config.reads == ("blocks.5.resid_post",)
    found = load_sae(root, "layers.5.mlp")
    assert found.config.writes == ("blocks.5.mlp.out",) and not found.is_autoencoder
    assert (
        load_sae(root, "layers.5.mlp/seed1").config
        == found.config
        == load_sae(root, "blocks.5.mlp.out").config
    )
    with pytest.raises(
        CheckpointError, match=r"4 SAEs; it has layers.5, layers.5.mlp/seed1, layers.9, layers.10;"
    ):
        load_sae(root)
    with pytest.raises(CheckpointError, match=r"no SAE 'layers.6'.*did you mean 'layers.\d'"):
        load_sae(root, "layers.6")
    for wrong in ("../run/layers.5", "/etc", "", "layers.5/cfg.json", "a\0b", "x" * 5000):
        with pytest.raises(CheckpointError, match=r"run") as caught:
            load_sae(root, wrong)
        assert len(str(caught.value)) < 2_000


def test_the_only_one_needs_no_name(tmp_path: Path) -> None:
    save_sae(_sae("relu"), tmp_path / "run" / "trainer_0", "dictionary_learning")
    assert load_sae(tmp_path / "run").config.activation == "relu"
    (tmp_path / "run" / "trainer_1").mkdir()
    (tmp_path / "run" / "trainer_1" / "cfg.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"holds 2 SAEs"):  # the one that cannot be read counts too
        load_sae(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"cfg.json"):
        load_sae(tmp_path / "run", "trainer_1")


@pytest.mark.parametrize(
    "name",
    ["AutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"],
)
def test_a_folder_of_trainers_as_dictionary_learning_leaves_it(tmp_path: Path, name: str) -> None:
    """A checkpoint, `trainer_0/checkpoints/ae_100.pt`, has the settings of its trainer."""
    for trainer in ("trainer_0", "trainer_1"):
        shutil.copytree(RECORDED / f"dictionary_learning_{name}", tmp_path / trainer)
        (tmp_path / trainer / "checkpoints").mkdir()
        for step in (0, 100):
            shutil.copy(tmp_path / trainer / "ae.pt", tmp_path / trainer / "checkpoints" / f"ae_{step}.pt")
    expected = load_sae(RECORDED / f"dictionary_learning_{name}")
    for sae_id in ("trainer_1", "trainer_1/checkpoints/ae_100.pt"):
        found = load_sae(tmp_path, sae_id)
        assert found.config == expected.config
        np.testing.assert_array_equal(found.W_dec, expected.W_dec)
    with pytest.raises(CheckpointError, match=r"holds 2 SAEs; it has trainer_0, trainer_1; name one"):
        load_sae(tmp_path)
    with pytest.raises(CheckpointError, match=r"2 SAEs .*\(ae_0.pt, ae_100.pt\); name one of the files"):
        load_sae(tmp_path / "trainer_0" / "checkpoints")


def test_several_files_in_a_folder_are_named_too(tmp_path: Path) -> None:
    for layer in (3, 4):
        save_sae(SAES["openai"], tmp_path / f"{layer}.pt", "openai")
    with pytest.raises(CheckpointError, match=r"2 SAEs of the format 'openai' \(3.pt, 4.pt\)"):
        load_sae(tmp_path)
    assert load_sae(tmp_path, "4.pt").config.activation == "relu"


def test_no_weight_is_read_to_recognize_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_sae(_sae(), tmp_path / "a", "saelens")
    from mergelab.checkpoints.file_tensor import FileTensor

    def fail(*_: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(FileTensor, "read_into", fail)
    assert recognized(Files(tmp_path / "a")) is not None
    assert open_pickled(RECORDED / "openai" / "autoencoder.pt", values=True).tensors


def test_every_format_says_what_it_is_recognized_by() -> None:
    for name, kind in FORMATS.items():
        finds_itself = type(kind).find is not FileFormat.find  # one layer of several files has no signature
        assert kind.name == name and kind.looks_for and (kind.signatures or finds_itself)
        assert all(one.tensors or one.settings or one.says for one in kind.signatures)
    assert json.dumps(sorted(FORMATS))
