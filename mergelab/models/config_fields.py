"""Checks of a parsed `config.json`: a family reads every field it is given, or refuses it by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergelab.errors import CheckpointError, did_you_mean

__all__ = ["layer_types_of", "read_fields"]

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
    known = {*required, *optional, *fixed, *INERT, "model_type"}
    for name, value in config.items():
        if name not in known:
            raise CheckpointError(
                f"{place} has the field {name!r} = {value!r}, which this model family does not implement"
                f"{did_you_mean(name, known)}; remove it if it has no effect on the model."
            )
        if name in fixed and value not in fixed[name]:
            raise CheckpointError(
                f"{place} has {name} = {value!r}, but this model family implements only "
                f"{' or '.join(repr(v) for v in fixed[name])}; the model cannot be run here."
            )
    return {name: config[name] for name in required} | {
        name: config.get(name, default) for name, default in optional.items()
    }


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
                f"{place} has the layer type {kind!r}, but this model family implements only "
                "'full_attention' or 'sliding_attention'; the model cannot be run here."
            )
    if window is None and "sliding_attention" in types:
        raise CheckpointError(f"{place} has layers of 'sliding_attention' but no sliding_window; add it.")
    return tuple(window if kind == "sliding_attention" else None for kind in types)
