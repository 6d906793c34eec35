"""What is read inside a model while it writes, and what a trace is worth by it: a probe, latents, a lens.

A reading is one number in every step, off the sites of the pass that chooses the step's token: what the model
holds of the text before that token. So a verifier costs no pass of its own, and it can score a trace, guide a
search among unfinished ones, or end one (`above`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial

from mergelab.decoding.monitors import Monitor
from mergelab.decoding.transforms import require
from mergelab.decoding.votes import lowest_group_confidence, step_score
from mergelab.interp.probes import Probe
from mergelab.models.decoder import exit_parts
from mergelab.models.model import Model, Params
from mergelab.models.residual_stream import readout, require_decoder
from mergelab.models.sites import match_sites
from mergelab.sae.sae import SAE

__all__ = [
    "How",
    "Reading",
    "confidence_reading",
    "entropy_reading",
    "latent_reading",
    "lens_reading",
    "log_probability_reading",
    "monitor_of",
    "probe_reading",
]

How = Literal["last", "min", "product", "mean", "exp_mean", "lowest"]


@dataclass(frozen=True)
class Reading:
    """One number of every step, and how those of a trace become its worth.

    Attributes:
        name: name in tables and logs.
        sites: sites that `read` takes.
        read: captured sites, each `[batch, ...]`, to numbers `[batch]`; None takes the log-probability of
            each token.
        how: worth of a trace: the number at its last token; the least, or the product, of those at the ends
            of its steps; the mean over tokens; e to that mean; or the lowest mean of `window` tokens in a
            row.
        above: bound beyond which a trace ends; None for no bound.
        window: number of tokens of `lowest`.
    """

    name: str
    sites: tuple[str, ...] = ()
    read: Partial | None = None
    how: How = "last"
    above: float | None = None
    window: int = 2048

    def __post_init__(self) -> None:
        require(f"Reading({self.name}, how)", self.how, self.how in get_args(How), ", ".join(get_args(How)))

    def worth(self, values: Any, ends: Sequence[int] = ()) -> float:
        """Worth of a trace.

        Args:
            values: the numbers of its tokens, `[tokens]`.
            ends: places of the tokens that end its steps; the last token always ends one.

        Raises:
            DecodingError: there are no tokens, or a product is asked for of what is no probability.
        """
        numbers = np.asarray(values, np.float64).reshape(-1)
        require(f"{self.name}(values)", numbers.size, numbers.size >= 1, "at least one token")
        if self.how == "lowest":
            return lowest_group_confidence(numbers, self.window)
        if self.how in ("mean", "exp_mean"):
            mean = float(numbers.mean())
            return float(np.exp(mean)) if self.how == "exp_mean" else mean
        if self.how == "last":
            return float(numbers[-1])
        at_ends = numbers[sorted({*ends, numbers.size - 1})]
        return float(at_ends.min()) if self.how == "min" else step_score(at_ends, "product")


def log_probability_reading() -> Reading:
    """The geometric mean of the probabilities that the model gives the tokens it chose."""
    return Reading("logprob", how="exp_mean")


def entropy_reading(above: float | None = None) -> Reading:
    """Exponential of the negative mean entropy of the next-token distributions, in nats.

    Args:
        above: negative entropy above which a trace ends.
    """
    return Reading("entropy", ("logits",), Partial(_negative_entropy), "exp_mean", above)


def confidence_reading(k: int = 20, window: int = 2048) -> Reading:
    """DeepConf's confidence (arXiv:2508.15260): the mean of `-log p` of the `k` likeliest tokens.

    The worth of a trace is the lowest mean over `window` tokens in a row.

    Args:
        k: number of tokens.
        window: number of tokens in a row.
    """
    require("confidence_reading(k)", k, k >= 1, "at least 1")
    return Reading("confidence", ("logits",), Partial(_Confidence(k)), "lowest", window=window)


def probe_reading(probe: Probe, site: str, how: How = "last", *, name: str | None = None) -> Reading:
    """The probability that a probe gives: that the trace comes to the right answer, if it was fitted to that.

    Args:
        probe: log-odds of one target (`mergelab.interp.fit_logistic`).
        site: site that it reads, `[batch, length, width]`.
        how: worth of a trace.
        name: name in tables; `probe` with the site by default.
    """
    return Reading(name or f"probe:{site}", (site,), Partial(_Probability(site), probe), how)


def latent_reading(sae: SAE, site: str, latents: Sequence[int], how: How = "mean") -> Reading:
    """The sum `s` of the activations of some latents of an SAE, as `s / (1 + s)`.

    Args:
        sae: an autoencoder.
        site: site that it reads.
        latents: numbers of the latents.
        how: worth of a trace.
    """
    bad = [latent for latent in latents if not 0 <= latent < sae.n_latents]
    require(
        "latent_reading", list(latents)[:8], bool(latents) and not bad, f"latents 0 to {sae.n_latents - 1}"
    )
    read = Partial(_Latents(site), sae, jnp.asarray(latents, jnp.int32))
    return Reading(f"latents:{','.join(map(str, latents))}", (site,), read, how)


def lens_reading(
    model: Model,
    params: Params,
    site: str,
    *,
    tokens: Sequence[int] | None = None,
    how: How = "mean",
    above: float | None = None,
) -> Reading:
    """How far a layer has settled: the probability that its logit lens gives the model's own next token.

    With `tokens` (the letters of choices, say) it is the probability of the likeliest of them under the lens:
    with a bound `above`, a trace ends once the layer has settled on an answer.

    Args:
        model: a decoder.
        params: its parameters.
        site: a stream, such as `blocks.3.resid_post`.
        tokens: tokens of which one is the answer.
        how: worth of a trace.
        above: probability above which a trace ends.

    Raises:
        SiteError: there is no such site.
    """
    require_decoder(model)
    (name,) = match_sites(model.sites(), site)
    kept = {key: params[key] for key in exit_parts(model.config) if key in params}
    if tokens is None:
        return Reading(f"lens:{name}", (name, "logits"), Partial(_Lens(model, name), kept), how, above)
    read = Partial(_LensOf(model, name), kept, jnp.asarray(tokens, jnp.int32))
    return Reading(f"lens:{name}", (name,), read, how, above)


def monitor_of(readings: Sequence[Reading]) -> tuple[Monitor | None, tuple[str, ...]]:
    """One monitor for all readings that look inside, in their order; and the sites that it takes."""
    inside = [one for one in readings if one.read is not None]
    if not inside:
        return None, ()
    sites = tuple(dict.fromkeys(site for one in inside for site in one.sites))
    bounds = [np.inf if one.above is None else one.above for one in inside]
    return Monitor(
        Partial(_SideBySide(), tuple(one.read for one in inside)), np.array(bounds, np.float32)
    ), sites


# Classes of no state, or of what is static: equal ones are one function to jit.


@dataclass(frozen=True)
class _SideBySide:
    def __call__(self, reads: tuple[Partial, ...], captured: Mapping[str, Array]) -> Array:
        return jnp.stack([read(captured).astype(jnp.float32) for read in reads], axis=1)


def _negative_entropy(captured: Mapping[str, Array]) -> Array:
    log_probs = jax.nn.log_softmax(captured["logits"].astype(jnp.float32), axis=-1)
    return (jnp.exp(log_probs) * log_probs).sum(axis=-1)


@dataclass(frozen=True)
class _Confidence:
    k: int

    def __call__(self, captured: Mapping[str, Array]) -> Array:
        log_probs = jax.nn.log_softmax(captured["logits"].astype(jnp.float32), axis=-1)
        return -jax.lax.top_k(log_probs, min(self.k, log_probs.shape[-1]))[0].mean(axis=-1)


@dataclass(frozen=True)
class _Probability:
    site: str

    def __call__(self, probe: Probe, captured: Mapping[str, Array]) -> Array:
        return jax.nn.sigmoid(probe(captured[self.site])[:, 0])


@dataclass(frozen=True)
class _Latents:
    site: str

    def __call__(self, sae: SAE, latents: Array, captured: Mapping[str, Array]) -> Array:
        codes = sae.encode(captured[self.site].astype(jnp.float32))[:, latents]
        total = jnp.maximum(codes.sum(axis=1), 0.0)
        return total / (1.0 + total)


@dataclass(frozen=True)
class _Lens:
    model: Model
    site: str

    def __call__(self, params: Params, captured: Mapping[str, Array]) -> Array:
        own = jnp.argmax(captured["logits"], axis=-1)[:, None]
        read = jax.nn.log_softmax(readout(self.model, params, captured[self.site]), axis=-1)
        return jnp.exp(jnp.take_along_axis(read, own, axis=1)[:, 0])


@dataclass(frozen=True)
class _LensOf:
    model: Model
    site: str

    def __call__(self, params: Params, tokens: Array, captured: Mapping[str, Array]) -> Array:
        read = jax.nn.softmax(readout(self.model, params, captured[self.site]), axis=-1)
        return read[:, tokens].max(axis=1)
