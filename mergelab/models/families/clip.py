"""CLIP: a tower for text, one for images, and their projections; either tower alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from mergelab.errors import CheckpointError, quoted
from mergelab.models.encoder import ENCODER, EncoderConfig
from mergelab.models.families.config_fields import head_width, read_fields
from mergelab.models.families.image_fields import image_sizes
from mergelab.models.layers.attention import AttentionSpec
from mergelab.models.layers.block import BlockSpec
from mergelab.models.layers.mlp import ACTIVATIONS, MLPSpec
from mergelab.models.layers.norms import NormKind
from mergelab.models.model import Family
from mergelab.models.table import Reshaped, Row, linear_rows, norm_rows, within
from mergelab.models.two_towers import TWO_TOWERS, TwoTowersConfig
from mergelab.models.vision import VISION, VisionConfig

__all__ = ["CLIP", "CLIP_TEXT", "CLIP_VISION"]

_LINEAR = {
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.out_proj",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}
_TOWER: Mapping[str, Any] = {
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_TEXT: Mapping[str, Any] = {
    **_TOWER,
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
}
_VISION: Mapping[str, Any] = {**_TOWER, "hidden_size": 768, "intermediate_size": 3072, "num_channels": 3}
_FIXED = {"hidden_act": tuple(ACTIVATIONS)}
_INERT = ("dropout", "initializer_factor", "projection_dim")


def _blocks_rows(tower: str) -> Iterator[Row]:
    layer = f"{tower}.encoder.layers.{{i}}"
    yield from linear_rows("blocks_{i}", layer, _LINEAR)
    yield from norm_rows("blocks_{i}.attn_norm", f"{layer}.layer_norm1")
    yield from norm_rows("blocks_{i}.mlp_norm", f"{layer}.layer_norm2")


def _text_rows(c: EncoderConfig) -> Iterator[Row]:
    yield Row("embed.embedding", "text_model.embeddings.token_embedding.weight")
    yield Row("positions.embedding", "text_model.embeddings.position_embedding.weight")
    yield from _blocks_rows("text_model")
    yield from norm_rows("final_norm", "text_model.final_layer_norm")


def _vision_rows(c: VisionConfig) -> Iterator[Row]:
    kernel = Reshaped((c.d_model, c.image[0], *c.patch), transposed=True)
    yield Row("embed.first", "vision_model.embeddings.class_embedding")
    yield Row("embed.kernel", "vision_model.embeddings.patch_embedding.weight", kernel)
    yield Row("positions.embedding", "vision_model.embeddings.position_embedding.weight")
    yield from norm_rows("entrance_norm", "vision_model.pre_layrnorm")
    yield from _blocks_rows("vision_model")
    yield from norm_rows("pooled_norm", "vision_model.post_layernorm")
    yield Row("projection.kernel", "visual_projection.weight", "transpose")


def _rows(c: TwoTowersConfig) -> Iterator[Row]:
    # One run of rows of blocks: the table numbers those of both towers together.
    rows = [*within("text", _text_rows(c.text)), *within("vision", _vision_rows(c.vision))]
    yield Row("logit_scale", "logit_scale")
    yield from sorted(rows, key=lambda row: "{i}" in row.path)
    yield Row("text_projection.kernel", "text_projection.weight", "transpose")


def _blocks(fields: Mapping[str, Any], place: str) -> dict[str, Any]:
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    head_dim = head_width(width, heads, place)
    attention = AttentionSpec(heads, heads, head_dim, head_dim**-0.5, qkv_bias=True, out_bias=True)
    mlp = MLPSpec(fields["intermediate_size"], fields["hidden_act"], gated=False, bias=True)
    norm = NormKind("layer", fields["layer_norm_eps"])
    return {"d_model": width, "blocks": (BlockSpec(attention, mlp, norm),) * fields["num_hidden_layers"]}


def read_text(config: Mapping[str, Any], place: str) -> EncoderConfig:
    """Reads a `config.json` of the tower for text; raises `CheckpointError`."""
    fields = read_fields(config, place, required=(), optional=_TEXT, fixed=_FIXED, inert=_INERT)
    return EncoderConfig(
        vocab_size=fields["vocab_size"],
        max_length=fields["max_position_embeddings"],
        causal=True,
        embed_norm=None,
        final_norm=NormKind("layer", fields["layer_norm_eps"]),
        **_blocks(fields, place),
    )


def read_vision(config: Mapping[str, Any], place: str) -> VisionConfig:
    """Reads a `config.json` of the tower for images; raises `CheckpointError`."""
    inert = (*_INERT, "image_size", "patch_size")
    optional = {**_VISION, "projection_dim": 512}
    fields = read_fields(config, place, required=(), optional=optional, fixed=_FIXED, inert=inert)
    image, patch = image_sizes(config, place, image=224, patch=32)
    norm = NormKind("layer", fields["layer_norm_eps"])
    return VisionConfig(
        image=(fields["num_channels"], *image),
        patch=patch,
        patch_bias=False,
        entrance_norm=norm,
        final_norm=None,
        pooled_norm=norm,
        projection=fields["projection_dim"],
        **_blocks(fields, place),
    )


def read_clip(config: Mapping[str, Any], place: str) -> TwoTowersConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    inert = ("initializer_factor", "logit_scale_init_value")
    inert += ("text_config", "text_config_dict", "vision_config", "vision_config_dict")
    fields = read_fields(config, place, required=(), optional={"projection_dim": 512}, fixed={}, inert=inert)
    text, vision = (_tower(config, name, place) for name in ("text_config", "vision_config"))
    end = text.get("eos_token_id", 49407)
    if type(end) is not int or end < 0:
        raise CheckpointError(
            f"{place}: text_config has eos_token_id = {quoted(end)}, but expected a token id."
        )
    seen = replace(read_vision(vision, f"{place}, vision_config"), projection=fields["projection_dim"])
    # The first configs name 2, which is not the end of CLIP's texts: theirs is the largest id.
    return TwoTowersConfig(read_text(text, f"{place}, text_config"), seen, None if end == 2 else end)


def _tower(config: Mapping[str, Any], name: str, place: str) -> Mapping[str, Any]:
    """A tower's part of the config; the first files say it twice, and mean what the dump leaves out."""
    found = config.get(f"{name}_dict")
    found = config.get(name) if found is None else found
    if found is not None and not isinstance(found, Mapping):
        raise CheckpointError(f"{place} has {name} = {quoted(found)}, but expected an object; correct it.")
    return found or {}


def _with_projection(config: VisionConfig, names: Collection[str]) -> VisionConfig:
    held = any(name.endswith("visual_projection.weight") for name in names)
    return config if held else replace(config, projection=0)


CLIP = Family("clip", TWO_TOWERS, read_clip, _rows)
CLIP_TEXT = Family("clip_text_model", ENCODER, read_text, _text_rows, prefix="text_model.")
CLIP_VISION = Family(
    "clip_vision_model", VISION, read_vision, _vision_rows, prefix="vision_model.", adapt=_with_projection
)
