"""Tokens that tell models, or layers of one, apart: contrastive decoding and DoLa."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key

from mergelab.decoding.generation import Generated, begin_samples, generated_of
from mergelab.decoding.generation_state import NO_CACHE, step_places
from mergelab.decoding.passes import Reader, check_one_rotation
from mergelab.decoding.samplers import Sampler, greedy
from mergelab.decoding.spread import on_host
from mergelab.decoding.steps import grown_alone
from mergelab.decoding.stop import Stop, stop_at
from mergelab.decoding.transforms import Chain, History, Logits, LogitsTransform, require, transform
from mergelab.errors import DecodingError
from mergelab.models.decoder import exit_parts
from mergelab.models.model import Model, Params
from mergelab.models.residual_stream import readout, require_decoder
from mergelab.models.sites import Edit, as_partials, match_sites

__all__ = ["Contrast", "LayerContrast", "generate_contrastive", "layer_contrast"]


@transform
class Contrast:
    """What a strong model likes better than a weak one, among the tokens that the strong one finds plausible.

    `expert * logits - amateur * theirs` where `p >= alpha * max p`, `-inf` elsewhere. With weights 1 and 1 it
    is contrastive decoding (Li et al., arXiv:2210.15097); with `1 + beta` and `beta` it is that of
    O'Brien and Lewis (2309.09117).

    Attributes:
        theirs: float32 `[batch, vocab]`, the weak model's logits of the same texts.
        alpha: plausibility, from 0 (any token) to 1 (the likeliest alone).
        expert, amateur: the two weights.
    """

    theirs: ArrayLike
    alpha: ArrayLike
    expert: ArrayLike
    amateur: ArrayLike

    def __call__(self, logits: Logits, history: History) -> Logits:
        contrasted = logits * self.expert - jnp.asarray(self.theirs, jnp.float32) * self.amateur
        return _plausible(logits, contrasted, self.alpha)


@dataclass(frozen=True)
class LayerContrast:
    """What DoLa needs of a generation.

    Attributes:
        transform: the first transform of a sampler: `greedy(dola.transform)`.
        capture: sites to capture: `generate(..., capture=dola.capture)`.
    """

    transform: LogitsTransform
    capture: tuple[str, ...]


@transform
class _Dola:
    """See `layer_contrast`.

    Attributes:
        model: static.
        params: those that read the stream.
        sites: early streams, static.
        alpha: plausibility.
    """

    params: Any
    alpha: ArrayLike
    model: Model = field(metadata={"static": True})
    sites: tuple[str, ...] = field(metadata={"static": True})

    def __call__(self, logits: Logits, history: History) -> Logits:
        late = jax.nn.log_softmax(logits, axis=-1)
        streams = jnp.stack([history.captured[site] for site in self.sites])
        early = jax.nn.log_softmax(readout(self.model, self.params, streams), axis=-1)
        middle = jnp.logaddexp(early, late[None]) - jnp.log(2.0).astype(jnp.float32)

        def divergence(x: Array) -> Array:
            return jnp.sum(jnp.exp(x) * (x - middle), axis=-1)

        apart = divergence(early) + divergence(jnp.broadcast_to(late[None], early.shape))
        furthest = jnp.argmax(apart, axis=0)
        chosen = jnp.take_along_axis(early, furthest[None, :, None], axis=0)[0]
        return _plausible(logits, late - chosen, self.alpha)


def layer_contrast(
    model: Model, params: Params, layers: Sequence[int] | None = None, *, alpha: float = 0.1
) -> LayerContrast:
    """DoLa: what the last layer says beyond an early one (Chuang et al., arXiv:2309.03883).

    In each step, of the early layers the one whose reading differs most from the model's own
    (Jensen-Shannon) is subtracted: `log p - log p_early` where `p >= alpha * max p`, `-inf` elsewhere.

    Args:
        model: a decoder.
        params: its parameters.
        layers: candidates, as numbers of blocks after which the stream is read; by default every second
            one of the first half.
        alpha: plausibility, from 0 (any token) to 1 (the likeliest alone).

    Raises:
        DecodingError: no layer, one that does not exist or is the last, or `alpha` is out of its range.
        SiteError: the model is an encoder.
    """
    require_decoder(model)
    count = model.config.n_layers
    layers = range(0, max(count // 2, 1), 2) if layers is None else layers
    good = len(layers) > 0 and all(0 <= layer < count - 1 for layer in layers)
    require("layer_contrast(layers)", list(layers), good, f"layers from 0 to {count - 2}, at least one")
    require("layer_contrast(alpha)", alpha, 0 <= alpha <= 1, "a number from 0 to 1")
    sites = tuple(match_sites(model.sites(), f"blocks.{layer}.resid_post")[0] for layer in layers)
    reads = {name: params[name] for name in exit_parts(model.config) if name in params}
    return LayerContrast(_Dola(reads, np.float32(alpha), model, sites), sites)


def generate_contrastive(
    model: Model,
    params: Params,
    amateur: Model,
    amateur_params: Params,
    tokens: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    max_new_tokens: int,
    alpha: float = 0.1,
    beta: float | None = 0.5,
    sampler: Sampler | None = None,
    key: Key[Array, "*batch"] | int = 0,
    stop: Stop | None = None,
    edit: Mapping[str, Edit] | None = None,
    pad_id: int = 0,
    samples: int = 1,
    log_probs: bool = False,
) -> Generated:
    """Continues every prompt with what the model likes better than a weaker one does (`Contrast`).

    Args:
        model: a decoder.
        params: its parameters.
        amateur: a weaker decoder with the same vocabulary.
        amateur_params: its parameters.
        tokens: int `[batch, length]`, padded on the left (`pad_prompts`).
        mask: bool `[batch, length]`, True for real tokens; None if there is no padding.
        max_new_tokens: largest number of tokens that are generated per row.
        sampler: choice among the contrasted logits; `greedy()` by default.
        key: a seed or a key, folded with the row's number; or one key per row of the result.
        stop: rule that ends rows; never by default.
        edit: edits of the model, as in `generate`; the weaker one is not edited.
        pad_id: token that fills `Generated.tokens` after a row's end.
        samples: number of continuations of each prompt, which is read once by each of the two.
        alpha: plausibility, from 0 (any token) to 1 (the likeliest alone).
        beta: strength: `(1 + beta) * logits - beta * theirs`; None for `logits - theirs`.
        log_probs: whether the model's own log-probabilities are kept.

    Raises:
        DecodingError: as `generate`; the vocabularies differ, or `alpha` or `beta` is out of its range.
    """
    theirs, ours = amateur.config.vocab_size, model.config.vocab_size
    if theirs != ours:
        raise DecodingError(
            f"the weaker model has a vocabulary of {theirs} tokens and the model one of {ours}; the two must "
            "have one vocabulary."
        )
    require("generate_contrastive(alpha)", alpha, 0 <= alpha <= 1, "a number from 0 to 1")
    finite = beta is None or 0 <= beta < float("inf")
    require("generate_contrastive(beta)", beta, finite, "a number of at least 0, or None")
    stop, sampler = stop or stop_at(), sampler or greedy()
    require("generate_contrastive(stop)", "a monitor", stop.monitor is None, "a rule without one")
    prompts = np.asarray(tokens)
    for one in (model, amateur):
        check_one_rotation(one, prompts, mask, max_new_tokens)
    begun: dict[str, Any] = {"samples": samples, "max_new_tokens": max_new_tokens, "stop": stop}
    progress, keys, spread = begin_samples(
        model, params, prompts, mask, key=key, edit=edit, pad_id=pad_id, log_probs=log_probs, **begun
    )
    weak, _, _ = begin_samples(amateur, amateur_params, prompts, mask, **begun)
    readers = Reader(model, params, edit=edit), Reader(amateur, amateur_params)
    edits, cache, its_cache = as_partials(edit), progress.cache, weak.cache
    rest, weights = replace(progress, cache=NO_CACHE), (1.0, 1.0) if beta is None else (1.0 + beta, beta)
    for _ in range(max_new_tokens):
        if on_host(rest.finished).all():
            break
        token = rest.last[:, None]
        places = step_places(replace(rest, cache=cache)) if edits else None
        out, its_out = readers[0](token, cache, places), readers[1](token, its_cache)
        assert out.logits is not None and its_out.logits is not None
        assert out.cache is not None and its_out.cache is not None
        cache, its_cache = out.cache, its_out.cache
        told = Contrast(its_out.logits[:, -1], np.float32(alpha), *map(np.float32, weights))
        contrasted = Sampler(Chain((told, *sampler.transforms.transforms)), sampler.random)
        rest = grown_alone((), rest, out.logits, out.captured, contrasted, keys, stop)
    found = generated_of(rest, max_new_tokens)
    return found if spread is None else spread.without_padding(found)


def _plausible(
    logits: Logits, scores: Float[Array, "batch vocab"], alpha: ArrayLike
) -> Float[Array, "batch vocab"]:
    """The scores of tokens at least `alpha` times as likely as the likeliest; `-inf` for the others."""
    least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(jnp.asarray(alpha, jnp.float32))
    return jnp.where(logits >= least, scores, -jnp.inf)
