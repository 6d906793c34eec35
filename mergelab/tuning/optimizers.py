"""Optimizers by name: gradients clipped, a learning rate that rises and falls, decay of matrices only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

__all__ = ["Optimizer", "is_inner_matrix"]

_TABLES = ("embed", "positions", "token_types", "unembed")
"""Places in a model's tree whose matrices are tables of tokens: Muon is for maps between activations."""

_RMS = 0.2
"""Root mean square of Muon's updates, in learning rates: that of Adam's, so that both share a rate
(Liu et al. 2025, arXiv:2502.16982)."""


@dataclass(frozen=True)
class Optimizer:
    """An optimizer of `steps` steps; hashable, so that equal ones share compiled programs.

    The learning rate rises from 0 in `warmup_steps`, and falls by a cosine to a tenth of its peak.

    Attributes:
        steps: number of steps.
        learning_rate: peak of the learning rate.
        warmup_steps: steps in which it rises.
        weight_decay: decay, on leaves of two and more axes.
        clip_norm: global norm that gradients are scaled down to.
        beta2: decay of Adam's mean squared gradient.
        kind: `adamw`; or `muon` (Jordan et al. 2024) for the matrices of the blocks, AdamW for all else.
    """

    steps: int
    learning_rate: float
    warmup_steps: int = 0
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    beta2: float = 0.999
    kind: Literal["adamw", "muon"] = "adamw"

    def rate(self) -> optax.Schedule:
        """The learning rate by the number of steps done."""
        peak, least = self.learning_rate, 0.1 * self.learning_rate
        if not self.warmup_steps:
            return optax.cosine_decay_schedule(peak, max(self.steps, 1), alpha=0.1)
        return optax.warmup_cosine_decay_schedule(0.0, peak, self.warmup_steps, self.steps, end_value=least)

    def build(self) -> optax.GradientTransformation:
        """The transformation of gradients."""
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), self._update())

    def _update(self) -> optax.GradientTransformation:
        rate, decay = self.rate(), self.weight_decay
        if self.kind == "adamw":
            return optax.adamw(rate, b2=self.beta2, weight_decay=decay, mask=_matrices)
        return muon(
            rate,
            weight_decay=decay,
            adam_b2=self.beta2,
            muon_weight_dimension_numbers=_muon_axes,
            consistent_rms=_RMS,
        )


def _matrices(params: Any) -> Any:
    """True for the leaves that weight decay applies to: all but biases and the norms' scales."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _muon_axes(params: Any) -> Any:
    """The axes of matrices that Muon makes orthogonal; None for leaves that go to AdamW."""

    def axes(path: Any, leaf: Any) -> MuonDimensionNumbers | None:
        if not is_inner_matrix(path, leaf):
            return None
        return MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)  # experts before them are apart

    return jax.tree_util.tree_map_with_path(axes, params)


def is_inner_matrix(path: tuple[Any, ...], leaf: Any) -> bool:
    """Whether a leaf is a matrix, or a stack of them, that maps activations to activations."""
    return leaf.ndim > 1 and not any(getattr(key, "key", None) in _TABLES for key in path)
