"""Function vectors: the heads that carry what a task is, and the sum of what they write on average.

Todd et al. 2023 (arXiv:2310.15213): the mean output of each head at the last token of prompts that show a
task is put into prompts that do not; the heads that then raise the right answer most are summed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from mergelab.activations.batches import batches
from mergelab.activations.capture import capture, check_prompts
from mergelab.errors import SiteError
from mergelab.interp.logit_metrics import token_probability
from mergelab.interp.patching import patched_metrics, rows_of
from mergelab.models.model import Model, Params
from mergelab.models.residual_stream import norms_outputs, require_attention, require_decoder

__all__ = ["FunctionVector", "function_vector", "indirect_effects", "mean_heads"]


@dataclass(frozen=True)
class FunctionVector:
    """A task, as a vector that is added to the stream.

    Attributes:
        vector: float32 `[width]`: add it with `steering.add_vector` to a `resid_post` at the last token.
        heads: (layer, head) of the heads summed, the strongest first.
        effects: float32 `[layers, heads]`: the average indirect effect of each head, in probability.
    """

    vector: Float[Array, " width"]
    heads: tuple[tuple[int, int], ...]
    effects: np.ndarray


def function_vector(
    model: Model,
    params: Params,
    shown: Any,
    not_shown: Any,
    answers: Any,
    *,
    masks: tuple[Any, Any] = (None, None),
    top: int = 10,
    batch: int = 16,
) -> FunctionVector:
    """A function vector from prompts that show a task and prompts that do not.

    Args:
        model: a decoder without norms on what attention adds.
        params: its parameters, on any mesh.
        shown: tokens `[prompts, length]` that show the task, such as examples and a query.
        not_shown: tokens `[others, length']` that end like them, such as shuffled examples and a query.
        answers: the right next token after each of `not_shown`, `[others]`.
        masks: True for real tokens, for each set; padding stands on the left.
        top: heads to sum.
        batch: prompts in one pass.

    Raises:
        SiteError: the model is an encoder or has sandwich blocks, or a prompt is padded on the right.
    """
    means = mean_heads(model, params, shown, mask=masks[0], batch=batch)
    effects = indirect_effects(model, params, means, not_shown, answers, mask=masks[1], batch=batch)
    order = np.argsort(-effects, axis=None, kind="stable")[:top]
    heads = tuple(
        (int(layer), int(head)) for layer, head in zip(*np.unravel_index(order, effects.shape), strict=True)
    )
    c = model.config
    vector = jnp.zeros(c.d_model, jnp.float32)
    for layer, head in heads:
        kernel = params[f"blocks_{layer}"]["attn"]["o"]["kernel"].astype(jnp.float32)
        kernel = kernel.reshape(c.n_heads, c.head_dim, c.d_model)[head]
        vector = vector + jnp.matmul(jnp.asarray(means[layer, head]), kernel, precision="highest")
    return FunctionVector(vector, heads, effects)


def mean_heads(model: Model, params: Params, tokens: Any, *, mask: Any = None, batch: int = 16) -> np.ndarray:
    """What each head has gathered (`attn.z`) at the last real token, on average: `[layers, heads, head_dim]`.

    Raises:
        SiteError: as `function_vector`.
    """
    require_decoder(model)
    require_attention(model)
    if norms_outputs(model):
        raise SiteError(
            f"in a {model.family.model_type!r} model a norm stands between heads and the stream, so that "
            "what heads write does not add up; take a family without one."
        )
    found = capture(model, params, tokens, "blocks.*.attn.z", mask=mask, position=-1, batch=batch)
    return np.stack([value.mean(axis=0) for value in found.values()])


def indirect_effects(
    model: Model,
    params: Params,
    means: Any,
    tokens: Any,
    answers: Any,
    *,
    mask: Any = None,
    batch: int = 16,
    heads_at_once: int = 8,
) -> np.ndarray:
    """The rise of the answer's probability when one head has its mean: `[layers, heads]`, float32.

    Args:
        model: model that `function_vector` takes.
        params: its parameters.
        means: result of `mean_heads`.
        tokens: `[prompts, length]`.
        answers: `[prompts]`.
        mask: True for real tokens; padding stands on the left.
        batch: prompts in one pass.
        heads_at_once: heads that are computed side by side.

    Raises:
        SiteError: a prompt is padded on the right.
    """
    tokens, real = check_prompts(model, tokens, mask)
    if not real[:, -1].all():
        raise SiteError("prompts are padded on the right; pad them on the left, so that all end together.")
    c, metric, length = model.config, token_probability(answers), tokens.shape[1]
    names = [f"blocks.{i}.attn.z" for i in range(c.n_layers)]
    cells = np.indices((c.n_layers, c.n_heads)).reshape(2, -1).T
    cells = np.insert(cells, 1, length - 1, axis=1).astype(np.int32)
    # One more cell that replaces nothing: the probability as it is.
    cells = np.concatenate([cells, np.array([[-1, 0, 0]], np.int32)])
    total = np.zeros(len(cells))
    for rows, count in batches(len(tokens), batch):
        shape = (len(rows), length, c.n_heads, c.head_dim)
        values = {
            name: jnp.broadcast_to(jnp.asarray(mean, jnp.float32)[None, None], shape)
            for name, mean in zip(names, means, strict=True)
        }
        scored = rows_of(metric, rows, len(tokens))
        found = patched_metrics(
            model, params, tokens[rows], real[rows], values, cells, scored, cells_at_once=heads_at_once
        )
        total += np.asarray(found, np.float64)[:, :count].sum(axis=1)
    mean = total / len(tokens)
    return (mean[:-1] - mean[-1]).reshape(c.n_layers, c.n_heads).astype(np.float32)
