"""Values of configurations as the types that dataclasses declare: one place that converts, or refuses."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

from mergelab.errors import SAEError, quoted

__all__ = ["checked_options"]

_MAX_FLOAT = 3e38  # the range of float32, which everything is computed in
_SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def checked_options(
    kind: type, options: Mapping[str, Any], place: str, *, most: int = 2**31 - 1
) -> dict[str, Any]:
    """The options as the fields of a dataclass declare them: `32.0` as 32, a list as a tuple.

    Args:
        kind: the dataclass.
        options: values by field name; names it does not have are passed on.
        place: what stands before a name in messages, such as `data.toy.`.
        most: the largest whole number.

    Raises:
        SAEError: a value has another type, or is out of the range of what it is computed in.
    """
    hints = get_type_hints(kind)
    found, faults = {}, []
    for name, value in options.items():
        accepted = get_args(hints.get(name)) or (hints.get(name),)
        try:
            found[name] = value if name not in hints else _convert(value, accepted, most)
        except (TypeError, ValueError, OverflowError):
            faults.append(f"{place}{name} is {quoted(value)}; expected {_expected(accepted)}.")
    if faults:
        raise SAEError(faults)
    return found


def _convert(value: Any, accepted: tuple[Any, ...], most: int) -> Any:
    """The value as the first of these types it can be; raises one of three errors otherwise."""
    if value is None and type(None) in accepted:
        return None
    if Ellipsis in accepted:  # the arguments of tuple[int, ...]
        return tuple(_whole(item, most) for item in _listed(value))
    if bool in accepted:
        return value if isinstance(value, bool) else _switch(value)
    if isinstance(value, bool):
        raise TypeError
    if float in accepted:
        return _finite(value, keep_int=int in accepted)
    if int in accepted:
        return _whole(value, most)
    if str in accepted:
        return _word(value)
    return value


def _switch(value: Any) -> bool:
    found = _SWITCHES.get(_word(value).lower())
    if found is None:
        raise ValueError
    return found


def _whole(value: Any, most: int) -> int:
    if isinstance(value, bool):
        raise TypeError
    if isinstance(value, str):
        value = int(value) if len(value) < 40 else None
    elif isinstance(value, float) and value.is_integer():
        value = int(value)
    number: int = operator.index(value)  # pyright: ignore[reportArgumentType]  # raises for the rest
    if abs(number) > most:
        raise ValueError
    return number


def _finite(value: Any, *, keep_int: bool) -> float | int:
    if isinstance(value, str) and len(value) > 40:
        raise ValueError
    number = float(value)
    if not math.isfinite(number) or abs(number) > _MAX_FLOAT:
        raise ValueError
    return value if keep_int and isinstance(value, int) else number


def _word(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise TypeError
    return list(value)


def _expected(accepted: tuple[Any, ...]) -> str:
    names = {bool: "true or false", float: "a number", int: "a whole number", str: "a word"}
    if Ellipsis in accepted:
        return "a list of whole numbers"
    said = next((name for kind, name in names.items() if kind in accepted), "another value")
    return f"{said} or null" if type(None) in accepted else said
