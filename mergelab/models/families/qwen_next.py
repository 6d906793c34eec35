"""Qwen3-Next: gated delta nets, every fourth layer gated attention; experts, one of them for all tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergelab.errors import CheckpointError
from mergelab.models.decoder import DECODER, DecoderConfig
from mergelab.models.families.config_fields import read_usual_fields, usual_decoder
from mergelab.models.families.llama import LLAMA_FILES, LLAMA_LINEAR, LLAMA_NORMS, llama_rows
from mergelab.models.families.qwen_moe import QWEN2_MOE_ROWS, qwen_experts
from mergelab.models.families.recurrent_fields import layer_kinds, recurrent_mixer, with_mixers
from mergelab.models.layers.delta_net import DeltaNetSpec
from mergelab.models.layers.norms import NormKind
from mergelab.models.model import Family
from mergelab.models.table import Channels, FusedGroups, FusedHeads, Row, linear_rows

__all__ = ["DELTA_FIELDS", "QWEN3_NEXT", "delta_decoder", "delta_rows", "gated_attention_rows"]

_LAYER, _MIXER = "model.layers.{i}", "model.layers.{i}.linear_attn"
DELTA_FIELDS: Mapping[str, Any] = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "full_attention_interval": 4,
    "layer_types": None,
    "attention_bias": False,
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "max_position_embeddings": 32768,
}
"""Fields of the delta nets and of the attention between them."""


def gated_attention_rows(heads: int) -> tuple[Row, ...]:
    """Attention and norms as Llama's, but that queries and their gates take turns head by head."""
    query = f"{_LAYER}.self_attn.q_proj"
    others = {ours: hf for ours, hf in LLAMA_LINEAR.items() if ours in ("attn.k", "attn.v", "attn.o")}
    return (
        *LLAMA_NORMS,
        Row("blocks_{i}.mixer_norm.scale", f"{_LAYER}.input_layernorm.weight"),
        *(
            Row(f"blocks_{{i}}.attn.{name}.{kind}", f"{query}.{end}", FusedHeads(part, 2, heads))
            for part, name in enumerate(("q", "gate"))
            for kind, end in (("kernel", "weight"), ("bias", "bias"))
        ),
        *linear_rows("blocks_{i}", _LAYER, others),
        Row("blocks_{i}.attn.q_norm.scale", f"{_LAYER}.self_attn.q_norm.weight"),
        Row("blocks_{i}.attn.k_norm.scale", f"{_LAYER}.self_attn.k_norm.weight"),
    )


def delta_rows(spec: DeltaNetSpec | None) -> tuple[Row, ...]:
    """What all delta nets of these files share: one convolution of queries, keys and values; a norm."""
    if spec is None:
        return ()
    keys, values = spec.key_heads * spec.key_dim, spec.value_heads * spec.value_dim
    size = 2 * keys + values
    return (
        *(
            Row(f"blocks_{{i}}.mixer.conv.{name}", f"{_MIXER}.conv1d.weight", Channels(start, size))
            for name, start in (("q", 0), ("k", keys), ("v", 2 * keys))
        ),
        Row("blocks_{i}.mixer.a_log", f"{_MIXER}.A_log"),
        Row("blocks_{i}.mixer.step_bias", f"{_MIXER}.dt_bias"),
        Row("blocks_{i}.mixer.norm.scale", f"{_MIXER}.norm.weight"),
        Row("blocks_{i}.mixer.o.kernel", f"{_MIXER}.out_proj.weight", "transpose"),
    )


def qwen3_next_rows(c: DecoderConfig) -> tuple[Row, ...]:
    """The table: for each key head its query and key, then values and gates of the heads that share it."""
    spec = recurrent_mixer(c, DeltaNetSpec)
    fused: tuple[Row, ...] = ()
    if spec is not None:
        groups, shared = spec.key_heads, spec.value_heads // spec.key_heads
        widths = {"q": spec.key_dim, "k": spec.key_dim, "v": shared * spec.value_dim}
        widths["gate"] = widths["v"]
        fused = (
            *_in_groups("in_proj_qkvz", widths, groups),
            *_in_groups("in_proj_ba", {"strength": shared, "step": shared}, groups),
        )
    fed = [row for row in QWEN2_MOE_ROWS if ".mlp." in row.path]
    return llama_rows(*gated_attention_rows(c.n_heads), *delta_rows(spec), *fused, *fed)


def _in_groups(name: str, widths: Mapping[str, int], groups: int) -> list[Row]:
    rows, start, size = [], 0, sum(widths.values())
    for ours, width in widths.items():
        change = FusedGroups(start, size, groups)
        rows.append(Row(f"blocks_{{i}}.mixer.{ours}.kernel", f"{_MIXER}.{name}.weight", change))
        start += width
    return rows


def delta_decoder(fields: Mapping[str, Any], place: str) -> DecoderConfig:
    """The decoder of these fields with plain feed-forward layers.

    Raises:
        CheckpointError: the list of layer types is not one of these layers, or value heads cannot share key
            heads evenly.
    """
    keys, values = fields["linear_num_key_heads"], fields["linear_num_value_heads"]
    if values % keys:
        raise CheckpointError(
            f"{place} has {values} linear_num_value_heads for {keys} linear_num_key_heads, which they cannot "
            "share evenly; correct one of the two."
        )
    every = fields["full_attention_interval"]
    default = [
        "linear_attention" if (i + 1) % every else "full_attention"
        for i in range(fields["num_hidden_layers"])
    ]
    known = ("linear_attention", "full_attention")
    kinds = layer_kinds(fields["layer_types"], default, known, place)
    norm = NormKind("rms", fields["rms_norm_eps"], offset=1.0)
    bias = fields["attention_bias"]
    attention = {"qkv_bias": bias, "out_bias": bias, "qk_norm": norm, "gated": True}
    attending = usual_decoder(fields, place, attention=attention, block={"norm": norm})
    delta = DeltaNetSpec(
        keys,
        values,
        fields["linear_key_head_dim"],
        fields["linear_value_head_dim"],
        fields["linear_conv_kernel_dim"],
        fields["rms_norm_eps"],
    )
    return with_mixers(attending, kinds, {"linear_attention": delta})


def read_qwen3_next(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    optional = {
        **DELTA_FIELDS,
        "intermediate_size": 5632,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
        "norm_topk_prob": True,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    }
    fixed = {"hidden_act": ("silu", "swish"), "is_causal": (True,)}
    fields = read_usual_fields(config, place, optional, fixed, inert=("max_window_layers",))
    shared = fields["shared_expert_intermediate_size"]
    return qwen_experts(delta_decoder(fields, place), fields, place, shared=shared, shared_gate=True)


QWEN3_NEXT = Family(
    "qwen3_next",
    DECODER,
    read_qwen3_next,
    qwen3_next_rows,
    prefix=LLAMA_FILES["prefix"],
    unused=(*LLAMA_FILES["unused"], "mtp.*"),
)
