"""How families choose windows, rotations and experts layer by layer, each rule as transformers has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mergelab.merging.structure.layer_kinds import (
    Kinds,
    LayerField,
    LayerPart,
    leading,
    numbers,
    periodic,
    switched,
    type_field,
    whole,
)

__all__ = [
    "DENSE",
    "ERNIE",
    "EXAONE",
    "EXPERTS",
    "FULL",
    "INDEXERS",
    "LINEAR",
    "NO_ROPE",
    "SLIDING",
    "STEP",
    "attention",
    "dots1_types",
    "interval",
    "llama4_experts",
    "llama4_types",
    "ministral_types",
    "mlp_types",
    "no_window",
    "qwen2_moe_types",
    "read_step",
    "smollm3_types",
    "uniform",
    "window_from",
    "write_step",
]

SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"
DENSE, EXPERTS = "dense", "experts"


def uniform(kind: str) -> Callable[[LayerPart, int], Kinds]:
    return lambda _, count: (kind,) * count


def attention(period: int, key: str | None = None, at: int = -1) -> LayerField:
    """Full attention in every period-th layer, a window in the others."""
    return type_field(
        periodic(FULL, SLIDING, at=at, period=period, key=key), uses=() if key is None else (key,)
    )


def interval(full: str = FULL) -> LayerField:
    """Full attention in every fourth layer, linear attention in the others."""
    key = "full_attention_interval"
    return type_field(periodic(full, LINEAR, at=-1, period=4, key=key), uses=(key,))


def _has_window(part: LayerPart) -> bool:
    return switched(part, "use_sliding_window") and part.get("sliding_window", 4096) is not None


def no_window(part: LayerPart, kinds: Kinds) -> Kinds:
    """A window is only had where it is switched on: transformers cannot run a list that says otherwise."""
    if _has_window(part):
        return kinds
    return tuple(
        "sliding_attention without use_sliding_window" if kind == SLIDING else kind for kind in kinds
    )


def window_from(first: int) -> LayerField:
    """A window in the layers from `max_window_layers` on."""

    def derive(part: LayerPart, count: int) -> Kinds:
        start = part.get("max_window_layers", first)
        return tuple(SLIDING if _has_window(part) and i >= start else FULL for i in range(count))

    return type_field(
        derive, uses=("max_window_layers", "use_sliding_window", "sliding_window"), finish=no_window
    )


def dots1_types(part: LayerPart, count: int) -> Kinds:
    start = part.get("max_window_layers", 62)
    window = part.get("sliding_window", 4096) is not None
    return tuple(SLIDING if window and i >= start else FULL for i in range(count))


def qwen2_moe_types(part: LayerPart, count: int) -> Kinds:
    last = part.get("max_window_layers", 28) if switched(part, "use_sliding_window") else 0
    return tuple(SLIDING if i % 2 == 0 and i < last else FULL for i in range(count))


def read_step(part: LayerPart, count: int) -> Kinds:
    step, dense = whole(part, "decoder_sparse_step", 1), numbers(part.get("mlp_only_layers"))
    experts = part.get("num_experts", 1) != 0
    return tuple(DENSE if i in dense or (i + 1) % step or not experts else EXPERTS for i in range(count))


def write_step(part: dict[str, Any], kinds: Kinds) -> None:
    part["mlp_only_layers"] = [i for i, kind in enumerate(kinds) if kind == DENSE]
    if "decoder_sparse_step" in part:
        part["decoder_sparse_step"] = 1


STEP = LayerField("mlp_only_layers", read_step, write_step, ("mlp_only_layers", "decoder_sparse_step"))


def mlp_types(default: int, key: str | None = "first_k_dense_replace") -> LayerField:
    """An explicit list of dense and sparse layers, or else a number of dense ones that come first."""

    def derive(part: LayerPart, count: int) -> Kinds:
        value = None if key is None else part.get(key)
        first = value if isinstance(value, int) else default
        return tuple("dense" if i < first else "sparse" for i in range(count))

    companions = {} if key is None else {key: lambda _, kinds: leading(kinds, "dense")}
    return type_field(derive, key="mlp_layer_types", companions=companions)


def _no_rope(part: LayerPart, count: int) -> Kinds:
    every = whole(part, "no_rope_layer_interval", 4)
    return tuple(int((i + 1) % every != 0) for i in range(count))


NO_ROPE = type_field(_no_rope, key="no_rope_layers", uses=("no_rope_layer_interval",))


def smollm3_types(part: LayerPart, count: int) -> Kinds:
    window = switched(part, "use_sliding_window") and part.get("sliding_window") is not None
    return tuple(SLIDING if window and not rope else FULL for rope in NO_ROPE.read(part, count))


def llama4_types(part: LayerPart, count: int) -> Kinds:
    chunked = part.get("attention_chunk_size", 8192) is not None
    return tuple("chunked_attention" if rope and chunked else FULL for rope in NO_ROPE.read(part, count))


def llama4_experts(part: LayerPart, count: int) -> frozenset[int]:
    step = whole(part, "interleave_moe_layer_step", 1)
    return frozenset(range(step - 1, count, step))


def _exaone_types(part: LayerPart, count: int) -> Kinds:
    pattern = part.get("sliding_window_pattern", 4)
    if part.get("sliding_window", 4096) is None:
        return (FULL,) * count
    if isinstance(pattern, str) and pattern:
        return tuple(FULL if pattern[i % len(pattern)] == "G" else SLIDING for i in range(count))
    return periodic(FULL, SLIDING, at=-1, period=4, key="sliding_window_pattern")(part, count)


EXAONE = type_field(_exaone_types, uses=("sliding_window_pattern",))


def _read_ernie(part: LayerPart, count: int) -> Kinds:
    every, first, last = (
        whole(part, "moe_layer_interval", 1),
        part.get("moe_layer_start_index", 1),
        part.get("moe_layer_end_index", -1),
    )
    last = count - 1 if last == -1 else last
    return tuple(EXPERTS if (i + 1) % every == 0 and first <= i <= last else DENSE for i in range(count))


def _write_ernie(part: dict[str, Any], kinds: Kinds) -> None:
    experts = [i for i, kind in enumerate(kinds) if kind == EXPERTS] or [len(kinds)]
    for every in range(1, len(kinds) + 1):
        trial = {
            "moe_layer_start_index": experts[0],
            "moe_layer_end_index": experts[-1],
            "moe_layer_interval": every,
        }
        if _read_ernie(trial, len(kinds)) == kinds:
            part.update(trial)
            return


ERNIE = LayerField(
    "moe_layer_interval",
    _read_ernie,
    _write_ernie,
    ("moe_layer_interval", "moe_layer_start_index", "moe_layer_end_index"),
)


def ministral_types(part: LayerPart, count: int) -> Kinds:
    return (FULL if part.get("sliding_window", 4096) is None else SLIDING,) * count


def _indexers(part: LayerPart, count: int) -> Kinds:
    pattern = part.get("index_topk_pattern")
    if isinstance(pattern, (str, list)) and len(pattern) == count:
        return tuple({"F": "full", "S": "shared"}.get(each, each) for each in pattern)
    every, offset = whole(part, "index_topk_freq", 1), part.get("index_skip_topk_offset", 2)
    return tuple("shared" if max(i - offset + 1, 0) % every else "full" for i in range(count))


INDEXERS = type_field(
    _indexers,
    key="indexer_types",
    uses=("index_topk_pattern", "index_topk_freq", "index_skip_topk_offset"),
)
