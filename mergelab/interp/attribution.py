"""Direct logit attribution: the logit of a token as a sum over everything that was added to the stream.

With the factor of the last norm frozen at its value, logits (before a soft cap) are linear in the last
stream. The stream is a sum: embeddings and what every block's attention and MLP added (their `out` sites,
which in sandwich blocks hold what their second norm made of them). So the parts sum to the logit up to
rounding; a layer norm's bias is a part of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mergelab.activations.batches import batches
from mergelab.activations.capture import check_prompts
from mergelab.errors import SiteError
from mergelab.models.model import Model, Params
from mergelab.models.residual_stream import (
    added_sites,
    norm_gain,
    require_attention,
    require_decoder,
    unembedding,
)

__all__ = ["Attribution", "direct_logit_attribution"]


@dataclass(frozen=True)
class Attribution:
    """Parts of a logit.

    Attributes:
        names: what each part comes from: `embed`, `blocks.0.attn.out`, ..., or, by heads,
            `blocks.0.attn.head.0`, ...; `final_norm.bias` where the model has one.
        parts: float32 `[prompts, parts, length]`.
        logits: float32 `[prompts, length]`, what the parts sum to: the model's logit before a soft cap, or
            the difference of two.
    """

    names: tuple[str, ...]
    parts: np.ndarray
    logits: np.ndarray

    def of(self, name: str) -> np.ndarray:
        """One part, `[prompts, length]`."""
        return self.parts[:, self.names.index(name)]


def direct_logit_attribution(
    model: Model,
    params: Params,
    tokens: Any,
    right: Any,
    wrong: Any = None,
    *,
    mask: Any = None,
    by_head: bool = False,
    batch: int = 16,
) -> Attribution:
    """Splits the logit of a token, or the difference of two, at every position.

    Args:
        model: a decoder.
        params: its parameters, on any mesh.
        tokens: `[prompts, length]`.
        right: the token, `[prompts]` ids.
        wrong: the one whose logit is subtracted, `[prompts]` ids; none by default.
        mask: True for real tokens.
        by_head: split what attention added by head; its output bias stays in `blocks.{i}.attn.bias`.
        batch: prompts in one pass.

    Raises:
        SiteError: the model is an encoder, whose norms leave no sum; or recurrent layers are asked for heads.
    """
    require_decoder(model)
    if by_head:
        require_attention(model)
    tokens, real = check_prompts(model, tokens, mask)
    chosen = [None if ids is None else np.asarray(ids, np.int32) for ids in (right, wrong)]
    if any(ids is not None and ids.shape != tokens.shape[:1] for ids in chosen):
        raise SiteError(f"give one token id for each of the {len(tokens)} prompts.")
    names = _names(model, by_head)
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    for rows, count in batches(len(tokens), batch):
        pair = [None if ids is None else ids[rows] for ids in chosen]
        found = _attribute(model, params, tokens[rows], real[rows], *pair, by_head=by_head)
        parts.append((np.asarray(found[0])[:, :count], np.asarray(found[1])[:count]))
    split = np.concatenate([part for part, _ in parts], axis=1).swapaxes(0, 1)
    return Attribution(names, split, np.concatenate([logits for _, logits in parts]))


def _names(model: Model, by_head: bool) -> tuple[str, ...]:
    names, parameters = ["embed"], {leaf.name for leaf in model.table()}
    for i in range(model.config.n_layers):
        if by_head:
            names += [f"blocks.{i}.attn.head.{head}" for head in range(model.config.n_heads)]
            names += [f"blocks.{i}.attn.bias"] * (f"blocks_{i}.attn.o.bias" in parameters)
        else:
            names += added_sites(model, i)[:-1]
        names.append(added_sites(model, i)[-1])
    return (*names, *["final_norm.bias"] * model.config.norm.has_bias)


@partial(jax.jit, static_argnames=("model", "by_head"))
def _attribute(
    model: Model,
    params: Params,
    tokens: Array,
    mask: Array,
    right: Array,
    wrong: Array | None,
    *,
    by_head: bool,
) -> tuple[Array, Array]:
    """`[parts, batch, length]`, and `[batch, length]`: what the model's own last norm makes of it."""
    c = model.config
    first = -1 if by_head else 0
    added = [name for i in range(c.n_layers) for name in added_sites(model, i)[first:]]
    capture = ["embed", *added, *["blocks.*.attn.z"] * by_head, "final_norm.scale"]
    out = model.apply(params, tokens, mask=mask, capture=capture, logits=False)
    assert out.hidden is not None
    seen = {name: value.astype(jnp.float32) for name, value in out.captured.items()}
    kernel = unembedding(model, params).astype(jnp.float32)
    direction = kernel[:, right].T  # [batch, width]
    if wrong is not None:
        direction = direction - kernel[:, wrong].T
    read = direction * norm_gain(model, params, "final_norm")[None]
    if c.norm.kind == "layer":
        read = read - read.mean(axis=-1, keepdims=True)  # centring a part is centring what reads it
    factor = seen["final_norm.scale"][..., 0]

    parts = [_dot(seen["embed"], read) * factor]
    for i in range(c.n_layers):
        if by_head:
            scale = getattr(c.blocks[i], "out_scale", 1.0)
            split = _heads(model, params[f"blocks_{i}"]["attn"], seen[f"blocks.{i}.attn.z"], read * scale)
            parts += [part * factor for part in split]
        else:
            parts += [_dot(seen[name], read) * factor for name in added_sites(model, i)[:-1]]
        parts.append(_dot(seen[added_sites(model, i)[-1]], read) * factor)
    if c.norm.has_bias:
        bias = _dot(params["final_norm"]["bias"].astype(jnp.float32)[None, None], direction)
        parts.append(jnp.broadcast_to(bias, factor.shape))
    return jnp.stack(parts), _dot(out.hidden.astype(jnp.float32), direction)


def _heads(model: Model, attention: Params, z: Array, read: Array) -> list[Array]:
    """What each head, and then the output bias, adds along `read [batch, width]`: `[batch, length]` each."""
    c = model.config
    kernel = attention["o"]["kernel"].astype(jnp.float32)
    bias = attention["o"]["bias"].astype(jnp.float32) if "bias" in attention["o"] else None
    scale = jnp.ones((1, *z.shape[:2]), jnp.float32)
    if "out_norm" in attention:
        # A norm stands between the heads and the stream; its factor is frozen like the last norm's.
        whole = jnp.einsum("blf,fw->blw", z.reshape(*z.shape[:2], -1), kernel, precision="highest")
        whole = whole if bias is None else whole + bias[None, None]
        scale = jax.lax.rsqrt(jnp.square(whole).mean(axis=-1) + c.norm.eps)[None]
        read = read * (attention["out_norm"]["scale"].astype(jnp.float32) + c.norm.offset)[None]
    kernel = kernel.reshape(z.shape[2], z.shape[3], -1)
    by_head = jnp.einsum("hdw,bw->bhd", kernel, read, precision="highest")
    found = jnp.einsum("blhd,bhd->hbl", z, by_head, precision="highest") * scale
    parts = list(found)
    if bias is not None:
        parts.append(jnp.broadcast_to(_dot(bias[None, None], read), z.shape[:2]) * scale[0])
    return parts


def _dot(part: Array, read: Array) -> Array:
    """`[batch or 1, length or 1, width]`, `[batch, width]` -> `[batch, length or 1]`."""
    part = jnp.broadcast_to(part, (read.shape[0], *part.shape[1:]))
    return jnp.einsum("blw,bw->bl", part, read, precision="highest")
