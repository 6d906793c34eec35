"""Which parameters read and write the residual stream, and from it to logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from mergelab.errors import SiteError
from mergelab.models.layers.attention import soft_cap
from mergelab.models.layers.bfloat16_bits import product_by_columns
from mergelab.models.layers.dense import scaled
from mergelab.models.layers.norms import Norm
from mergelab.models.model import Model, Params
from mergelab.models.table import Leaf

__all__ = [
    "Component",
    "ResidualWriter",
    "added_sites",
    "logits_of",
    "norm_gain",
    "norms_outputs",
    "read_logits",
    "readout",
    "require_attention",
    "require_decoder",
    "require_sum",
    "unembedding",
    "writers",
]


def unembedding(model: Model, params: Params) -> Float[Array, "width vocab"]:
    """The output embedding, in its stored dtype; the transposed input embedding where they are tied.

    What logits are multiplied with (`logit_scale`) is in it.

    Raises:
        SiteError: the model is an encoder.
    """
    require_decoder(model)
    kernel = params["embed"]["embedding"].T if model.config.tied else params["unembed"]["kernel"]
    if "unembed_down" in params:
        kernel = params["unembed_down"]["kernel"] @ kernel
    return scaled(kernel, model.config.logit_scale)


def norm_gain(model: Model, params: Params, *path: str) -> Float[Array, " width"]:
    """What a norm multiplies each coordinate with, float32: its stored scale, and the family's offset.

    Ones for a norm that is not there (`post` placement) or has no scale (OLMo 1).
    """
    node: Any = params
    for name in path:
        node = node.get(name, {})
    if "scale" not in node:
        return jnp.ones(model.config.d_model, jnp.float32)
    return node["scale"].astype(jnp.float32) + model.config.norm.offset


def readout(model: Model, params: Params, stream: Float[Array, "*rows width"]) -> Float[Array, "*rows vocab"]:
    """Logits, float32, of a stream before the last norm, soft cap included.

    Of the site `blocks.{last}.resid_post` they are the model's own.

    Raises:
        SiteError: the model is an encoder.
    """
    normed: Array = Norm(model.config.norm).apply({"params": params.get("final_norm", {})}, stream)  # pyright: ignore[reportAssignmentType]
    return logits_of(model, params, normed)


def logits_of(
    model: Model, params: Params, normed: Float[Array, "*rows width"]
) -> Float[Array, "*rows vocab"]:
    """Logits, float32, of what the last norm gives: the site `unembed.input`; soft cap included.

    Raises:
        SiteError: the model is an encoder.
    """
    kernel = unembedding(model, params)
    logits = jnp.matmul(normed, kernel.astype(normed.dtype), preferred_element_type=jnp.float32)
    if "bias" in params.get("unembed", {}):
        bias = params["unembed"]["bias"].astype(jnp.float32) * model.config.logit_scale
        logits = logits + jnp.broadcast_to(bias, logits.shape)
    return soft_cap(logits.astype(jnp.float32), model.config.logit_cap)


def read_logits(
    model: Model, params: Params, normed: Float[Array, "rows width"]
) -> Float[Array, "rows vocab"]:
    """`logits_of` for who only reads them, without a derivative.

    Alone on a CPU, where XLA would hold a float32 copy of all of a large bfloat16 unembedding, it is widened
    some tokens at a time.

    Raises:
        SiteError: the model is an encoder.
    """
    config = model.config
    place, name = ("embed", "embedding") if config.tied else ("unembed", "kernel")
    kernel: Any = params.get(place, {}).get(name)
    if (
        not _alone_on_cpu()
        or getattr(kernel, "dtype", None) != jnp.bfloat16
        or normed.dtype != jnp.bfloat16
        or kernel.size < _LARGE
        or config.logit_scale != 1
        or "unembed_down" in params
        or "bias" in params.get("unembed", {})
    ):
        return logits_of(model, params, normed)
    require_decoder(model)
    return soft_cap(product_by_columns(normed, kernel, transposed=config.tied), config.logit_cap)


def _alone_on_cpu() -> bool:
    return jax.default_backend() == "cpu" and jax.device_count() == 1


_LARGE = 1 << 24
"""Elements of an unembedding whose float32 copy matters."""


def norms_outputs(model: Model) -> bool:
    """Whether a norm stands between what blocks compute and the stream (`sandwich` and `post` placement)."""
    return any(leaf.path[-2:-1] == ("out_norm",) for leaf in model.table())


Component = Literal["embeddings", "attention", "mlp"]
_WIDTH = "embed"
"""The logical axis that runs over the residual stream."""


@dataclass(frozen=True)
class ResidualWriter:
    """A parameter whose last axis is the residual stream: a kernel `[..., in, width]`, a bias or a table.

    Attributes:
        leaf: its row of the table.
        component: what it belongs to; a recurrent layer stands in place of attention.
        layer: the block, or None for embeddings.
        gain: the scale of the norm that stands between it and the stream (sandwich blocks), or None.
    """

    leaf: Leaf
    component: Component
    layer: int | None
    gain: Leaf | None = None

    @property
    def is_bias(self) -> bool:
        """Whether it is a vector, added to every token."""
        return len(self.leaf.shape) == 1


def writers(model: Model) -> tuple[ResidualWriter, ...]:
    """Every parameter that writes to the residual stream, in table order.

    Those are the leaves of two or more axes whose last is the residual width (embeddings, attention and
    feed-forward outputs, those of experts stacked), and the biases beside them. Norms of a block's input read
    the stream, and are not among them; a norm of its output is a `gain`.

    Raises:
        SiteError: the model is an encoder, or norms stand on its stream.
    """
    require_sum(model)
    table = {leaf.path: leaf for leaf in model.table()}
    kernels = {path for path, leaf in table.items() if len(leaf.shape) > 1 and leaf.axes[-1:] == (_WIDTH,)}
    found = []
    for path, leaf in table.items():
        if path not in kernels and not (path[-1] == "bias" and (*path[:-1], "kernel") in kernels):
            continue
        if not path[0].startswith("blocks_"):
            found.append(ResidualWriter(leaf, "embeddings", None))
            continue
        component: Component = "attention" if path[1] in ("attn", "mixer") else "mlp"
        gain = table.get((*path[:2], "out_norm", "scale"))
        found.append(ResidualWriter(leaf, component, int(path[0].removeprefix("blocks_")), gain))
    return tuple(found)


def added_sites(model: Model, layer: int) -> tuple[str, ...]:
    """The sites of what a block adds to the stream, in order: `attn.out` or `mixer.out`, and `mlp.out`."""
    names = [f"blocks.{layer}.{part}.out" for part in ("attn", "mixer", "mlp")]
    return tuple(name for name in names if name in model.sites())


def require_attention(model: Model) -> None:
    """Checks that every block of a decoder has attention heads.

    Raises:
        SiteError: some are recurrent.
    """
    if layers := getattr(model.config, "recurrent", ()):
        raise SiteError(
            f"{len(layers)} of the {model.config.n_layers} blocks of this {model.family.model_type!r} model "
            f"are recurrent and have no attention heads, block {layers[0]} among them; read its sites "
            "instead (blocks.*.mixer.*)."
        )


def require_decoder(model: Model) -> None:
    """Checks that a model has a residual stream that is read into the logits of next tokens.

    Raises:
        SiteError: it is an encoder: its norms stand on the stream itself, and nothing reads tokens off it; or
            it was saved without a head.
    """
    if model.family.architecture.causal and not getattr(model.config, "head", True):
        raise SiteError(
            f"the weights of this {model.family.model_type!r} model were saved without a head of next "
            "tokens; take a model that has one."
        )
    if not model.family.architecture.causal:
        raise SiteError(
            f"a {model.family.model_type!r} model is an encoder: norms stand on its stream, and it predicts "
            "no next tokens; take a decoder."
        )


def require_sum(model: Model) -> None:
    """Checks that the residual stream of a decoder is a sum of what its layers added.

    Raises:
        SiteError: as `require_decoder`; or norms stand on the stream (OPT 350m, BLOOM's embeddings), or it is
            multiplied by a number after each block (Gemma 4).
    """
    require_decoder(model)
    changed = {getattr(block, "placement", "") for block in model.config.blocks} & {"after", "scaled"}
    if changed or model.config.embed_norm is not None:
        raise SiteError(
            f"the stream of this {model.family.model_type!r} model is no sum of what its embeddings and "
            "layers added, as norms or factors stand on it; take a model of another family."
        )
