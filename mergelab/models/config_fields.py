"""Checks of a parsed `config.json`: a family reads every field it is given, or refuses it by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergelab.errors import CheckpointError, did_you_mean

__all__ = ["check_fields", "rope_theta_of"]

# Fields that say nothing about the forward computation of any family.
INERT = frozenset(
    {
        "_name_or_path",
        "_attn_implementation_autoset",
        "dtype",
        "initializer_range",
        "pretraining_tp",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


def check_fields(
    config: Mapping[str, Any],
    place: str,
    required: Sequence[str],
    optional: Sequence[str],
    fixed: Mapping[str, Sequence[Any]],
) -> None:
    """Refuses a config that a family would compute wrongly.

    Args:
        config: the parsed `config.json`.
        place: its path, for messages.
        required: fields that must be there.
        optional: fields that may be there.
        fixed: fields that may be there with one of the given values only.

    Raises:
        CheckpointError: a required field is missing, a field is unknown, or a fixed one has another value.
    """
    missing = [name for name in required if config.get(name) is None]
    if missing:
        raise CheckpointError(f"{place} lacks the field {missing[0]!r}; a model of this family needs it.")
    known = {*required, *optional, *fixed, *INERT}
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


def rope_theta_of(config: Mapping[str, Any], place: str) -> float:
    """The base of the rotary frequencies, from `rope_theta` or from the newer `rope_parameters`.

    Raises:
        CheckpointError: `rope_parameters` asks for scaled rotary positions.
    """
    parameters = config.get("rope_parameters") or {}
    scaling = {
        k: v for k, v in parameters.items() if k != "rope_theta" and (k, v) != ("rope_type", "default")
    }
    if scaling:
        raise CheckpointError(
            f"{place} has rope_parameters with {scaling!r}, but this model family implements only plain "
            "rotary positions (rope_type 'default'); the model cannot be run here."
        )
    return float(parameters.get("rope_theta", config.get("rope_theta") or 10000.0))
