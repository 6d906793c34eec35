"""Difference-of-means directions: what distinguishes two sets of prompts, at every layer and last token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mergelab.abliteration.prompts import PromptBatch, Prompts
from mergelab.activations.kept import DEFAULT_RULE, TokenRule
from mergelab.activations.passes import TokenBatch, passes
from mergelab.errors import MergelabError, NonFiniteError
from mergelab.models.model import Model, Params
from mergelab.models.residual_stream import require_decoder

__all__ = ["Directions", "find_directions", "mean_activations"]

_SAME = 1e-5
"""A difference below this part of the means is rounding: at layer 0 the last token is the same everywhere."""


@dataclass(frozen=True)
class Directions:
    """Means of the stream before each block, over two sets of prompts.

    Attributes:
        harmful: float64 `[positions, layers, width]`; the last position is the prompt's last token.
        harmless: the same, of the other set.
        orthogonal: whether the difference loses its part along the harmless mean.
    """

    harmful: np.ndarray
    harmless: np.ndarray
    orthogonal: bool = False

    @property
    def raw(self) -> np.ndarray:
        """`mean(harmful) - mean(harmless)`, float32 `[positions, layers, width]`: what `induce` adds.

        Exactly zero where the two means are equal up to rounding.
        """
        difference = self.harmful - self.harmless
        size = np.maximum(_norm(self.harmful), _norm(self.harmless))
        difference = np.where(_norm(difference) > _SAME * size, difference, 0.0)
        if self.orthogonal:
            mean = self.harmless / np.maximum(_norm(self.harmless), np.finfo(np.float64).tiny)
            rest = difference - (difference * mean).sum(-1, keepdims=True) * mean
            difference = np.where(_norm(rest) > _SAME * _norm(difference), rest, 0.0)
        return difference.astype(np.float32)

    @property
    def valid(self) -> np.ndarray:
        """Bool `[positions, layers]`: where there is a direction at all."""
        return _norm(self.raw)[..., 0] > 0

    @property
    def unit(self) -> np.ndarray:
        """The directions at length 1, float32 `[positions, layers, width]`; zero where there is none."""
        raw = self.raw
        return raw / np.where(self.valid, _norm(raw)[..., 0], 1.0)[..., None].astype(np.float32)


def _norm(x: np.ndarray) -> np.ndarray:
    return np.linalg.norm(x, axis=-1, keepdims=True)


def find_directions(
    model: Model,
    params: Params,
    harmful: Prompts,
    harmless: Prompts,
    *,
    positions: int = 1,
    batch: int = 32,
    winsorize: float | None = None,
    orthogonal: bool = False,
    rule: TokenRule = DEFAULT_RULE,
) -> Directions:
    """The directions from `harmless` to `harmful` prompts.

    Args:
        model: a decoder.
        params: its parameters, on any mesh.
        harmful: prompts with the property.
        harmless: prompts without it.
        positions: number of last tokens to look at (`post_instruction_tokens`).
        batch: prompts in one forward pass.
        winsorize: clip each activation vector to this quantile of its own magnitudes before averaging, such
            as 0.995: a few enormous coordinates (as Gemma has) would else decide every direction.
        orthogonal: Whether each difference is first made orthogonal to the harmless mean, so that the model
            keeps this component, which all prompts have.
        rule: `max_norm_multiple` of it leaves attention sinks out of each mean. Positions and special tokens
            count here: the last tokens are markers of chats.

    Raises:
        MergelabError: the model is an encoder, a prompt has no `positions` tokens behind its first, or the
            quantile is none.
        NonFiniteError: an activation is NaN or infinite.

    Reference: Arditi et al. 2024, arXiv:2406.11717, section 2.3.
    """
    means = [
        mean_activations(
            model, params, prompts, positions=positions, batch=batch, winsorize=winsorize, rule=rule
        )
        for prompts in (harmful, harmless)
    ]
    return Directions(means[0], means[1], orthogonal)


def mean_activations(
    model: Model,
    params: Params,
    prompts: Prompts,
    *,
    positions: int = 1,
    batch: int = 32,
    winsorize: float | None = None,
    rule: TokenRule = DEFAULT_RULE,
) -> np.ndarray:
    """Mean over prompts of the stream before each block, at the last tokens: `[positions, layers, width]`.

    Sums are float32 within a batch and float64 between batches. Arguments and errors are those of
    `find_directions`.
    """
    require_decoder(model)
    if not 1 <= positions < prompts.shortest:
        raise MergelabError(
            f"the last {positions} tokens were asked for, but the shortest prompt has {prompts.shortest}, of "
            "which the first does not count (models keep an attention sink there, many times longer than all "
            "else, which would be most of a mean); ask for fewer, and at least 1, or give longer prompts."
        )
    if winsorize is not None and not 0 < winsorize <= 1:
        raise MergelabError(f"winsorize is {winsorize}; expected a quantile above 0 and at most 1.")

    sites = tuple(f"blocks.{i}.resid_pre" for i in range(model.config.n_layers))
    keep, read = _LastTokens(positions), _Summed(sites, winsorize is not None)

    def summed(some: Sequence[tuple[PromptBatch, np.ndarray]]) -> list[tuple[np.ndarray, np.ndarray]]:
        quantile = np.float32(winsorize or 1.0)
        given = [TokenBatch(part.tokens, part.mask, extra=(counted, quantile)) for part, counted in some]
        found = passes(model, params, given, sites, keep=keep, read=read)
        return [
            (np.asarray(total, np.float64), np.asarray(norms)[: part.real])
            for (part, _), (total, norms) in zip(some, found, strict=True)
        ]

    layers = model.config.n_layers
    parts = list(prompts.batches(batch))
    shape = (positions, layers)
    counted = [
        np.repeat(np.arange(len(part.tokens)) < part.real, positions * layers).reshape(-1, *shape)
        for part in parts
    ]
    found = summed(list(zip(parts, counted, strict=True)))
    sums, norms = [total for total, _ in found], [lengths for _, lengths in found]
    kept = len(prompts) - np.zeros((positions, layers, 1))
    if rule.max_norm_multiple is not None and np.isfinite(np.sum(sums)):
        limit = rule.max_norm_multiple * np.median(np.concatenate(norms), axis=0)
        again: dict[int, tuple[PromptBatch, np.ndarray]] = {}
        for number, (part, lengths) in enumerate(zip(parts, norms, strict=True)):
            long = lengths > np.where(limit > 0, limit, np.inf)
            if long.any():  # rare: the batch is run again without them
                there = counted[number].copy()
                there[: part.real] &= ~long
                again[number] = part, there
                kept -= long.sum(axis=0)[..., None]
        for number, (total, _) in zip(again, summed(list(again.values())) if again else (), strict=True):
            sums[number] = total
    total = np.sum(sums, axis=0)
    if not np.isfinite(total).all():
        layer = int(np.argwhere(~np.isfinite(total))[0, 1])
        raise NonFiniteError(
            f"activations of 'blocks.{layer}.resid_pre' are not finite; load the weights as float32."
        )
    return total / kept


@dataclass(frozen=True)
class _LastTokens:
    """Keeps the last tokens of a stream, float32 `[batch, positions, width]`."""

    positions: int

    def __call__(self, value: Array, extra: Any) -> Array:
        return value[:, -self.positions :].astype(jnp.float32)


@dataclass(frozen=True)
class _Summed:
    """Sums over the counted rows of a batch, and the norms of all."""

    sites: tuple[str, ...]
    clip: bool

    def __call__(
        self, model: Model, params: Params, kept: Mapping[str, Array], extra: Any
    ) -> tuple[Float[Array, "positions layers width"], Float[Array, "batch positions layers"]]:
        counted, quantile = extra
        x = jnp.stack([kept[site] for site in self.sites], axis=2)
        if self.clip:
            bound = jnp.quantile(jnp.abs(x), quantile, axis=-1, keepdims=True)
            x = jnp.clip(x, -bound, bound)
        return jnp.sum(jnp.where(counted[..., None], x, 0.0), axis=0), jnp.linalg.norm(x, axis=-1)
