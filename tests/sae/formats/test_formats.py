"""Files of other libraries: theirs are read to the same codes and outputs, ours come back unchanged."""

from __future__ import annotations

import json
import os
import subprocess
import time
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mergelab.checkpoints.output_target import OutputLock
from mergelab.errors import CheckpointError, OutputError, SAEError
from mergelab.sae.formats import FORMATS, load_sae, reserve, save_sae
from mergelab.sae.sae import SAE, SAEConfig
from mergelab.sharding import make_mesh

RECORDED = Path(__file__).parent / "recorded"
D, N = 8, 24


def _sae(activation: str = "topk", **config: Any) -> SAE:
    rng = np.random.default_rng(3)

    def array(*shape: int) -> Any:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    extras: dict[str, Any] = {}
    if activation in ("jump_relu", "batch_topk"):
        extras["threshold"] = jnp.abs(array(N))
    if activation == "gated":
        extras = {"magnitude_scale": 0.1 * array(N), "magnitude_bias": array(N)}
    if config.pop("skip", False):
        extras["W_skip"] = array(D, D)
    k = 4 if activation in ("topk", "batch_topk") else None
    settings = SAEConfig(activation, k, **config)
    return SAE(array(D, N), array(N), array(N, D), array(D), settings, **extras).checked()


@pytest.mark.parametrize("folder", sorted(p.name for p in RECORDED.iterdir()))
def test_what_other_libraries_wrote_means_the_same_here(folder: str) -> None:
    expected = load_file(RECORDED / folder / "expected.safetensors")
    path = RECORDED / folder
    sae = load_sae(path / "autoencoder.pt" if folder == "openai" else path)
    x = jnp.asarray(expected["x"])
    codes = np.asarray(sae.encode(x))
    if folder == "dictionary_learning_AutoEncoderTopK":
        assert sae.config.k == 4
    np.testing.assert_allclose(codes, expected["codes"], atol=2e-5)
    # SAELens divides by a standard deviation + 1e-5, and multiplies by one without.
    out = sae.reconstruct(x, jnp.asarray(codes))
    np.testing.assert_allclose(out, expected["out"], atol=5e-5, rtol=2e-5)
    assert (codes > 0).any() and (codes == 0).any()


READ_ONLY = {"gemma-scope-2", "llama-scope", "torch-release", "circuit-tracer", "cross-layer"}
"""Formats without a writer; tests/sae/formats/test_releases.py has their examples."""

WRITTEN: list[tuple[str, SAE]] = [
    ("mergelab", _sae("topk", sites=2, metadata={"site": "blocks.1.resid_post"})),
    ("mergelab", _sae("gated")),
    ("mergelab", _sae("batch_topk", normalization="layer_norm")),
    ("mergelab", _sae("topk", skip=True)),
    ("saelens", _sae("topk", subtract_b_dec=True)),
    ("saelens", _sae("gated")),
    ("saelens", _sae("jump_relu", subtract_b_dec=True)),
    ("saelens", _sae("relu", normalization="layer_norm")),
    ("saelens", _sae("batch_topk")),
    ("saelens", _sae("relu", skip=True)),
    ("saelens", _sae("relu", reads=("blocks.1.resid_mid",), writes=("blocks.1.mlp.out",))),
    ("saelens", _sae("jump_relu", skip=True)),
    ("sparsify", _sae("topk", transcoder=True)),
    ("sparsify", _sae("topk")),
    ("sparsify", _sae("topk", skip=True)),
    ("dictionary_learning", _sae("topk")),
    ("dictionary_learning", _sae("jump_relu")),
    ("openai", _sae("topk", normalization="layer_norm")),
    ("openai", _sae("relu")),
    ("gemma-scope", _sae("jump_relu")),
]


@pytest.mark.parametrize(("name", "sae"), WRITTEN)
def test_what_is_written_is_read_to_the_same_function(tmp_path: Path, name: str, sae: SAE) -> None:
    path = tmp_path / ("sae.pt" if name == "openai" else "sae")
    save_sae(sae, path, name)
    found = load_sae(path)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((6, D)), jnp.float32)
    np.testing.assert_allclose(found.encode(x), sae.encode(x), atol=2e-5)
    np.testing.assert_allclose(found(x), sae(x), atol=5e-5)
    assert (np.asarray(found.encode(x)) > 0).any()
    if name == "mergelab":
        assert found.config == sae.config
    with pytest.raises(OutputError):
        save_sae(sae, path, name)


def _lay_out(path: Path) -> dict[str, Any]:
    tensors = {name: list(value.shape) for name, value in load_file(path).items()}
    return dict(sorted(tensors.items()))


@pytest.mark.parametrize(
    ("name", "recorded", "sae", "weights"),
    [
        ("saelens", "saelens_topk", _sae("topk", subtract_b_dec=True), "sae_weights.safetensors"),
        ("saelens", "saelens_gated", _sae("gated"), "sae_weights.safetensors"),
        ("saelens", "saelens_jumprelu", _sae("jump_relu"), "sae_weights.safetensors"),
        ("sparsify", "sparsify_sae", _sae("topk"), "sae.safetensors"),
        ("sparsify", "sparsify_skip", _sae("topk", skip=True), "sae.safetensors"),
    ],
)
def test_what_is_written_has_the_libraries_own_layout(
    tmp_path: Path, name: str, recorded: str, sae: SAE, weights: str
) -> None:
    save_sae(sae, tmp_path / "sae", name)
    assert _lay_out(tmp_path / "sae" / weights) == _lay_out(RECORDED / recorded / weights)
    mine = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    theirs = json.loads((RECORDED / recorded / "cfg.json").read_text())
    assert set(theirs) - {"device", "metadata"} <= set(mine)
    for key in ("architecture", "activation", "k", "d_in", "d_sae", "transcode", "skip_connection"):
        assert mine.get(key) == theirs.get(key)


@pytest.mark.parametrize(
    ("name", "sae", "words"),
    [
        ("sparsify", _sae("jump_relu"), "'jump_relu'.*export to 'mergelab'"),
        ("sparsify", _sae("topk", normalization="layer_norm"), "'layer_norm'"),
        ("openai", _sae("topk"), "'topk' with 'none'"),
        ("gemma-scope", _sae("relu"), "'relu'"),
        ("dictionary_learning", _sae("gated"), "'gated'"),
        ("saelens", _sae("topk", skip=True), "transcoder"),
        ("gemma-scope-2", _sae("jump_relu"), "read, not written"),
        ("saelenz", _sae(), "did you mean 'saelens'"),
    ],
)
def test_what_a_format_cannot_say_is_refused(tmp_path: Path, name: str, sae: SAE, words: str) -> None:
    with pytest.raises(SAEError, match=words):
        save_sae(sae, tmp_path / "sae", name)
    assert not list(tmp_path.iterdir())


def test_gemma_scope_2_is_read(tmp_path: Path) -> None:
    sae = _sae("jump_relu", skip=True)
    names = {"W_enc": "w_enc", "W_dec": "w_dec", "W_skip": "affine_skip_connection"}
    arrays = {names.get(name, name): value for name, value in sae.as_numpy().items()}
    save_file(arrays, tmp_path / "params.safetensors")
    x = jnp.ones((3, D))
    np.testing.assert_allclose(load_sae(tmp_path)(x), sae(x), atol=1e-5)


@pytest.mark.parametrize("format", ["mergelab", "saelens"])
@pytest.mark.parametrize(("devices", "held"), [(8, 3), (5, 24)])
def test_saes_are_read_onto_meshes(tmp_path: Path, format: str, devices: int, held: int) -> None:
    sae = _sae()
    save_sae(sae, tmp_path / "sae", format)
    mesh = make_mesh({"latents": devices}, jax.devices()[:devices])
    found = load_sae(tmp_path / "sae", mesh=mesh)
    # Latents that the devices cannot share equally stay whole on each.
    assert found.W_enc.addressable_shards[0].data.shape == (D, held)
    assert found.W_dec.addressable_shards[0].data.shape == (held, D)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, D)), jnp.float32)
    np.testing.assert_allclose(found(x), sae(x), atol=1e-5)


def _truncated(path: Path) -> None:
    file = path / "sae.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def _other_sizes(path: Path) -> None:
    cfg = json.loads((path / "cfg.json").read_text())
    (path / "cfg.json").write_text(json.dumps({**cfg, "n_latents": 7}))


def _unknown_key(path: Path) -> None:
    cfg = json.loads((path / "cfg.json").read_text())
    (path / "cfg.json").write_text(json.dumps({**cfg, "sparseness": 7}))


def _renamed(path: Path) -> None:
    arrays = load_file(path / "sae.safetensors")
    save_file({"W": arrays.pop("W_enc"), **arrays}, path / "sae.safetensors")


def _flat(path: Path) -> None:
    arrays = load_file(path / "sae.safetensors")
    save_file({**arrays, "W_dec": arrays["b_enc"]}, path / "sae.safetensors")


def _whole_numbers(path: Path) -> None:
    arrays = load_file(path / "sae.safetensors")
    save_file({**arrays, "b_enc": arrays["b_enc"].astype(np.int32)}, path / "sae.safetensors")


@pytest.mark.parametrize("spoil", [_truncated, _other_sizes, _unknown_key, _renamed, _flat, _whole_numbers])
def test_spoilt_files_are_refused(tmp_path: Path, spoil: Any) -> None:
    save_sae(_sae(), tmp_path / "sae")
    spoil(tmp_path / "sae")
    with pytest.raises(CheckpointError, match="sae"):
        load_sae(tmp_path / "sae")


def test_files_that_could_run_something_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "params.npz", W_enc=np.array([{}], object))
    with pytest.raises(CheckpointError, match=r"params.npz.*holds Python objects, which are never unpickled"):
        load_sae(tmp_path)
    with zipfile.ZipFile(tmp_path / "bad.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"cos\nsystem\n(S'true'\ntR.")
        archive.writestr("archive/data/0", rng.bytes(4))
    with pytest.raises(CheckpointError):
        load_sae(tmp_path / "bad.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="not an SAE of a known format"):
        load_sae(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="no such file"):
        load_sae(tmp_path / "none")


_LOAD = """
import json, sys
import numpy as np, torch
from pathlib import Path
root = Path(sys.argv[1])
x = torch.tensor(np.load(root / "x.npy"))
for folder in sorted(root.iterdir()):
    if folder.name.startswith("saelens"):
        from sae_lens import SAE
        model = SAE.load_from_disk(folder)
        codes = model.encode(x); out = model(x)
    elif folder.name.startswith("sparsify"):
        from sparsify import SparseCoder
        model = SparseCoder.load_from_disk(folder)
        out = model(x).sae_out
    elif folder.name.startswith("SAE"):
        from dictionary_learning.utils import load_sae
        model, _ = load_sae(str(folder), "cpu")
        out = model.decode(model.encode(x))
    elif folder.suffix == ".pt":
        state = torch.load(folder, weights_only=True)
        mean = x.mean(-1, keepdim=True); scale = (x - mean).std(-1, keepdim=True) + 1e-5
        top = state["activation"] == "TopK"
        z = (x - mean) / scale if top else x
        pre = (z - state["pre_bias"]) @ state["encoder.weight"].T + state["latent_bias"]
        codes = pre.relu()
        if top:
            values, indices = pre.topk(state["activation_state_dict"]["k"])
            codes = torch.zeros_like(pre).scatter(1, indices, values.relu())
        out = codes @ state["decoder.weight"].T + state["pre_bias"]
        out = out * scale + mean if top else out
    else:
        continue
    np.save(root / f"out_{folder.name}.npy", out.detach().numpy())
"""


@pytest.mark.peers
def test_the_libraries_themselves_read_what_is_written(tmp_path: Path) -> None:
    python = os.environ.get("MERGELAB_SAE_PEERS")
    assert python, "set MERGELAB_SAE_PEERS to a Python with sae-lens, eai-sparsify and dictionary-learning"
    x = np.random.default_rng(0).standard_normal((6, D)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    wanted = {}
    for i, (name, sae) in enumerate(WRITTEN):
        if name in ("mergelab", "gemma-scope"):
            continue
        path = tmp_path / f"{name}{i}{'.pt' if name == 'openai' else ''}"
        save_sae(sae, path, name)
        wanted[path.name] = np.asarray(sae(jnp.asarray(x)))
    subprocess.run([python, "-c", _LOAD, str(tmp_path)], check=True)
    assert len(wanted) > 10
    for name, out in wanted.items():
        np.testing.assert_allclose(
            np.load(tmp_path / f"out_{name}.npy"), out, atol=1e-4, rtol=2e-5, err_msg=name
        )


@pytest.mark.parametrize("name", ["mergelab", "saelens", "dictionary_learning", "gemma-scope", "openai"])
def test_every_format_is_made_beside_under_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    sae = dict(WRITTEN)[name]
    path = tmp_path / ("sae.pt" if name == "openai" else "sae")
    with OutputLock(path), pytest.raises(OutputError, match="another run is writing this output"):
        save_sae(sae, path, name)
    assert not list(tmp_path.iterdir())
    replace = os.replace

    def checked(source: Path, target: Path) -> None:
        assert not path.exists() or not any(path.iterdir())
        replace(source, target)
        raise Killed

    class Killed(BaseException):
        pass

    monkeypatch.setattr(os, "replace", checked)
    monkeypatch.setattr(OutputLock, "release", lambda lock, **_: os.close(lock._file))  # as a kill does
    with pytest.raises(Killed):
        save_sae(sae, path, name)
    monkeypatch.undo()
    before = path.read_bytes() if path.is_file() else {p.name: p.read_bytes() for p in path.iterdir()}
    save_sae(sae, path, name)  # the same command again
    assert (
        path.read_bytes() if path.is_file() else {p.name: p.read_bytes() for p in path.iterdir()}
    ) == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["mergelab", "saelens", "dictionary_learning", "gemma-scope", "openai"])
def test_places_are_refused_before_anything_is_read(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for out, words in {tmp_path / "link": "nowhere, which does not exist", run: "run is a"}.items():
        if out == run and name != "openai":
            words = "is an input"
        with pytest.raises(OutputError, match=words), reserve(out, name, inputs=[run]):
            pass
    if name != "openai":
        with (
            pytest.raises(OutputError, match="lies inside the input"),
            reserve(run / "x", name, inputs=[run]),
        ):
            pass
    assert not list(run.iterdir()) and len(list(tmp_path.iterdir())) == 2


def test_every_format_is_tested() -> None:
    assert {name for name, _ in WRITTEN} | READ_ONLY == set(FORMATS)


@pytest.mark.parametrize("name", ["dictionary_learning", "openai", "gemma-scope"])
def test_the_bytes_do_not_depend_on_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    found = []
    for year in (2000, 2020):
        moment = time.struct_time((year, 2, 3, 4, 5, 6, 0, 1, 0))
        monkeypatch.setattr(time, "localtime", lambda _=None, moment=moment: moment)
        path = tmp_path / f"{year}.pt"
        save_sae(dict(WRITTEN)[name], path, name)
        found.append([file.read_bytes() for file in ([path] if path.is_file() else sorted(path.iterdir()))])
    assert found[0] == found[1]
