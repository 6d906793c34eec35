"""Reads how a `config.json` rotates positions: `rope_scaling` in older files, `rope_parameters` in newer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mergelab.errors import CheckpointError, did_you_mean, quoted
from mergelab.models.layers.rotary import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rotary,
    Scaling,
    YarnScaling,
)

__all__ = ["ROTARY_FIELDS", "read_rotary", "rotary_from"]

# The fields of `config.json` that `read_rotary` reads.
ROTARY_FIELDS: Mapping[str, Any] = {
    "rope_theta": None,
    "rope_scaling": None,
    "rope_parameters": None,
    "partial_rotary_factor": None,
    "original_max_position_embeddings": None,
}

_NUMBERS = (
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "attention_factor",
)
_MAY_BE_ZERO = ("mscale", "mscale_all_dim", "beta_fast", "beta_slow")

# What each type of scaling says besides its type: required fields, then optional ones.
_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ("factor",)),
    "linear": (("factor",), ()),
    "llama3": (
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        (),
    ),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (
        ("short_factor", "long_factor", "original_max_position_embeddings"),
        ("factor", "attention_factor"),
    ),
}


def read_rotary(
    fields: Mapping[str, Any], place: str, *, head_dim: int, max_length: int, theta: float = 10000.0
) -> Rotary:
    """The rotation of all layers, from the fields `ROTARY_FIELDS` of a config.

    Args:
        fields: the config's fields.
        place: the config's path, for messages.
        head_dim: width of a head.
        max_length: `max_position_embeddings`.
        theta: the base where the config names none.

    Raises:
        CheckpointError: the scaling is of an unknown type, or its fields are missing, unknown or malformed.
    """
    parameters = dict(fields.get("rope_parameters") or fields.get("rope_scaling") or {})
    for name in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if fields.get(name) is not None:
            parameters.setdefault(name, fields[name])
    return rotary_from(parameters, place, head_dim=head_dim, max_length=max_length, theta=theta)


def rotary_from(
    parameters: Mapping[str, Any], place: str, *, head_dim: int, max_length: int, theta: float
) -> Rotary:
    """The rotation that one SAE of rope parameters describes; else as `read_rotary`."""
    if not isinstance(parameters, Mapping):
        raise CheckpointError(f"{place} has rotary positions {quoted(parameters)}, but expected an object.")
    given = dict(parameters)
    _check_rope(given, place)
    base = float(given.pop("rope_theta", None) or theta)
    dim = int(head_dim * float(given.pop("partial_rotary_factor", None) or 1.0))
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    if not isinstance(kind, str):
        raise CheckpointError(f"{place} has rotary positions of type {quoted(kind)}, but expected a word.")
    kind = {"su": "longrope"}.get(kind, kind)
    if dim % 2 or not 0 < dim <= head_dim:
        raise CheckpointError(
            f"{place} rotates {dim} of {head_dim} components of a head; the number must be even and positive."
        )
    if kind not in _FIELDS:
        raise CheckpointError(
            f"{place} has rotary positions of type {quoted(kind)}{did_you_mean(kind, _FIELDS)}, but only "
            f"{', '.join(map(repr, _FIELDS))} are implemented; the model cannot be run here."
        )
    required, optional = _FIELDS[kind]
    if kind == "yarn" and base <= 1:
        raise CheckpointError(
            f"{place}: rotary positions of type 'yarn' have rope_theta = {base}, not above 1."
        )
    if kind not in ("llama3", "yarn", "longrope"):
        given.pop("original_max_position_embeddings", None)
    elif kind != "longrope":
        given.setdefault("original_max_position_embeddings", max_length)
    for name in required:
        if given.get(name) is None:
            raise CheckpointError(f"{place}: rotary positions of type {kind!r} lack {name!r}; add it.")
    unknown = [name for name in given if name not in (*required, *optional)]
    if unknown:
        raise CheckpointError(
            f"{place}: rotary positions of type {kind!r} have the field {quoted(unknown[0])}"
            f"{did_you_mean(unknown[0], (*required, *optional))}, which is not implemented; remove it if it "
            "has no effect."
        )
    return Rotary(base, dim, _scaling(kind, given, place, dim, max_length))


def _check_rope(given: Mapping[str, Any], place: str) -> None:
    """Checks that what is computed with is a positive number (of ordinary size), or a list of such.

    Raises:
        CheckpointError: one is not.
    """
    words = ("rope_type", "type", "truncate")
    for name, value in given.items():
        if value is None or name in words:
            continue
        if name in ("short_factor", "long_factor"):
            fits = isinstance(value, list) and all(map(_is_factor, value))
            expected = "a list of numbers above 0"
        elif name == "original_max_position_embeddings":
            fits, expected = type(value) is int and 1 < value < 2**31, "a whole number above 1"
        elif name in _MAY_BE_ZERO:
            fits, expected = value == 0 or _is_factor(value), "a number"
        elif name in _NUMBERS:
            fits, expected = _is_factor(value), "a number above 0"
        else:
            continue  # refused by its name
        if not fits:
            raise CheckpointError(
                f"{place}: rotary positions have {name} = {quoted(value)}, but expected {expected}; "
                "correct it."
            )


def _is_factor(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e30


def _scaling(kind: str, given: Mapping[str, Any], place: str, dim: int, max_length: int) -> Scaling | None:
    match kind:
        case "linear":
            return LinearScaling(float(given["factor"]))
        case "llama3":
            if not given["low_freq_factor"] < given["high_freq_factor"]:
                raise CheckpointError(f"{place}: high_freq_factor must exceed low_freq_factor; correct it.")
            return Llama3Scaling(
                float(given["factor"]),
                float(given["low_freq_factor"]),
                float(given["high_freq_factor"]),
                int(given["original_max_position_embeddings"]),
            )
        case "yarn":
            return YarnScaling(
                factor=float(given["factor"]),
                original_length=int(given["original_max_position_embeddings"]),
                attention_factor=_yarn_attention_factor(given),
                beta_fast=float(given.get("beta_fast") or 32.0),
                beta_slow=float(given.get("beta_slow") or 1.0),
                truncate=bool(given.get("truncate", True)),
            )
        case "longrope":
            original = int(given["original_max_position_embeddings"])
            sets = {name: tuple(map(float, given[name])) for name in ("short_factor", "long_factor")}
            for name, divisors in sets.items():
                if len(divisors) != dim // 2:
                    raise CheckpointError(
                        f"{place}: {name} has {len(divisors)} numbers, but there are {dim // 2} "
                        "frequencies; give one per frequency."
                    )
            ratio = float(given.get("factor") or max_length / original)
            attention = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
            return LongRopeScaling(
                sets["short_factor"],
                sets["long_factor"],
                original,
                float(given.get("attention_factor") or attention),
            )
    return None


def _yarn_attention_factor(given: Mapping[str, Any]) -> float:
    """`0.1 ln(factor) + 1` as the paper recommends, unless the config says otherwise."""
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    factor = float(given["factor"])

    def recommended(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    over, under = given.get("mscale"), given.get("mscale_all_dim")
    return recommended(float(over)) / recommended(float(under)) if over and under else recommended(1.0)
