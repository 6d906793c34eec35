"""A model's structure read off its tensor names: towers of numbered blocks, what comes before and after."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mergelab.merging.vocabulary.embedding_rows import is_token_tensor

__all__ = [
    "FURTHER",
    "HEADS",
    "LAYER_COUNT_KEYS",
    "OTHER_TOWERS",
    "BlockRun",
    "Module",
    "Structure",
    "counterpart",
    "infer_architecture",
    "layer_counts",
    "renumbered",
]

LAYER_COUNT_KEYS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
    "num_encoder_layers",
    "num_decoder_layers",
    "depth",
)
"""The names under which Hugging Face configs keep the number of blocks."""

FURTHER = "mtp"
"""The module of the layers behind the last one, which predict the tokens after the next (DeepSeek V3)."""

_NUMBER = re.compile(r"\.(\d+)\.")
OTHER_TOWERS = ("vision", "visual", "image", "audio", "speech")
HEADS = ("lm_head", "embed_out", "output", "score", "classifier", "cls", "qa_outputs", "pooler")
_WRAPPERS = frozenset({"model", "transformer", "base_model", "backbone", "net"})


@dataclass(frozen=True)
class BlockRun:
    """A run of numbered blocks.

    Attributes:
        prefix: what precedes the number, e.g. `model.layers.`.
        count: the number of blocks, numbered from 0.
        suffixes: rest of each tensor's name after the block's number and dot, per block.
    """

    prefix: str
    count: int
    suffixes: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Module:
    """One tower of a model (or a part without blocks, such as a projector).

    Attributes:
        name: what a recipe's `modules:` calls it.
        stack: its blocks, if any.
        pre, post: its other tensors, those before the first block and those after the last.
    """

    name: str
    stack: BlockRun | None
    pre: tuple[str, ...]
    post: tuple[str, ...]


@dataclass(frozen=True)
class Structure:
    """The modules of one model; every tensor of the model is in exactly one of them."""

    modules: Mapping[str, Module]
    names: frozenset[str]

    @property
    def main(self) -> Module:
        """The module with the most tensors in blocks."""
        return max(self.modules.values(), key=lambda m: sum(map(len, m.stack.suffixes)) if m.stack else 0)

    @property
    def towers(self) -> tuple[Module, ...]:
        """The modules that have blocks."""
        return tuple(module for module in self.modules.values() if module.stack is not None)


def infer_architecture(names: Iterable[str], config: Mapping[str, Any]) -> Structure:
    """Groups tensor names into modules.

    A stack is a prefix followed by numbers 0 to n - 1, n being a layer count of `config` where it states any
    (so that a two-layer projector is not a tower). Numbers further inside a name (experts) are its block's.
    Layers of multi-token prediction, numbered on from the last of a tower, are the module `FURTHER`.
    """
    given = tuple(names)
    counts = {count for _, _, count in layer_counts(config)}
    further = _further_layers(given, counts, config)
    names = tuple(name for name in given if name not in further)
    stacks = _stacks(names, counts, _omits_text_layers(config))
    labels = _module_names([stack.prefix for stack in stacks])
    inside = {
        f"{stack.prefix}{i}.{suffix}"
        for stack in stacks
        for i, each in enumerate(stack.suffixes)
        for suffix in each
    }
    grouped: dict[str, list[str]] = {label: [] for label in labels}
    for name in names:
        if name not in inside:
            grouped.setdefault(_owner(name, labels), []).append(name)
    by_label = dict(zip(labels, stacks, strict=True))
    modules = {}
    for label, rest in grouped.items():
        post = tuple(name for name in rest if _is_post(name))
        pre = tuple(name for name in rest if name not in post)
        modules[label] = Module(label, by_label.get(label), pre, post)
    if further:
        modules[FURTHER] = Module(FURTHER, None, (), tuple(further))
    return Structure(modules, frozenset(given))


def _further_layers(names: tuple[str, ...], counts: set[int], config: Mapping[str, Any]) -> dict[str, None]:
    """Tensors of layers that a config counts beside those of a tower, and files number on from them."""
    parts = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    more = [part.get("num_nextn_predict_layers") for part in parts]
    last: dict[str, int] = {}
    for name in names:
        if match := _NUMBER.search(name):
            prefix = name[: match.start() + 1]
            last[prefix] = max(last.get(prefix, 0), int(match[1]))
    found: dict[str, None] = {}
    for extra in (n for n in more if type(n) is int and n > 0):
        for prefix, highest in last.items():
            count = highest + 1 - extra
            if count in counts:
                behind = tuple(f"{prefix}{number}." for number in range(count, highest + 1))
                found |= {name: None for name in names if name.startswith(behind)}
    return found


def renumbered(name: str, prefix: str, by: int) -> str:
    """A tensor of a layer behind the last one, once the tower has `by` more layers."""
    if not by or not name.startswith(prefix):
        return name
    number, dot, rest = name.removeprefix(prefix).partition(".")
    return f"{prefix}{int(number) + by}{dot}{rest}" if number.isdecimal() else name


def counterpart(name: str, here: Structure, there: Structure) -> str:
    """What another model calls a tensor that stands outside the blocks.

    The same name, unless the blocks of a tower that both have stand in another place (`transformer.h.`
    against `h.`, `language_model.model.layers.` against `model.layers.`): then what differs before the blocks
    is exchanged where that gives a name the other model has. A head stands beside, or above, its tower.
    """
    if name in there.names:
        return name
    moved = False
    for label, module in here.modules.items():
        other = there.modules.get(label)
        if module.stack is None or other is None or other.stack is None:
            continue
        ours, theirs = _without_common_end(module.stack.prefix, other.stack.prefix)
        moved |= ours != theirs
        renamed = theirs + name.removeprefix(ours)
        if name.startswith(ours) and renamed in there.names:
            return renamed
    head = ".".join(name.split(".")[-2:])
    if moved and head.split(".")[0] in HEADS:
        found = [other for other in there.names if other == head or other.endswith(f".{head}")]
        return found[0] if len(found) == 1 else name
    return name


def _without_common_end(one: str, other: str) -> tuple[str, str]:
    """Two dotted prefixes without the components in which they both end."""
    left, right = one.rstrip(".").split("."), other.rstrip(".").split(".")
    while left and right and left[-1] == right[-1]:
        left.pop()
        right.pop()
    return "".join(f"{part}." for part in left), "".join(f"{part}." for part in right)


def layer_counts(
    config: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], str, int]]:
    """Every `(path of the dict, key, count)` at which a config or one nested in it states a layer count."""
    for key, value in config.items():
        if key in LAYER_COUNT_KEYS and isinstance(value, int) and not isinstance(value, bool):
            yield path, key, value
        elif isinstance(value, Mapping):
            yield from layer_counts(value, (*path, key))


def _omits_text_layers(config: Mapping[str, Any]) -> bool:
    """Whether a wrapper leaves the layers of its text tower to the default of a class (LLaVA 1.5)."""
    text = config.get("text_config")
    return isinstance(text, Mapping) and not any(True for _ in layer_counts(text))


def _stacks(names: tuple[str, ...], counts: set[int], text: bool) -> list[BlockRun]:
    """The stacks; `text` says that the largest one outside other towers is one too, stated or not."""
    blocks: dict[str, dict[int, list[str]]] = {}
    for name in names:
        if match := _NUMBER.search(name):
            prefix, index = name[: match.start() + 1], int(match[1])
            blocks.setdefault(prefix, {}).setdefault(index, []).append(name[match.end() :])
    whole = {prefix: found for prefix, found in blocks.items() if sorted(found) == list(range(len(found)))}
    stated = {prefix: found for prefix, found in whole.items() if len(found) in counts}
    chosen = stated or whole
    if stated and text:
        rest = {p: found for p, found in whole.items() if not any(word in p for word in OTHER_TOWERS)}
        largest = max(rest, key=lambda prefix: sum(map(len, rest[prefix].values())), default=None)
        chosen = {p: found for p, found in whole.items() if p in stated or p == largest}
    if not stated and counts and whole:
        longest = max(whole, key=lambda prefix: sum(map(len, whole[prefix].values())))
        chosen = {longest: whole[longest]}
    return [
        BlockRun(prefix, len(found), tuple(tuple(found[i]) for i in range(len(found))))
        for prefix, found in chosen.items()
    ]


def _module_names(prefixes: list[str]) -> list[str]:
    """A name per stack: `default` for a single one, else the first component that tells them apart."""
    if len(prefixes) <= 1:
        return ["default"] * len(prefixes)
    labels: list[str] = []
    for prefix in prefixes:
        parts = [part for part in prefix.rstrip(".").split(".") if part not in _WRAPPERS]
        label = parts[0] if parts else prefix.rstrip(".")
        while label in labels and len(parts) > 1:
            parts = parts[1:]
            label = f"{label}.{parts[0]}"
        labels.append(label)
    return labels


def _owner(name: str, labels: list[str]) -> str:
    """The module of a tensor outside all stacks."""
    if len(labels) <= 1:
        return labels[0] if labels else "default"
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    for label in sorted(labels, key=len, reverse=True):
        if parts[: len(label.split("."))] == label.split("."):
            return label
    text = [
        label for label in labels if any(word in label for word in ("text", "language", "layers", "decoder"))
    ]
    if text and (is_token_tensor(name) or parts[0] in (*HEADS, "norm", "final_layer_norm")):
        return text[0]
    return parts[0] if parts else name


def _is_post(name: str) -> bool:
    """Heads and final norms come after the blocks; embeddings, and norms of embeddings, before them."""
    parts = name.split(".")
    if any(part in HEADS or part.endswith("_head") for part in parts):
        return True
    if any("emb" in part or part in ("wte", "wpe", "shared") for part in parts):
        return False
    return any("norm" in part.lower() or part.startswith("ln_") for part in parts)
