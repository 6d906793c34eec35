"""How families mix layers of several mechanisms, or let layers share parts, as transformers has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mergelab.merging.structure.layer_kinds import (
    Kinds,
    LayerField,
    LayerPart,
    leading,
    listed,
    numbers,
    periodic,
    type_field,
    whole,
)
from mergelab.merging.structure.layer_rules import FULL, LINEAR, SLIDING, attention

__all__ = [
    "GEMMA3N",
    "GEMMA4",
    "GPT_NEO",
    "KIMI",
    "LFM2",
    "NEMOTRON",
    "ZAMBA",
    "ZAMBA2",
    "bailing_types",
    "first_only",
    "hybrids_in_order",
    "lfm3_types",
    "mimo_types",
    "olmo_hybrid_types",
    "recurrent_types",
    "shared_keys",
    "sparsity",
]


def _lfm2_types(part: LayerPart, count: int) -> Kinds:
    full = part.get("full_attn_idxs")
    return tuple(FULL if full is None or i in numbers(full) else "conv" for i in range(count))


LFM2 = type_field(
    _lfm2_types,
    companions={"full_attn_idxs": lambda _, kinds: [i for i, kind in enumerate(kinds) if kind == FULL]},
)


def lfm3_types(_: LayerPart, count: int) -> Kinds:
    return tuple(FULL if i % 4 == 2 else SLIDING if i % 4 == 0 and i > 0 else "conv" for i in range(count))


def olmo_hybrid_types(_: LayerPart, count: int) -> Kinds:
    kinds = periodic(FULL, LINEAR, at=3, period=4)({}, count)
    return kinds if FULL in kinds else (*kinds[:-1], FULL)


def mimo_types(_: LayerPart, count: int) -> Kinds:
    return tuple(FULL if i == 0 or (i + 1) % 6 == 0 else SLIDING for i in range(count))


def _last_is_full(_: LayerPart, kinds: Kinds) -> Kinds:
    return (*kinds[:-1], FULL)


def _read_shared(default: int, types: LayerField) -> Callable[[LayerPart, int], Kinds]:
    """Which of the last layers take keys and values from the last layer of their type that makes its own."""

    def read(part: LayerPart, count: int) -> Kinds:
        value = part.get("num_kv_shared_layers", default)
        own = max(0, count - (value if isinstance(value, int) else 0))
        kinds = types.read(part, count)
        made = set(kinds[:own])
        return tuple(
            "own keys" if i < own else "shared keys" if kinds[i] in made or not own else "no keys to share"
            for i in range(count)
        )

    return read


def _write_shared(part: dict[str, Any], kinds: Kinds) -> None:
    part["num_kv_shared_layers"] = leading(kinds[::-1], "shared keys")


def shared_keys(default: int, types: LayerField) -> LayerField:
    return LayerField(
        "num_kv_shared_layers", _read_shared(default, types), _write_shared, ("num_kv_shared_layers",)
    )


def sparsity(_: LayerPart, count: int) -> Kinds:
    sparse = 10 if count > 10 else 0
    return (0.95,) * sparse + (0.0,) * (count - sparse)


GEMMA3N = attention(5)
GEMMA4 = type_field(periodic(FULL, SLIDING, at=-1, period=6), finish=_last_is_full)


def recurrent_types(part: LayerPart, count: int) -> Kinds:
    cycle = part.get("block_types") or ("recurrent", "recurrent", "attention")
    return tuple(cycle[i % len(cycle)] for i in range(count))


def _zamba_types(part: LayerPart, count: int) -> Kinds:
    every, at = whole(part, "attn_layer_period", 6), part.get("attn_layer_offset", 4)
    rest = ("hybrid" if i % every == at else LINEAR for i in range(count - 3))
    return (LINEAR, LINEAR, "hybrid", *rest)[:count]


def _zamba2_types(_: LayerPart, count: int) -> Kinds:
    hybrids = {*range(6, 43, 6), 47, 51}
    return tuple("hybrid" if i in hybrids else LINEAR for i in range(count))


def hybrids_in_order(types: LayerField, name: str, strict: bool) -> LayerField:
    """Hybrid layers share an attention whose weights and adapters go by their order."""

    def read(part: LayerPart, count: int) -> Kinds:
        kinds = types.read(part, count)
        return tuple(
            f"hybrid layer {kinds[:i].count('hybrid')}" if kind == "hybrid" else "not hybrid"
            for i, kind in enumerate(kinds)
        )

    return LayerField(name, read, strict=strict)


ZAMBA = type_field(
    _zamba_types,
    key="layers_block_type",
    aliases=("layer_types",),
    uses=("attn_layer_period", "attn_layer_offset"),
)
ZAMBA2 = type_field(
    _zamba2_types,
    key="layers_block_type",
    aliases=("layer_types",),
    companions={"hybrid_layer_ids": lambda _, kinds: [i for i, kind in enumerate(kinds) if kind == "hybrid"]},
)

_LETTERS = {"M": LINEAR, "*": FULL, "E": "moe", "-": "mlp"}
_LETTER_OF = {**{kind: letter for letter, kind in _LETTERS.items()}, "mamba": "M", "attention": "*"}


def _nemotron_types(part: LayerPart, count: int) -> Kinds:
    pattern = part.get("hybrid_override_pattern")
    if isinstance(pattern, str) and pattern:
        return tuple(_LETTERS.get(letter, letter) for letter in pattern[:count].ljust(count, "?"))
    return tuple((LINEAR, "moe", FULL, "mlp")[i % 4] for i in range(count))


def _nemotron_pattern(_: Any, kinds: Kinds) -> str:
    return "".join(_LETTER_OF.get(kind, "?") for kind in kinds)


def _write_nemotron(part: dict[str, Any], kinds: Kinds) -> None:
    if "hybrid_override_pattern" in part:
        part["hybrid_override_pattern"] = _nemotron_pattern(None, kinds)
    keys = [key for key in ("layers_block_type", "layer_types") if part.get(key) is not None]
    for key in keys or ([] if "hybrid_override_pattern" in part else ["layers_block_type"]):
        part[key] = list(kinds)


NEMOTRON = LayerField(
    "layers_block_type",
    lambda part, count: (
        listed(part, ("layers_block_type", "layer_types"), count) or _nemotron_types(part, count)
    ),
    _write_nemotron,
    ("layers_block_type", "layer_types", "hybrid_override_pattern"),
)


def _gpt_neo_types(part: LayerPart, count: int) -> Kinds:
    kinds: list[Any] = []
    for names, times in part.get("attention_types") or ((("global", "local"), count),):
        for _ in range(min(times, count)):
            kinds += names
    return tuple(kinds[:count])


GPT_NEO = LayerField(
    "attention_types",
    _gpt_neo_types,
    lambda part, kinds: part.update(
        {"attention_types": [[list(kinds), 1]]}
        | ({"attention_layers": list(kinds)} if "attention_layers" in part else {})
    ),
    ("attention_types", "attention_layers"),
)


def _kimi_types(part: LayerPart, count: int) -> Kinds:
    nested = part.get("linear_attn_config") or {}
    if "full_attn_layers" in nested and "kda_layers" in nested:
        full = numbers(nested["full_attn_layers"])
        return tuple(FULL if i + 1 in full else LINEAR for i in range(count))
    return tuple(FULL if i and i % 4 == 0 else LINEAR for i in range(count))


def _kimi_numbers(old: Any, kinds: Kinds) -> Any:
    if not isinstance(old, Mapping) or "full_attn_layers" not in old:
        return old
    full = [i + 1 for i, kind in enumerate(kinds) if kind == FULL]
    rest = [i + 1 for i, kind in enumerate(kinds) if kind != FULL]
    return {**old, "full_attn_layers": full, "kda_layers": rest}


KIMI = type_field(_kimi_types, companions={"linear_attn_config": _kimi_numbers})


def bailing_types(part: LayerPart, count: int) -> Kinds:
    return periodic(FULL, LINEAR, at=-1, period=6, key="layer_group_size")(part, count)


def first_only(name: str) -> LayerField:
    """What the first layer alone has, for all layers."""
    return LayerField(
        name, lambda _, count: ("has it",)[:count] + ("takes the first layer's",) * (count - 1), strict=False
    )
