"""Losses and gradients of the variants against plain dense formulas in float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.compat import enable_x64
from mergelab.sae import activation_functions
from mergelab.sae.kernels.codes import top_k_codes
from mergelab.sae.kernels.collectives import ONE_DEVICE, Shards
from mergelab.sae.training.aux_k import aux_k_gradients
from mergelab.sae.training.initialize import initial_params
from mergelab.sae.variants import Context, MultiTopK, TopK, Variant, make_variant
from tests.slow import slow_except

TOKENS, D, N, K = 12, 16, 96, 4


def _params(variant: Variant, seed: int = 0) -> dict[str, Any]:
    """Parameters far from any symmetry: nothing is a transpose of anything."""
    params = initial_params(variant, jax.random.key(seed), tie=False)
    rng = np.random.default_rng(seed)
    noise = {name: 0.1 * rng.standard_normal(value.shape) for name, value in params.items()}
    return {name: value + jnp.asarray(noise[name], jnp.float32) for name, value in params.items()}


def _batch(width: int = D, seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((TOKENS, width)), jnp.float32)


def _context(**changes: Any) -> Context:
    return Context(
        **{"tokens": TOKENS, "mse_scale": jnp.float32(0.7), "progress": jnp.float32(1.0), **changes}
    )


def _keep(pre: Any, k: int) -> Any:
    """`relu(top_k(pre))`, dense."""
    least = -jnp.sort(-pre, axis=1)[:, k - 1 : k]
    return jnp.where(jax.lax.stop_gradient(pre >= least), jnp.maximum(pre, 0), 0)


def _double(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)


def _reference(loss: Any, params: Any) -> tuple[float, dict[str, np.ndarray]]:
    with enable_x64(True), jax.numpy_rank_promotion("allow"):
        value, grads = jax.value_and_grad(loss)(_double(params))
        return float(value), {name: np.asarray(grad) for name, grad in grads.items()}


def _agree(grads: Any, wanted: Any) -> None:
    assert set(grads) == set(wanted)
    for name in wanted:
        assert np.abs(wanted[name]).max() > 1e-4, f"{name} has no gradient: the case shows nothing"
        np.testing.assert_allclose(grads[name], wanted[name], atol=3e-6, rtol=3e-5, err_msg=name)


def _top_k_loss(x: Any, y: Any, ks: dict[int, float], *, center: bool, skip: bool = False) -> Any:
    def loss(p: Any) -> Any:
        read = x - p["decoder_bias"] if center else x
        pre = read @ p["encoder"].T + p["encoder_bias"]
        total = 0.0
        for k, weight in ks.items():
            out = _keep(pre, k) @ p["decoder"] + p["decoder_bias"] + (x @ p["skip"] if skip else 0)
            total = total + weight * 0.7 * jnp.mean((y - out) ** 2)
        return total

    return loss


@pytest.mark.parametrize(
    ("kind", "pairs"),
    slow_except(
        [("multi_topk", True), ("half", False), ("transcoder", False)],
        [(kind, pairs) for kind in ("topk", "multi_topk", "half", "transcoder") for pairs in (True, False)],
    ),
)
def test_top_k_gradients(kind: str, pairs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergelab.sae.kernels.codes.prefers_dense", lambda *_: not pairs)
    x = _batch()
    if kind == "transcoder":
        variant: Variant = TopK(D, N, 8, skip=True, k=K)
        y, ks = _batch(8, seed=5), {K: 1.0}
    elif kind == "half":
        variant = MultiTopK(D, N, k=K, half_weight=0.25)
        y, ks = x, {K: 1.0, K // 2: 0.25, 4 * K: 1 / 8}
    else:
        variant = make_variant(kind, d_in=D, n_latents=N, k=K)
        y, ks = x, {K: 1.0} if kind == "topk" else {K: 1.0, 4 * K: 1 / 8}
    params = _params(variant)
    (value, outcome), grads = jax.value_and_grad(variant.loss, has_aux=True)(params, x, y, _context())
    with enable_x64(True):
        loss = _top_k_loss(_double(x), _double(y), ks, center=kind != "transcoder", skip=kind == "transcoder")
    wanted_value, wanted = _reference(loss, params)
    np.testing.assert_allclose(value, wanted_value, rtol=1e-5)
    _agree(grads, wanted)
    assert float(outcome.codes.count()) <= TOKENS * K


@pytest.mark.parametrize(("k", "half"), [(5, 2), (1, 1)])
def test_the_half_reconstruction_counts_from_its_part_of_the_training_on(k: int, half: int) -> None:
    variant = TopK(D, N, k=k, half_weight=0.25, half_from=0.5)
    params, x = _params(variant), _batch()
    loss = jax.jit(lambda progress: variant.loss(params, x, x, _context(progress=progress))[0])
    before, after = (float(loss(jnp.float32(progress))) for progress in (0.49, 0.5))
    with enable_x64(True), jax.numpy_rank_promotion("allow"):
        plain = _top_k_loss(_double(x), _double(x), {k: 1.0}, center=True)(_double(params))
        extra = _top_k_loss(_double(x), _double(x), {half: 0.25}, center=True)(_double(params))
    assert before == pytest.approx(float(plain), rel=1e-5)
    assert after == pytest.approx(float(plain + extra), rel=1e-5)


def test_the_wide_reconstruction_reaches_the_encoder() -> None:
    """The multi-top-k of sparsify 1.3.3 sends no gradient to encoder rows outside the first k."""
    variant = MultiTopK(D, N, k=1)
    params, x = _params(variant), _batch()
    grads = jax.grad(lambda p: variant.loss(p, x, x, _context())[0])(params)
    pre = np.asarray((x - params["decoder_bias"][None]) @ params["encoder"].T + params["encoder_bias"][None])
    second = np.argsort(-pre, axis=1)[:, 1:4]
    outside = np.setdiff1d(second, pre.argmax(axis=1))
    assert len(outside) and (np.abs(grads["encoder"][outside]).max(axis=1) > 1e-7).all()


@pytest.mark.parametrize("dead_share", [0.0, 0.2, 1.0])
def test_aux_k_gradients(dead_share: float) -> None:
    variant = TopK(D, N, k=K)
    params, x, error = _params(variant), _batch(), _batch(seed=9)
    dead = np.random.default_rng(3).random(N) < dead_share
    zeros = {name: jnp.zeros_like(value) for name, value in params.items()}
    value, grads = aux_k_gradients(
        variant, params, zeros, jnp.asarray(dead), x, error,
        k=6, coefficient=0.5, tokens=TOKENS, shards=ONE_DEVICE,
    )  # fmt: skip
    if not dead.any():
        assert float(value) == 0 and not any(np.asarray(g).any() for g in grads.values())
        return
    with enable_x64(True):
        xs, es = _double(x), _double(error)

        def loss(p: Any) -> Any:
            pre = (xs - p["decoder_bias"]) @ p["encoder"].T + p["encoder_bias"]
            codes = _keep(jnp.where(jnp.asarray(dead), pre, -jnp.inf), 6)
            spread = es - es.mean(axis=0)
            return jnp.sum((es - codes @ p["decoder"]) ** 2) / jnp.sum(spread**2)

    wanted_value, wanted = _reference(loss, params)
    np.testing.assert_allclose(value, wanted_value, rtol=1e-5)
    _agree(grads, {name: 0.5 * grad for name, grad in wanted.items()})
    assert np.abs(np.asarray(grads["encoder"])[dead]).max() > 1e-4  # the encoder learns too
    assert not np.asarray(grads["encoder"])[~dead].any()


@pytest.mark.parametrize("options", [{"kind": "relu", "l1": 0.3}, {"kind": "gated", "l1": 0.3}])
def test_penalized_gradients(options: dict[str, Any]) -> None:
    kind = options.pop("kind")
    variant = make_variant(kind, d_in=D, n_latents=N, **options)
    params, x = _params(variant), _batch()
    value, grads = jax.value_and_grad(lambda p: variant.loss(p, x, x, _context())[0])(params)
    with enable_x64(True):
        xs = _double(x)
        still = jax.lax.stop_gradient

        def relu_loss(p: Any) -> Any:
            z = jnp.maximum((xs - p["decoder_bias"]) @ p["encoder"].T + p["encoder_bias"], 0)
            norms = jnp.sqrt((p["decoder"] ** 2).sum(axis=1))
            miss = xs - z @ p["decoder"] - p["decoder_bias"]
            return 0.7 * jnp.mean(miss**2) + 0.3 * jnp.mean(z @ norms)

        def gated_loss(p: Any) -> Any:
            product = (xs - p["decoder_bias"]) @ p["encoder"].T
            gate = product + p["encoder_bias"]
            size = jnp.maximum(jnp.exp(p["magnitude_scale"]) * product + p["magnitude_bias"], 0)
            miss = xs - jnp.where(gate > 0, size, 0) @ p["decoder"] - p["decoder_bias"]
            again = xs - jnp.maximum(gate, 0) @ still(p["decoder"]) - still(p["decoder_bias"])
            penalty = 0.3 * jnp.mean(jnp.maximum(gate, 0).sum(axis=1))
            return 0.7 * jnp.mean(miss**2) + 0.7 * jnp.mean(again**2) + penalty

    wanted_value, wanted = _reference(relu_loss if kind == "relu" else gated_loss, params)
    np.testing.assert_allclose(value, wanted_value, rtol=1e-5)
    _agree(grads, wanted)


def test_screening_in_half_precision_still_scores_in_single() -> None:
    variant = TopK(64, 4096, k=8)
    params = _params(variant)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((32, 64)), jnp.float32)

    def codes(dtype: str) -> Any:
        found = top_k_codes(
            x,
            params["encoder"],
            params["encoder_bias"],
            [8],
            8,
            Shards(),
            ranking=activation_functions.TopKFunction,
            dense=False,
            compute_dtype=dtype,
        )
        return found[0]

    exact, screened = codes("float32"), codes("bfloat16")
    same = np.asarray(exact.indices == screened.indices)
    assert same.mean() > 0.97  # the spare candidates leave few rows whose choice half precision changes
    np.testing.assert_allclose(screened.values[same], exact.values[same], rtol=1e-5)
