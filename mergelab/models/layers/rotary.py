"""Rotary position embeddings (arXiv:2104.09864), and how frequencies are scaled for long contexts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

__all__ = [
    "LinearScaling",
    "Llama3Scaling",
    "LongRopeScaling",
    "ProportionalScaling",
    "Rotary",
    "Scaling",
    "YarnScaling",
    "rotary_tables",
    "rotate",
]


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (Chen et al., arXiv:2306.15595): all frequencies divided by `factor`."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's scaling: low frequencies divided by `factor`, high ones kept, a ramp between.

    A frequency is low or high by how often it turns within `original_length` positions: below
    `low_freq_factor` times, or above `high_freq_factor` times.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al., arXiv:2309.00071): a ramp in the frequencies' index, and a longer query and key.

    Attributes:
        factor: how much longer the context is than `original_length`.
        original_length: positions before scaling.
        beta_fast, beta_slow: turns within `original_length` above which a frequency is kept, and below which
            it is divided by `factor`.
        attention_factor: what the rotated queries and keys are multiplied with.
        truncate: whether the ends of the ramp are rounded outward to whole indices.
    """

    factor: float
    original_length: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE (Ding et al., arXiv:2402.13753): every frequency has its own divisor, in two sets.

    Attributes:
        short: divisors of rows no longer than `original_length`.
        long: divisors of longer rows.
        original_length: positions before scaling.
        attention_factor: what the rotated queries and keys are multiplied with.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_length: int
    attention_factor: float


@dataclass(frozen=True)
class ProportionalScaling:
    """Gemma 4's rotation of part of a head: the first `kept` frequencies divided by `factor`, the rest 0.

    The frequencies are those of the whole head, and so are the pairs.
    """

    kept: int
    factor: float = 1.0


Scaling = LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling | ProportionalScaling


@dataclass(frozen=True)
class Rotary:
    """How one layer rotates its queries and keys.

    Attributes:
        theta: the base of the frequencies.
        dim: number of leading components of a head that are rotated (even).
        scaling: how the frequencies are changed, if at all.
        neighbors: whether pairs are components `2i` and `2i + 1` (GPT-J, GLM), and not `i` and `i + dim / 2`.
    """

    theta: float
    dim: int
    scaling: Scaling | None = None
    neighbors: bool = False


def rotary_tables(
    positions: Int[Array, "batch length"], rotary: Rotary
) -> tuple[Float[Array, "batch length half"], Float[Array, "batch length half"]]:
    """Cosine and sine of `position * frequency`, times the scaling's factor on attention; float32."""
    exponents = np.arange(0, rotary.dim, 2, dtype=np.float32) / np.float32(rotary.dim)
    plain = (1.0 / np.float32(rotary.theta) ** exponents).astype(np.float32)
    factor = 1.0
    match rotary.scaling:
        case None:
            frequencies = jnp.asarray(plain)
        case LinearScaling(divisor):
            frequencies = jnp.asarray(plain / np.float32(divisor))
        case ProportionalScaling(kept, divisor):
            turning = np.arange(len(plain)) < kept
            frequencies = jnp.asarray(np.where(turning, plain / np.float32(divisor), np.float32(0)))
        case Llama3Scaling() as scaling:
            frequencies = jnp.asarray(_llama3(plain, scaling))
        case YarnScaling(attention_factor=factor) as scaling:
            frequencies = jnp.asarray(_yarn(plain, rotary, scaling))
        case LongRopeScaling(short, long, original_length, factor):
            is_long = positions.max(axis=1) >= original_length
            both = jnp.asarray(plain / np.asarray([short, long], np.float32))
            frequencies = both[is_long.astype(jnp.int32)][:, None]
    if frequencies.ndim == 1:
        frequencies = frequencies[None, None]
    angles = positions.astype(jnp.float32)[:, :, None] * frequencies
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(
    x: Float[Array, "batch length heads head_dim"],
    cos: Float[Array, "batch length half"],
    sin: Float[Array, "batch length half"],
    neighbors: bool = False,
) -> Float[Array, "batch length heads head_dim"]:
    """Rotates pairs of each head's first `2 half` components: (`i`, `i + half`), or (`2i`, `2i + 1`)."""
    dim = 2 * cos.shape[-1]
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned = x[..., :dim].astype(jnp.float32)
    if neighbors:
        first, second = turned[..., ::2], turned[..., 1::2]
        pairs = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
        pairs = pairs.reshape(turned.shape)
    else:
        first, second = jnp.split(turned, 2, axis=-1)
        pairs = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([pairs.astype(x.dtype), x[..., dim:]], axis=-1)


def _llama3(plain: np.ndarray, s: Llama3Scaling) -> np.ndarray:
    turns = s.original_length * plain / (2 * math.pi)
    kept = np.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0, 1)
    return (kept * plain + (1 - kept) * plain / s.factor).astype(np.float32)


def _yarn(plain: np.ndarray, rotary: Rotary, s: YarnScaling) -> np.ndarray:
    def index_of(turns: float) -> float:
        """The (fractional) frequency index that turns this often within the original length."""
        position = math.log(s.original_length / (turns * 2 * math.pi)) / math.log(rotary.theta)
        return rotary.dim / 2 * position

    low, high = index_of(s.beta_fast), index_of(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary.dim - 1)
    divided = np.clip((np.arange(rotary.dim // 2) - low) / max(high - low, 1e-3), 0, 1)
    return ((1 - divided) * plain + divided * plain / s.factor).astype(np.float32)
