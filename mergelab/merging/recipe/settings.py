"""A recipe parameter as written: a scalar, a gradient over layers, or filtered entries; and its value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

from mergelab.errors import quoted

__all__ = ["UNSET", "Scalar", "Setting", "SettingEntry", "Unset", "parse_setting"]

Scalar: TypeAlias = bool | int | float | str | None


class Unset:
    """The outcome of a setting that says nothing about a tensor, so that the next scope is asked."""

    def __repr__(self) -> str:
        return "UNSET"


UNSET = Unset()


@dataclass(frozen=True)
class SettingEntry:
    """One `{filter, value}` of a setting.

    Attributes:
        values: the scalars; one unless `gradient`.
        gradient: True if written as a list, whose values are spread over the layers of a slice.
        filter: the substring a tensor's name must hold; None or `"*"` matches every tensor.
    """

    values: tuple[Scalar, ...]
    gradient: bool = False
    filter: str | None = None

    @cached_property
    def _numbers(self) -> list[int | float]:
        # Kept: it is asked for once for each tensor, and a list may be long.
        return [v for v in self.values if isinstance(v, int | float) and not isinstance(v, bool)]

    def matches(self, tensor_name: str) -> bool:
        return self.filter is None or self.filter == "*" or self.filter in tensor_name

    def at(self, t: float) -> Scalar | Unset:
        """The value at layer coordinate `t` in [0, 1]; numbers interpolate, switches and words step."""
        if not self.gradient:
            return self.values[0]
        if not self.values:
            return UNSET
        position = t * (len(self.values) - 1)
        index = int(position)
        numbers = self._numbers
        if len(numbers) < len(self.values):
            return self.values[index]
        fraction = position - index
        following = numbers[min(index + 1, len(numbers) - 1)]
        return (1 - fraction) * numbers[index] + fraction * following


@dataclass(frozen=True)
class Setting:
    """Entries in order; the first whose filter matches a tensor's name gives its value.

    Attributes:
        entries: entries in order, at least one.
        filtered: True if written as `{filter, value}` entries, which `to_data` then restores.
    """

    entries: tuple[SettingEntry, ...]
    filtered: bool = False

    def evaluate(self, tensor_name: str, t: float) -> Scalar | Unset:
        """The value for a tensor at layer coordinate `t`, or `UNSET` if no entry matches its name."""
        for entry in self.entries:
            if entry.matches(tensor_name):
                return entry.at(t)
        return UNSET

    def scalars(self) -> tuple[Scalar, ...]:
        """Every scalar written, for type and range checks (interpolation stays between them)."""
        return tuple(value for entry in self.entries for value in entry.values)

    def to_data(self) -> Any:
        """The plain data `parse_setting` reads back to an equal setting."""
        values = [list(e.values) if e.gradient else e.values[0] for e in self.entries]
        if not self.filtered:
            return values[0]
        return [
            {"value": value} if entry.filter is None else {"filter": entry.filter, "value": value}
            for entry, value in zip(self.entries, values, strict=True)
        ]


def parse_setting(data: Any) -> Setting:
    """Reads `1.0`, `[0, 1]`, `{filter, value}` or a list of `{filter, value}`.

    Raises:
        ValueError: anything else, with what was found and what is expected.
    """
    if isinstance(data, Setting):
        return data
    if isinstance(data, Mapping):
        return Setting((_entry(data, ""),), filtered=True)
    if _is_list(data) and any(isinstance(item, Mapping) for item in data):
        return Setting(tuple(_entry(item, f"entry {i}: ") for i, item in enumerate(data, 1)), filtered=True)
    values, gradient = _values(data, "")
    return Setting((SettingEntry(values, gradient),))


def _is_list(data: Any) -> bool:
    return isinstance(data, Sequence) and not isinstance(data, str | bytes)


def _entry(data: Any, place: str) -> SettingEntry:
    if not isinstance(data, Mapping):
        raise ValueError(f"{place}expected {{filter, value}} like its neighbors, found {quoted(data)}")
    unknown = [key for key in data if key not in ("filter", "value")]
    if unknown:
        raise ValueError(f"{place}unknown key {quoted(unknown[0])}: an entry has 'filter' and 'value' only")
    if "value" not in data:
        raise ValueError(f"{place}'value' is missing beside 'filter'")
    pattern = data.get("filter")
    if pattern is not None and not isinstance(pattern, str):
        raise ValueError(f"{place}'filter' must be a part of a tensor name, found {quoted(pattern)}")
    values, gradient = _values(data["value"], place)
    return SettingEntry(values, gradient, pattern)


def _values(data: Any, place: str) -> tuple[tuple[Scalar, ...], bool]:
    items = list(data) if _is_list(data) else [data]
    for item in items:
        if item is not None and not isinstance(item, bool | int | float | str):
            raise ValueError(
                f"{place}expected a value, a list of values, or {{filter, value}} entries, "
                f"found {quoted(item)}"
            )
    return tuple(items), _is_list(data)
