"""Published SAEs: every layout is read to what its own library makes of it; the table of releases."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mergelab.errors import CheckpointError, NonFiniteError, SAEError
from mergelab.sae import CrossLayerTranscoder, load_cross_layer_transcoder, sae_releases
from mergelab.sae.formats import find_release, load_sae, sae_path

RELEASED = Path(__file__).parent / "released"
CLT = "mntss/clt-gemma-2-2b-2.5M"
SCOPE_2 = "google/gemma-scope-2-1b-pt"
CROSSCODER = f"{SCOPE_2}/crosscoder/layer_7_13_17_width_262k_l0_medium"

LAYOUTS: dict[str, tuple[str, str | None, str | None, bool]] = {
    "gemma_scope": (
        "google/gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_59", "resid_post", None, False,
    ),
    "gemma_scope_transcoder": (
        "google/gemma-scope-2b-pt-transcoders/layer_3/width_16k/average_l0_54", None, "mlp.out", True,
    ),
    "gemma_scope_2_resid": (f"{SCOPE_2}/resid_post/layer_3_width_16k_l0_medium", "resid_post", None, False),
    "gemma_scope_2_attn": (f"{SCOPE_2}/attn_out/layer_3_width_16k_l0_medium", "attn.z", None, False),
    "gemma_scope_2_mlp": (f"{SCOPE_2}/mlp_out/layer_3_width_16k_l0_medium", "mlp.out", None, False),
    "gemma_scope_2_transcoder": (
        f"{SCOPE_2}/transcoder/layer_3_width_16k_l0_medium", "mlp.input", "mlp.out", True,
    ),
    "gemma_scope_2_affine": (
        f"{SCOPE_2}/transcoder/layer_3_width_16k_l0_medium_affine", "mlp.input", "mlp.out", True,
    ),
    "llama_scope": ("fnlp/Llama3_1-8B-Base-LXR-8x/Llama3_1-8B-Base-L3R-8x", "resid_post", None, False),
    "goodfire": (
        "Goodfire/Llama-3.1-8B-Instruct-SAE-l19/Llama-3.1-8B-Instruct-SAE-l19.pth", "resid_post", None, False,
    ),
    "deepseek_r1": (
        "qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19/DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt",
        "resid_post", None, False,
    ),
    "qwen_scope": ("Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_4/layer3.sae.pt", "resid_post", None, False),
    "hook_z": ("ckkissane/attn-saes-gpt2-small-all-layers/gpt2-small_L3_Hcat_z.pt", "attn.z", None, False),
    "mwhanna": ("mwhanna/qwen3-1.7b-transcoders-lowl0/layer_3.safetensors", "mlp.input", "mlp.out", True),
    "circuit_tracer_skip": (
        "mwhanna/qwen3-1.7b-transcoders-lowl0/layer_4.safetensors", "mlp.input", "mlp.out", True,
    ),
    "circuit_tracer_jump": (
        "mwhanna/qwen3-1.7b-transcoders-lowl0/layer_5.safetensors", "mlp.input", "mlp.out", True,
    ),
    "clt_layer": (f"{CLT}/W_enc_1.safetensors", "resid_mid", None, True),
    "gemma_scope_2_clt_layer": (
        f"{SCOPE_2}/clt/width_262k_l0_medium_affine/params_layer_1.safetensors", "mlp.input", None, True,
    ),
}  # fmt: skip
"""Place, site that is read, site that is written by a transcoder, whether it is one; by recorded answer."""


@pytest.mark.peers
def test_the_recorded_answers_are_still_those_of_the_libraries(tmp_path: Path) -> None:
    python = os.environ.get("MERGELAB_SAE_PEERS")
    assert python, "set MERGELAB_SAE_PEERS to a Python with sae-lens and circuit-tracer"
    record = RELEASED.with_name("record_releases.py")
    subprocess.run([python, str(record), str(tmp_path / "again")], check=True, cwd=tmp_path)
    names = sorted(path.name for path in RELEASED.glob("*.safetensors"))
    assert len(names) > 15 and names == sorted(p.name for p in (tmp_path / "again").glob("*.safetensors"))
    for name in names:
        again = load_file(tmp_path / "again" / name)
        for key, value in load_file(RELEASED / name).items():
            np.testing.assert_allclose(again[key], value, atol=1e-5, rtol=1e-5, err_msg=f"{name}: {key}")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_release_means_what_its_library_makes_of_it(name: str) -> None:
    place, reads, writes, transcoder = LAYOUTS[name]
    expected = load_file(RELEASED / f"{name}.safetensors")
    sae = load_sae(RELEASED / place)
    x = jnp.asarray(expected["x"])
    codes = np.asarray(sae.encode(x))
    np.testing.assert_allclose(codes, expected["codes"], atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(sae(x), expected["out"], atol=5e-5, rtol=2e-5)
    assert (codes > 0).any() and (codes == 0).any()
    layer = 19 if "l19" in place else 4 if "layer_4" in place else 5 if "layer_5" in place else 3
    layer = 1 if name.endswith("clt_layer") else layer
    assert sae.config.reads == (None if reads is None else (f"blocks.{layer}.{reads}",))
    assert (not sae.is_autoencoder, sae.target_known) == (transcoder, True)
    if transcoder:
        assert sae.config.writes == (None if writes is None else (f"blocks.{layer}.{writes}",))


CROSS = {
    "clt_relu": (CLT, "resid_mid", "mlp.out"),
    "clt_jump": ("mntss/clt-jump", "resid_mid", "mlp.out"),
    "gemma_scope_2_clt": (f"{SCOPE_2}/clt/width_262k_l0_medium_affine", "mlp.input", "mlp.out"),
    "gemma_scope_2_crosscoder": (CROSSCODER, "resid_post", "resid_post"),
}


@pytest.mark.parametrize("name", CROSS)
def test_transcoders_across_layers_mean_what_circuit_tracer_makes_of_them(name: str) -> None:
    place, reads, writes = CROSS[name]
    expected = load_file(RELEASED / f"{name}.safetensors")
    model = load_cross_layer_transcoder(RELEASED / place)
    codes = model.encode(expected["x"])
    np.testing.assert_allclose(codes, expected["codes"], atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(model.decode(codes, expected["x"]), expected["out"], atol=5e-5, rtol=2e-5)
    assert (codes > 0).any() and (codes == 0).any()
    numbers = (7, 13, 17) if name.endswith("crosscoder") else range(3)
    assert model.reads == tuple(f"blocks.{i}.{reads}" for i in numbers)
    assert model.writes == tuple(f"blocks.{i}.{writes}" for i in numbers)
    assert model.is_crosscoder == name.endswith("crosscoder")
    whole = model.crosscoder()
    side_by_side = np.concatenate(list(expected["x"]), axis=1)
    want = np.concatenate(list(expected["out"]), axis=1)
    np.testing.assert_allclose(whole(jnp.asarray(side_by_side)), want, atol=5e-5, rtol=2e-5)
    assert whole.is_autoencoder == model.is_crosscoder


def test_one_layer_writes_its_share_and_reads_the_rows_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_cross_layer_transcoder(RELEASED / CLT)
    x = load_file(RELEASED / "clt_relu.safetensors")["x"]
    codes = model.encode(x)
    shares = [np.asarray(model.transcoder(i, 2).decode(jnp.asarray(codes[i]))) for i in range(3)]
    bias = model.layers[2].b_dec
    np.testing.assert_allclose(sum(shares) - 2 * bias, model.decode(codes)[2], atol=5e-5)
    own = model.transcoder(1, 1).config
    assert (own.reads, own.writes) == (("blocks.1.resid_mid",), ("blocks.1.mlp.out",))
    read: list[int] = []
    inner = type(model.layers[0].W_dec).read_into

    def counted(self: object, start: int, out: np.ndarray) -> None:
        read.append(out.size)
        inner(self, start, out)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(type(model.layers[0].W_dec), "read_into", counted)
    rows = model.decoder(0, [5, 6, 20])
    assert (rows.shape, read) == ((3, 3, 8), [48, 24])  # two runs of rows of 24 numbers
    np.testing.assert_array_equal(rows, model.decoder(0, range(24))[[5, 6, 20]])
    np.testing.assert_array_equal(model.encoder(0, [7]), np.asarray(model.transcoder(0).W_enc.T)[[7]])


def test_blocks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (CLT, CROSSCODER):
        model = load_cross_layer_transcoder(RELEASED / place)
        x = np.random.default_rng(0).standard_normal((3, 5, 8)).astype(np.float32)
        whole = model(x)
        with monkeypatch.context() as patch:
            patch.setattr("mergelab.sae.cross_layer._BLOCK", 50)
            np.testing.assert_allclose(model(x), whole, atol=2e-5)


def test_transcoders_across_layers_are_refused_where_they_do_not_fit(tmp_path: Path) -> None:
    model = load_cross_layer_transcoder(RELEASED / CLT)
    for given, said in ((np.zeros((2, 5, 8)), "3, tokens, 8"), (np.zeros((3, 8)), "3, tokens, 8")):
        with pytest.raises(SAEError, match=said):
            model.encode(given)
    with pytest.raises(SAEError, match="not 0"):
        model.transcoder(1, 0)
    with pytest.raises(SAEError, match="no layer 3"):
        model.transcoder(3)
    with pytest.raises(SAEError, match="latents 24 to 24"):
        model.decoder(0, [24])
    skip = load_cross_layer_transcoder(RELEASED / CROSS["gemma_scope_2_clt"][0])
    with pytest.raises(SAEError, match="skip path"):
        skip.decode(np.zeros((3, 2, 24)))
    with pytest.raises(CheckpointError, match="load_cross_layer_transcoder"):
        load_sae(RELEASED / CLT)
    with pytest.raises(CheckpointError, match="load_sae"):
        load_cross_layer_transcoder(RELEASED / LAYOUTS["gemma_scope"][0])
    assert isinstance(model, CrossLayerTranscoder) and "3 layers of 24" in repr(model)
    shutil.copytree(RELEASED / CLT, tmp_path / "clt")
    (tmp_path / "clt" / "W_dec_1.safetensors").unlink()
    (tmp_path / "clt" / "W_enc_1.safetensors").unlink()
    with pytest.raises(CheckpointError, match="layers up to 2, but not 1"):
        load_cross_layer_transcoder(tmp_path / "clt")


def _spoiled(source: Path, out: Path, name: str, value: np.ndarray) -> Path:
    tensors = load_file(source)
    shutil.copytree(source.parent, out)
    save_file(tensors | {name: value}, out / source.name)
    return out / source.name


@pytest.mark.parametrize(
    ("place", "tensor"),
    [
        (f"{CLT}/W_enc_1.safetensors", "b_enc_1"),
        ("mwhanna/qwen3-1.7b-transcoders-lowl0/layer_3.safetensors", "W_dec"),
        (
            "fnlp/Llama3_1-8B-Base-LXR-8x/Llama3_1-8B-Base-L3R-8x/checkpoints/final.safetensors",
            "encoder.bias",
        ),
        (f"{SCOPE_2}/resid_post/layer_3_width_16k_l0_medium/params.safetensors", "threshold"),
    ],
)
def test_nan_and_wrong_widths_are_refused_by_name(tmp_path: Path, place: str, tensor: str) -> None:
    source = RELEASED / place
    right = load_file(source)[tensor].astype(np.float32)
    bad = right.copy()
    bad.reshape(-1)[3] = np.nan
    inner = source.parent.name == "checkpoints"
    for number, value in enumerate((bad, right[:-1])):
        out = tmp_path / str(number)
        file = _spoiled(source, out / "checkpoints" if inner else out, tensor, value)
        if inner:
            shutil.copy(source.parent.parent / "hyperparams.json", out)
        where = out if inner or file.name.startswith("params.") else file
        with pytest.raises(NonFiniteError if number == 0 else CheckpointError, match=tensor.rstrip("_1")):
            load_sae(where)


def test_a_weight_that_is_read_late_is_checked_too(tmp_path: Path) -> None:
    weights = load_file(RELEASED / CLT / "W_dec_0.safetensors")["W_dec_0"]
    weights[5, 1, 2] = np.inf
    _spoiled(RELEASED / CLT / "W_dec_0.safetensors", tmp_path / "clt", "W_dec_0", weights)
    model = load_cross_layer_transcoder(tmp_path / "clt")
    model.decoder(0, [4])
    with pytest.raises(NonFiniteError, match=r"W_dec_0\[5, 1, 2\]"):
        model.decoder(0, [4, 5])


def test_what_the_files_leave_open_is_asked_for(tmp_path: Path) -> None:
    shutil.copy(RELEASED / LAYOUTS["qwen_scope"][0], tmp_path / "layer3.sae.pt")
    with pytest.raises(CheckpointError, match="L0_50"):
        load_sae(tmp_path / "layer3.sae.pt")
    shutil.copy(RELEASED / LAYOUTS["hook_z"][0], tmp_path / "z.pt")
    with pytest.raises(CheckpointError, match=r"z_cfg\.json"):
        load_sae(tmp_path / "z.pt")
    r1 = RELEASED / "fnlp/Llama-Scope-R1-Distill/400M-Slimpajama-400M-OpenR1-Math-220k/L3R"
    with pytest.raises(CheckpointError, match="llama_scope_r1_distill"):
        load_sae(r1)


def test_llama_scopes_threshold_counts_decoders_of_norm_one(tmp_path: Path) -> None:
    """As OpenMOSS has it: scaled decoders change codes and outputs only by what is folded."""
    source = RELEASED / LAYOUTS["llama_scope"][0]
    shutil.copytree(source, tmp_path / "sae")
    file = tmp_path / "sae" / "checkpoints" / "final.safetensors"
    tensors = {name: value.astype(np.float32) for name, value in load_file(file).items()}
    norms = np.exp(np.random.default_rng(0).standard_normal(24)).astype(np.float32)
    tensors["decoder.weight"] = tensors["decoder.weight"] * norms[None, :]
    tensors["encoder.weight"] = tensors["encoder.weight"] / norms[:, None]
    tensors["encoder.bias"] = tensors["encoder.bias"] / norms
    save_file(tensors, file)
    x = jnp.asarray(load_file(RELEASED / "llama_scope.safetensors")["x"])
    found, right = load_sae(tmp_path / "sae"), load_sae(source)
    np.testing.assert_allclose(found(x), right(x), atol=5e-3)  # the file is bfloat16, norms are not quite 1
    np.testing.assert_array_equal(found.encode(x) > 0, right.encode(x) > 0)
    said = json.loads((tmp_path / "sae" / "hyperparams.json").read_text())
    said["dataset_average_activation_norm"]["in"] = 0
    (tmp_path / "sae" / "hyperparams.json").write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match=r"dataset_average_activation_norm\.in is 0"):
        load_sae(tmp_path / "sae")


def test_the_table_of_releases_knows_names_and_near_misses(tmp_path: Path) -> None:
    table = sae_releases()
    assert (len(table), sum(map(len, table.values()))) == (170, 13857)
    assert set(sae_releases("gpt2")) < set(table) and "gpt2-small-res-jb" in sae_releases("gpt2")
    found = find_release("gpt2-small-res-jb", "blocks.8.hook_resid_pre")
    assert str(found.place) == "jbloom/GPT2-Small-SAEs-Reformatted:blocks.8.hook_resid_pre"
    assert found.says["model_from_pretrained_kwargs"] == {"center_writing_weights": True}
    canonical = find_release("gemma-scope-2b-pt-res-canonical", "layer_12/width_16k/canonical")
    assert canonical.place.within == "layer_12/width_16k/average_l0_82"
    for release, sae_id, said in (
        ("gpt2-small-res-jbb", "x", r"did you mean 'gpt2-small-res-jb'"),
        ("gpt2-small-res-jb", "blocks.8.hook_resid_prae", r"did you mean 'blocks.8.hook_resid_pre'"),
        ("gpt2-small-res-jb", None, r"one of its 13"),
        ("temporal-sae-gemma-2-2b", "blocks.12.hook_resid_post", "attention"),
    ):
        with pytest.raises(CheckpointError, match=said):
            load_sae(release, sae_id)
    with pytest.raises(CheckpointError, match=r"no such file, folder or release \(did you mean"):
        load_sae("gpt2-smal-res-jb")
    with pytest.raises(CheckpointError, match="no such file or folder"):
        load_sae(tmp_path / "gpt2-small-res-jb-of-mine")
    assert sae_path(RELEASED / SCOPE_2, "resid_post") == RELEASED / SCOPE_2 / "resid_post"


def test_gemma_scopes_saes_of_embeddings_read_the_site_which_is_scaled(tmp_path: Path) -> None:
    source = RELEASED / LAYOUTS["gemma_scope"][0]
    place = tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k" / "average_l0_6"
    shutil.copytree(source, place)
    sae, plain = load_sae(place), load_sae(source)
    x = jnp.asarray(load_file(RELEASED / "gemma_scope.safetensors")["x"])
    scale = np.float32(8**0.5)
    np.testing.assert_allclose(sae.encode(x * scale), plain.encode(x), atol=2e-5)
    np.testing.assert_allclose(sae(x * scale), plain(x) * scale, atol=5e-5)
    assert sae.config.reads == sae.config.writes == ("embed",)
