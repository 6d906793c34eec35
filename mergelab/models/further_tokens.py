"""Layers of multi-token prediction: one block behind the last, which guesses the token after the next.

DeepSeek V3 and GLM-4.5 are trained with one (arXiv:2412.19437, section 2.2). It reads the model's last hidden
state of a token and the embedding of the token that follows, and shares the model's embeddings and logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from mergelab.checkpoints.folder import open_checkpoint
from mergelab.checkpoints.source import Checkpoint
from mergelab.errors import CheckpointError
from mergelab.models.cache import Cache, new_cache
from mergelab.models.decoder import embedded
from mergelab.models.layers.block import AnyBlock, Pass
from mergelab.models.layers.dense import matmul
from mergelab.models.layers.norms import Norm
from mergelab.models.load import load_params
from mergelab.models.model import Model, Params
from mergelab.models.residual_stream import logits_of
from mergelab.models.sites import Tap
from mergelab.models.table import Leaf
from mergelab.sharding import Rules

__all__ = ["FurtherLayer", "further_layer", "load_further_layer"]

_FAMILIES = ("deepseek_v3", "glm4_moe")
_NORMS = {"embed_norm": "enorm", "stream_norm": "hnorm", "final_norm": "shared_head.norm"}


@dataclass(frozen=True)
class FurtherLayer:
    """A layer of multi-token prediction; hashable, without parameters.

    Attributes:
        model: the model whose tokens it guesses.
        block: its block.
        number: its number in the files, those of the model's own blocks being lower.
    """

    model: Model
    block: AnyBlock
    number: int

    def table(self) -> tuple[Leaf, ...]:
        """Every parameter of its own: its path, shape and logical axes, and the HF tensor that stores it."""
        model, width = self.model, self.model.config.d_model
        place, spelling = f"model.layers.{self.number}", model.spelling
        blocks = (*model.config.blocks, self.block)
        longer = replace(model, config=replace(model.config, blocks=blocks))

        def named(name: str) -> str:
            return (
                f"{place}.{name}.weight" if spelling is None else spelling.in_file(f"{place}.{name}.weight")
            )

        own = f"blocks_{self.number}"
        return (
            *(Leaf((ours, "scale"), named(name), (width,), axes=("embed",)) for ours, name in _NORMS.items()),
            Leaf(("join", "kernel"), named("eh_proj"), (2 * width, width), "transpose", (None, "embed")),
            *(
                replace(leaf, path=("block", *leaf.path[1:]), reads=None)
                for leaf in longer.table()
                if leaf.path[0] == own
            ),
        )

    def new_cache(self, batch: int, slots: int, dtype: Any = jnp.float32) -> Cache:
        """An empty cache of the layer."""
        return new_cache([self.block.kept], batch, slots, dtype)

    def apply(
        self,
        own: Params,
        params: Params,
        tokens: Int[Array, "batch length"],
        hidden: Float[Array, "batch length width"],
        cache: Cache,
        mask: Bool[Array, "batch length"] | None = None,
    ) -> tuple[Float[Array, "batch length vocab"], Float[Array, "batch length width"], Cache]:
        """Logits behind `tokens`, what stands for the model's hidden states there, and the cache.

        Args:
            own: the layer's parameters.
            params: the model's.
            tokens: token ids.
            hidden: the model's last hidden state (`Output.hidden`) of the token before each, or what this
                function gave for it.
            cache: what the layer has read before.
            mask: False for padding.
        """
        config = self.model.config
        real = jnp.ones(tokens.shape, jnp.bool_) if mask is None else mask
        norms = {
            name: partial(Norm(config.norm).apply, {"params": own[name]})
            for name in ("embed_norm", "stream_norm", "final_norm")
        }
        vectors = embedded(config, params, tokens)
        pair = [norms["embed_norm"](vectors), norms["stream_norm"](hidden.astype(vectors.dtype))]
        x = matmul(jnp.concatenate([jnp.asarray(one) for one in pair], axis=-1), own["join"]["kernel"])
        shared = Pass(cache.positions(real), mask, cache, Tap({}))
        found: Any = self.block.module(0, 1.0, "block").apply({"params": own["block"]}, x, shared)
        x, (keys, values) = found
        length = cache.length + tokens.shape[1]
        cache = replace(cache, keys=(keys,), values=(values,), mask=cache.extend_mask(real), length=length)
        logits = logits_of(self.model, params, jnp.asarray(norms["final_norm"](x)))
        return logits, x, cache


def load_further_layer(
    path: str | Path | Checkpoint,
    model: Model,
    *,
    mesh: Mesh | None = None,
    dtype: Any = None,
    rules: Rules | None = None,
) -> tuple[FurtherLayer, Params]:
    """The first layer of multi-token prediction that a model's files hold, and its parameters.

    Args:
        path: the model's folder, weight file or open checkpoint.
        model: the model, as `load_model` gives it.
        mesh: where the parameters go; JAX's default device if None.
        dtype: the parameters' dtype; the stored one if None.
        rules: logical axis -> mesh axes; `DEFAULT_RULES` if None.

    Raises:
        CheckpointError: the model has none, or is of a family whose layers are not run here; or a tensor is
            missing, damaged, or of another shape.
    """
    checkpoint = open_checkpoint(path) if isinstance(path, str | Path) else path
    layer = further_layer(model, str(checkpoint.path))
    params = load_params(
        checkpoint.tensors,
        layer.table(),
        str(checkpoint.path),
        unused=lambda name: True,
        mesh=mesh,
        dtype=dtype,
        rules=rules,
    )
    return layer, params


def further_layer(model: Model, place: str = "config.json") -> FurtherLayer:
    """The first layer of multi-token prediction that a model's config names.

    Raises:
        CheckpointError: there is none, or the family's are not run here.
    """
    config: Mapping[str, Any] = model.hf_config
    kind, count = model.family.model_type, config.get("num_nextn_predict_layers")
    if kind not in _FAMILIES:
        raise CheckpointError(
            f"{place}: layers of multi-token prediction are run for {' and '.join(_FAMILIES)}, but this is a "
            f"{kind!r} model; give another model as draft."
        )
    if type(count) is not int or count < 1:
        raise CheckpointError(
            f"{place} has no layer of multi-token prediction (num_nextn_predict_layers = {count}); give "
            "another model as draft."
        )
    layers = model.config.n_layers
    block = model.family.read({**config, "num_hidden_layers": layers + 1}, place).blocks[layers]
    return FurtherLayer(model, block, layers)
