"""Explains latents by token patterns (N2G, Foote et al., arXiv 2305.19911, constants of arXiv 2406.04093).

An example is cut off after its strongest token and shortened to the shortest suffix that keeps half of the
activation; tokens of it that may be masked without losing half become wildcards. An encoder sees what comes
after a token too: its examples are not cut off but shortened from both ends, first from the left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mergelab.activations.model_activations import ModelActivations
from mergelab.models.model import Model
from mergelab.sae.features.explanations import LatentExplanation, Match, Pattern, judge_explanation
from mergelab.sae.features.survey import Example
from mergelab.sae.sae import SAE
from mergelab.sae.splice import encode_batches

__all__ = ["AlteredText", "explain", "find_patterns", "match_explanations"]

KEPT = 0.5
"""The fraction of an activation that a cut keeps; a token is a wildcard if masking it costs less than it."""

_LENGTH_STEP = 16  # lengths are padded to a multiple of this, so that few of them are compiled


@dataclass(frozen=True)
class AlteredText:
    """A text of which one latent's activation at one token is asked.

    Attributes:
        latent: number of the latent.
        tokens: the text.
        at: the token's place.
    """

    latent: int
    tokens: tuple[int, ...]
    at: int


@dataclass(frozen=True)
class _Case:
    """An example, and the window `[start, stop)` of it that is left; what is outside `[low, high)` stays."""

    latent: int
    tokens: tuple[int, ...]
    at: int
    low: int
    high: int
    start: int
    stop: int
    activation: float = 0.0

    @classmethod
    def of(cls, latent: int, example: Example, *, causal: bool, framed: bool, first: int) -> _Case:
        at = int(np.argmax(example.codes))
        tokens = example.tokens[: at + 1] if causal else example.tokens
        low, high = (1, len(tokens) - 1) if framed and not causal else (0, len(tokens))
        # A token moved to a position that does not count would be an attention sink.
        low = max(low, min(first, at))
        return cls(latent, tokens, at, low, high, low, high)

    def variant(self) -> AlteredText:
        tokens = self.tokens[: self.low] + self.tokens[self.start : self.stop] + self.tokens[self.high :]
        at = self.at
        if at >= self.high:
            at += self.low + self.stop - self.start - self.high
        elif at >= self.low:
            at += self.low - self.start
        return AlteredText(self.latent, tokens, at)

    def starts(self) -> list[_Case]:
        """Shortened from the left, the shortest first."""
        last = min(max(self.at, self.low), self.high)
        return [replace(self, start=start) for start in range(last, self.low - 1, -1)]

    def stops(self) -> list[_Case]:
        """Shortened from the right, the shortest first."""
        first = min(max(self.at + 1, self.start), self.high)
        return [replace(self, stop=stop) for stop in range(first, self.high + 1)]

    def places(self) -> list[int]:
        """The tokens that may belong to the pattern."""
        return sorted({*range(self.start, self.stop), self.at})

    def masked(self, place: int, mask_token: int) -> _Case:
        tokens = (*self.tokens[:place], mask_token, *self.tokens[place + 1 :])
        return replace(self, tokens=tokens)

    def pattern(self, saliency: np.ndarray) -> tuple[tuple[int | None, ...], tuple[int | None, ...]]:
        """The tokens up to the active one, and those after it, from the first to the last that is needed."""
        places = self.places()
        needed = [place for place, value in zip(places, saliency, strict=True) if value >= KEPT]
        if not needed:
            return (self.tokens[self.at],), ()  # a pattern of wildcards would match everything
        first, last = min(*needed, self.at), max(*needed, self.at)
        shown = [
            self.tokens[place] if place in needed else None for place in places if first <= place <= last
        ]
        return tuple(shown[: self.at - first + 1]), tuple(shown[self.at - first + 1 :])


def find_patterns(
    examples: Mapping[int, Sequence[Example]],
    activation: Callable[[Sequence[AlteredText]], np.ndarray],
    *,
    mask_token: int,
    causal: bool = True,
    framed: bool = False,
    first: int = 0,
) -> dict[int, LatentExplanation]:
    """The patterns of latents whose activation can be asked for any text.

    Args:
        examples: examples by latent.
        activation: float32 `[variants]`; it is asked a few times for many variants at once.
        mask_token: token that takes the place of another to see what it does.
        causal: whether tokens see only what comes before them.
        framed: whether the first and the last token of each context always stay (`ModelActivations.framed`).
        first: number of first tokens of each context that always stay (`TokenRule.skip_positions`).
    """

    def ask(groups: Sequence[Sequence[_Case]]) -> list[np.ndarray]:
        values = activation([case.variant() for group in groups for case in group])
        return np.split(values, np.cumsum([len(group) for group in groups])[:-1]) if groups else []

    cases = [
        _Case.of(latent, example, causal=causal, framed=framed, first=first)
        for latent, found in examples.items()
        for example in found
        if example.peak > 0
    ]
    cases = [
        replace(case, activation=float(values[0]))
        for case, values in zip(cases, ask([[case] for case in cases]), strict=True)
    ]
    whole = [case.activation for case in cases]
    cases = _shortest([case.starts() for case in cases], whole, ask)
    if not causal:
        cases = _shortest([case.stops() for case in cases], whole, ask)
    masked = ask([[case.masked(place, mask_token) for place in case.places()] for case in cases])
    made: dict[int, dict[tuple[Any, Any], list[float]]] = {latent: {} for latent in examples}
    for case, without, full in zip(cases, masked, whole, strict=True):
        saliency = 1 - without / max(case.activation, float(np.finfo(np.float32).tiny))
        made[case.latent].setdefault(case.pattern(saliency), []).append(full)
    return {
        latent: LatentExplanation(
            latent, tuple(Pattern(p, float(np.mean(v)), after) for (p, after), v in kept.items())
        )
        for latent, kept in made.items()
    }


def _shortest(
    groups: Sequence[Sequence[_Case]],
    whole: Sequence[float],
    ask: Callable[[Sequence[Sequence[_Case]]], list[np.ndarray]],
) -> list[_Case]:
    """The first of each group that keeps enough of the whole example's activation, as its last does."""
    found = [group[-1] for group in groups]
    pending, begin, end = list(range(len(groups))), 0, 4
    while pending:  # most need few tokens: the long ones are asked for the rest only
        asked = ask([groups[i][begin:end] for i in pending])
        missing = []
        for i, values in zip(pending, asked, strict=True):
            enough = np.flatnonzero(values >= KEPT * whole[i])
            if len(enough):
                case = groups[i][begin + int(enough[0])]
                found[i] = replace(case, activation=float(values[enough[0]]))
            elif end < len(groups[i]):
                missing.append(i)
        pending, begin, end = missing, end, 2 * end
    return found


def explain(
    sae: SAE,
    source: ModelActivations,
    examples: Mapping[int, Sequence[Example]],
    *,
    mask_token: int,
) -> dict[int, LatentExplanation]:
    """Explanations of latents from their examples; all examples of all latents share forward passes.

    Args:
        sae: SAE that reads the first of the source's sites.
        source: the model; its `batch` is the number of variants of examples in one pass.
        examples: examples by latent, such as `survey` finds.
        mask_token: token that takes the place of another to see what it does, such as `Tokenizer.mask_id`.
    """
    causal = source.model.causal
    activation = partial(_activations, sae, source)
    return find_patterns(
        examples,
        activation,
        mask_token=mask_token,
        causal=causal,
        framed=source.framed,
        first=source.rule.skip_positions,
    )


def match_explanations(
    sae: SAE, source: ModelActivations, explanations: Sequence[LatentExplanation]
) -> tuple[Match, ...]:
    """Precision and recall of explanations on a text, without running the model beyond the site.

    Args:
        sae: SAE that reads the first of the source's sites.
        source: model and text; a text the explanations are not made of.
        explanations: explanations in any order, which the result has too.

    Raises:
        SAEError: the SAE does not fit the site.
    """
    latents = np.array([explanation.latent for explanation in explanations], np.int64)
    pieces = [(codes[kept][:, latents], kept) for codes, kept in encode_batches(sae, source)]
    codes = np.concatenate([codes for codes, _ in pieces])
    kept = np.concatenate([kept for _, kept in pieces])
    contexts = source.tokens.tolist()
    return tuple(
        judge_explanation(
            np.concatenate([explanation.simulate(tokens) for tokens in contexts])[kept], codes[:, i]
        )
        for i, explanation in enumerate(explanations)
    )


def _activations(sae: SAE, source: ModelActivations, variants: Sequence[AlteredText]) -> np.ndarray:
    """Float32 `[variants]`, in passes of few shapes: texts of like length run together."""
    batch, most = source.batch, source.tokens.shape[1]
    order = sorted(range(len(variants)), key=lambda i: len(variants[i].tokens))
    found = np.zeros(len(variants), np.float32)
    for begin in range(0, len(order), batch):
        part = order[begin : begin + batch]
        length = min(most, -(-len(variants[part[-1]].tokens) // _LENGTH_STEP) * _LENGTH_STEP)
        tokens, mask = np.zeros((batch, length), np.int32), np.zeros((batch, length), bool)
        mask[:, 0] = True  # also of the rows that fill up the last pass
        latents, places = np.zeros(batch, np.int32), np.zeros(batch, np.int32)
        for row, i in enumerate(part):
            variant = variants[i]
            tokens[row, : len(variant.tokens)] = variant.tokens
            mask[row, : len(variant.tokens)] = True
            latents[row], places[row] = variant.latent, variant.at
        arrays = (jnp.asarray(array) for array in (tokens, mask, latents, places))
        values = _activation_at(source.params, sae, *arrays, model=source.model, site=source.sites[0])
        found[part] = np.asarray(values)[: len(part)]
    return found


@partial(jax.jit, static_argnames=("model", "site"))
def _activation_at(
    params: Any,
    sae: SAE,
    tokens: Array,
    mask: Array,
    latents: Array,
    places: Array,
    *,
    model: Model,
    site: str,
) -> Array:
    x = model.apply(params, tokens, mask=mask, capture=[site], logits=False).captured[site]
    rows = jnp.arange(len(tokens))
    return sae.encode(x[rows, places].astype(jnp.float32))[rows, latents]
