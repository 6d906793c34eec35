"""One model read on the contexts: how much of each latent, with what loss, and what an added vector does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial

from mergelab.activations.batches import filled_batches
from mergelab.activations.harvest import side_by_side
from mergelab.activations.losses import UNEMBEDDED
from mergelab.activations.passes import TokenBatch
from mergelab.activations.passes import passes as run_passes
from mergelab.models.model import Model, Params
from mergelab.models.residual_stream import logits_of
from mergelab.sae.normalizations import normalized
from mergelab.sae.sae import SAE
from mergelab.sae.splice import anonymous, encode

__all__ = ["ModelReading", "SharedContexts", "codes_at", "losses_with", "passes", "read_model", "rotated"]


@dataclass(frozen=True)
class SharedContexts:
    """The text, the same for all models.

    Attributes:
        tokens: int32 `[contexts, length]`.
        kept: bool `[contexts, length]`, tokens whose latents count.
        targets: bool `[contexts, length - 1]`, next tokens whose loss counts.
        site: site that the SAE reads.
        batch: contexts in one forward pass.
    """

    tokens: np.ndarray
    kept: np.ndarray
    targets: np.ndarray
    site: str
    batch: int = 8


@dataclass(frozen=True)
class ModelReading:
    """What a model does on the contexts.

    Attributes:
        fired: fraction of each context's kept tokens at which each latent is active: `[contexts, latents]`.
        mean: mean code over them: `[contexts, latents]`.
        turned: `mean` of the control, the same SAE in a randomly turned space.
        losses: mean loss of each context's targets, in nats: `[contexts]`.
    """

    fired: np.ndarray
    mean: np.ndarray
    turned: np.ndarray
    losses: np.ndarray

    @property
    def loss(self) -> float:
        """Mean over contexts."""
        return float(self.losses.mean())


def passes(
    model: Model,
    params: Params,
    contexts: SharedContexts,
    added: Callable[[int, int], np.ndarray] | None = None,
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Forward passes one after the other: the contexts, the site's activations, and each context's loss.

    Args:
        model: a decoder.
        params: its parameters.
        contexts: the text.
        added: function of the first context and the one after the last, to vectors that are added at the
            site: `[contexts, length, width]`.

    Yields:
        Numbers of the contexts, float32 `[contexts, length, width]`, and float64 `[contexts]`.
    """
    parts = list(filled_batches(contexts.batch, contexts.tokens, contexts.targets))

    def batches() -> Iterator[TokenBatch]:
        start = 0
        for (tokens, targets), count in parts:
            vectors = jnp.zeros((), jnp.float32)
            if added is not None:
                given = added(start, start + count)
                vectors = jnp.asarray(np.pad(given, ((0, len(tokens) - count), (0, 0), (0, 0))), jnp.float32)
            edit = {contexts.site: Partial(_add, vectors)}
            yield TokenBatch(
                jnp.asarray(tokens), edit=edit, extra=(jnp.asarray(tokens), jnp.asarray(targets))
            )
            start += count

    found = run_passes(model, params, batches(), (contexts.site, UNEMBEDDED), read=_Read(contexts.site))
    start = 0
    for ((_, targets), count), (x, nats) in zip(parts, found, strict=True):
        per_target = np.asarray(nats, np.float64)[:count] / np.maximum(targets[:count].sum(axis=1), 1)
        yield slice(start, start + count), np.asarray(x)[:count], per_target
        start += count


@dataclass(frozen=True)
class _Read:
    """The activations of a site, and each context's summed loss."""

    site: str

    def __call__(
        self, model: Model, params: Params, kept: Mapping[str, Array], extra: tuple[Array, Array]
    ) -> tuple[Array, Array]:
        tokens, targets = extra
        logits = logits_of(model, params, kept[UNEMBEDDED])
        logp = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
        nats = -jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)[..., 0]
        x = side_by_side(kept[self.site]).astype(jnp.float32)
        return x, jnp.where(targets, nats, 0.0).sum(axis=1)


def _add(vectors: Array, x: Array) -> Array:
    if vectors.ndim == 0:
        return x
    return (x.astype(jnp.float32) + vectors.reshape(x.shape)).astype(x.dtype)


def rotated(sae: SAE, center: np.ndarray, seed: int) -> SAE:
    """Control: an SAE that reads the space turned at random about a point: directions of no meaning.

    Norms, thresholds and the sizes of the codes' inputs are those of the SAE.
    """
    width = len(center)
    turn, upper = np.linalg.qr(np.random.default_rng([seed, 2]).standard_normal((width, width)))
    turn = (turn * np.sign(np.diag(upper))).astype(np.float32)
    middle = np.asarray(sae.b_dec) if sae.config.subtract_b_dec else np.zeros(width, np.float32)
    # (R (x - c) + c - m) W + b, with m what the SAE subtracts itself.
    weights = turn.T @ np.asarray(sae.W_enc)
    shift = (center - middle) @ np.asarray(sae.W_enc) - (center - middle) @ weights
    return replace(sae, W_enc=jnp.asarray(weights), b_enc=sae.b_enc + jnp.asarray(shift, jnp.float32))


def read_model(
    sae: SAE, control: SAE | None, model: Model, params: Params, contexts: SharedContexts
) -> ModelReading:
    """Reads all of the contexts once.

    Args:
        sae: SAE of the site.
        control: what `rotated` gives, or None for none yet.
        model: the model.
        params: its parameters.
        contexts: the text.
    """
    count, latents = len(contexts.tokens), sae.n_latents
    fired, mean, turned = (np.zeros((count, latents), np.float32) for _ in range(3))
    losses = np.zeros(count)
    plain = anonymous(sae)
    other = None if control is None else anonymous(control)
    for here, x, nats in passes(model, params, contexts):
        losses[here] = nats
        kept = contexts.kept[here]
        weights = kept / np.maximum(kept.sum(axis=1, keepdims=True), 1)
        for number, row in enumerate(range(here.start, here.stop)):
            codes = np.asarray(encode(plain, jnp.asarray(x[number])))
            fired[row] = weights[number] @ (codes > 0)
            mean[row] = weights[number] @ codes
            if other is not None:
                turned[row] = weights[number] @ np.asarray(encode(other, jnp.asarray(x[number])))
    return ModelReading(fired, mean, turned, losses)


def codes_at(
    sae: SAE, model: Model, params: Params, contexts: SharedContexts, latents: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Codes of some latents at every token, 0 where none counts, and the length of a code's unit there.

    Returns:
        Float32 `[contexts, length, latents]`, and `[contexts, length, 1]`: 1, or the scale of the token where
        the SAE reads normalized tokens.
    """
    plain = anonymous(sae)
    found: list[np.ndarray] = []
    units: list[np.ndarray] = []
    for here, x, _ in passes(model, params, contexts):
        codes = [np.asarray(encode(plain, jnp.asarray(row)))[:, latents] for row in x]
        found.append(np.where(contexts.kept[here][..., None], np.stack(codes), np.float32(0)))
        scale = normalized(sae.config.normalization, jnp.asarray(x.reshape(-1, x.shape[-1])))[2]
        one = np.ones((*x.shape[:2], 1), np.float32)
        units.append(one if scale is None else np.asarray(scale).reshape(one.shape))
    return np.concatenate(found), np.concatenate(units)


def losses_with(
    model: Model, params: Params, contexts: SharedContexts, added: Callable[[int, int], np.ndarray]
) -> np.ndarray:
    """Loss of each context, in nats a target, with vectors added at the site, as in `passes`."""
    return np.concatenate([nats for _, _, nats in passes(model, params, contexts, added)])
