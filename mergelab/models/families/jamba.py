"""Jamba: Mamba layers, every eighth one attention without positions; every second feed-forward is experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergelab.errors import CheckpointError
from mergelab.models.decoder import DECODER, DecoderConfig
from mergelab.models.families.config_fields import read_usual_fields, usual_decoder
from mergelab.models.families.expert_fields import check_experts, experts_in_layers
from mergelab.models.families.llama import LLAMA_FILES, LLAMA_LINEAR
from mergelab.models.families.mamba import mamba_rows, rank_of
from mergelab.models.families.recurrent_fields import recurrent_mixer, with_mixers
from mergelab.models.layers.mamba import MambaSpec
from mergelab.models.layers.norms import NormKind
from mergelab.models.layers.routing import Experts
from mergelab.models.model import Family
from mergelab.models.table import Row, linear_rows

__all__ = ["JAMBA"]

_LAYER, _FED = "model.layers.{i}", "model.layers.{i}.feed_forward"


def jamba_rows(c: DecoderConfig) -> tuple[Row, ...]:
    """The table."""
    mixer = recurrent_mixer(c, MambaSpec)
    attention = {ours: hf for ours, hf in LLAMA_LINEAR.items() if ours.startswith("attn.")}
    return (
        Row("embed.embedding", "model.embed_tokens.weight"),
        Row("blocks_{i}.mixer_norm.scale", f"{_LAYER}.input_layernorm.weight"),
        Row("blocks_{i}.attn_norm.scale", f"{_LAYER}.input_layernorm.weight"),
        Row("blocks_{i}.mlp_norm.scale", f"{_LAYER}.pre_ff_layernorm.weight"),
        *linear_rows("blocks_{i}", _LAYER, attention),
        *(() if mixer is None else mamba_rows(mixer, f"{_LAYER}.mamba")),
        Row("blocks_{i}.mixer.step_latent_norm.scale", f"{_LAYER}.mamba.dt_layernorm.weight"),
        Row("blocks_{i}.mixer.b_norm.scale", f"{_LAYER}.mamba.b_layernorm.weight"),
        Row("blocks_{i}.mixer.c_norm.scale", f"{_LAYER}.mamba.c_layernorm.weight"),
        *linear_rows("blocks_{i}", _FED, {f"mlp.{n}": f"{n}_proj" for n in ("gate", "up", "down")}),
        Row("blocks_{i}.mlp.router", f"{_FED}.router.weight", "transpose"),
        *(
            Row(f"blocks_{{i}}.mlp.{name}", f"{_FED}.experts.{{e}}.{name}_proj.weight", "transpose")
            for name in ("gate", "up", "down")
        ),
        Row("final_norm.scale", "model.final_layernorm.weight"),
        Row("unembed.kernel", "lm_head.weight", "transpose"),
    )


def read_jamba(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    optional = {
        "vocab_size": 65536,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 262144,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "attn_layer_period": 8,
        "attn_layer_offset": 4,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_dt_rank": 256,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
    }
    fixed = {
        "hidden_act": ("silu", "swish"),
        "is_causal": (True,),
        "mamba_inner_layernorms": (True,),
        "sliding_window": (None,),
    }
    inert = ("use_mamba_kernels", "use_mambapy", "use_associative_scan", "num_logits_to_keep", "layer_types")
    inert += ("calc_logits_for_entire_prompt", "layers_block_type", "layers_num_experts", "num_local_experts")
    width = config.get("hidden_size", 4096)
    config = rank_of(config, "mamba_dt_rank", width if type(width) is int else 1)
    fields = read_usual_fields(config, place, optional, fixed, inert)
    faults = [
        f"{place} has {part}_layer_offset = {offset} for {part}_layer_period = {period}, which no layer has; "
        "give an offset below the period."
        for part in ("attn", "expert")
        if (offset := fields[f"{part}_layer_offset"]) >= (period := fields[f"{part}_layer_period"])
    ]
    if faults:
        raise CheckpointError(faults)

    def every(part: str) -> list[bool]:
        period, offset = fields[f"{part}_layer_period"], fields[f"{part}_layer_offset"]
        return [i % period == offset for i in range(fields["num_hidden_layers"])]

    attending = usual_decoder(fields, place, rotary=[None] * fields["num_hidden_layers"])
    mixer = MambaSpec(
        fields["mamba_expand"] * fields["hidden_size"],
        fields["mamba_d_state"],
        fields["mamba_dt_rank"],
        fields["mamba_d_conv"],
        fields["mamba_proj_bias"],
        fields["mamba_conv_bias"],
        NormKind("rms", fields["rms_norm_eps"]),
    )
    kinds = ["attention" if attends else "mamba" for attends in every("attn")]
    mixed = with_mixers(attending, kinds, {"mamba": mixer})
    if fields["num_experts"] == 1:
        return mixed
    experts = Experts(
        fields["num_experts"], fields["num_experts_per_tok"], fields["intermediate_size"], normalize=False
    )
    return experts_in_layers(mixed, check_experts(experts, place), every("expert"))


JAMBA = Family("jamba", DECODER, read_jamba, jamba_rows, **LLAMA_FILES)
