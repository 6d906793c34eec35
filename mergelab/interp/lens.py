"""What the stream of every layer already predicts: the logit lens, and the tuned lens that undoes drift.

The logit lens reads a stream as if it were the last (nostalgebraist 2020). The tuned lens first applies an
affine translator per site, trained so that the reading agrees with the model's own prediction (Belrose et al.
2023, arXiv:2303.08112).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float

from mergelab.activations.batches import batches
from mergelab.activations.capture import Patterns, check_prompts, stream_sites
from mergelab.activations.losses import UNEMBEDDED, kl_of_log_probabilities
from mergelab.activations.passes import TokenBatch, passes
from mergelab.compat import register_dataclass
from mergelab.errors import SiteError
from mergelab.models.model import Model, Params
from mergelab.models.residual_stream import logits_of, readout, require_decoder
from mergelab.models.streamed import StreamedParams
from mergelab.models.token_checks import check_tokens

__all__ = ["LensReading", "TunedLens", "logit_lens", "read_lens", "train_tuned_lens"]

STREAMS = "blocks.*.resid_post"


@partial(register_dataclass, data_fields=["kernels", "biases"], meta_fields=["sites"])
@dataclass(frozen=True)
class TunedLens:
    """A translator `h -> h + h @ kernel + bias` for each site; zeros are the logit lens.

    Attributes:
        kernels: float32 `[sites, width, width]`.
        biases: float32 `[sites, width]`.
        sites: names, in forward order.
    """

    kernels: Float[Array, "sites width width"]
    biases: Float[Array, "sites width"]
    sites: tuple[str, ...]

    @classmethod
    def identity(cls, model: Model, sites: Patterns = STREAMS) -> TunedLens:
        """The logit lens of these sites.

        Raises:
            SiteError: a site is not a stream of the model's width, or the model is an encoder.
        """
        require_decoder(model)
        names, width = stream_sites(model, sites), model.config.d_model
        for name in names:
            if model.sites()[name][2:] != (width,):
                raise SiteError(
                    f"the site {name!r} has shape {list(model.sites()[name])}; a lens reads streams of shape "
                    f"[batch, length, {width}]."
                )
        return cls(jnp.zeros((len(names), width, width)), jnp.zeros((len(names), width)), names)

    def translate(self, number: Any, stream: Array) -> Array:
        """`[..., width]` at the `number`-th site -> what stands for it at the end, float32."""
        stream = stream.astype(jnp.float32)
        moved = jnp.einsum("...i,ij->...j", stream, self.kernels[number], precision="highest")
        return stream + moved + jnp.broadcast_to(self.biases[number], stream.shape)


@dataclass(frozen=True)
class LensReading:
    """How well each site predicts, as means over tokens, in nats.

    Attributes:
        sites: names, in forward order.
        kl: `[sites]`, `KL(model || lens)` of the next-token distributions.
        cross_entropy: `[sites]`, of the next token under the lens; NaN for prompts of one token.
        agreement: `[sites]`, the part of the tokens at which lens and model put the same token first.
    """

    sites: tuple[str, ...]
    kl: np.ndarray
    cross_entropy: np.ndarray
    agreement: np.ndarray


def logit_lens(
    model: Model,
    params: Params,
    tokens: Any,
    sites: Patterns = STREAMS,
    *,
    lens: TunedLens | None = None,
    mask: Any = None,
) -> dict[str, Array]:
    """Logits read from each site: float32 `[batch, length, vocab]` by name.

    All of them are held at once; for a text, `read_lens` measures them site by site.

    Args:
        model: a decoder.
        params: its parameters.
        tokens: `[batch, length]`.
        sites: names or patterns; the lens's own where one is given.
        lens: translators; none by default.
        mask: True for real tokens, `[batch, length]`; what is read at padding has no meaning.

    Raises:
        SiteError: as `TunedLens.identity`; or the mask is not of the tokens' shape.
        TokenError: tokens beyond the vocabulary or the learned positions.
    """
    lens = TunedLens.identity(model, sites) if lens is None else lens
    tokens, real = check_prompts(model, tokens, mask)
    given = None if mask is None else jnp.asarray(real)
    streams = model.apply(
        params, jnp.asarray(tokens, jnp.int32), mask=given, capture=lens.sites, logits=False
    ).captured
    behind = params.outer() if isinstance(params, StreamedParams) else params
    return {
        name: readout(model, behind, lens.translate(i, streams[name])) for i, name in enumerate(lens.sites)
    }


def read_lens(
    model: Model,
    params: Params,
    tokens: Any,
    lens: TunedLens | None = None,
    *,
    mask: Any = None,
    batch: int = 16,
) -> LensReading:
    """Measures a lens on a text.

    Args:
        model: a decoder.
        params: its parameters, on any mesh.
        tokens: `[prompts, length]`.
        lens: what to measure; by default the logit lens after every block.
        mask: True for real tokens.
        batch: prompts in one pass; the logits of one site are held at a time.

    Raises:
        SiteError: as `TunedLens.identity`.
    """
    lens = TunedLens.identity(model) if lens is None else lens
    tokens, real = check_prompts(model, tokens, mask)
    total = np.zeros((3, len(lens.sites)))
    predicted = (real[:, 1:] & real[:, :-1]).sum()
    given = []
    for rows, count in batches(len(tokens), batch):
        counted = real[rows] & (np.arange(len(rows)) < count)[:, None]
        extra = _weights(lens), tokens[rows], counted
        given.append(TokenBatch(tokens[rows], real[rows], extra=extra))
    wanted = (*lens.sites, UNEMBEDDED)
    for found in passes(model, params, given, wanted, read=_Measured(lens.sites)):
        total += np.asarray(found, np.float64).T
    with np.errstate(invalid="ignore"):
        cross_entropy = total[1] / predicted
    return LensReading(lens.sites, total[0] / real.sum(), cross_entropy, total[2] / real.sum())


def train_tuned_lens(
    model: Model,
    params: Params,
    batches: Iterator[Any],
    *,
    sites: Patterns = STREAMS,
    steps: int = 250,
    learning_rate: float = 1e-3,
    start: TunedLens | None = None,
) -> tuple[TunedLens, np.ndarray]:
    """Trains translators to agree with the model: Adam on `KL(model || lens)`, linear decay to 0.

    The model's parameters stay as they are. Sites are taken one after the other within a step, so that the
    logits of one of them are held at a time.

    Args:
        model: a decoder.
        params: its parameters, on any mesh.
        batches: tokens `[batch, length]`, all of one shape.
        sites: names or patterns, after which to read.
        steps: batches to train on.
        learning_rate: learning rate of the first step.
        start: go on from these; the identity by default.

    Returns:
        The lens, and float32 `[steps, sites]`: the loss of every step, in nats per token.

    Raises:
        SiteError: as `TunedLens.identity`.
    """
    lens = TunedLens.identity(model, sites) if start is None else start
    optimizer = optax.adam(optax.linear_schedule(learning_rate, 0.0, steps))
    state = optimizer.init(_weights(lens))

    @jax.jit
    def step(params: Params, lens: TunedLens, state: Any, tokens: Array) -> tuple[TunedLens, Any, Array]:
        losses, gradients = _losses_and_gradients(model, params, lens, tokens)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to its integer step count
            updates, state = optimizer.update(gradients, state)
        kernels, biases = jax.tree.map(jnp.add, _weights(lens), updates)
        return TunedLens(kernels, biases, lens.sites), state, losses

    losses = []
    for _ in range(steps):
        tokens = next(batches)
        check_tokens(model, tokens, place="training batches")
        lens, state, loss = step(params, lens, state, jnp.asarray(tokens, jnp.int32))
        losses.append(loss)
    return lens, np.asarray(jax.device_get(losses), np.float32)


def _weights(lens: TunedLens) -> tuple[Array, Array]:
    return lens.kernels, lens.biases


def _streams(
    model: Model, params: Params, lens: TunedLens, tokens: Array, mask: Array | None
) -> tuple[Array, Array]:
    """The streams `[sites, batch, length, width]`, and the model's own log-probabilities."""
    out = model.apply(params, tokens, mask=mask, capture=lens.sites)
    assert out.logits is not None
    return jnp.stack([out.captured[name] for name in lens.sites]), jax.nn.log_softmax(out.logits)


def _losses_and_gradients(
    model: Model, params: Params, lens: TunedLens, tokens: Array
) -> tuple[Array, tuple[Array, Array]]:
    streams, own = _streams(model, params, lens, tokens, None)

    def loss(weights: tuple[Array, Array], stream: Array) -> Array:
        kernel, bias = weights
        read = TunedLens(kernel[None], bias[None], lens.sites).translate(0, stream)
        return kl_of_log_probabilities(own, jax.nn.log_softmax(readout(model, params, read))).mean()

    return jax.lax.map(lambda pair: jax.value_and_grad(loss)(*pair), (_weights(lens), streams))


@dataclass(frozen=True)
class _Measured:
    """Sums over the counted tokens of KL, cross-entropy and agreement: `[sites, 3]`."""

    sites: tuple[str, ...]

    def __call__(self, model: Model, params: Params, kept: Mapping[str, Array], extra: Any) -> Array:
        weights, tokens, counted = extra
        streams = jnp.stack([kept[site] for site in self.sites])
        own = jax.nn.log_softmax(logits_of(model, params, kept[UNEMBEDDED]))
        lens = TunedLens(weights[0], weights[1], self.sites)
        return _sums(model, params, lens, streams, own, tokens, counted)


def _sums(
    model: Model,
    params: Params,
    lens: TunedLens,
    streams: Array,
    own: Array,
    tokens: Array,
    counted: Array,
) -> Array:
    weight = counted.astype(jnp.float32)
    following = weight[:, 1:] * weight[:, :-1]

    def one(triple: tuple[Array, Array, Array]) -> Array:
        kernel, bias, stream = triple
        read = TunedLens(kernel[None], bias[None], lens.sites).translate(0, stream)
        logp = jax.nn.log_softmax(readout(model, params, read))
        kl = kl_of_log_probabilities(own, logp)
        next_token = -jnp.take_along_axis(logp[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
        same = (logp.argmax(-1) == own.argmax(-1)).astype(jnp.float32)
        return jnp.stack([(kl * weight).sum(), (next_token * following).sum(), (same * weight).sum()])

    return jax.lax.map(one, (lens.kernels, lens.biases, streams))
