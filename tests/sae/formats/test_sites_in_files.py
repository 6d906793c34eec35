"""What files of other libraries say of sites, sizes and bad numbers: names there, sites here, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from mergelab.checkpoints.torch_pickle import write_pickled
from mergelab.errors import CheckpointError, NonFiniteError
from mergelab.sae.formats import load_sae, save_sae
from mergelab.sae.formats.hook_names import hook_of, module_of, site_of, submodule_of
from mergelab.sae.sae import SAE, SAEConfig

D, N = 6, 10
SUFFIXES = (
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn.out",
    "attn.z",
    "attn.v",
    "mlp.pre",
    "mlp.post",
    "mlp.out",
)


def _sae(activation: str = "topk", out: int = D, **config: Any) -> SAE:
    rng = np.random.default_rng(1)

    def array(*shape: int) -> Any:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    k = 3 if activation == "topk" else None
    threshold = jnp.abs(array(N)) if activation == "jump_relu" else None
    skip = array(D, out) if config.pop("skip", False) else None
    settings = SAEConfig(activation, k, **config)
    return SAE(array(D, N), array(N), array(N, out), array(out), settings, threshold, skip).checked()


@given(st.integers(0, 200), st.sampled_from(SUFFIXES))
def test_every_name_of_a_site_means_that_site(layer: int, suffix: str) -> None:
    site = f"blocks.{layer}.{suffix}"
    names = [name for name in (hook_of(site), module_of(site), submodule_of(site)) if name is not None]
    assert names and hook_of(site) is not None and site_of(site) == site
    assert all(site_of(name) == site for name in names)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("blocks.3.hook_resid_post", "blocks.3.resid_post"),
        ("blocks.3.hook_mlp_out", "blocks.3.mlp.out"),
        ("blocks.3.mlp.hook_post", "blocks.3.mlp.post"),
        ("blocks.3.attn.hook_z", "blocks.3.attn.z"),
        ("blocks.3.hook_mlp_in", "blocks.3.resid_mid"),
        ("layers.3.mlp", "blocks.3.mlp.out"),
        ("h.3", "blocks.3.resid_post"),
        ("h.11.attn", "blocks.11.attn.out"),
        ("model.layers.9.output", "blocks.9.resid_post"),
        ("model.layers.9.self_attn.o_proj.input", "blocks.9.attn.z"),
        ("model.layers.9.post_feedforward_layernorm.output", "blocks.9.mlp.out"),
        ("gpt_neox.layers.0.attention", "blocks.0.attn.out"),
        ("transformer.h.0", "blocks.0.resid_post"),
        ("encoder.layer.2", "blocks.2.resid_post"),
        ("resid_post_layer_8", "blocks.8.resid_post"),
        ("model.layers.9.pre_feedforward_layernorm.output", "blocks.9.mlp.input"),
        ("layers.3.mlp.input", "blocks.3.mlp.input"),
        ("blocks.3.mlp.hook_in", "blocks.3.mlp.input"),
        ("blocks.3.mlp.hook_out", "blocks.3.mlp.out"),
        ("hook_embed", "embed"),
        # The norm's weights or none: no site.
        ("blocks.3.ln2.hook_normalized", None),
        ("encoder.layer.2.attention", None),
        ("layers.x", None),
        ("blocks.3.hook_resid_post\n", None),
        (None, None),
        (7, None),
    ],
)
def test_names_of_other_libraries(name: object, site: str | None) -> None:
    assert site_of(name) == site


def _cfg(path: Path, name: str = "cfg.json") -> dict[str, Any]:
    return json.loads((path / name).read_text())


def _change(path: Path, name: str = "cfg.json", **changes: Any) -> None:
    kept = {key: value for key, value in {**_cfg(path, name), **changes}.items() if value is not ...}
    (path / name).write_text(json.dumps(kept))


def test_saelens_hooks_become_sites_and_are_written_back(tmp_path: Path) -> None:
    metadata = {"site": "blocks.15.resid_post", "model": "m", "model_hash": "0" * 64, "context": 128}
    save_sae(_sae(subtract_b_dec=True, transcoder=False, metadata=metadata), tmp_path / "a", "saelens")
    said = _cfg(tmp_path / "a")["metadata"]
    assert said["hook_name"] == "blocks.15.hook_resid_post" and said["sae_lens_version"] >= "6"
    assert (said["model_name"], said["context_size"], said["prepend_bos"]) == ("m", 128, False)
    assert "hook_name_out" not in said
    back = load_sae(tmp_path / "a")
    assert back.config.reads == back.config.writes == ("blocks.15.resid_post",) and back.target_known
    # Before version 6 they stand beside the architecture.
    _change(tmp_path / "a", metadata=..., hook_point="blocks.2.hook_mlp_out", model_name="gpt2")
    old = load_sae(tmp_path / "a").config
    assert old.reads == ("blocks.2.mlp.out",) and old.metadata["model_name"] == "gpt2"


@pytest.mark.parametrize(
    ("activation", "skip"), [("relu", False), ("relu", True), ("jump_relu", False), ("jump_relu", True)]
)
def test_saelens_transcoders_of_equal_widths(tmp_path: Path, activation: str, skip: bool) -> None:
    mapped = _sae(activation, skip=skip, reads="blocks.1.resid_mid", writes="blocks.1.mlp.out")
    save_sae(mapped, tmp_path / "a", "saelens")
    cfg = _cfg(tmp_path / "a")
    prefix = "jumprelu_" if activation == "jump_relu" else ""
    assert cfg["architecture"] == f"{prefix}{'skip_' if skip else ''}transcoder" and cfg["d_out"] == D
    assert cfg["apply_b_dec_to_input"] is False
    assert cfg["metadata"]["hook_name"] == "blocks.1.hook_resid_mid"
    assert cfg["metadata"]["hook_name_out"] == "blocks.1.hook_mlp_out"
    back = load_sae(tmp_path / "a")
    assert (back.config.reads, back.config.writes) == (mapped.config.reads, mapped.config.writes)
    x = jnp.asarray(np.random.default_rng(2).standard_normal((5, D)), jnp.float32)
    np.testing.assert_allclose(back(x), mapped(x), atol=1e-5)
    # A hook that is not a site here keeps its name, and the SAE stays a transcoder.
    _change(
        tmp_path / "a",
        metadata={**cfg["metadata"], "hook_name": "blocks.1.ln2.hook_normalized", "site": None},
    )
    odd = load_sae(tmp_path / "a")
    assert odd.config.reads is None and odd.config.writes == ("blocks.1.mlp.out",) and not odd.is_autoencoder
    save_sae(odd, tmp_path / "b", "saelens")
    assert _cfg(tmp_path / "b")["metadata"]["hook_name"] == "blocks.1.ln2.hook_normalized"


def test_a_saelens_transcoder_keeps_the_scale_of_what_it_writes(tmp_path: Path) -> None:
    """SAELens' `Transcoder.decode` puts no mean and scale of the input on the output."""
    mapped = _sae("relu", out=4)
    save_sae(mapped, tmp_path / "a", "saelens")
    _change(tmp_path / "a", normalize_activations="layer_norm")
    x = np.random.default_rng(2).standard_normal((5, D)) * 3 + 7
    centered = x - x.mean(axis=1, keepdims=True)
    normal = centered / (centered.std(axis=1, keepdims=True, ddof=1) + 1e-5)
    arrays = {name: np.asarray(value, np.float64) for name, value in mapped.as_numpy().items()}
    codes = np.maximum(normal @ arrays["W_enc"] + arrays["b_enc"], 0)
    wanted = codes @ arrays["W_dec"] + arrays["b_dec"]
    found = np.asarray(load_sae(tmp_path / "a")(jnp.asarray(x, jnp.float32)))
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    scaled = wanted * x.std(axis=1, keepdims=True, ddof=1) + x.mean(axis=1, keepdims=True)
    assert np.abs(found - scaled).max() > 1


def test_sparsify_names_a_module_by_its_folder(tmp_path: Path) -> None:
    save_sae(_sae(transcoder=False), tmp_path / "layers.3.mlp", "sparsify")
    back = load_sae(tmp_path / "layers.3.mlp").config
    assert back.reads == back.writes == ("blocks.3.mlp.out",) and back.metadata["hookpoint"] == "layers.3.mlp"
    save_sae(_sae(transcoder=True), tmp_path / "h.2.mlp" / "seed1", "sparsify")
    found = load_sae(tmp_path / "h.2.mlp" / "seed1")
    assert not found.is_autoencoder and found.config.reads is None
    assert found.config.writes == ("blocks.2.mlp.out",)
    assert _cfg(tmp_path / "h.2.mlp" / "seed1")["transcode"] is True
    save_sae(found, tmp_path / "copy", "sparsify")
    assert _cfg(tmp_path / "copy")["hookpoint"] == "h.2.mlp"
    again = load_sae(tmp_path / "copy")
    assert again.config.writes == found.config.writes and not again.is_autoencoder
    # A transcoder of sparsify subtracts nothing from what it reads.
    x = jnp.asarray(np.random.default_rng(2).standard_normal((5, D)), jnp.float32)
    np.testing.assert_allclose(again(x), _sae(transcoder=True)(x), atol=1e-5)
    _change(tmp_path / "copy", hook_mode="transcode", transcode=False)
    assert not load_sae(tmp_path / "copy").is_autoencoder


def test_dictionary_learning_names_a_submodule_and_its_end(tmp_path: Path) -> None:
    save_sae(_sae(reads="blocks.8.resid_post", transcoder=False), tmp_path / "a", "dictionary_learning")
    trainer = _cfg(tmp_path / "a", "config.json")["trainer"]
    assert (trainer["submodule_name"], trainer["layer"]) == ("resid_post_layer_8", 8)
    back = load_sae(tmp_path / "a")
    assert back.config.reads == back.config.writes == ("blocks.8.resid_post",)
    changed = {**trainer, "submodule_name": "mlp_out_layer_8"}
    _change(tmp_path / "a", "config.json", trainer=changed, buffer={"io": "in_and_out"})
    found = load_sae(tmp_path / "a")
    assert (
        not found.is_autoencoder
        and found.config.writes == ("blocks.8.mlp.out",)
        and found.config.reads is None
    )
    _change(tmp_path / "a", "config.json", buffer={"io": "in"})
    assert load_sae(tmp_path / "a").config.reads is None


def test_gemma_scope_tells_by_its_folders_or_beside_the_file(tmp_path: Path) -> None:
    plain = _sae("jump_relu")
    for folder, reads, writes, is_autoencoder in (
        (
            "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71",
            "blocks.20.resid_post",
            "blocks.20.resid_post",
            True,
        ),
        (
            "gemma-scope-2b-pt-mlp/layer_3/width_16k/average_l0_71",
            "blocks.3.mlp.out",
            "blocks.3.mlp.out",
            True,
        ),
        ("gemma-scope-2b-pt-transcoders/layer_3/width_16k/average_l0_71", None, "blocks.3.mlp.out", False),
    ):
        save_sae(plain, tmp_path / folder, "gemma-scope")
        found = load_sae(tmp_path / folder)
        assert found.config.reads == (None if reads is None else (reads,)), folder
        assert (
            found.config.writes == (writes,) and found.is_autoencoder == is_autoencoder and found.target_known
        )
    save_sae(plain, tmp_path / "transcoders", "gemma-scope")
    assert not load_sae(tmp_path / "transcoders").target_known  # not of the release: nobody said
    arrays = {name.lower(): value for name, value in plain.as_numpy().items()}
    two = tmp_path / "gemma-scope-2" / "x"
    two.mkdir(parents=True)
    save_file(arrays, two / "params.safetensors")
    hooks = {
        "hf_hook_point_in": "model.layers.9.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.9.post_feedforward_layernorm.output",
    }
    (two / "config.json").write_text(json.dumps(hooks))
    found = load_sae(two)
    assert found.config.writes == ("blocks.9.mlp.out",) and not found.is_autoencoder
    assert found.config.metadata["hf_hook_point_in"] == hooks["hf_hook_point_in"]


def _npz(path: Path, name: str, change: Any) -> None:
    with np.load(path / "params.npz") as held:
        arrays = {key: np.array(held[key]) for key in held}
    change(arrays[name])
    np.savez(path / "params.npz", **arrays)


def _tensors(file: str) -> Any:
    def apply(path: Path, name: str, change: Any) -> None:
        arrays = load_file(path / file)
        change(arrays[name])
        save_file(arrays, path / file)

    return apply


def _pickle(path: Path, name: str, change: Any) -> None:
    from mergelab.checkpoints import open_pickled, read_whole

    file = path / "ae.pt" if path.is_dir() else path
    opened = open_pickled(file, values=True)
    read = {key: np.array(read_whole(tensor)) for key, tensor in opened.tensors.items()}
    arrays = {key: one.astype(np.int64) if one.dtype.kind == "i" else one for key, one in read.items()}
    change(arrays[name])
    rest = {key: value for key, value in opened.values.items() if isinstance(value, str | dict)}
    file.unlink()
    write_pickled(file, {**arrays, **rest})


BAD: list[tuple[str, SAE, str, Any]] = [
    ("mergelab", _sae(), "W_dec", _tensors("sae.safetensors")),
    ("saelens", _sae("relu", transcoder=False), "W_enc", _tensors("sae_weights.safetensors")),
    ("sparsify", _sae(transcoder=False), "encoder.weight", _tensors("sae.safetensors")),
    ("dictionary_learning", _sae(transcoder=False), "decoder.weight", _pickle),
    ("openai", _sae("relu", transcoder=False), "encoder.weight", _pickle),
    ("gemma-scope", _sae("jump_relu"), "W_dec", _npz),
]


@pytest.mark.parametrize(("format", "sae", "name", "apply"), BAD, ids=[case[0] for case in BAD])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_weights_that_are_not_finite_are_refused(
    tmp_path: Path, format: str, sae: SAE, name: str, apply: Any, value: float
) -> None:
    path = tmp_path / ("a.pt" if format == "openai" else "a")
    save_sae(sae, path, format)
    load_sae(path)

    def spoil(array: np.ndarray) -> None:
        array[3, 2] = value

    apply(path, name, spoil)
    words = f"{name}\\[3, 2\\] is {value}, where finite weights were expected"
    with pytest.raises(NonFiniteError, match=words) as caught:
        load_sae(path)
    assert str(tmp_path) in str(caught.value)


def test_a_threshold_of_one_number_is_looked_at_too(tmp_path: Path) -> None:
    recorded = Path(__file__).parent / "recorded" / "dictionary_learning_BatchTopKSAE"
    (tmp_path / "a").mkdir()
    for file in ("ae.pt", "config.json"):
        (tmp_path / "a" / file).write_bytes((recorded / file).read_bytes())
    load_sae(tmp_path / "a")
    _pickle(tmp_path / "a", "threshold", lambda array: array.fill(np.nan))
    with pytest.raises(NonFiniteError, match="threshold"):
        load_sae(tmp_path / "a")


@pytest.mark.parametrize(
    ("format", "changes", "words"),
    [
        ("saelens", {"d_in": 99}, "d_in is 99, but the tensors have 6"),
        ("saelens", {"d_sae": 7}, "d_sae is 7, but the tensors have 10"),
        ("sparsify", {"d_in": 7}, "d_in is 7, but the tensors have 6"),
        ("sparsify", {"num_latents": 11}, "num_latents is 11, but the tensors have 10"),
        ("mergelab", {"d_out": 7}, "d_out is 7, but the tensors have 6"),
        ("saelens", {"d_in": 99, "d_sae": 7}, "(?s)d_in is 99.*d_sae is 7"),
    ],
)
def test_sizes_the_configuration_has_wrong_are_refused(
    tmp_path: Path, format: str, changes: dict[str, int], words: str
) -> None:
    save_sae(_sae(subtract_b_dec=True, transcoder=False), tmp_path / "a", format)
    _change(tmp_path / "a", **changes)
    with pytest.raises(CheckpointError, match=words):
        load_sae(tmp_path / "a")


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("W_enc", (N, D), [D, N]),
        ("W_dec", (D, N), [N, D]),
        ("b_enc", (D,), [N]),
        ("b_dec", (N,), [D]),
    ],
)
def test_the_wrong_tensor_is_blamed(
    tmp_path: Path, name: str, shape: tuple[int, ...], said: list[int]
) -> None:
    save_sae(_sae("relu", transcoder=False), tmp_path / "a", "saelens")
    file = tmp_path / "a" / "sae_weights.safetensors"
    save_file({**load_file(file), name: np.zeros(shape, np.float32)}, file)
    with pytest.raises(CheckpointError) as caught:
        load_sae(tmp_path / "a")
    assert f"{name} has shape {list(shape)}, where {said} was expected" in str(caught.value)
    assert "\n" not in str(caught.value)
