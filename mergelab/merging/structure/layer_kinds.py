"""The kind of each layer (its attention, its MLP, its positions), as transformers reads it off a config."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Kinds", "LayerField", "LayerPart", "index_field", "same_kind", "type_field"]

LayerPart = Mapping[str, Any]
"""A `config.json`, or the part of it that states one tower's number of layers."""

Kinds = tuple[Any, ...]
"""One value per layer."""

# transformers renames these when it reads a list of layer types.
_RENAMED = {"mamba": "linear_attention", "attention": "full_attention"}


@dataclass(frozen=True)
class LayerField:
    """One thing in which the layers of a model differ, and how a config says so.

    Attributes:
        name: the key that states it, for messages; where there is an explicit list, the list's key.
        read: the kind of each of the n layers that a config describes.
        write: sets the keys so that they mean the given kinds, as nearly as they can; None where no key can
            state anything but what `read` finds already.
        uses: every key that `read` looks at.
        strict: whether a config that means other kinds than the weights have is refused, or only warned of.
    """

    name: str
    read: Callable[[LayerPart, int], Kinds]
    write: Callable[[dict[str, Any], Kinds], None] | None = None
    uses: tuple[str, ...] = ()
    strict: bool = True


def same_kind(a: object, b: object) -> bool:
    """Whether two kinds are one, possibly in an older spelling."""
    return _RENAMED.get(str(a), a) == _RENAMED.get(str(b), b)


def whole(part: LayerPart, key: str, default: int) -> int:
    """A positive number of the config, or the default where it is absent or something else."""
    value = part.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else default


def switched(part: LayerPart, key: str, default: bool = False) -> bool:
    """A switch of the config."""
    return bool(part.get(key, default))


def listed(part: LayerPart, keys: Sequence[str], count: int) -> Kinds | None:
    """The explicit list under the first key that has one of the right length."""
    for key in keys:
        value = part.get(key)
        if isinstance(value, (list, tuple)) and len(value) == count:
            return tuple(value)
    return None


def numbers(value: object) -> frozenset[int]:
    """The layer numbers in a list; none if it is not a list."""
    return (
        frozenset(i for i in value if isinstance(i, int)) if isinstance(value, (list, tuple)) else frozenset()
    )


def type_field(
    derive: Callable[[LayerPart, int], Sequence[Any]],
    *,
    key: str = "layer_types",
    aliases: tuple[str, ...] = (),
    uses: tuple[str, ...] = (),
    companions: Mapping[str, Callable[[Any, Kinds], Any]] | None = None,
    finish: Callable[[LayerPart, Kinds], Kinds] | None = None,
) -> LayerField:
    """A field with an explicit list of one entry per layer, and a rule where the list is absent.

    Args:
        derive: the rule.
        key: where transformers reads the list.
        aliases: other keys under which it reads it.
        uses: the keys that the rule reads.
        companions: other keys that say the same thing; kept in step where a config has them. Each is a
            function of the old value and the kinds.
        finish: what transformers changes in either.
    """
    keys = (key, *aliases)

    def read(part: LayerPart, count: int) -> Kinds:
        given = listed(part, keys, count)
        kinds = tuple(derive(part, count)) if given is None else given
        return kinds if finish is None else finish(part, kinds)

    def write(part: dict[str, Any], kinds: Kinds) -> None:
        for name in [name for name in keys if name in part] or [key]:
            part[name] = list(kinds)
        for name, change in (companions or {}).items():
            if part.get(name) is not None:
                part[name] = change(part[name], kinds)

    return LayerField(key, read, write, (*keys, *uses, *(companions or {})))


def periodic(
    special: str,
    usual: str,
    *,
    at: int,
    period: int,
    key: str | None = None,
) -> Callable[[LayerPart, int], Kinds]:
    """Every period-th layer is special: layer i where i = `at` modulo the period, which `key` may state."""

    def derive(part: LayerPart, count: int) -> Kinds:
        every = period if key is None else whole(part, key, period)
        return tuple(special if i % every == at % every else usual for i in range(count))

    return derive


def index_field(
    key: str,
    inside: str = "listed",
    outside: str = "not listed",
    default: Callable[[LayerPart, int], frozenset[int]] | None = None,
    uses: tuple[str, ...] = (),
) -> LayerField:
    """A field that lists the numbers of the layers of one kind."""

    def read(part: LayerPart, count: int) -> Kinds:
        given = part.get(key)
        found = default(part, count) if given is None and default is not None else numbers(given)
        return tuple(inside if i in found else outside for i in range(count))

    def write(part: dict[str, Any], kinds: Kinds) -> None:
        part[key] = [i for i, kind in enumerate(kinds) if kind == inside]

    return LayerField(key, read, write, (key, *uses))


def prefix_field(key: str, default: int, inside: str = "dense", outside: str = "experts") -> LayerField:
    """A field that counts the layers of one kind, all of which come first."""

    def read(part: LayerPart, count: int) -> Kinds:
        value = part.get(key)
        first = value if isinstance(value, int) else default
        return tuple(inside if i < first else outside for i in range(count))

    def write(part: dict[str, Any], kinds: Kinds) -> None:
        part[key] = leading(kinds, inside)

    return LayerField(key, read, write, (key,))


def leading(kinds: Kinds, kind: str) -> int:
    """How many layers of a kind come before the first of another."""
    return next((i for i, each in enumerate(kinds) if each != kind), len(kinds))


def offset_field(period: str, offset: str, defaults: tuple[int, int], special: str, usual: str) -> LayerField:
    """A field in which layer i is special where i modulo the period is the offset; there is no list."""

    def read(part: LayerPart, count: int) -> Kinds:
        every, at = whole(part, period, defaults[0]), part.get(offset, defaults[1])
        return tuple(special if i % every == at else usual for i in range(count))

    def write(part: dict[str, Any], kinds: Kinds) -> None:
        if read(part, len(kinds)) == kinds:
            return
        first = leading(kinds, usual)
        for every in range(first + 1, len(kinds) + 2):
            trial = {period: every, offset: first if first < len(kinds) else every - 1}
            if read(trial, len(kinds)) == kinds:
                part.update(trial)
                return

    return LayerField(period, read, write, (period, offset))
