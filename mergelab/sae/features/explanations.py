"""Explanations of latents as token patterns: what they promise at each token, and how often that is true."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mergelab.sae.activation_functions import is_active

__all__ = ["LatentExplanation", "Match", "Pattern", "judge_explanation", "mean_match"]

Tokens = tuple[int | None, ...]

_VALUE = "value"


@dataclass(frozen=True)
class Pattern:
    """A sequence of tokens around the active one; None stands for any token.

    Attributes:
        tokens: tokens in reading order, up to the active one.
        activation: mean activation of the examples it comes from.
        after: those after the active one, which only an encoder can need.
    """

    tokens: Tokens
    activation: float
    after: Tokens = ()


@dataclass(frozen=True)
class LatentExplanation:
    """The patterns of a latent."""

    latent: int
    patterns: tuple[Pattern, ...]

    @cached_property
    def _trie(self) -> dict[Any, Any]:
        """Patterns read backwards from the active token; a node may end several, which differ after it."""
        root: dict[Any, Any] = {}
        for pattern in self.patterns:
            node = root
            for token in reversed(pattern.tokens):
                node = node.setdefault(token, {})
            node.setdefault(_VALUE, []).append(pattern)
        return root

    def simulate(self, tokens: Sequence[int]) -> np.ndarray:
        """The activation the patterns promise at each token of a context: float32 `[length]`.

        Of the patterns that match, the longest counts, and of those the strongest; 0 where none does.
        """
        found = np.zeros(len(tokens), np.float32)
        for end in range(len(tokens)):
            nodes, at = [self._trie], end
            best = (0, 0.0)
            while nodes and at >= 0:
                nodes = [node[step] for node in nodes for step in (tokens[at], None) if step in node]
                at -= 1
                for pattern in (pattern for node in nodes for pattern in node.get(_VALUE, ())):
                    if _matches(pattern.after, tokens[end + 1 :]):
                        size = len(pattern.tokens) + len(pattern.after)
                        best = max(best, (size, pattern.activation))
            found[end] = best[1]
        return found


def _matches(after: Tokens, tokens: Sequence[int]) -> bool:
    if len(after) > len(tokens):
        return False
    return all(wanted is None or wanted == token for wanted, token in zip(after, tokens, strict=False))


@dataclass(frozen=True)
class Match:
    """How well an explanation tells where its latent is active.

    Attributes:
        precision: fraction of the tokens it names where the latent is active; NaN if it names none.
        recall: fraction of the tokens where the latent is active that it names; NaN if there are none.
        active: tokens where the latent is active.
    """

    precision: float
    recall: float
    active: int


def judge_explanation(simulated: np.ndarray, codes: np.ndarray) -> Match:
    """Compares simulated with true activations of one latent, on text the explanation is not made of.

    Args:
        simulated: activations from `LatentExplanation.simulate`, of any shape.
        codes: true activations, of the same shape.
    """
    said, active = is_active(simulated), is_active(codes)
    hits = int((said & active).sum())
    named, there = int(said.sum()), int(active.sum())
    return Match(hits / named if named else float("nan"), hits / there if there else float("nan"), there)


def mean_match(matches: Iterable[Match]) -> tuple[float, float]:
    """Mean precision, of the explanations that name a token, and mean recall, of the latents that are active.

    NaN where there are none.
    """
    found = list(matches)
    return _mean([match.precision for match in found]), _mean([match.recall for match in found])


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")
