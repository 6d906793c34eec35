"""Fields of `config.json`, read by type, and those that most decoders share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mergelab.errors import CheckpointError, did_you_mean, first_faults, quoted
from mergelab.models.decoder import DecoderConfig
from mergelab.models.families.known_fields import (
    FIXED,
    LAYER_NUMBERS,
    LISTS,
    MAPPINGS,
    MAX_LAYERS,
    NULLABLE,
    NUMBERS,
    SIZES,
    SWITCHES,
    is_inert,
)
from mergelab.models.families.rotary_config import ROTARY_FIELDS, read_rotary, rotary_faults
from mergelab.models.layers.attention import AttentionSpec
from mergelab.models.layers.block import BlockSpec
from mergelab.models.layers.mlp import MLPSpec
from mergelab.models.layers.norms import NormKind
from mergelab.models.layers.rotary import Rotary
from mergelab.models.layers.routing import Experts

__all__ = ["head_width", "layer_types_of", "layered", "read_fields", "read_usual_fields", "usual_decoder"]
__all__ += ["usual_rotary"]


def read_fields(
    config: Mapping[str, Any],
    place: str,
    *,
    required: Sequence[str],
    optional: Mapping[str, Any],
    fixed: Mapping[str, Sequence[Any]],
    inert: Collection[str] = (),
) -> dict[str, Any]:
    """The fields that a family reads, with its defaults, once nothing in the config is known to be beyond it.

    A field that neither the family nor `known_fields` knows is ignored, as transformers does, with a warning.

    Args:
        config: the parsed `config.json`.
        place: its path, for messages.
        required: fields that must be there.
        optional: fields that may be there, and what they are if not.
        fixed: fields that may be there with one of the given values only: others change the forward pass.
        inert: fields of this family that say nothing of a forward pass, beside those of `known_fields`.

    Raises:
        CheckpointError: required fields are missing, or fields have values that are not of their kind or that
            the family does not implement; the error names all of them.
    """
    fixed = {**{name: values for name, values in FIXED.items() if name not in optional}, **fixed}
    faults = [
        f"{place} lacks the field {name!r}; a model of this family needs it."
        for name in required
        if config.get(name) is None
    ]
    given = {name: config[name] for name in required if config.get(name) is not None}
    given |= {name: config[name] for name in optional if name in config}
    faults += _wrong_values(given, place, optional)
    faults += [
        f"{place} has {name} = {quoted(config[name])}, but this model family implements only "
        f"{' or '.join(repr(value) for value in values)}; the model cannot be run here."
        for name, values in fixed.items()
        if name in config and config[name] not in values
    ]
    if ROTARY_FIELDS.keys() <= optional.keys():
        faults += rotary_faults(config, place)
    if faults:
        raise CheckpointError(faults)
    known = {*required, *optional, *fixed, *inert, "model_type"}
    _warn_of([n for n, value in config.items() if n not in known and not is_inert(n, value)], known, place)
    found = {name: config[name] for name in required} | {
        name: config.get(name, default) for name, default in optional.items()
    }
    return {name: _as_kind(name, value) for name, value in found.items()}


def _warn_of(unknown: Sequence[str], known: Collection[str], place: str) -> None:
    """One warning that names all fields that nothing is known of."""
    if not unknown:
        return
    names = first_faults(f"{quoted(name)}{did_you_mean(name, known)}" for name in unknown)
    what = "the field" if len(unknown) == 1 else "the fields"
    it = "it is" if len(unknown) == 1 else "they are"
    warnings.warn(
        f"{place} has {what} {', '.join(names)}, unknown here: {it} ignored, as transformers does.",
        stacklevel=3,
    )


def _as_kind(name: str, value: Any) -> Any:
    """A checked value as the type of its field: a missing switch is off, a whole number is a number too."""
    if name in SWITCHES:
        return bool(value)
    return float(value) if name in NUMBERS and value is not None else value


def _wrong_values(given: Mapping[str, Any], place: str, optional: Mapping[str, Any]) -> list[str]:
    """One sentence for each value that is not of the kind of its field."""
    faults = []
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
        elif name in LAYER_NUMBERS:
            fits, expected = _are_numbers(value), "a list of whole numbers"
        else:
            fits, expected = isinstance(value, str), "a word"
        if not fits:
            faults.append(f"{place} has {name} = {quoted(value)}, but expected {expected}; correct it.")
    return faults


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _are_words(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MAX_LAYERS and all(isinstance(v, str) for v in value)


def _are_numbers(value: Any) -> bool:
    fits = isinstance(value, list) and len(value) <= MAX_LAYERS
    return fits and all(type(v) is int and 0 <= v <= MAX_LAYERS for v in value)


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
    "is_causal": True,
    **ROTARY_FIELDS,
}


def read_usual_fields(
    config: Mapping[str, Any],
    place: str,
    optional: Mapping[str, Any],
    fixed: Mapping[str, Sequence[Any]],
    inert: Collection[str] = (),
) -> dict[str, Any]:
    """The usual fields and a family's own; the arguments are those of `read_fields`.

    Args:
        config: the parsed `config.json`.
        place: its path, for messages.
        optional: fields of the family, or other defaults of the usual ones, which are required without one
            (sizes); `max_position_embeddings` among them.
        fixed: same as in `read_fields`.
        inert: same as in `read_fields`.

    Raises:
        CheckpointError: as `read_fields`.
    """
    optional = {**_OPTIONAL, **optional}
    required = [name for name in _REQUIRED if name not in optional]
    found = read_fields(config, place, required=required, optional=optional, fixed=fixed, inert=inert)
    width, heads = found["hidden_size"], found["num_attention_heads"]
    return {**found, "head_dim": found["head_dim"] or head_width(width, heads, place)}


def usual_rotary(fields: Mapping[str, Any], place: str, theta: float = 10000.0) -> Rotary:
    """The rotation that the usual fields describe, of base `theta` where the config names none.

    Raises:
        CheckpointError: the rotary scaling is unknown or malformed.
    """
    sizes = {"head_dim": fields["head_dim"], "max_length": fields["max_position_embeddings"]}
    return read_rotary(fields, place, theta=theta, **sizes)


def usual_decoder(
    fields: Mapping[str, Any],
    place: str,
    *,
    theta: float = 10000.0,
    rotary: Sequence[Rotary | None] | None = None,
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
    head_dim = fields["head_dim"]
    key_heads = fields["num_key_value_heads"] or heads
    if heads % key_heads:
        raise CheckpointError(
            f"{place} has {heads} heads for {key_heads} key-value heads, which cannot share them evenly; "
            "correct one of the two."
        )
    rotations: list[Rotary | None] = list(rotary or ())
    if not rotations:
        rotations = [usual_rotary(fields, place, theta)] * layers
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
        "max_length": fields["max_position_embeddings"],
        "blocks": layered(spec, rotations, windows or (None,) * layers),
        "norm": spec.norm,
        "tied": fields["tie_word_embeddings"],
        "causal": fields["is_causal"],
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
