"""A finished SAE in use: any leading axes, names, kinds, and what is said when something is wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.errors import CheckpointError, SAEError
from mergelab.sae.activation_functions import ACTIVATION_FUNCTIONS
from mergelab.sae.formats import load_sae, save_sae
from mergelab.sae.normalizations import NORMALIZATIONS
from mergelab.sae.sae import SAE, Crosscoder, SAEConfig, Transcoder, at_sites

D, N = 6, 16
DRAW = np.random.default_rng(0)
ARRAYS: dict[str, Any] = {
    name: jnp.asarray(DRAW.standard_normal(shape), jnp.float32)
    for name, shape in {"W_enc": (D, N), "b_enc": (N,), "W_dec": (N, D), "b_dec": (D,)}.items()
}
MORE: dict[str, Any] = {
    "threshold": jnp.full(N, 0.5),
    "magnitude_scale": jnp.asarray(DRAW.standard_normal(N), jnp.float32),
    "magnitude_bias": jnp.asarray(DRAW.standard_normal(N), jnp.float32),
}
X = jnp.asarray(DRAW.standard_normal((2, 3, D)), jnp.float32)


def _sae(activation: str = "topk", **config: Any) -> SAE:
    needs = ACTIVATION_FUNCTIONS[activation].needs()
    k = {"k": 4 if activation == "group_max" else 3} if "k" in needs else {}
    arrays = ARRAYS | {name: MORE[name] for name in needs if name in MORE}
    return SAE(**arrays, config=SAEConfig(activation, **k, **config)).checked()


@pytest.mark.parametrize("activation", ACTIVATION_FUNCTIONS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_leading_axes_are_tokens(activation: str, normalization: str) -> None:
    sae = _sae(activation, normalization=normalization)
    codes = sae.encode(X)
    assert codes.shape == (2, 3, N)
    assert sae.encode(X[0, 0]).shape == (N,)
    rows = sae.encode(X.reshape(-1, D))
    np.testing.assert_array_equal(codes.reshape(-1, N), rows)
    np.testing.assert_allclose(sae.encode(X[1, 2]), codes[1, 2], rtol=1e-5, atol=1e-6)
    assert np.abs(codes[0, 0] - codes[1, 2]).max() > 0.01
    np.testing.assert_array_equal(sae(X), sae.reconstruct(X, codes))
    np.testing.assert_array_equal(sae(X).reshape(-1, D), sae(X.reshape(-1, D)))
    np.testing.assert_allclose(sae.decode(codes[0, 0]), sae.decode(codes)[0, 0], rtol=1e-5, atol=1e-5)
    assert sae.pre_activations(X[0]).shape == (3, N)


def test_pairs_have_leading_axes_too() -> None:
    sae = _sae()
    values, indices = sae.sparse_codes(X)
    assert values.shape == indices.shape == (2, 3, 3)
    np.testing.assert_allclose(sae.decode_sparse(values, indices), sae(X), atol=1e-5)
    with pytest.raises(SAEError, match="only top-k SAEs"):
        _sae("relu").sparse_codes(X)


def test_absolute_top_k_keeps_signs() -> None:
    sae = _sae("abs_topk")
    pre, codes = np.asarray(sae.pre_activations(X)).reshape(-1, N), np.asarray(sae.encode(X)).reshape(-1, N)
    wanted = np.zeros_like(pre)
    chosen = np.argsort(-np.abs(pre), axis=1)[:, :3]
    np.put_along_axis(wanted, chosen, np.take_along_axis(pre, chosen, 1), 1)
    np.testing.assert_array_equal(codes, wanted)
    assert (codes < 0).any() and ((codes != 0).sum(axis=1) == 3).all()


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (lambda sae: sae.encode(jnp.ones((2, 5))), r"activations have shape \[2, 5\], .* d_in=6"),
        (lambda sae: sae(jnp.ones(())), r"shape \[\]"),
        (lambda sae: sae.decode(jnp.ones((2, 6))), r"codes have shape \[2, 6\], .* n_latents=16"),
        (lambda sae: sae.reconstruct(X, jnp.ones((2, 3, 6))), "codes have shape"),
    ],
)
def test_wrong_widths_are_refused_in_a_sentence(use: Any, words: str) -> None:
    with pytest.raises(SAEError, match=words) as caught:
        use(_sae())
    assert len(str(caught.value).splitlines()) == 1


def test_it_is_shown_in_a_line_without_its_arrays() -> None:
    sae = _sae(reads=("blocks.3.resid_post",), transcoder=False)
    assert repr(sae) == "SAE(topk k=3, 6 -> 16 -> 6, blocks.3.resid_post)"
    moved = at_sites(_sae("relu"), "blocks.3.resid_mid", "blocks.3.mlp.out")
    assert repr(moved) == "Transcoder(relu, 6 -> 16 -> 6, blocks.3.resid_mid -> blocks.3.mlp.out)"
    assert "?" in repr(jax.tree.map(lambda _: None, sae, is_leaf=lambda leaf: leaf is None))


def test_a_class_says_what_is_written_where() -> None:
    assert type(_sae()) is SAE
    assert type(_sae(transcoder=True)) is Transcoder
    assert type(_sae(sites=2)) is Crosscoder
    found = jax.jit(lambda sae: replace(sae, b_dec=sae.b_dec + 1))(_sae(transcoder=True))
    assert type(found) is Transcoder and isinstance(found, SAE)
    assert type(replace(found, config=SAEConfig("relu", transcoder=False)).checked()) is SAE


def test_d_sae_is_another_name_of_n_latents_and_cannot_be_set() -> None:
    assert _sae().d_sae == _sae().n_latents == N
    with pytest.raises(AttributeError):
        _sae().d_sae = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("owner", "name", "words"),
    [
        (SAE, "from_pretrained", r"type object 'SAE' has no attribute 'from_pretrained'; `mergelab.load_sae"),
        (SAE, "load_from_disk", "load_sae"),
        (_sae(), "save_model", "save_sae"),
        (_sae(), "cfg", "`config`"),
        (_sae(), "run_with_cache", "capture="),
        (_sae(), "W_encc", "did you mean 'W_enc'"),
    ],
    ids=str,
)
def test_names_of_other_libraries_lead_to_ours(owner: Any, name: str, words: str) -> None:
    with pytest.raises(AttributeError, match=words):
        getattr(owner, name)
    assert not hasattr(owner, name)


def test_the_folder_of_a_run_is_its_sae(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("sae: {}\n")
    with pytest.raises(CheckpointError, match=r"has not finished, so it has no final/"):
        load_sae(run)
    save_sae(_sae(), run / "final")
    assert repr(load_sae(run)) == repr(_sae())
    np.testing.assert_array_equal(load_sae(run).encode(X), _sae().encode(X))
    with pytest.raises(CheckpointError, match=r"nor a training run with final/"):
        load_sae(run / "checkpoints")


def test_a_group_gives_its_largest_latent() -> None:
    sae = _sae("group_max")
    pre = np.asarray(sae.pre_activations(X)).reshape(-1, 4, N // 4)
    wanted = np.where(pre == pre.max(axis=2, keepdims=True), np.maximum(pre, 0), 0).reshape(-1, N)
    np.testing.assert_array_equal(np.asarray(sae.encode(X)).reshape(-1, N), wanted)
    values, indices = sae.sparse_codes(X)
    np.testing.assert_array_equal(np.asarray(indices) // (N // 4), np.broadcast_to(range(4), (2, 3, 4)))
    np.testing.assert_allclose(sae.decode_sparse(values, indices), sae(X), atol=1e-5)
    with pytest.raises(SAEError, match="16 latents do not make 5 groups"):
        SAE(**ARRAYS, config=SAEConfig("group_max", 5)).checked()


def test_a_constant_norm_is_put_back() -> None:
    sae = _sae("topk", normalization="constant_norm")
    rows = np.asarray(X, np.float64).reshape(-1, D)
    scale = np.linalg.norm(rows, axis=1, keepdims=True) / np.sqrt(D)
    plain = _sae("topk")
    np.testing.assert_allclose(
        np.asarray(sae(X)).reshape(-1, D), np.asarray(plain(jnp.asarray(rows / scale, jnp.float32))) * scale,
        atol=1e-4,
    )  # fmt: skip
    assert np.isfinite(np.asarray(sae(jnp.zeros((1, D))))).all()


def test_signed_codes_are_written_where_a_format_has_them(tmp_path: Path) -> None:
    sae = _sae("abs_topk")
    for format in ("mergelab", "saelens"):
        save_sae(sae, tmp_path / format, format)
        np.testing.assert_array_equal(load_sae(tmp_path / format).encode(X), sae.encode(X))
    for format in ("sparsify", "dictionary_learning", "openai", "gemma-scope"):
        with pytest.raises(SAEError, match="abs_topk"):
            save_sae(sae, tmp_path / format, format)
