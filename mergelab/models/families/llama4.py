"""Llama 4, text: chunked layers that are rotated, global ones that are not; experts with a shared one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mergelab.errors import CheckpointError, quoted
from mergelab.models.decoder import DECODER, DecoderConfig
from mergelab.models.families.config_fields import read_usual_fields, usual_decoder, usual_rotary
from mergelab.models.families.expert_fields import check_experts, experts_in_layers
from mergelab.models.families.llama import LLAMA_FILES, LLAMA_LINEAR, LLAMA_NORMS, llama_rows
from mergelab.models.layers.attention import AttentionSpec, QueryTemperature
from mergelab.models.layers.block import BlockSpec
from mergelab.models.layers.mlp import MLPSpec
from mergelab.models.layers.norms import NormKind
from mergelab.models.layers.routing import Experts
from mergelab.models.model import Family
from mergelab.models.table import Fused, Row, linear_rows

__all__ = ["LLAMA4_TEXT"]

_LAYER = "model.layers.{i}"
_MLP = f"{_LAYER}.feed_forward"
_LINEAR = {ours: hf.replace("mlp.", "feed_forward.") for ours, hf in LLAMA_LINEAR.items()}
_SHARED = {f"mlp.shared.{part}": f"shared_expert.{part}_proj" for part in ("gate", "up", "down")}


def llama4_rows(c: DecoderConfig) -> tuple[Row, ...]:
    """The table: one tensor `[experts, in, out]` holds gate and up, one after the other."""
    mixtures = [block.mlp for block in c.blocks if isinstance(block, BlockSpec)]
    hidden = next((mlp.hidden for mlp in mixtures if isinstance(mlp, Experts)), 0)
    return llama_rows(
        *LLAMA_NORMS,
        *linear_rows("blocks_{i}", _LAYER, _LINEAR),
        Row("blocks_{i}.mlp.router", f"{_MLP}.router.weight", "transpose"),
        *(
            Row(
                f"blocks_{{i}}.mlp.{name}",
                f"{_MLP}.experts.gate_up_proj",
                Fused(start, 2 * hidden, transposed=False),
            )
            for name, start in (("gate", 0), ("up", hidden))
        ),
        Row("blocks_{i}.mlp.down", f"{_MLP}.experts.down_proj"),
        *linear_rows("blocks_{i}", _MLP, _SHARED),
    )


def read_llama4(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    if type(config.get("attn_temperature_tuning")) is int:  # the first files have a number for a switch
        config = {**config, "attn_temperature_tuning": bool(config["attn_temperature_tuning"])}
    optional = {
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "num_experts_per_tok": 1,
        "num_local_experts": 16,
        "moe_layers": None,
        "interleave_moe_layer_step": 1,
        "use_qk_norm": True,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
        "attention_chunk_size": 8192,
        "layer_types": None,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "attn_scale": 0.1,
    }
    fields = read_usual_fields(
        config, place, optional, {"hidden_act": ("silu", "swish")}, ("for_llm_compressor",)
    )
    count, bias = fields["num_hidden_layers"], fields["attention_bias"]
    rotated = _rotated(fields, place)
    chunks = _chunks(fields, rotated, place)
    rotary = replace(usual_rotary(fields, place, 500000.0), neighbors=True)
    hidden = fields["intermediate_size"]
    dense = usual_decoder(
        fields,
        place,
        attention={"qkv_bias": bias, "out_bias": bias},
        mlp=MLPSpec(fields["intermediate_size_mlp"]),
        rotary=[rotary if turns else None for turns in rotated],
    )
    tuning = (
        QueryTemperature(fields["attn_scale"], fields["floor_scale"])
        if fields["attn_temperature_tuning"]
        else None
    )
    # A norm without scales is the same before the rotation, where it stands here, and after it.
    norm = NormKind("rms", fields["rms_norm_eps"], scaled=False) if fields["use_qk_norm"] else None
    blocks = []
    for block, turns, chunk in zip(dense.blocks, rotated, chunks, strict=True):
        assert isinstance(block, BlockSpec) and isinstance(block.attention, AttentionSpec)
        kind = {"qk_norm": norm} if turns else {"temperature": tuning}
        blocks.append(replace(block, attention=replace(block.attention, chunk=chunk, **kind)))
    experts = Experts(
        fields["num_local_experts"],
        fields["num_experts_per_tok"],
        hidden,
        normalize=False,
        scoring="sigmoid",
        weigh_input=True,
        shared=hidden,
    )
    sparse = _sparse(fields, count, place)
    return experts_in_layers(replace(dense, blocks=tuple(blocks)), check_experts(experts, place), sparse)


def _rotated(fields: Mapping[str, Any], place: str) -> list[bool]:
    """Whether each layer is rotated."""
    count, every = fields["num_hidden_layers"], fields["no_rope_layer_interval"]
    given = fields["no_rope_layers"] or [int((i + 1) % every != 0) for i in range(count)]
    if len(given) != count:
        raise CheckpointError(
            f"{place} has {len(given)} no_rope_layers for {count} layers; give one per layer, 1 for one that "
            "is rotated."
        )
    return [bool(one) for one in given]


def _chunks(fields: Mapping[str, Any], rotated: Sequence[bool], place: str) -> list[int | None]:
    """The length of the chunks within which each layer sees; None for all tokens."""
    chunk, given = fields["attention_chunk_size"], fields["layer_types"]
    if given is None:
        return [chunk if turns else None for turns in rotated]
    if len(given) != len(rotated):
        raise CheckpointError(
            f"{place} has {len(given)} layer_types for {len(rotated)} layers; give one per layer."
        )
    for kind in given:
        if kind not in ("full_attention", "chunked_attention"):
            raise CheckpointError(
                f"{place} has the layer type {quoted(kind)}, but this model family implements only "
                "'full_attention' or 'chunked_attention'; the model cannot be run here."
            )
    if chunk is None and "chunked_attention" in given:
        raise CheckpointError(
            f"{place} has layers of 'chunked_attention' but no attention_chunk_size; add it."
        )
    return [chunk if kind == "chunked_attention" else None for kind in given]


def _sparse(fields: Mapping[str, Any], count: int, place: str) -> list[bool]:
    """Whether each layer has experts."""
    step, given = fields["interleave_moe_layer_step"], fields["moe_layers"]
    if given is None:
        return [(i + 1) % step == 0 for i in range(count)]
    if any(layer >= count for layer in given):
        raise CheckpointError(
            f"{place} has moe_layers up to {max(given)}, but {count} layers, numbered from 0; correct it."
        )
    return [i in given for i in range(count)]


LLAMA4_TEXT = Family("llama4_text", DECODER, read_llama4, llama4_rows, **LLAMA_FILES)
