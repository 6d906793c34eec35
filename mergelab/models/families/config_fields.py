"""Fields of `config.json`, read by type, and those that most decoders share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mergelab.errors import CheckpointError, did_you_mean, quoted
from mergelab.models.decoder import DecoderConfig
from mergelab.models.families.rotary_config import ROTARY_FIELDS, read_rotary
from mergelab.models.layers.attention import AttentionSpec
from mergelab.models.layers.block import BlockSpec
from mergelab.models.layers.mlp import Experts, MLPSpec
from mergelab.models.layers.norms import NormKind
from mergelab.models.layers.rotary import Rotary

__all__ = ["head_width", "layer_types_of", "layered", "read_fields", "read_usual_fields", "usual_decoder"]


MAX_LAYERS = 10_000
"""Layers a config may claim; what its weights hold is compared once they are open (`Model.for_tensors`)."""

_MAX = 2**31 - 1
SIZES: Mapping[str, tuple[int, int]] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer"), (1, MAX_LAYERS)),
    **dict.fromkeys(("num_local_experts", "num_experts_per_tok"), (1, 2**16)),
    "max_window_layers": (0, _MAX),
    **dict.fromkeys(
        (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "original_max_position_embeddings",
            "sliding_window",
            "sliding_window_pattern",
            "_sliding_window_pattern",
            "type_vocab_size",
            "n_embd",
            "n_head",
            "n_inner",
            "n_positions",
            "n_ctx",
        ),
        (1, _MAX),
    ),
}
"""Whole numbers, with the least and the largest they may be."""

NUMBERS = frozenset(
    {
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "layer_norm_eps",
        "layer_norm_epsilon",
        "partial_rotary_factor",
        "query_pre_attn_scalar",
        "rms_norm_eps",
        "rope_local_base_freq",
        "rope_theta",
        "rotary_emb_base",
        "rotary_pct",
    }
)
SWITCHES = frozenset(
    {
        "attention_bias",
        "mlp_bias",
        "tie_word_embeddings",
        "use_parallel_residual",
        "use_sliding_window",
    }
)
MAPPINGS = frozenset({"rope_parameters", "rope_scaling"})
LISTS = frozenset({"layer_types"})
NULLABLE = frozenset(
    {
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "head_dim",
        "num_key_value_heads",
        "sliding_window",
        "sliding_window_pattern",
        "tie_word_embeddings",
    }
)
"""Fields that transformers writes as null though their default is something else."""

# Fields that say nothing about a forward pass at inference: token ids (of text), dropouts and the like (of
# training), the names of other heads' labels, and how `transformers` stores or runs a model.
INERT = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_name_or_path",
        "_num_labels",
        "architectures",
        "attention_dropout",
        "attention_probs_dropout_prob",
        "attn_pdrop",
        "auto_map",
        "bos_token_id",
        "cache_implementation",
        "classifier_dropout",
        "dtype",
        "embd_pdrop",
        "eos_token_id",
        "gradient_checkpointing",
        "hidden_dropout",
        "hidden_dropout_prob",
        "id2label",
        "initializer_range",
        "is_llama_config",
        "label2id",
        "output_router_logits",
        "quantization_config",
        "pad_token_id",
        "pretraining_tp",
        "resid_pdrop",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "task_specific_params",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "use_cache",
    }
)


def read_fields(
    config: Mapping[str, Any],
    place: str,
    *,
    required: Sequence[str],
    optional: Mapping[str, Any],
    fixed: Mapping[str, Sequence[Any]],
) -> dict[str, Any]:
    """The fields that a family reads, with its defaults, once nothing in the config is beyond it.

    Args:
        config: the parsed `config.json`.
        place: its path, for messages.
        required: fields that must be there.
        optional: fields that may be there, and what they are if not.
        fixed: fields that may be there with one of the given values only.

    Raises:
        CheckpointError: a required field is missing, a field is unknown, or a fixed one has another value.
    """
    for name in required:
        if config.get(name) is None:
            raise CheckpointError(f"{place} lacks the field {name!r}; a model of this family needs it.")
    _check_values({n: config[n] for n in (*required, *optional) if n in config}, place, optional)
    known = {*required, *optional, *fixed, *INERT, "model_type"}
    for name, value in config.items():
        if name not in known:
            raise CheckpointError(
                f"{place} has the field {quoted(name)} = {quoted(value)}, which this model family does not "
                f"implement{did_you_mean(name, known)}; remove it if it has no effect on the model."
            )
        if name in fixed and value not in fixed[name]:
            raise CheckpointError(
                f"{place} has {name} = {quoted(value)}, but this model family implements only "
                f"{' or '.join(repr(v) for v in fixed[name])}; the model cannot be run here."
            )
    found = {name: config[name] for name in required} | {
        name: config.get(name, default) for name, default in optional.items()
    }
    return {name: _as_kind(name, value) for name, value in found.items()}


def _as_kind(name: str, value: Any) -> Any:
    """A checked value as the type of its field: a missing switch is off, a whole number is a number too."""
    if name in SWITCHES:
        return bool(value)
    return float(value) if name in NUMBERS and value is not None else value


def _check_values(given: Mapping[str, Any], place: str, optional: Mapping[str, Any]) -> None:
    """Checks each value against the kind of its field, before anything is computed or made from it.

    Raises:
        CheckpointError: one has another type or is beyond its bounds.
    """
    for name, value in given.items():
        if value is None and (name in NULLABLE or optional.get(name, 0) is None):
            continue
        if name in SIZES:
            low, high = SIZES[name]
            fits = type(value) is int and low <= value <= high
            expected = f"a whole number from {low} to {high:,}"
        elif name in NUMBERS:
            fits, expected = _is_positive(value), "a number above 0"
        elif name in SWITCHES:
            fits, expected = isinstance(value, bool), "true or false"
        elif name in MAPPINGS:
            fits, expected = isinstance(value, Mapping), "an object"
        elif name in LISTS:
            fits, expected = _are_words(value), "a list of words"
        else:
            fits, expected = isinstance(value, str), "a word"
        if not fits:
            raise CheckpointError(
                f"{place} has {name} = {quoted(value)}, but expected {expected}; correct it."
            )


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _are_words(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MAX_LAYERS and all(isinstance(v, str) for v in value)


def head_width(width: int, heads: int, place: str) -> int:
    """The width of a head where the config names none: that of the model, shared by the heads.

    Raises:
        CheckpointError: there are more heads than components.
    """
    if heads > width:
        raise CheckpointError(f"{place} has {heads} heads for a width of {width}; correct one of the two.")
    return width // heads


def layer_types_of(
    given: Sequence[str] | None, default: Sequence[str], window: int | None, place: str
) -> tuple[int | None, ...]:
    """The window of every layer, from `layer_types` and `sliding_window`.

    Args:
        given: `layer_types`, or None.
        default: what it is if not given; one entry a layer.
        window: the window of the layers of type `sliding_attention`.
        place: the config's path, for messages.

    Raises:
        CheckpointError: there are not as many types as layers, a type is unknown, or a window is missing.
    """
    types = default if given is None else given
    if len(types) != len(default):
        raise CheckpointError(
            f"{place} has {len(types)} layer_types for {len(default)} layers; give one per layer."
        )
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise CheckpointError(
                f"{place} has the layer type {quoted(kind)}, but this model family implements only "
                "'full_attention' or 'sliding_attention'; the model cannot be run here."
            )
    if window is None and "sliding_attention" in types:
        raise CheckpointError(f"{place} has layers of 'sliding_attention' but no sliding_window; add it.")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_OPTIONAL: Mapping[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    **ROTARY_FIELDS,
}


def read_usual_fields(
    config: Mapping[str, Any],
    place: str,
    optional: Mapping[str, Any],
    fixed: Mapping[str, Sequence[Any]],
) -> dict[str, Any]:
    """The usual fields and a family's own; the arguments are those of `read_fields`.

    Args:
        config: the parsed `config.json`.
        place: its path, for messages.
        optional: fields of the family, or other defaults of the usual ones; `max_position_embeddings` among
            them.
        fixed: same as in `read_fields`.

    Raises:
        CheckpointError: as `read_fields`.
    """
    found = read_fields(config, place, required=_REQUIRED, optional={**_OPTIONAL, **optional}, fixed=fixed)
    width, heads = found["hidden_size"], found["num_attention_heads"]
    return {**found, "head_dim": found["head_dim"] or head_width(width, heads, place)}


def usual_decoder(
    fields: Mapping[str, Any],
    place: str,
    *,
    theta: float = 10000.0,
    rotary: Sequence[Rotary] | None = None,
    windows: Sequence[int | None] | None = None,
    attention: Mapping[str, Any] | None = None,
    mlp: MLPSpec | Experts | None = None,
    block: Mapping[str, Any] | None = None,
    **different: Any,
) -> DecoderConfig:
    """The decoder that the usual fields describe: blocks alike but for rotation and window.

    Args:
        fields: result of `read_usual_fields`.
        place: the config's path, for messages.
        theta: base of the rotary frequencies where the config names none.
        rotary: rotation of each layer; by default the one that the config names.
        windows: window of each layer; none by default.
        attention: fields of `AttentionSpec` that this family sets otherwise.
        mlp: the feed-forward layer; by default a gated one of SiLU without biases.
        block: fields of `BlockSpec` that this family sets otherwise.
        different: fields of `DecoderConfig` that this family sets otherwise.

    Raises:
        CheckpointError: the rotary scaling is unknown or malformed.
    """
    layers, heads = fields["num_hidden_layers"], fields["num_attention_heads"]
    length, head_dim = fields["max_position_embeddings"], fields["head_dim"]
    key_heads = fields["num_key_value_heads"] or heads
    if heads % key_heads:
        raise CheckpointError(
            f"{place} has {heads} heads for {key_heads} key-value heads, which cannot share them evenly; "
            "correct one of the two."
        )
    rotations: list[Rotary | None] = list(rotary or ())
    if not rotations:
        one = read_rotary(fields, place, head_dim=head_dim, max_length=length, theta=theta)
        rotations = [one] * layers
    shape = {"n_heads": heads, "n_kv_heads": key_heads, "head_dim": head_dim, "scale": head_dim**-0.5}
    norm = NormKind("rms", fields["rms_norm_eps"])
    usual: dict[str, Any] = {
        "attention": AttentionSpec(**shape | dict(attention or {})),
        "mlp": mlp or MLPSpec(fields["intermediate_size"]),
        "norm": norm,
    }
    spec = BlockSpec(**usual | dict(block or {}))
    outside = {
        "vocab_size": fields["vocab_size"],
        "d_model": fields["hidden_size"],
        "max_length": length,
        "blocks": layered(spec, rotations, windows or (None,) * layers),
        "norm": spec.norm,
        "tied": fields["tie_word_embeddings"],
    }
    return DecoderConfig(**outside | different)


def layered(
    spec: BlockSpec, rotary: Sequence[Rotary | None], windows: Sequence[int | None]
) -> tuple[BlockSpec, ...]:
    """One block per layer, alike but for rotation and window; equal layers are one object."""
    kinds = {
        (rotation, window): replace(spec, attention=replace(spec.attention, rotary=rotation, window=window))
        for rotation, window in zip(rotary, windows, strict=True)
    }
    return tuple(kinds[key] for key in zip(rotary, windows, strict=True))
