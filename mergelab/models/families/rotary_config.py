"""Reads how a `config.json` rotates positions: `rope_scaling` in older files, `rope_parameters` in newer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from mergelab.errors import CheckpointError, did_you_mean, quoted
from mergelab.models.layers.rotary import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ProportionalScaling,
    Rotary,
    Scaling,
    YarnScaling,
)

__all__ = ["ROTARY_FIELDS", "read_rotary", "rotary_faults", "rotary_from", "yarn_gain"]

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
    "proportional": ((), ("factor",)),
    # Positions of images in three directions, which are equal for text (Qwen2-VL, arXiv:2409.12191).
    "mrope": ((), ("mrope_section", "mrope_interleaved", "factor")),
}
_TYPES = {"su": "longrope"}
_NESTED = ("full_attention", "sliding_attention")


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
        CheckpointError: the scaling is of an unknown type, or its fields are missing or malformed.
    """
    return rotary_from(_parameters(fields), place, head_dim=head_dim, max_length=max_length, theta=theta)


def _parameters(fields: Mapping[str, Any]) -> dict[str, Any]:
    """One set of rope parameters from wherever a config names them."""
    parameters = dict(fields.get("rope_parameters") or fields.get("rope_scaling") or {})
    for name in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if fields.get(name) is not None:
            parameters.setdefault(name, fields[name])
    return parameters


def rotary_faults(config: Mapping[str, Any], place: str) -> list[str]:
    """One sentence for each fault of a config's rope parameters that can be told without its sizes."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        return []  # said of the field itself
    if any(name in given for name in _NESTED):
        sets = [given.get(name) or {} for name in _NESTED]
    else:
        sets = [_parameters(config)]
    return list(dict.fromkeys(fault for one in sets for fault in _faults(one, place)))


def _faults(parameters: Any, place: str) -> list[str]:
    """The faults of one set of rope parameters: its type, the fields that lack, values of another kind."""
    if not isinstance(parameters, Mapping):
        return [f"{place} has rotary positions {quoted(parameters)}, but expected an object."]
    faults = list(_wrong_values(parameters, place))
    kind = _kind(parameters)
    if not isinstance(kind, str):
        return [*faults, f"{place} has rotary positions of type {quoted(kind)}, but expected a word."]
    if kind not in _FIELDS:
        return [
            *faults,
            f"{place} has rotary positions of type {quoted(kind)}{did_you_mean(kind, _FIELDS)}, but only "
            f"{', '.join(map(repr, _FIELDS))} are implemented; the model cannot be run here.",
        ]
    faults += [
        f"{place}: rotary positions of type {kind!r} lack {name!r}; add it."
        for name in _FIELDS[kind][0]
        if name != "original_max_position_embeddings" and parameters.get(name) is None
    ]
    return faults


def _kind(parameters: Mapping[str, Any]) -> Any:
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    return _TYPES.get(kind, kind) if isinstance(kind, str) else kind


def rotary_from(
    parameters: Mapping[str, Any], place: str, *, head_dim: int, max_length: int, theta: float
) -> Rotary:
    """The rotation that one set of rope parameters describes; else as `read_rotary`."""
    faults = _faults(parameters, place)
    if faults:
        raise CheckpointError(faults)
    kind, given = _kind(parameters), dict(parameters)
    for name in ("rope_type", "type"):
        given.pop(name, None)
    base = float(given.pop("rope_theta", None) or theta)
    fraction = float(given.pop("partial_rotary_factor", None) or 1.0)
    dim = head_dim if kind == "proportional" else int(head_dim * fraction)
    if dim % 2 or not 0 < dim <= head_dim:
        raise CheckpointError(
            f"{place} rotates {dim} of {head_dim} components of a head; the number must be even and positive."
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
    if "original_max_position_embeddings" in required and not given.get("original_max_position_embeddings"):
        raise CheckpointError(
            f"{place}: rotary positions of type {kind!r} lack 'original_max_position_embeddings'; add it."
        )
    unknown = [name for name in given if name not in (*required, *optional)]
    if unknown:
        names = ", ".join(
            f"{quoted(name)}{did_you_mean(name, (*required, *optional))}" for name in unknown[:20]
        )
        warnings.warn(
            f"{place}: rotary positions of type {kind!r} have fields unknown here: {names}; they are "
            "ignored, as transformers does.",
            stacklevel=3,
        )
    if kind == "proportional":
        kept = int(fraction * head_dim // 2)
        return Rotary(base, dim, ProportionalScaling(kept, float(given.get("factor") or 1.0)))
    return Rotary(base, dim, _scaling(kind, given, place, dim, max_length))


def _wrong_values(given: Mapping[str, Any], place: str) -> Iterator[str]:
    """What is computed with must be a positive number (of ordinary size), or a list of such."""
    for name, value in given.items():
        if value is None:
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
            continue  # words, or nothing is known of it
        if not fits:
            yield (
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


def yarn_gain(fields: Mapping[str, Any]) -> float:
    """What DeepSeek multiplies queries and keys with for YaRN's longer context: `0.1 m ln(factor) + 1`.

    `m` is `mscale_all_dim`, without which nothing is multiplied.
    """
    given = _parameters(fields)
    weight, factor = given.get("mscale_all_dim"), given.get("factor")
    if _kind(given) == "default" or not weight or not factor or factor <= 1:
        return 1.0
    return 0.1 * float(weight) * math.log(float(factor)) + 1.0


def _yarn_attention_factor(given: Mapping[str, Any]) -> float:
    """`0.1 ln(factor) + 1` as the paper recommends, unless the config says otherwise."""
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    factor = float(given["factor"])

    def recommended(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    over, under = given.get("mscale"), given.get("mscale_all_dim")
    return recommended(float(over)) / recommended(float(under)) if over and under else recommended(1.0)
