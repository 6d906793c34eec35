"""Qwen3.5, dense and with experts: Qwen3-Next's layers, their delta nets stored by part and not by head."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from mergelab.models.decoder import DECODER, DecoderConfig
from mergelab.models.families.config_fields import read_usual_fields
from mergelab.models.families.expert_fields import check_experts, experts_in_layers
from mergelab.models.families.llama import LLAMA_FILES, LLAMA_LINEAR, llama_rows
from mergelab.models.families.qwen_moe import QWEN2_MOE_ROWS
from mergelab.models.families.qwen_next import DELTA_FIELDS, delta_decoder, delta_rows, gated_attention_rows
from mergelab.models.families.recurrent_fields import recurrent_mixer
from mergelab.models.families.wrappers import without_images
from mergelab.models.layers.delta_net import DeltaNetSpec
from mergelab.models.layers.routing import Experts
from mergelab.models.model import Family
from mergelab.models.table import Fused, Row, linear_rows

__all__ = ["QWEN3_5_MOE_TEXT", "QWEN3_5_TEXT"]

_LAYER = "model.layers.{i}"
_FIXED: Mapping[str, Any] = {
    "hidden_act": ("silu", "swish"),
    "is_causal": (True,),
    "attn_output_gate": (True,),
}
_INERT = ("mamba_ssm_dtype", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "base_config_key")


def _mixing_rows(c: DecoderConfig) -> tuple[Row, ...]:
    spec = recurrent_mixer(c, DeltaNetSpec)
    ours, theirs = "blocks_{i}.mixer", f"{_LAYER}.linear_attn"
    fused: tuple[Row, ...] = ()
    if spec is not None:
        keys, values = spec.key_heads * spec.key_dim, spec.value_heads * spec.value_dim
        fused = tuple(
            Row(f"{ours}.{name}.kernel", f"{theirs}.in_proj_qkv.weight", Fused(start, 2 * keys + values))
            for name, start in (("q", 0), ("k", keys), ("v", 2 * keys))
        )
    plain = {"gate": "in_proj_z", "strength": "in_proj_b", "step": "in_proj_a"}
    return (
        *gated_attention_rows(c.n_heads),
        *delta_rows(spec),
        *fused,
        *linear_rows(ours, theirs, plain),
    )


def _rows(c: DecoderConfig) -> tuple[Row, ...]:
    fed = {ours: hf for ours, hf in LLAMA_LINEAR.items() if ours.startswith("mlp.")}
    return llama_rows(*_mixing_rows(c), *linear_rows("blocks_{i}", _LAYER, fed))


def _moe_rows(c: DecoderConfig) -> tuple[Row, ...]:
    """Experts are tensors of their own, or lie in two tensors of a layer (as published)."""
    fed = [row for row in QWEN2_MOE_ROWS if ".mlp." in row.path]
    experts: Any = c.blocks[0]
    if experts.mlp.packed:
        theirs, width = f"{_LAYER}.mlp.experts", experts.mlp.hidden
        packed = {
            "gate": (f"{theirs}.gate_up_proj", Fused(0, 2 * width)),
            "up": (f"{theirs}.gate_up_proj", Fused(width, 2 * width)),
            "down": (f"{theirs}.down_proj", "transpose"),
        }
        fed = [row for row in fed if "{e}" not in row.hf_name]
        fed += [Row(f"blocks_{{i}}.mlp.{ours}", name, change) for ours, (name, change) in packed.items()]
    return llama_rows(*_mixing_rows(c), *fed)


def _as_packed(config: DecoderConfig, names: Collection[str]) -> DecoderConfig:
    """The configuration whose table fits files that hold all experts of a layer in two tensors."""
    if not any(name.endswith("mlp.experts.gate_up_proj") for name in names):
        return config
    blocks: list[Any] = [*config.blocks]
    made = {block: replace(block, mlp=replace(block.mlp, packed=True)) for block in dict.fromkeys(blocks)}
    return replace(config, blocks=tuple(made[block] for block in blocks))


def read_qwen3_5(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    optional = {
        **DELTA_FIELDS,
        "vocab_size": 248320,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    }
    config = without_images(dict(config))
    fields = read_usual_fields(config, place, optional, _FIXED, (*_INERT, "mlp_only_layers"))
    return delta_decoder(fields, place)


def read_qwen3_5_moe(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    optional = {
        **DELTA_FIELDS,
        "vocab_size": 248320,
        "hidden_size": 2048,
        "num_hidden_layers": 40,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    }
    fixed = {**_FIXED, "norm_topk_prob": (True, None), "mlp_only_layers": ([], None)}
    inert = (*_INERT, "num_local_experts")
    config = without_images({**config, "intermediate_size": 1})  # there is no layer without experts
    fields = read_usual_fields(config, place, optional, fixed, inert)
    experts = Experts(
        fields["num_experts"],
        fields["num_experts_per_tok"],
        fields["moe_intermediate_size"],
        shared=fields["shared_expert_intermediate_size"],
        shared_gate=True,
    )
    dense = delta_decoder(fields, place)
    return experts_in_layers(dense, check_experts(experts, place), [True] * dense.n_layers)


_FILES: dict[str, Any] = {
    "prefix": LLAMA_FILES["prefix"],
    "unused": (*LLAMA_FILES["unused"], "mtp.*", "model.visual.*"),
}
QWEN3_5_TEXT = Family("qwen3_5_text", DECODER, read_qwen3_5, _rows, **_FILES)
QWEN3_5_MOE_TEXT = Family(
    "qwen3_5_moe_text", DECODER, read_qwen3_5_moe, _moe_rows, **_FILES, adapt=_as_packed
)
