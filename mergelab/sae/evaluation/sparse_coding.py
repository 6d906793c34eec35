"""Codes by optimization instead of an encoder, and the amortization gap between the two."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from mergelab.activations.batches import map_pieces
from mergelab.errors import SAEError
from mergelab.sae.evaluation.metric import Evidence, Metric, Options, Scores
from mergelab.sae.normalizations import normalized
from mergelab.sae.sae import SAE
from mergelab.sae.splice import read_batches

__all__ = [
    "AmortizationGap",
    "amortization_gap",
    "coding_target",
    "elastic_net",
    "hard_threshold",
    "lasso",
    "matching_pursuit",
    "orthogonal_matching_pursuit",
]


Rows = Float[Array, "tokens d"]
Atoms = Float[Array, "n d"]
Codes = Float[Array, "tokens n"]


def orthogonal_matching_pursuit(x: Rows, atoms: Atoms, k: int, *, tokens_at_once: int = 256) -> Codes:
    """Takes the atom with the largest cosine with the residual, fits all taken so far, k times over.

    The fit goes through an orthonormal basis that grows by one vector a step (Pati et al. 1993), with each
    vector made orthogonal twice: nearly parallel atoms cost no digits.

    Args:
        x: what to code.
        atoms: directions, of any lengths above 0.
        k: atoms per token, at most d.
        tokens_at_once: rows computed side by side.

    Raises:
        SAEError: shapes do not fit together, or k is not within 1 and d.
    """
    x, atoms = _checked(x, atoms, k)
    return _omp(x, atoms, k, tokens_at_once)


def matching_pursuit(
    x: Rows, atoms: Atoms, k: int, *, nonnegative: bool = False, tokens_at_once: int = 256
) -> Codes:
    """Subtracts the residual's part along the atom it has the largest cosine with, k times (Mallat 1993).

    An atom may be taken again: at most k codes are not 0. With `nonnegative`, only atoms on the residual's
    side are taken. Arguments and errors as for `orthogonal_matching_pursuit`.
    """
    x, atoms = _checked(x, atoms, k)
    return _mp(x, atoms, k, nonnegative, tokens_at_once)


def lasso(
    x: Rows,
    atoms: Atoms,
    l1: float,
    *,
    nonnegative: bool = False,
    accelerate: bool = True,
    steps: int = 3000,
    tolerance: float = 1e-7,
    tokens_at_once: int = 256,
) -> Codes:
    """Minimizes `1/2 |x - f A|^2 + l1 |f|_1` by proximal gradient steps; see `elastic_net` with `l2` 0."""
    return elastic_net(
        x, atoms, l1, 0.0, nonnegative=nonnegative, accelerate=accelerate, steps=steps, tolerance=tolerance,
        tokens_at_once=tokens_at_once,
    )  # fmt: skip


def elastic_net(
    x: Rows,
    atoms: Atoms,
    l1: float,
    l2: float,
    *,
    nonnegative: bool = False,
    accelerate: bool = True,
    steps: int = 3000,
    tolerance: float = 1e-7,
    tokens_at_once: int = 256,
) -> Codes:
    """Minimizes `1/2 |x - f A|^2 + l1 |f|_1 + l2/2 |f|^2`.

    ISTA, or FISTA (Beck & Teboulle 2009) that restarts its momentum where it points uphill (O'Donoghue &
    Candes 2015). Steps are `1 / (largest eigenvalue of A A^T + l2)`. Penalties are not divided by d: they are
    `d` times scikit-learn's.

    Args:
        x: what to code.
        atoms: directions, of any lengths.
        l1: weight of the L1 penalty, at least 0.
        l2: weight of the L2 penalty, at least 0.
        nonnegative: whether codes below 0 are forbidden, as for most autoencoders.
        accelerate: FISTA; False for ISTA.
        steps: maximum number of steps.
        tolerance: change of a code below which a token is done, as a fraction of what the largest
            correlation of an atom with its token is worth.
        tokens_at_once: rows computed side by side.

    Raises:
        SAEError: shapes do not fit together, or a penalty is negative.
    """
    x, atoms = _checked(x, atoms, 1)
    if l1 < 0 or l2 < 0:
        raise SAEError(f"penalties are {l1} and {l2}; give 0 or more.")
    return _proximal(
        x, atoms, jnp.float32(l1), jnp.float32(l2), jnp.float32(tolerance),
        nonnegative, accelerate, steps, tokens_at_once,
    )  # fmt: skip


def hard_threshold(
    x: Rows, atoms: Atoms, k: int, *, nonnegative: bool = False, steps: int = 100, tokens_at_once: int = 256
) -> Codes:
    """Iterative hard thresholding: a gradient step of the error, then all but the k largest codes are 0.

    `f <- H_k(f + (x - f A) A^T / |A|_2^2)`, from 0 (Blumensath & Davies 2009). One step keeps the k largest
    correlations. Arguments and errors as for `matching_pursuit`.
    """
    x, atoms = _checked(x, atoms, k)
    return _iht(x, atoms, k, nonnegative, steps, tokens_at_once)


def _checked(x: Any, atoms: Any, k: int) -> tuple[Array, Array]:
    x, atoms = jnp.asarray(x, jnp.float32), jnp.asarray(atoms, jnp.float32)
    if x.ndim != 2 or atoms.ndim != 2 or x.shape[1] != atoms.shape[1] or not len(x):
        raise SAEError(
            f"rows of shape {list(x.shape)} cannot be coded with atoms of shape {list(atoms.shape)}; "
            "expected [tokens, d] and [n, d]."
        )
    if not 1 <= k <= min(atoms.shape):
        raise SAEError(f"k is {k}, but {atoms.shape[0]} atoms of width {atoms.shape[1]} allow 1 to "
                       f"{min(atoms.shape)}.")  # fmt: skip
    return x, atoms


def _dot(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")


def _lengths(atoms: Array) -> Array:
    norms = jnp.linalg.norm(atoms, axis=1)
    return jnp.where(norms > 0, norms, 1.0)


@partial(jax.jit, static_argnames=("k", "at_once"))
def _omp(x: Array, atoms: Array, k: int, at_once: int) -> Array:
    n, d = atoms.shape
    norms = _lengths(atoms)

    def code(row: Array) -> Array:
        def step(i: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
            residual, basis, triangle, taken, free = state
            fit = jnp.where(free, jnp.abs(_dot(atoms, residual)) / norms, -1.0)
            best = jnp.argmax(fit)
            atom = atoms[best]
            along = _dot(basis, atom)
            rest = atom - _dot(along, basis)
            again = _dot(basis, rest)
            rest = rest - _dot(again, basis)
            size = jnp.linalg.norm(rest)
            # An atom within the span of those taken adds nothing: it gets a code of 0.
            real = size > 1e-6 * norms[best]
            vector = jnp.where(real, rest / jnp.where(real, size, 1.0), 0.0)
            column = (along + again).at[i].set(jnp.where(real, size, 1.0))
            return (
                residual - (vector @ residual) * vector,
                basis.at[i].set(vector),
                triangle.at[:, i].set(column),
                taken.at[i].set(best),
                free.at[best].set(False),
            )

        start = (row, jnp.zeros((k, d)), jnp.zeros((k, k)), jnp.zeros(k, jnp.int32), jnp.ones(n, bool))
        _, basis, triangle, taken, _ = lax.fori_loop(0, k, step, start)
        values = jax.scipy.linalg.solve_triangular(triangle, _dot(basis, row))
        return jnp.zeros(n).at[taken].set(values)

    return map_pieces(code, x, at_once)


@partial(jax.jit, static_argnames=("k", "nonnegative", "at_once"))
def _mp(x: Array, atoms: Array, k: int, nonnegative: bool, at_once: int) -> Array:
    norms = _lengths(atoms)
    unit = atoms / norms[:, None]

    def code(row: Array) -> Array:
        def step(_: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            residual, codes = state
            along = _dot(unit, residual)
            best = jnp.argmax(along if nonnegative else jnp.abs(along))
            amount = jnp.maximum(along[best], 0.0) if nonnegative else along[best]
            return residual - amount * unit[best], codes.at[best].add(amount)

        return lax.fori_loop(0, k, step, (row, jnp.zeros(len(atoms))))[1] / norms

    return map_pieces(code, x, at_once)


@partial(jax.jit, static_argnames=("nonnegative", "accelerate", "steps", "at_once"))
def _proximal(
    x: Array,
    atoms: Array,
    l1: Array,
    l2: Array,
    tolerance: Array,
    nonnegative: bool,
    accelerate: bool,
    steps: int,
    at_once: int,
) -> Array:
    largest = _largest_eigenvalue(atoms) + l2

    def code(row: Array) -> Array:
        allowed = tolerance * jnp.abs(_dot(atoms, row)).max() / largest

        def step(state: tuple[Array, ...]) -> tuple[Array, ...]:
            codes, ahead, momentum, number, _ = state
            slope = _dot(atoms, _dot(ahead, atoms) - row) + l2 * ahead
            moved = _shrink(ahead - slope / largest, l1 / largest, nonnegative)
            change = jnp.abs(moved - ahead).max()
            if not accelerate:
                return moved, moved, momentum, number + 1, change > allowed
            uphill = (ahead - moved) @ (moved - codes) > 0
            following = 0.5 * (1 + jnp.sqrt(1 + 4 * jnp.square(momentum)))
            push = jnp.where(uphill, 0.0, (momentum - 1) / following)
            further = moved + push * (moved - codes)
            return moved, further, jnp.where(uphill, 1.0, following), number + 1, change > allowed

        def going(state: tuple[Array, ...]) -> Array:
            return state[4] & (state[3] < steps)

        zero = jnp.zeros(len(atoms))
        return lax.while_loop(going, step, (zero, zero, jnp.float32(1), jnp.int32(0), jnp.bool_(True)))[0]

    return map_pieces(code, x, at_once)


@partial(jax.jit, static_argnames=("k", "nonnegative", "steps", "at_once"))
def _iht(x: Array, atoms: Array, k: int, nonnegative: bool, steps: int, at_once: int) -> Array:
    largest = _largest_eigenvalue(atoms)

    def code(row: Array) -> Array:
        def step(_: Array, codes: Array) -> Array:
            moved = codes + _dot(atoms, row - _dot(codes, atoms)) / largest
            moved = jnp.maximum(moved, 0.0) if nonnegative else moved
            _, kept = lax.top_k(jnp.abs(moved), k)
            return jnp.zeros_like(moved).at[kept].set(moved[kept])

        return lax.fori_loop(0, steps, step, jnp.zeros(len(atoms)))

    return map_pieces(code, x, at_once)


def _largest_eigenvalue(atoms: Array) -> Array:
    """The largest eigenvalue of `A A^T` and a hair more, so that steps are never too long."""
    small = atoms if atoms.shape[0] < atoms.shape[1] else atoms.T
    return jnp.linalg.eigvalsh(_dot(small, small.T))[-1] * 1.0001


def _shrink(codes: Array, amount: Array, nonnegative: bool) -> Array:
    """The proximal map of `amount |f|_1`."""
    if nonnegative:
        return jnp.maximum(codes - amount, 0.0)
    return jnp.sign(codes) * jnp.maximum(jnp.abs(codes) - amount, 0.0)


@dataclass(frozen=True)
class AmortizationGap:
    """Two codes of the same activations.

    Attributes:
        encoder_error: `sum |x - f A|^2 / sum |x - mean|^2` of the encoder's codes.
        searched_error: the same of the others.
        encoder_l0: latents that are not 0, on average.
        searched_l0: the same of the others.
        overlap: latents that both use over latents that either uses, over all tokens.
    """

    encoder_error: float
    searched_error: float
    encoder_l0: float
    searched_l0: float
    overlap: float


def coding_target(sae: SAE, x: Float[Array, "tokens d"]) -> Float[Array, "tokens d"]:
    """What the decoder's rows must sum to: `x` less `b_dec`, after the SAE's own normalization.

    Raises:
        SAEError: the SAE does not reconstruct what it reads.
    """
    if not sae.is_autoencoder or sae.W_skip is not None:
        raise SAEError("a transcoder's rows sum to another site; codes are searched for autoencoders only.")
    x = jnp.asarray(x, jnp.float32)
    normal = normalized(sae.config.normalization, x)[0]
    return normal - sae.b_dec[None]


def amortization_gap(
    sae: SAE, x: Float[Array, "tokens d"], codes: Float[Array, "tokens n"]
) -> AmortizationGap:
    """Compares an SAE's own codes of activations with others, of `coding_target` by `W_dec`.

    Raises:
        SAEError: shapes do not fit together, or as `coding_target`.
    """
    target = coding_target(sae, x)
    own = sae.encode(jnp.asarray(x, jnp.float32))
    if codes.shape != own.shape:
        raise SAEError(f"codes have shape {list(codes.shape)}; expected {list(own.shape)}.")
    spread = jnp.square(target - target.mean(axis=0, keepdims=True)).sum()

    def error(f: Array) -> float:
        return float(jnp.square(target - jnp.matmul(f, sae.W_dec, precision="highest")).sum() / spread)

    ours, theirs = own != 0, codes != 0
    either = (ours | theirs).sum(dtype=jnp.float32)
    return AmortizationGap(
        error(own), error(codes),
        float(ours.sum(axis=1).mean()), float(theirs.sum(axis=1).mean()),
        float((ours & theirs).sum(dtype=jnp.float32) / jnp.maximum(either, 1.0)),
    )  # fmt: skip


_CODED = 2048  # tokens of the text that codes are searched for


def _scores(sae: SAE, evidence: Evidence, options: Options) -> Scores:
    source = evidence.judge
    # Some more than are needed, as not all tokens count.
    contexts = -(-_CODED // source.tokens.shape[1])
    contexts += -(-int((~source.by_place[: 2 * contexts]).sum()) // source.tokens.shape[1])
    x = jnp.asarray(np.concatenate(list(read_batches(source, contexts)))[:_CODED])
    target = coding_target(sae, x)
    active = float((sae.encode(x) != 0).sum(axis=1).mean())
    k = max(1, min(round(active), *sae.W_dec.shape))
    found = amortization_gap(sae, x, orthogonal_matching_pursuit(target, sae.W_dec, k))
    against = f"squared error over that of the mean, {len(x)} tokens; 0 exact, 1 useless"
    yield "encoder_error", found.encoder_error, f"the encoder's codes: {against}"
    yield "searched_error", found.searched_error, f"orthogonal matching pursuit with {k} latents: {against}"
    yield "gap", found.encoder_error - found.searched_error, "error due to the encoder; 0 an optimal encoder"
    yield "encoder_l0", found.encoder_l0, f"of {sae.n_latents}"
    yield "overlap", found.overlap, "latents that both use over those that either uses; 1 the same"


METRIC = Metric(
    name="amortization_gap",
    about="error of the encoder beside searched codes (slow)",
    units={
        "encoder_error": "",
        "searched_error": "",
        "gap": "",
        "encoder_l0": "latents / token",
        "overlap": "",
    },
    measure=_scores,
    default=False,  # tokens x k x n x d multiply-adds
)
