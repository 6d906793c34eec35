"""Explains latents by token patterns (N2G, Foote et al., arXiv 2305.19911, constants of arXiv 2406.04093).

An example is cut off after its strongest token and shortened to the shortest suffix that keeps half of the
activation; tokens of it that may be masked without losing half become wildcards. The patterns of a latent
form a trie read backwards from the active token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mergelab.models.model import Model
from mergelab.sae.dictionary import Dictionary
from mergelab.sae.evaluation.examples import Example
from mergelab.sae.evaluation.host import check_reads
from mergelab.sae.model_source import ModelActivations

__all__ = ["Explanation", "Match", "Pattern", "explain", "judge_explanation"]

KEPT = 0.5
"""The part of an activation that a suffix keeps; a token is a wildcard if masking it costs less than it."""

_VALUE = "value"


@dataclass(frozen=True)
class Pattern:
    """A sequence of tokens that ends in the active one.

    Attributes:
        tokens: in reading order; None stands for any token.
        activation: mean activation of the examples it comes from.
    """

    tokens: tuple[int | None, ...]
    activation: float


@dataclass(frozen=True)
class Explanation:
    """The patterns of a latent."""

    latent: int
    patterns: tuple[Pattern, ...]

    @cached_property
    def _trie(self) -> dict[Any, Any]:
        root: dict[Any, Any] = {}
        for pattern in self.patterns:
            node = root
            for token in reversed(pattern.tokens):
                node = node.setdefault(token, {})
            node[_VALUE] = pattern.activation
        return root

    def simulate(self, tokens: Sequence[int]) -> np.ndarray:
        """The activation the patterns promise at each token of a context: float32 `[length]`.

        Of the patterns that match, the longest counts, and of those the strongest; 0 where none does.
        """
        found = np.zeros(len(tokens), np.float32)
        for end in range(len(tokens)):
            nodes, at = [self._trie], end
            while nodes and at >= 0:
                nodes = [node[step] for node in nodes for step in (tokens[at], None) if step in node]
                promised = [node[_VALUE] for node in nodes if _VALUE in node]
                if promised:
                    found[end] = max(promised)
                at -= 1
        return found


@dataclass(frozen=True)
class Match:
    """How well an explanation tells where its latent is active.

    Attributes:
        precision: of the tokens it names, the part where the latent is active; NaN if it names none.
        recall: of the tokens where the latent is active, the part it names; NaN if there are none.
        active: tokens where the latent is active.
    """

    precision: float
    recall: float
    active: int


def judge_explanation(simulated: np.ndarray, codes: np.ndarray) -> Match:
    """Compares simulated with true activations of one latent, on text the explanation is not made of.

    Args:
        simulated: from `Explanation.simulate`, of any shape.
        codes: of the same shape.
    """
    said, active = simulated > 0, codes > 0
    hits = int((said & active).sum())
    named, there = int(said.sum()), int(active.sum())
    return Match(hits / named if named else float("nan"), hits / there if there else float("nan"), there)


def explain(
    dictionary: Dictionary,
    source: ModelActivations,
    examples: Mapping[int, Sequence[Example]],
    *,
    mask_token: int,
) -> dict[int, Explanation]:
    """Explanations of latents from their examples; all examples of all latents share forward passes.

    Args:
        dictionary: reads the first of the source's sites.
        source: the model; its `batch` is the number of variants of examples in one pass.
        examples: by latent, such as `survey` finds.
        mask_token: takes the place of a token to see what it does, such as the tokenizer's padding.

    Raises:
        SAEError: the dictionary does not fit the site.
    """
    check_reads(dictionary, source)
    activation = _Activation(dictionary, source)
    cut = [
        (latent, list(example.tokens[: int(np.argmax(example.codes)) + 1]))
        for latent, found in examples.items()
        for example in found
        if example.peak > 0
    ]
    suffixes = [(latent, tokens[start:]) for latent, tokens in cut for start in range(len(tokens))]
    values = activation(suffixes)
    shortest: list[tuple[int, list[int]]] = []
    reference: list[float] = []
    at = 0
    for latent, tokens in cut:
        mine = values[at : at + len(tokens)]
        at += len(tokens)
        start = int(np.flatnonzero(mine >= KEPT * mine[0]).max())
        shortest.append((latent, tokens[start:]))
        reference.append(float(mine[0]))
    masked = [
        (latent, [*tokens[:i], mask_token, *tokens[i + 1 :]])
        for latent, tokens in shortest
        for i in range(len(tokens))
    ]
    whole, without = activation(shortest), activation(masked)
    patterns: dict[int, dict[tuple[int | None, ...], list[float]]] = {latent: {} for latent in examples}
    at = 0
    for (latent, tokens), full, peak in zip(shortest, whole, reference, strict=True):
        saliency = 1 - without[at : at + len(tokens)] / max(full, np.finfo(np.float32).tiny)
        at += len(tokens)
        pattern = _pattern(tokens, saliency)
        patterns[latent].setdefault(pattern, []).append(peak)
    return {
        latent: Explanation(latent, tuple(Pattern(p, float(np.mean(v))) for p, v in found.items()))
        for latent, found in patterns.items()
    }


def _pattern(tokens: Sequence[int], saliency: np.ndarray) -> tuple[int | None, ...]:
    needed = saliency >= KEPT
    if not needed.any():
        return (tokens[-1],)  # no token alone is needed; a pattern of wildcards would match everything
    first = int(np.argmax(needed))
    return tuple(token if need else None for token, need in zip(tokens[first:], needed[first:], strict=True))


class _Activation:
    """The activation of a latent on the last token of short texts, in passes of one shape."""

    def __init__(self, dictionary: Dictionary, source: ModelActivations) -> None:
        self.dictionary, self.source = dictionary, source

    def __call__(self, texts: Sequence[tuple[int, Sequence[int]]]) -> np.ndarray:
        """Pairs of latent and tokens -> float32 `[texts]`."""
        batch, length = self.source.batch, self.source.tokens.shape[1]
        found = [np.zeros(0, np.float32)]
        for start in range(0, len(texts), batch):
            part = texts[start : start + batch]
            tokens, mask = np.zeros((batch, length), np.int32), np.zeros((batch, length), bool)
            mask[:, 0] = True  # also of the rows that fill up the last pass
            latents = np.zeros(batch, np.int32)
            for row, (latent, ids) in enumerate(part):
                tokens[row, : len(ids)], mask[row, : len(ids)], latents[row] = ids, True, latent
            arrays = (jnp.asarray(part) for part in (tokens, mask, latents))
            values = _last_activation(
                self.source.params,
                self.dictionary,
                *arrays,
                model=self.source.model,
                site=self.source.sites[0],
            )
            found.append(np.asarray(values)[: len(part)])
        return np.concatenate(found)


@partial(jax.jit, static_argnames=("model", "site"))
def _last_activation(
    params: Any,
    dictionary: Dictionary,
    tokens: Array,
    mask: Array,
    latents: Array,
    *,
    model: Model,
    site: str,
) -> Array:
    x = model.apply(params, tokens, mask=mask, capture=[site], logits=False).captured[site]
    rows = jnp.arange(len(tokens))
    last = mask.sum(axis=1, dtype=jnp.int32) - 1
    return dictionary.encode(x[rows, last].astype(jnp.float32))[rows, latents]
