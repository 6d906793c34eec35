"""ViT: an encoder of the patches of an image (arXiv:2010.11929)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from mergelab.models.families.config_fields import head_width, read_fields
from mergelab.models.families.image_fields import image_sizes
from mergelab.models.layers.attention import AttentionSpec
from mergelab.models.layers.block import BlockSpec
from mergelab.models.layers.mlp import ACTIVATIONS, MLPSpec
from mergelab.models.layers.norms import NormKind
from mergelab.models.model import Family
from mergelab.models.table import Reshaped, Row, linear_rows, norm_rows
from mergelab.models.vision import VISION, VisionConfig

__all__ = ["VIT"]

_LAYER = "vit.encoder.layer.{i}"
_LINEAR = {
    "attn.q": "attention.attention.query",
    "attn.k": "attention.attention.key",
    "attn.v": "attention.attention.value",
    "attn.o": "attention.output.dense",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
}
# Of masked image modeling, whose head is not loaded.
_INERT = ("encoder_stride",)


def _rows(c: VisionConfig) -> Iterator[Row]:
    kernel = Reshaped((c.d_model, c.image[0], *c.patch), transposed=True)
    yield Row("embed.first", "vit.embeddings.cls_token", Reshaped((1, 1, c.d_model)))
    yield Row("embed.kernel", "vit.embeddings.patch_embeddings.projection.weight", kernel)
    yield Row("embed.bias", "vit.embeddings.patch_embeddings.projection.bias")
    table = Reshaped((1, c.max_length, c.d_model))
    yield Row("positions.embedding", "vit.embeddings.position_embeddings", table)
    yield from linear_rows("blocks_{i}", _LAYER, _LINEAR)
    yield from norm_rows("blocks_{i}.attn_norm", f"{_LAYER}.layernorm_before")
    yield from norm_rows("blocks_{i}.mlp_norm", f"{_LAYER}.layernorm_after")
    yield from norm_rows("final_norm", "vit.layernorm")
    yield Row("pooler.kernel", "vit.pooler.dense.weight", "transpose")
    yield Row("pooler.bias", "vit.pooler.dense.bias")


def read_vit(config: Mapping[str, Any], place: str) -> VisionConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    fields = read_fields(
        config,
        place,
        required=("hidden_size", "num_hidden_layers", "num_attention_heads"),
        optional={
            "intermediate_size": 3072,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-12,
            "num_channels": 3,
            "qkv_bias": True,
        },
        fixed={
            "hidden_act": tuple(ACTIVATIONS),
            "pooler_act": ("tanh",),
            "pooler_output_size": (None, config.get("hidden_size")),
        },
        inert=(*_INERT, "image_size", "patch_size"),
    )
    image, patch = image_sizes(config, place, image=224, patch=16)
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    head_dim = head_width(width, heads, place)
    norm = NormKind("layer", fields["layer_norm_eps"])
    bias = fields["qkv_bias"]
    attention = AttentionSpec(heads, heads, head_dim, head_dim**-0.5, qkv_bias=bias, out_bias=True)
    mlp = MLPSpec(fields["intermediate_size"], fields["hidden_act"], gated=False, bias=True)
    return VisionConfig(
        d_model=width,
        image=(fields["num_channels"], *image),
        patch=patch,
        blocks=(BlockSpec(attention, mlp, norm),) * fields["num_hidden_layers"],
        final_norm=norm,
        pooler=True,
    )


def _with_pooler(config: VisionConfig, names: Collection[str]) -> VisionConfig:
    return replace(config, pooler=any(name.endswith("pooler.dense.weight") for name in names))


VIT = Family(
    "vit",
    VISION,
    read_vit,
    _rows,
    prefix="vit.",
    # What hides patches, and the head that guesses them.
    unused=("vit.embeddings.mask_token", "decoder.*"),
    adapt=_with_pooler,
)
