"""Steps of thought without words: the last stream of a token fed back as the embedding of the next.

Coconut (Hao et al. 2024, arXiv:2412.06769). A model that was not trained for it is not expected to think so;
what steps do is measured beside steps that hold nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial
from jaxtyping import Float

from mergelab.activations.batches import stack_prompts
from mergelab.activations.losses import UNEMBEDDED
from mergelab.decoding.generation import Generated, generate
from mergelab.decoding.transforms import require
from mergelab.errors import DecodingError
from mergelab.interp.token_selection import Columns, in_columns
from mergelab.models.cache import Cache
from mergelab.models.decoder import embedded
from mergelab.models.model import Model, Params
from mergelab.models.residual_stream import logits_of, require_decoder

__all__ = [
    "LatentKind",
    "LatentSteps",
    "compare_latent_steps",
    "generate_after_latent_steps",
    "latent_steps_of",
]

LatentKind = Literal["latent", "random", "shuffled", "filler"]
Read = Literal["normalized", "stream"]


@dataclass(frozen=True)
class LatentSteps:
    """Steps of thought behind prompts.

    Attributes:
        tokens: prompts with a place for each step, int32 `[batch, length + steps]`, padded on the left.
        mask: True for real tokens and steps.
        vectors: what stands there in place of embeddings, float32 `[batch, steps, width]`.
        likeliest: int32 `[batch, steps]`, token that each step would say in words.
        log_probs: float32 `[batch, steps]`, its log-probability, in nats.
    """

    tokens: np.ndarray
    mask: np.ndarray
    vectors: np.ndarray
    likeliest: np.ndarray
    log_probs: np.ndarray


def latent_steps_of(
    model: Model,
    params: Params,
    tokens: Any,
    steps: int,
    *,
    mask: Any = None,
    kind: LatentKind = "latent",
    read: Read = "normalized",
    filler: int | None = None,
    seed: int = 0,
) -> LatentSteps:
    """Reads prompts and takes latent steps behind them.

    A step's vector is what the last norm gave at the token before (`normalized`, as in the paper), or the
    stream before that norm (`stream`).

    Args:
        model: a decoder.
        params: its parameters.
        tokens: int `[batch, length]`, padded on the left, or prompts of any lengths.
        steps: number of steps; 0 leaves prompts as they are.
        mask: True for real tokens.
        kind: `latent`; or a control: `random` vectors of the same lengths, those of the row before
            (`shuffled`), or the embedding of a token said over and over (`filler`).
        read: which vector is fed back.
        filler: that token; the last of each prompt if None.
        seed: seed of random vectors.

    Raises:
        DecodingError: a negative number of steps, or one prompt alone to shuffle.
        SiteError: the model predicts no next tokens.
    """
    require_decoder(model)
    require("latent_steps_of(steps)", steps, steps >= 0, "0 or more")
    ids, real = stack_prompts(tokens, mask)
    ids = ids.astype(np.int32)
    require("latent_steps_of(kind)", kind, kind in ("latent", "random", "shuffled", "filler"), "a known kind")
    require("latent_steps_of(mask)", real[:, -1].tolist()[:4], bool(real[:, -1].all()), "padding on the left")
    said = ids[:, -1:] if filler is None else np.full((len(ids), 1), filler, np.int32)
    wide = np.concatenate([ids, np.repeat(said, steps, axis=1)], axis=1)
    there = np.concatenate([real, np.ones((len(ids), steps), bool)], axis=1)
    if not steps:
        nothing = np.zeros((len(ids), 0), np.float32)
        width = model.config.d_model
        return LatentSteps(
            wide, there, np.zeros((len(ids), 0, width), np.float32), nothing.astype(np.int32), nothing
        )
    if kind == "shuffled" and len(ids) < 2:
        raise DecodingError("the steps of one prompt cannot be shuffled; give two prompts or more.")
    found = _think(model, params, jnp.asarray(ids), jnp.asarray(real), steps, read == "normalized")
    vectors, likeliest, log_probs = (np.asarray(part) for part in found)
    if kind == "random":
        drawn = np.random.default_rng(seed).normal(size=vectors.shape)
        length = np.linalg.norm(vectors, axis=-1, keepdims=True)
        vectors = (drawn / np.linalg.norm(drawn, axis=-1, keepdims=True) * length).astype(np.float32)
    elif kind == "shuffled":
        vectors = np.roll(vectors, 1, axis=0)
    elif kind == "filler":
        vectors = np.asarray(_embedded(model, params, jnp.asarray(wide[:, -steps:])))
    return LatentSteps(wide, there, vectors, likeliest, log_probs)


def generate_after_latent_steps(
    model: Model, params: Params, steps: LatentSteps, *, max_new_tokens: int, **options: Any
) -> Generated:
    """Continues prompts behind their latent steps; without any, it is `generate` of the prompts.

    Args:
        model: the model that took the steps.
        params: its parameters.
        steps: what `latent_steps_of` gives.
        max_new_tokens: largest number of tokens that are generated.
        **options: further options of `mergelab.decoding.generate`.
    """
    edit = {**(options.pop("edit", None) or {}), **latent_edit(model, params, steps)}
    return generate(
        model, params, steps.tokens, steps.mask, max_new_tokens=max_new_tokens, edit=edit or None, **options
    )


def latent_edit(model: Model, params: Params, steps: LatentSteps) -> dict[str, Partial]:
    """The edit that puts vectors in the places of embeddings; none without steps.

    What else the site `embed` holds, such as a learned position, stays: the vector takes the place of the
    token's embedding.
    """
    count = steps.vectors.shape[1]
    if not count:
        return {}
    before = steps.tokens.shape[1] - count
    change = jnp.asarray(steps.vectors) - _embedded(model, params, jnp.asarray(steps.tokens[:, before:]))
    whole = jnp.pad(change, ((0, 0), (before, 0), (0, 0)))
    return {"embed": Partial(_moved, whole)}


def compare_latent_steps(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[int],
    *,
    steps: Sequence[int] = (0, 1, 2, 4),
    read: Read = "normalized",
    filler: int | None = None,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Mean log-probability of the right next token behind so many steps, of each kind, in nats.

    Args:
        model: a decoder.
        params: its parameters.
        prompts: token ids of each prompt.
        answers: the token that should follow each.
        steps: numbers of steps to try.
        read: same as in `latent_steps_of`.
        filler: same as in `latent_steps_of`.
        seed: seed of random vectors.

    Returns:
        One number for each number of steps, by kind; `shuffled` is there for two prompts and more.
    """
    kinds: list[LatentKind] = ["latent", "random", "filler", *(["shuffled"] if len(prompts) > 1 else [])]
    wanted = jnp.asarray(answers, jnp.int32)
    found: dict[str, list[float]] = {}
    for kind in kinds:
        values = []
        for count in steps:
            taken = latent_steps_of(
                model, params, [*prompts], count, kind=kind, read=read, filler=filler, seed=seed
            )
            edit = latent_edit(model, params, taken)
            last = _after(model, params, jnp.asarray(taken.tokens), jnp.asarray(taken.mask), edit, wanted)
            values.append(float(np.asarray(last).mean()))
        found[kind] = values
    return found


@partial(jax.jit, static_argnames="model")
def _after(model: Model, params: Params, tokens: Array, mask: Array, edit: Any, wanted: Array) -> Array:
    seen = model.apply(params, tokens, mask=mask, edit=edit, capture=UNEMBEDDED, logits=False).captured
    log_probs = jax.nn.log_softmax(logits_of(model, params, jnp.asarray(seen[UNEMBEDDED])[:, -1]), axis=-1)
    return jnp.take_along_axis(log_probs, wanted[:, None], axis=1)[:, 0]


@partial(jax.jit, static_argnames=("model", "steps", "normalized"))
def _think(
    model: Model, params: Params, tokens: Array, mask: Array, steps: int, normalized: bool
) -> tuple[Array, Array, Array]:
    """Vectors `[batch, steps, width]`; the likeliest token where each came from, and its log-probability."""
    last_stream = f"blocks.{model.config.n_layers - 1}.resid_post"
    site = UNEMBEDDED if normalized else last_stream
    batch, length = tokens.shape
    cache = model.new_cache(batch, length + steps, params["embed"]["embedding"].dtype)
    out = model.apply(params, tokens, mask=mask, cache=cache, capture=site)

    def read(out: Any) -> tuple[Array, Array, Array]:
        log_probs = jax.nn.log_softmax(out.logits[:, -1], axis=-1)
        best = jnp.argmax(log_probs, axis=-1).astype(jnp.int32)
        return out.captured[site][:, -1].astype(jnp.float32), best, log_probs.max(axis=-1)

    filler = jnp.zeros((batch, 1), jnp.int32)
    own = _embedded(model, params, filler)

    def step(carry: tuple[Array, Cache], _: None) -> tuple[tuple[Array, Cache], tuple[Array, Array, Array]]:
        vector, cache = carry
        edit = {"embed": Partial(_shifted, vector[:, None] - own)}
        out = model.apply(params, filler, cache=cache, edit=edit, capture=site)
        found = read(out)
        assert out.cache is not None
        return (found[0], out.cache), found

    first = read(out)
    assert out.cache is not None
    _, rest = jax.lax.scan(step, (first[0], out.cache), None, length=steps - 1)
    parts = [jnp.concatenate([one[None], more]) for one, more in zip(first, rest, strict=True)]
    return parts[0].swapaxes(0, 1), parts[1].T, parts[2].T


def _embedded(model: Model, params: Params, tokens: Array) -> Float[Array, "batch length width"]:
    """Embeddings as they enter the first block, without learned positions, float32."""
    return embedded(model.config, params, tokens).astype(jnp.float32)


def _shifted(change: Array, x: Array) -> Array:
    return (x.astype(jnp.float32) + change).astype(x.dtype)


def _moved(change: Array, x: Array, columns: Columns = None) -> Array:
    placed = in_columns(change, x.shape, columns)
    if placed is None:
        raise DecodingError(
            f"latent steps of {change.shape[0]} prompts of {change.shape[1]} tokens cannot stand in a pass "
            f"over {list(x.shape[:2])}; generate from the prompts that they were taken behind."
        )
    values, there = placed
    return (x.astype(jnp.float32) + jnp.where(there[..., None], values, 0.0)).astype(x.dtype)
