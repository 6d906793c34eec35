"""What attention heads do: from their weights, and on text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from mergelab.activations.batches import batches
from mergelab.compat import register_dataclass
from mergelab.errors import SiteError
from mergelab.models.layers.attention import AttentionSpec
from mergelab.models.model import Model, Params
from mergelab.models.residual_stream import norm_gain, require_attention, require_decoder, unembedding
from mergelab.models.sites import Edit, as_partials
from mergelab.models.token_checks import check_tokens

__all__ = [
    "HeadScores",
    "HeadWeights",
    "composition_scores",
    "copying_scores",
    "head_scores",
    "head_weights",
    "repeated_tokens",
]


@register_dataclass
@dataclass(frozen=True)
class HeadWeights:
    """The matrices of every query head, float32; heads that share keys and values repeat theirs.

    Attributes:
        q: `[layers, heads, width, head_dim]`.
        k: the same.
        v: the same.
        o: `[layers, heads, head_dim, width]`.
    """

    q: Float[Array, "layers heads width head_dim"]
    k: Float[Array, "layers heads width head_dim"]
    v: Float[Array, "layers heads width head_dim"]
    o: Float[Array, "layers heads head_dim width"]

    def ov(self, layer: int, head: int) -> Float[Array, "width width"]:
        """`V O`: what a head writes for each direction it reads."""
        return jnp.matmul(self.v[layer, head], self.o[layer, head], precision="highest")

    def qk(self, layer: int, head: int) -> Float[Array, "width width"]:
        """`Q K^T`: the score of each pair of directions at the query and at the key."""
        return jnp.matmul(self.q[layer, head], self.k[layer, head].T, precision="highest")


def head_weights(model: Model, params: Params) -> HeadWeights:
    """Takes the heads of all layers apart, with the gains (and centring) of the norms before and after them.

    Raises:
        SiteError: the model is an encoder.
    """
    require_decoder(model)
    require_attention(model)
    c = model.config
    if not all(isinstance(getattr(block, "attention", None), AttentionSpec) for block in c.blocks):
        raise SiteError(
            f"heads of a {model.family.model_type!r} model cannot be taken apart: its queries and keys are "
            "made of narrow vectors that are normalized; read its sites instead."
        )
    found: dict[str, list[Array]] = {name: [] for name in "qkvo"}
    for i in range(c.n_layers):
        attention = params[f"blocks_{i}"]["attn"]
        gain = norm_gain(model, params, f"blocks_{i}", "attn_norm")
        for name in "qkv":
            kernel = attention[name]["kernel"].astype(jnp.float32) * gain[:, None]
            if c.norm.kind == "layer":
                kernel = kernel - kernel.mean(axis=0, keepdims=True)
            heads = kernel.reshape(c.d_model, -1, c.head_dim).swapaxes(0, 1)
            found[name].append(jnp.repeat(heads, c.n_heads // heads.shape[0], axis=0))
        kernel = attention["o"]["kernel"].astype(jnp.float32) * getattr(c.blocks[i], "out_scale", 1.0)
        if "out_norm" in attention:
            kernel = kernel * norm_gain(model, params, f"blocks_{i}", "attn", "out_norm")[None]
        found["o"].append(kernel.reshape(c.n_heads, c.head_dim, c.d_model))
    return HeadWeights(*(jnp.stack(found[name]) for name in "qkvo"))


def composition_scores(weights: HeadWeights, kind: Literal["q", "k", "v"]) -> np.ndarray:
    """How much of what later heads read through Q, K or V is what earlier heads write.

    `|V1 O1 M2|_F / (|V1 O1|_F |M2|_F)`, where `M2` is `Q2 K2^T`, `K2 Q2^T` or `V2 O2`. Random matrices do not
    give 0: compare with scores of shuffled or fresh weights.

    Returns:
        float32 `[layers, heads, layers, heads]`, earlier head first; NaN where it is not in an earlier layer.
    """
    found = np.array(_compositions(weights, kind))
    layers = np.arange(len(found))
    later = layers[:, None] < layers[None]
    return np.where(later[:, None, :, None], found, np.nan).astype(np.float32)


def copying_scores(model: Model, params: Params) -> np.ndarray:
    """Whether heads raise the logits of the tokens they attend to: `sum(l) / sum(|l|)`, -1 to 1.

    `l` are the eigenvalues of the full OV circuit `E V O U`, `[vocab, vocab]` (`E` the embedding, `U` the
    unembedding with the gain of the last norm); those that are not 0 are the eigenvalues of the small
    `O U E V`.

    Returns:
        float32 `[layers, heads]`.

    Raises:
        SiteError: the model is an encoder.
    """
    weights = head_weights(model, params)
    small = np.asarray(_small_circuits(model, params, weights), np.float64)
    values = np.linalg.eigvals(small)
    sizes = np.abs(values).sum(axis=-1)
    return (values.sum(axis=-1).real / np.where(sizes > 0, sizes, 1)).astype(np.float32)


@partial(jax.jit, static_argnames="kind")
def _compositions(weights: HeadWeights, kind: str) -> Array:
    into, out = {
        "q": (weights.q, weights.k),
        "k": (weights.k, weights.q),
        "v": (weights.v, weights.o.swapaxes(-1, -2)),
    }[kind]
    read = jnp.einsum("lhwd,lhwe->lhde", weights.v, weights.v, precision="highest")
    written = jnp.einsum("lhdw,lhew->lhde", weights.o, weights.o, precision="highest")
    # |A B^T|_F^2 = tr(A^T A B^T B), for thin A and B.
    first = jnp.sqrt(jnp.einsum("lhde,lhed->lh", read, written, precision="highest"))

    def with_layer(pair: tuple[Array, Array]) -> Array:
        x, y = pair  # of one later layer, [heads, width, head_dim]
        ends = jnp.einsum("gwd,gwe->gde", y, y, precision="highest")
        second = jnp.sqrt(jnp.einsum("gwd,gwe,ged->g", x, x, ends, precision="highest"))
        middle = jnp.einsum("lhdw,gwe->lhgde", weights.o, x, precision="highest")
        squared = jnp.einsum("lhgde,lhdf,lhgfk,gke->lhg", middle, read, middle, ends, precision="highest")
        norms = jnp.einsum("lh,g->lhg", first, second)
        return jnp.sqrt(jnp.maximum(squared, 0)) / jnp.where(norms > 0, norms, 1)

    found = jax.lax.map(with_layer, (into, out))  # [later, layers, heads, heads]
    return jnp.moveaxis(found, 0, 2)


@partial(jax.jit, static_argnames="model")
def _small_circuits(model: Model, params: Params, weights: HeadWeights) -> Array:
    embedding = params["embed"]["embedding"].astype(jnp.float32)
    kernel = unembedding(model, params).astype(jnp.float32) * norm_gain(model, params, "final_norm")[:, None]
    if model.config.norm.kind == "layer":
        kernel = kernel - kernel.mean(axis=0, keepdims=True)
    around = jnp.matmul(kernel, embedding, precision="highest")
    return jnp.einsum("lhdw,wx,lhxe->lhde", weights.o, around, weights.v, precision="highest")


@dataclass(frozen=True)
class HeadScores:
    """Mean attention from tokens of the second half to one place, from 0 to 1: `[layers, heads]` each.

    Attributes:
        induction: attention to the token after the same token's first occurrence, `n - 1` back.
        previous: attention to the token before.
        duplicate: attention to the same token's first occurrence, `n` back.
        repeated_loss: cross-entropy, in nats, of the tokens of the second half but its first.
    """

    induction: np.ndarray
    previous: np.ndarray
    duplicate: np.ndarray
    repeated_loss: float


def repeated_tokens(
    vocab_size: int, half: int, prompts: int, *, seed: int = 0, first: int | None = None, lowest: int = 0
) -> np.ndarray:
    """Random tokens that come twice: int32 `[prompts, 2 * half]`, with `first` before them one longer.

    Args:
        vocab_size: tokens are drawn uniformly from `lowest` to `vocab_size - 1`, without repetition within a
            half where there are enough of them.
        half: tokens that are repeated.
        prompts: how many rows.
        seed: seed of the draw.
        first: a token to begin every row with, such as the one that begins a text.
        lowest: the first token that is not special.
    """
    rng = np.random.default_rng(seed)
    choices = np.arange(lowest, vocab_size)
    drawn = np.stack([rng.choice(choices, half, replace=len(choices) < half) for _ in range(prompts)])
    start = np.full((prompts, 0 if first is None else 1), first or 0)
    return np.concatenate([start, drawn, drawn], axis=1).astype(np.int32)


def head_scores(
    model: Model,
    params: Params,
    *,
    half: int = 32,
    prompts: int = 32,
    seed: int = 0,
    first: int | None = None,
    lowest: int = 0,
    batch: int = 8,
    edit: Mapping[str, Edit] | None = None,
) -> HeadScores:
    """Runs a decoder on repeated random tokens.

    Args:
        model: a decoder.
        params: its parameters, on any mesh.
        half: an argument of `repeated_tokens`, like `prompts`, `seed`, `first` and `lowest`.
        prompts: see `half`.
        seed: see `half`.
        first: see `half`.
        lowest: see `half`.
        batch: prompts in one pass; the patterns of all layers are held for so many.
        edit: edits to run it with.

    Raises:
        SiteError: the model is an encoder, or has too few positions.
        TokenError: `first` is none of its tokens.
    """
    c = model.config
    require_attention(model)
    if not model.predicts or 2 * half + (first is not None) > c.max_length or half < 2:
        raise SiteError(
            f"{half} tokens that come twice do not fit a {model.family.model_type!r} model with "
            f"{c.max_length} positions; take a decoder, and halves of 2 tokens or more that fit it."
        )
    tokens = repeated_tokens(c.vocab_size, half, prompts, seed=seed, first=first, lowest=lowest)
    check_tokens(model, tokens, place="the first token and those drawn")
    total, loss = np.zeros((3, c.n_layers, c.n_heads)), 0.0
    for rows, count in batches(prompts, batch):
        scores, losses = _scores(model, params, tokens[rows], as_partials(edit), half)
        total += np.asarray(scores, np.float64)[:count].sum(axis=0)
        loss += float(np.asarray(losses, np.float64)[:count].sum())
    induction, previous, duplicate = total / prompts
    return HeadScores(induction, previous, duplicate, loss / prompts)


@partial(jax.jit, static_argnames=("model", "half"))
def _scores(
    model: Model, params: Params, tokens: Array, edit: Mapping[str, Edit], half: int
) -> tuple[Array, Array]:
    """`[batch, 3, layers, heads]` and the loss `[batch]`."""
    out = model.apply(params, tokens, capture=["blocks.*.attn.pattern"], edit=edit)
    assert out.logits is not None
    patterns = jnp.stack(list(out.captured.values()), axis=1)  # [batch, layers, heads, query, key]
    queries = jnp.arange(tokens.shape[1] - half, tokens.shape[1])
    scores = jnp.stack(
        [patterns[..., queries, queries - back].mean(axis=-1) for back in (half - 1, 1, half)], axis=1
    )
    logp = jax.nn.log_softmax(out.logits[:, -half:-1])
    losses = -jnp.take_along_axis(logp, tokens[:, -half + 1 :, None], axis=-1)[..., 0].mean(axis=1)
    return scores, losses
