"""Every form of a kernel is its plain reference: whichever platform takes it, the numbers are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.sae import activation_functions
from mergelab.sae.kernels import largest, rows
from mergelab.sae.kernels.codes import top_k_codes
from mergelab.sae.kernels.collectives import ONE_DEVICE
from mergelab.sae.kernels.dispatch import Forms

TOKENS, K, N, D = 24, 6, 2048, 32
DRAW = np.random.default_rng(0)
WEIGHTS = jnp.asarray(DRAW.standard_normal((TOKENS, K)), jnp.float32)
INDICES = jnp.asarray(DRAW.integers(0, N, (TOKENS, K)), jnp.int32)
MATRIX, OTHER = (jnp.asarray(DRAW.standard_normal((N, D)), jnp.float32) for _ in range(2))
X = jnp.asarray(DRAW.standard_normal((TOKENS, D)), jnp.float32)
PRE = jnp.asarray(DRAW.integers(-3000, 3000, (TOKENS, N)), jnp.float32)  # with ties


def _rule(a: jax.Array, b: jax.Array) -> tuple[jax.Array]:
    return (a / jnp.abs(a).max(axis=1, keepdims=True) + b,)


def _branch(at: int) -> Callable[[jax.Array], jax.Array]:
    return lambda matrix: matrix.at[at].multiply(2.0)


CASES: dict[str, tuple[Forms[Any], Callable[[Any], Any]]] = {
    "sum_of_rows": (rows.SUM_OF_ROWS, lambda f: f(WEIGHTS, INDICES, MATRIX)),
    "dot_with_rows": (rows.DOT_WITH_ROWS, lambda f: f(X, INDICES, MATRIX)),
    "add_rows": (rows.ADD_ROWS, lambda f: f(jnp.zeros((N, D)), WEIGHTS, INDICES, X)),
    "update_rows": (rows.UPDATE_ROWS, lambda f: f(_rule, (MATRIX,), (OTHER,), jnp.abs(MATRIX).max())),
    "update_rows after NaN": (rows.UPDATE_ROWS, lambda f: f(_rule, (MATRIX,), (OTHER,), jnp.float32("nan"))),
    "apply_one": (
        rows.APPLY_ONE,
        lambda f: [f(jnp.int32(i), [_branch(3), _branch(5)], MATRIX) for i in range(2)],
    ),
    "top_k": (largest.TOP_K, lambda f: f(PRE, K)),
}


def test_all_forms_are_compared() -> None:
    known = {
        id(value) for module in (rows, largest) for value in vars(module).values() if type(value) is Forms
    }
    assert known == {id(forms) for forms, _ in CASES.values()}


OWN = [
    (name, platform)
    for name, (forms, _) in CASES.items()
    for platform in ("cpu", "gpu", "tpu")
    if forms.on(platform) is not forms.reference
]


@pytest.mark.parametrize(("name", "platform"), OWN)
def test_a_form_is_its_reference(name: str, platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_BLOCK_BYTES", 300 * D * 4)  # six blocks of rows, and a rest
    forms, use = CASES[name]
    found, wanted = use(forms.on(platform)), use(forms.reference)
    for mine, plain in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(mine, plain, rtol=1e-5, atol=1e-5)
        assert not np.allclose(mine, np.roll(plain, 1, axis=0), rtol=1e-5, atol=1e-5)


def test_a_platform_without_a_form_of_its_own_takes_the_reference() -> None:
    forms = Forms(reference=abs, cpu=max)
    assert (forms.on("cpu"), forms.on("gpu"), forms.on("tpu")) == (max, abs, abs)


@pytest.mark.parametrize("kind", [activation_functions.TopKFunction, activation_functions.AbsTopKFunction])
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "pairs"])
def test_codes_of_training_are_those_of_the_activation_function(kind: Any, dense: bool) -> None:
    encoder, bias = MATRIX, jnp.asarray(DRAW.standard_normal(N), jnp.float32)
    (codes,) = top_k_codes(X, encoder, bias, [K], K, ONE_DEVICE, ranking=kind, dense=dense)
    wanted = kind(K).codes(X @ encoder.T + bias[None, :])
    assert (np.asarray(wanted) != 0).sum(axis=1).max() == K
    np.testing.assert_allclose(codes.decode(MATRIX), wanted @ MATRIX, rtol=1e-4, atol=1e-4)
    assert int(codes.count()) == (np.asarray(wanted) != 0).sum()
    np.testing.assert_array_equal(codes.fired(), (np.abs(np.asarray(wanted)) > 1e-3).any(axis=0))
    assert (np.asarray(wanted) < 0).any() == (kind is activation_functions.AbsTopKFunction)
