"""What is minimized: the surprise of next tokens that count, and the distance to a teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Bool, Float, Int

from mergelab.activations.losses import LOGIT_BYTES, UNEMBEDDED, kl_of_log_probabilities
from mergelab.models.model import Model, Params
from mergelab.models.residual_stream import logits_of
from mergelab.tuning.lora import Factors, with_factors

__all__ = ["Sums", "TokenLoss", "WindowLoss"]

Sums = tuple[Array, Array, Array, Array]
"""Sums over the targets of one pass: of what is minimized, cross-entropies, KL divergences, and ones."""

Apply = Callable[[Any, Int[Array, "batch length"]], Float[Array, "batch length vocab"]]


@dataclass(frozen=True)
class WindowLoss:
    """The loss of any function from tokens to logits, on windows `[batch, length + 1]` of which all count.

    Attributes:
        apply: `(params, tokens) -> logits`; the same object compiles once.
    """

    apply: Apply

    def __call__(self, trained: Any, fixed: Any, windows: Int[Array, "batch length_plus_1"]) -> Sums:
        logits = self.apply(trained, windows[:, :-1])
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).sum()
        return nats, nats, jnp.zeros((), nats.dtype), jnp.asarray(windows[:, 1:].size, nats.dtype)


@dataclass(frozen=True)
class TokenLoss:
    """The loss of a model, or of its LoRA factors, on contexts; hashable, without arrays.

    Attributes:
        model: a decoder.
        dtypes: dtype of each parameter in the forward pass, in the order of the tree's leaves, where the
            parameters are trained; float32, in which they are, if None.
        factors: the modules that have factors and their scale; None where the parameters are trained.
        teacher: model of the teacher; None for none.
        kl: weight of `KL(teacher || model)` beside the cross-entropy.
    """

    model: Model
    dtypes: tuple[str, ...] | None = None
    factors: Factors | None = None
    teacher: Model | None = None
    kl: float = 0.0

    def params(self, trained: Any, fixed: Any) -> Params:
        """The parameters of the forward pass: jittable, differentiable in what is trained."""
        if self.factors is not None:
            return with_factors(self.factors, fixed["params"], trained)
        if self.dtypes is None:
            return trained
        leaves, tree = jax.tree.flatten(trained)
        return tree.unflatten([leaf.astype(kind) for leaf, kind in zip(leaves, self.dtypes, strict=True)])

    def __call__(self, trained: Any, fixed: Any, batch: tuple[Array, Array]) -> Sums:
        """Sums over the targets of a batch.

        Args:
            trained: parameters or factors, float32.
            fixed: what is not trained: `params` beside factors, and `teacher`.
            batch: tokens int32 `[batch, length]`, and which targets count, bool `[batch, length - 1]`.
        """
        tokens, counted = batch
        params = self.params(trained, fixed)
        passes = [(self.model, params, _hidden(self.model, params, tokens))]
        if self.teacher is not None:
            other = fixed["teacher"]
            passes.append((self.teacher, other, _hidden(self.teacher, other, tokens)))
        ce, kl = _losses(passes, tokens[:, 1:], counted)
        return ce + jnp.float32(self.kl) * kl, ce, kl, counted.sum(dtype=jnp.float32)


def _hidden(
    model: Model, params: Params, tokens: Int[Array, "batch length"]
) -> Float[Array, "batch length_less_1 width"]:
    """What the unembedding reads at every token that another follows."""
    return model.apply(params, tokens, capture=[UNEMBEDDED], logits=False).captured[UNEMBEDDED][:, :-1]  # pyright: ignore[reportReturnType]


def _losses(
    passes: list[tuple[Model, Params, Array]],
    targets: Int[Array, "batch length"],
    counted: Bool[Array, "batch length"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Summed cross-entropy of the first pass, and `KL(second || first)`; logits are made in pieces.

    A piece is some positions of all rows, so that rows stay on their devices; its logits are made once more
    for the gradient, which holds none of them.
    """
    rows, length = targets.shape
    each = 4 * len(passes) * rows * max(model.config.vocab_size for model, _, _ in passes)
    piece = max(1, min(length, LOGIT_BYTES // each))
    count = -(-length // piece)

    def pieces(x: Array) -> Array:
        padded = jnp.pad(x, ((0, 0), (0, count * piece - length), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(padded.reshape(rows, count, piece, *x.shape[2:]), 1, 0)

    models = [model for model, _, _ in passes]
    params = [params for _, params, _ in passes]

    @jax.checkpoint
    def one(params: list[Params], hidden: list[Array], wanted: Array, here: Array) -> tuple[Array, Array]:
        logp = [
            jax.nn.log_softmax(logits_of(model, each, x), axis=-1)
            for model, each, x in zip(models, params, hidden, strict=True)
        ]
        ce = -jnp.take_along_axis(logp[0], wanted[..., None], axis=-1)[..., 0]
        kl = kl_of_log_probabilities(logp[1], logp[0]) if len(logp) > 1 else jnp.zeros_like(ce)
        return jnp.sum(jnp.where(here, ce, 0.0)), jnp.sum(jnp.where(here, kl, 0.0))

    def add(
        sums: tuple[Array, Array], given: tuple[list[Array], Array, Array]
    ) -> tuple[tuple[Array, Array], None]:
        ce, kl = one(params, *given)
        return (sums[0] + ce, sums[1] + kl), None

    given = [pieces(hidden) for _, _, hidden in passes], pieces(targets), pieces(counted)
    zero = jnp.zeros((), jnp.float32)
    if count == 1:
        first: Any = jax.tree.map(lambda x: x[0], given)
        return one(params, *first)
    sums, _ = jax.lax.scan(add, (zero, zero), given)
    return sums
