"""Mamba 1 and 2: blocks of one recurrent layer each, without attention, positions or feed-forward layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mergelab.errors import CheckpointError, quoted
from mergelab.models.decoder import DECODER, DecoderConfig
from mergelab.models.families.config_fields import read_fields
from mergelab.models.families.recurrent_fields import recurrent_mixer
from mergelab.models.layers.mamba import Mamba2Spec, MambaSpec
from mergelab.models.layers.norms import NormKind
from mergelab.models.layers.recurrent_block import MixerSpec, RecurrentBlockSpec
from mergelab.models.model import Family
from mergelab.models.table import Channels, Fused, Row, linear_rows

__all__ = ["MAMBA", "MAMBA2", "mamba_rows", "rank_of"]

_OURS, _SITE = "blocks_{i}.mixer", "blocks.{i}.mixer"
NO_LIMIT = 2**31 - 1
"""Positions of a model that counts none."""

_OPTIONAL: Mapping[str, Any] = {
    "layer_norm_epsilon": 1e-5,
    "expand": 2,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_rank": None,
}
_FIXED: Mapping[str, Any] = {"hidden_act": ("silu", "swish"), "rms_norm": (True,), "is_causal": (True,)}
_INERT = (
    *("d_inner", "d_model", "n_layer", "intermediate_size"),  # say once more what other fields say
    *("time_step_floor", "time_step_init_scheme", "time_step_max", "time_step_min", "time_step_scale"),
    *("fused_add_norm", "pad_vocab_size_multiple", "rescale_prenorm_residual", "ssm_cfg"),
    *("residual_in_fp32", "use_mambapy", "use_associative_scan", "chunk_size", "layer_types"),
)


def rank_of(config: Mapping[str, Any], name: str, width: int) -> dict[str, Any]:
    """The config with a number for a rank that is `auto`, or null: a sixteenth of the width, rounded up."""
    if config.get(name) not in (None, "auto"):
        return dict(config)
    return {**config, name: math.ceil(width / 16)}


def mamba_rows(spec: MambaSpec, theirs: str) -> tuple[Row, ...]:
    """The rows of a Mamba 1 layer, whose files fuse what reads one vector.

    Args:
        spec: the layer.
        theirs: what stands before the names in HF.
    """
    inner = {"step_latent": spec.rank, "b": spec.numbers, "c": spec.numbers}
    return (
        *_fused("in_proj", {"x": spec.channels, "gate": spec.channels}, theirs),
        *_fused("x_proj", inner, theirs, reads=f"{_SITE}.x"),
        Row(f"{_OURS}.conv.x", f"{theirs}.conv1d.weight", Channels(0, spec.channels)),
        Row(f"{_OURS}.conv.x_bias", f"{theirs}.conv1d.bias"),
        Row(f"{_OURS}.step.kernel", f"{theirs}.dt_proj.weight", "transpose", f"{_SITE}.step_latent"),
        Row(f"{_OURS}.step.bias", f"{theirs}.dt_proj.bias"),
        *_shared_rows(theirs),
    )


def _mamba2_rows(spec: Mamba2Spec, theirs: str) -> tuple[Row, ...]:
    convolved = {"x": spec.channels, "b": spec.groups * spec.numbers, "c": spec.groups * spec.numbers}
    rows, start, size = [], 0, sum(convolved.values())
    for name, width in convolved.items():
        rows.append(Row(f"{_OURS}.conv.{name}", f"{theirs}.conv1d.weight", Channels(start, size)))
        rows.append(Row(f"{_OURS}.conv.{name}_bias", f"{theirs}.conv1d.bias", Fused(start, size)))
        start += width
    return (
        *_fused("in_proj", {"gate": spec.channels, **convolved, "step": spec.heads}, theirs),
        *rows,
        Row(f"{_OURS}.step_bias", f"{theirs}.dt_bias"),
        Row(f"{_OURS}.scale", f"{theirs}.norm.weight"),
        *_shared_rows(theirs),
    )


def _fused(name: str, widths: Mapping[str, int], theirs: str, reads: str | None = None) -> list[Row]:
    """Projections that are ranges of one."""
    rows, start, size = [], 0, sum(widths.values())
    for ours, width in widths.items():
        change = Fused(start, size)
        rows.append(Row(f"{_OURS}.{ours}.kernel", f"{theirs}.{name}.weight", change, reads))
        rows.append(Row(f"{_OURS}.{ours}.bias", f"{theirs}.{name}.bias", change))
        start += width
    return rows


def _shared_rows(theirs: str) -> tuple[Row, ...]:
    """What both kinds have."""
    return (
        Row(f"{_OURS}.a_log", f"{theirs}.A_log"),
        Row(f"{_OURS}.skip", f"{theirs}.D"),
        *linear_rows(_OURS, theirs, {"o": "out_proj"}),
    )


def _rows(c: DecoderConfig) -> tuple[Row, ...]:
    first, second = recurrent_mixer(c, MambaSpec), recurrent_mixer(c, Mamba2Spec)
    theirs = "backbone.layers.{i}.mixer"
    return (
        Row("embed.embedding", "backbone.embeddings.weight"),
        Row("blocks_{i}.mixer_norm.scale", "backbone.layers.{i}.norm.weight"),
        *(() if first is None else mamba_rows(first, theirs)),
        *(() if second is None else _mamba2_rows(second, theirs)),
        Row("final_norm.scale", "backbone.norm_f.weight"),
        Row("unembed.kernel", "lm_head.weight", "transpose"),
    )


def _decoder(fields: Mapping[str, Any], mixer: MixerSpec) -> DecoderConfig:
    norm = NormKind("rms", fields["layer_norm_epsilon"])
    return DecoderConfig(
        fields["vocab_size"],
        fields["hidden_size"],
        NO_LIMIT,
        (RecurrentBlockSpec(mixer, None, norm),) * fields["num_hidden_layers"],
        norm,
        tied=fields["tie_word_embeddings"],
    )


def read_mamba(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    optional = {
        **_OPTIONAL,
        "vocab_size": 50280,
        "hidden_size": 768,
        "num_hidden_layers": 32,
        "state_size": 16,
        "tie_word_embeddings": True,
    }
    width = config.get("hidden_size", 768)
    config = rank_of(config, "time_step_rank", width if type(width) is int else 1)
    fields = read_fields(config, place, required=(), optional=optional, fixed=_FIXED, inert=_INERT)
    mixer = MambaSpec(
        fields["expand"] * fields["hidden_size"],
        fields["state_size"],
        fields["time_step_rank"],
        fields["conv_kernel"],
        fields["use_bias"],
        fields["use_conv_bias"],
    )
    return _decoder(fields, mixer)


def read_mamba2(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    optional = {
        **_OPTIONAL,
        "vocab_size": 32768,
        "hidden_size": 4096,
        "num_hidden_layers": 64,
        "num_heads": 128,
        "head_dim": 64,
        "state_size": 128,
        "n_groups": 8,
        "tie_word_embeddings": False,
    }
    inert = (*_INERT, "time_step_limit", "norm_before_gate")
    fixed = {**_FIXED, "norm_before_gate": (False,)}
    config = {**config, "time_step_rank": None}  # the files have none
    fields = read_fields(config, place, required=(), optional=optional, fixed=fixed, inert=inert)
    heads, groups, channels = (
        fields["num_heads"],
        fields["n_groups"],
        fields["expand"] * fields["hidden_size"],
    )
    faults = []
    if heads * (fields["head_dim"] or 0) != channels:
        faults.append(
            f"{place} has {heads} heads of width {fields['head_dim']} for {channels} channels (expand times "
            "hidden_size), which they must fill; correct one of them."
        )
    if heads % groups:
        faults.append(
            f"{place} has {heads} heads in {groups} n_groups, which cannot be equal; correct one of the two."
        )
    limit = config.get("time_step_limit") or (0.0, math.inf)
    if not _is_range(limit):
        faults.append(f"{place} has time_step_limit = {quoted(limit)}, but expected two numbers that rise.")
    if faults:
        raise CheckpointError(faults)
    mixer = Mamba2Spec(
        heads,
        fields["head_dim"],
        fields["state_size"],
        groups,
        fields["conv_kernel"],
        fields["use_bias"],
        fields["use_conv_bias"],
        fields["layer_norm_epsilon"],
        float(limit[0]),
        float(limit[1]),
    )
    return _decoder(fields, mixer)


def _is_range(limit: Any) -> bool:
    if not isinstance(limit, list | tuple) or len(limit) != 2:
        return False
    return all(type(value) in (int, float) for value in limit) and 0 <= limit[0] < limit[1]


_FILES: dict[str, Any] = {"prefix": "backbone.", "unused": ("lm_head.weight",)}
MAMBA = Family("mamba", DECODER, read_mamba, _rows, **_FILES)
MAMBA2 = Family("mamba2", DECODER, read_mamba2, _rows, **_FILES)
