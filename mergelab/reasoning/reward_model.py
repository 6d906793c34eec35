"""A reward model: a head on the last stream of a model, read at the end of a text or of each of its steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from mergelab.activations.batches import filled_batches, stack_prompts
from mergelab.activations.losses import UNEMBEDDED
from mergelab.errors import TuningError
from mergelab.models.model import Model, Params
from mergelab.models.table import Leaf
from mergelab.models.token_checks import check_tokens

__all__ = ["RewardKind", "RewardModel", "new_reward_model", "score_texts"]

RewardKind = Literal["outcome", "process"]


@dataclass(frozen=True)
class RewardModel:
    """A model without its head of next tokens, and linear layers with ReLU between them in its place.

    Parameters are `{"model": those of the model, "head": {"0": {"kernel", "bias"}, ...}}`. Hashable.

    Attributes:
        model: what reads the text.
        kind: `outcome` reads the last token (HF's sequence classification), `process` every token (HF's
            token classification), of which those that end steps have a meaning.
        labels: names of the head's outputs; one is a score of any size, several are classes.
        positive: number of the label that means right; of one label it is 0.
        hidden: widths of the head's layers before the last.
        biases: whether its layers have a bias.
        module: name of the head in files.
    """

    model: Model
    kind: RewardKind = "outcome"
    labels: tuple[str, ...] = ("LABEL_0",)
    positive: int = 0
    hidden: tuple[int, ...] = ()
    biases: bool = False
    module: str = "score"

    def table(self) -> tuple[Leaf, ...]:
        """Every parameter: its path, shape and logical axes, and the tensors that store it in files."""
        rows = [replace(leaf, path=("model", *leaf.path)) for leaf in self.model.table()]
        widths = (self.model.config.d_model, *self.hidden, len(self.labels))
        for n, (ins, outs) in enumerate(pairwise(widths)):
            # Layers of a torch `Sequential` are counted with the ReLU between them.
            name = f"{self.module}.{2 * n}" if self.hidden else self.module
            axes = ("embed" if n == 0 else None, None)
            kernel = Leaf(("head", str(n), "kernel"), f"{name}.weight", (ins, outs), "transpose", axes)
            rows.append(kernel)
            if self.biases:
                rows.append(Leaf(("head", str(n), "bias"), f"{name}.bias", (outs,), axes=(None,)))
        return tuple(rows)

    def apply(
        self, params: Params, tokens: ArrayLike, mask: ArrayLike | None = None
    ) -> Float[Array, "batch *length labels"]:
        """What the head gives: pure, jittable, differentiable and shardable.

        Args:
            params: the parameters, as `table()` describes them.
            tokens: int `[batch, length]`.
            mask: True for real tokens.

        Returns:
            float32 `[batch, labels]` of outcomes, `[batch, length, labels]` of a process.
        """
        ids = jnp.asarray(tokens, jnp.int32)
        real = None if mask is None else jnp.asarray(mask, jnp.bool_)
        sites = self.model.sites()
        # An encoder's last norm stands in its last block.
        last_stream = f"blocks.{self.model.config.n_layers - 1}.resid_post"
        site = UNEMBEDDED if UNEMBEDDED in sites else last_stream
        x = self.model.apply(params["model"], ids, mask=real, capture=site, logits=False).captured[site]
        if self.kind == "outcome":
            last = jnp.full(len(ids), ids.shape[1] - 1) if real is None else last_columns(real)
            x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
        for n in range(len(self.hidden) + 1):
            layer = params["head"][str(n)]
            x = jnp.matmul(x, layer["kernel"].astype(x.dtype))
            if self.biases:
                x = x + jnp.broadcast_to(layer["bias"].astype(x.dtype), x.shape)
            x = jax.nn.relu(x) if n < len(self.hidden) else x
        return x.astype(jnp.float32)

    def log_odds(self, outputs: Float[Array, "*batch labels"]) -> Float[Array, "*batch"]:
        """Log-odds of the positive label; the score itself where there is one label."""
        if len(self.labels) == 1:
            return outputs[..., 0]
        others = jnp.arange(len(self.labels)) != self.positive
        rest = jax.nn.logsumexp(jnp.where(others[(None,) * (outputs.ndim - 1)], outputs, -jnp.inf), axis=-1)
        return outputs[..., self.positive] - rest


def last_columns(mask: Array) -> Array:
    """Column of the last real token of each row, int32 `[batch]`."""
    return (mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)).astype(jnp.int32)


def new_reward_model(
    model: Model,
    params: Params,
    *,
    kind: RewardKind = "outcome",
    labels: int = 1,
    hidden: tuple[int, ...] = (),
    biases: bool | None = None,
    seed: int = 0,
) -> tuple[RewardModel, Params]:
    """A reward model on a language model, its head drawn at random; the parameters are shared, not copied.

    Args:
        model: any model of `mergelab.models`.
        params: its parameters, on any mesh; a head of next tokens is dropped.
        kind: `outcome` or `process`.
        labels: outputs of the head: 1 for a score, 2 for wrong and right.
        hidden: widths of layers before the last, such as the model's own.
        biases: whether layers have a bias; those of HF's classes if None.
        seed: seed of the head: kernels normal, of deviation 0.02; biases 0.

    Raises:
        TuningError: there are no labels, or the kind is unknown.
    """
    if kind not in ("outcome", "process") or labels < 1:
        raise TuningError(
            f"a reward model of kind {kind!r} with {labels} labels cannot be made; expected 'outcome' or "
            "'process', and at least 1 label."
        )
    if "unembed" in params:
        model = replace(model, config=replace(model.config, head=False))
        params = {name: tree for name, tree in params.items() if name != "unembed"}
    names = ("LABEL_0",) if labels == 1 else tuple(f"LABEL_{n}" for n in range(labels))
    with_bias = (kind == "process" or bool(hidden)) if biases is None else biases
    reward = RewardModel(model, kind, names, labels - 1, tuple(hidden), with_bias)
    keys = iter(jax.random.split(jax.random.key(seed), len(hidden) + 1))
    head: Params = {}
    for leaf in reward.table():
        if leaf.path[0] == "head":
            _, number, part = leaf.path
            made = (
                jnp.zeros(leaf.shape) if part == "bias" else 0.02 * jax.random.normal(next(keys), leaf.shape)
            )
            head.setdefault(number, {})[part] = made
    return reward, {"model": params, "head": head}


def score_texts(
    reward: RewardModel, params: Params, tokens: Any, mask: Any = None, *, batch: int = 8
) -> np.ndarray:
    """Log-odds that texts, or the steps that end at each token, are right; one score's own value.

    Rows run in batches of one shape. `1 / (1 + exp(-x))` is the probability, which
    `mergelab.decoding.step_score` takes at the tokens that end steps.

    Args:
        reward: a reward model.
        params: its parameters, on any mesh.
        tokens: int `[rows, length]`, or a list of texts of any lengths.
        mask: True for real tokens.
        batch: rows in one pass.

    Returns:
        float32 `[rows]` of outcomes, `[rows, length]` of a process.

    Raises:
        SiteError: there are no rows, or the shapes differ.
        TokenError: ids beyond the vocabulary, or more tokens than the model has positions.
    """
    ids, real = stack_prompts(tokens, mask)
    check_tokens(reward.model, ids, place="texts")
    found = [
        np.asarray(_scores(reward, params, rows.astype(np.int32), there))[:count]
        for (rows, there), count in filled_batches(min(batch, len(ids)), ids, real)
    ]
    return np.concatenate(found)


@partial(jax.jit, static_argnames="reward")
def _scores(reward: RewardModel, params: Params, tokens: Array, mask: Array) -> Array:
    return reward.log_odds(reward.apply(params, tokens, mask))
