"""Numbers read off a model in every step of a generation: to look at afterwards, and to end rows by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from mergelab.decoding.transforms import require, transform

__all__ = ["Monitor", "confidence_monitor", "margin_monitor", "monitor"]

Read = Callable[[Mapping[str, Array]], Array]


@transform
class Monitor:
    """What to read in each step off the sites that `generate(capture=...)` names; build it with `monitor`.

    Attributes:
        read: captured sites, each `[batch, ...]`, to numbers `[batch, readings]`; a pytree.
        above: float32 `[readings]`; a row ends with the token in whose pass a reading exceeds its bound.
            Infinity records only.
    """

    read: Partial
    above: ArrayLike

    @property
    def readings(self) -> int:
        """Numbers of one step."""
        return np.shape(self.above)[0]

    def __call__(self, captured: Mapping[str, Array]) -> Float[Array, "batch readings"]:
        """The numbers of a step, float32."""
        return self.read(captured).astype(jnp.float32)

    def ends(self, read: Float[Array, "batch readings"]) -> Bool[Array, " batch"]:
        """True for the rows that end."""
        return (read > jnp.asarray(self.above, jnp.float32)[None]).any(axis=1)


def monitor(read: Read, *, readings: int = 1, above: float | None = None) -> Monitor:
    """Reads `readings` numbers in every step, and ends a row where one of them exceeds `above`.

    A probe, a latent of an SAE or a lens is a function of captured sites; give one that holds arrays as
    `jax.tree_util.Partial(function, *arrays)`, so that other arrays compile nothing anew.

    Args:
        read: captured sites, each `[batch, ...]` of one token a row, to numbers `[batch, readings]`.
        readings: how many numbers that are.
        above: bound that ends a row; never if None.

    Raises:
        DecodingError: there are no readings, or the bound is NaN.
    """
    require("monitor(readings)", readings, readings >= 1, "at least 1")
    bound = float("inf") if above is None else float(above)
    require("monitor(above)", above, bound == bound, "a number")
    function = read if isinstance(read, Partial) else Partial(read)
    return Monitor(function, np.full(readings, bound, np.float32))


def margin_monitor() -> Monitor:
    """Margin of the likeliest next token over the second, in probability (Wang and Zhou, arXiv:2402.10200).

    It reads the site `logits`.
    """
    return monitor(_margin)


def confidence_monitor(k: int = 20, *, below: float | None = None) -> Monitor:
    """DeepConf's confidence, negated: the mean log-probability of the `k` likeliest tokens (2508.15260).

    It reads the site `logits`. The confidence itself, the mean of `-log p`, is high where all but the
    likeliest tokens are very unlikely.

    Args:
        k: number of tokens.
        below: confidence below which a row ends; never if None. DeepConf compares means over a window
            (`mergelab.decoding.lowest_group_confidence`), which is less easily ended by one token.

    Raises:
        DecodingError: `k` is not positive.
    """
    require("confidence_monitor(k)", k, k >= 1, "at least 1")
    return monitor(_MeanOfTop(k), above=None if below is None else -below)


def _margin(captured: Mapping[str, Array]) -> Array:
    best = jax.lax.top_k(jax.nn.softmax(captured["logits"].astype(jnp.float32), axis=-1), 2)[0]
    return best[:, :1] - best[:, 1:]


@dataclass(frozen=True)
class _MeanOfTop:
    k: int

    def __call__(self, captured: Mapping[str, Array]) -> Array:
        log_probs = jax.nn.log_softmax(captured["logits"].astype(jnp.float32), axis=-1)
        best = jax.lax.top_k(log_probs, min(self.k, log_probs.shape[-1]))[0]
        return best.mean(axis=-1, keepdims=True)
