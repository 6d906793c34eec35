"""Options of `mergelab generate` that say how tokens are searched, drafted, forced, promoted and watched."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click

from mergelab.cli.numbers import WholeNumber
from mergelab.errors import quoted

__all__ = ["ClampedLatent", "Trigger", "check_methods", "decoding_options", "uses_methods"]

F = TypeVar("F", bound=Callable[..., Any])


class ClampedLatent(NamedTuple):
    """What `--clamp-latent` names."""

    sae: Path
    latent: int
    value: float


class Trigger(NamedTuple):
    """What `--stop-when` names."""

    sae: Path
    latents: tuple[int, ...]
    above: float


class _Valued(click.ParamType):
    """`NAME=NUMBER`, split at the last `=`.

    Args:
        name: what stands for it in messages.
        path: whether the name is that of a file.
    """

    def __init__(self, name: str, *, path: bool = False) -> None:
        self.name, self._path = name, path

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, float]:
        name, sign, number = str(value).rpartition("=")
        strength = _number(number)
        if not sign or not name or strength is None:
            self.fail(f"{quoted(str(value))} is not {self.name}, with a finite number", param, ctx)
        return (Path(name) if self._path else name), strength


class _Clamp(click.ParamType):
    name = "SAE:ID=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> ClampedLatent:
        place, _, number = str(value).rpartition("=")
        sae, _, latent = place.rpartition(":")
        ids, amount = _ids(latent), _number(number)
        if not sae or ids is None or len(ids) != 1 or amount is None:
            self.fail(f"{quoted(str(value))} is not SAE:ID=VALUE, such as run:892=4.5", param, ctx)
        return ClampedLatent(Path(sae), ids[0], amount)


class _When(click.ParamType):
    name = "SAE:ID,...>VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Trigger:
        place, _, number = str(value).rpartition(">")
        sae, _, latents = place.rpartition(":")
        ids, above = _ids(latents), _number(number)
        if not sae or ids is None or above is None:
            self.fail(f"{quoted(str(value))} is not SAE:ID,...>VALUE, such as 'run:892,1043>4'", param, ctx)
        return Trigger(Path(sae), ids, above)


def _number(text: str) -> float | None:
    try:
        number = float(text) if len(text) <= 100 else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _ids(text: str) -> tuple[int, ...] | None:
    parts = [part.strip() for part in text.split(",")]
    if all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts):
        return tuple(map(int, parts))
    return None


_OPTIONS = [
    click.option(
        "--samples", type=WholeNumber(1), help="Number of continuations of the prompt, which is read once."
    ),
    click.option(
        "--draft",
        type=click.Path(path_type=Path),
        metavar="MODEL",
        help="Small model of the same vocabulary that drafts tokens, or mtp for the model's own layer of "
        "multi-token prediction; the text keeps its distribution.",
    ),
    click.option("--beams", type=WholeNumber(1), help="Number of beginnings that a beam search follows."),
    click.option("--think-end", metavar="TEXT", help="Text that ends thinking, such as '</think>'."),
    click.option(
        "--think-min", type=WholeNumber(0), help="Number of new tokens before which thinking does not end."
    ),
    click.option(
        "--think-max", type=WholeNumber(1), help="Number of new tokens at which --think-end is put in."
    ),
    click.option(
        "--think-more", metavar="TEXT", help="Text in the place of an end before --think-min: ' Wait'."
    ),
    click.option(
        "--promote",
        multiple=True,
        type=_Valued("TEXT=STRENGTH"),
        metavar="TEXT=STRENGTH",
        help="Text to make likelier: STRENGTH is added to the logits of its tokens. Repeatable.",
    ),
    click.option(
        "--ban", multiple=True, metavar="TEXT", help="Text that is not written, in any spelling. Repeatable."
    ),
    click.option(
        "--steer",
        multiple=True,
        type=_Valued("FILE=STRENGTH", path=True),
        metavar="FILE=STRENGTH",
        help="Control vector (.gguf) to add to the residual stream, times STRENGTH. Repeatable.",
    ),
    click.option(
        "--clamp-latent",
        "clamps",
        multiple=True,
        type=_Clamp(),
        metavar="SAE:ID=VALUE",
        help="Latent of an SAE to hold at a value. Repeatable.",
    ),
    click.option(
        "--stop-when",
        "triggers",
        multiple=True,
        type=_When(),
        metavar="'SAE:ID,...>VALUE'",
        help="Latents to watch; the text ends where one of them exceeds VALUE. Repeatable.",
    ),
]


def decoding_options(command: F) -> F:
    """Decorator that adds the options."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


_METHODS = ("samples", "draft", "beams", "think_end", "steer", "clamps", "triggers")
_SPELLED = {"clamps": "clamp-latent", "triggers": "stop-when"}


def uses_methods(options: Mapping[str, Any]) -> bool:
    """Whether the text is made otherwise than token by token from the model as it is."""
    return any(options[name] is not None and options[name] != () for name in _METHODS)


def check_methods(options: Mapping[str, Any], *, turns: bool, file: bool) -> None:
    """Refuses options that do not go together.

    Args:
        options: those of the command.
        turns: whether it is a conversation of several turns.
        file: whether the prompts come from a file.
    """

    def given(*names: str) -> str | None:
        for name in names:
            if options[name] is not None and options[name] != ():
                return f"--{_SPELLED.get(name, name.replace('_', '-'))}"
        return None

    if (option := given("think_min", "think_max", "think_more")) and options["think_end"] is None:
        raise click.UsageError(f"{option} is of thinking: add --think-end TEXT, the text that ends it")
    if options["think_end"] is not None and not options["think_end"]:
        raise click.UsageError("--think-end is empty; give the text that ends thinking, such as '</think>'")
    least, most = options["think_min"] or 0, options["think_max"]
    if most is not None and most < least:
        raise click.UsageError(f"--think-max {most} is less than --think-min {least}; exchange them")
    if options["think_more"] and options["think_end"] in options["think_more"]:
        raise click.UsageError("--think-more holds --think-end, which it stands in for; give another text")
    if "" in options["ban"]:
        raise click.UsageError("--ban is empty; give the text that is not to be written")
    for one, others in (
        ("beams", ("samples", "draft", "think_end", "triggers", "temperature", "top_k", "top_p", "min_p")),
        ("draft", ("think_end", "triggers")),
    ):
        if given(one) and (other := given(*others)):
            raise click.UsageError(f"--{one} does not go with {other}: omit one of them")
    if options["greedy"] and (options["samples"] or 1) > 1:
        raise click.UsageError("--greedy gives one text: omit --samples, or --greedy")
    where = "a conversation of several turns" if turns else "a file of prompts" if file else ""
    if where and (option := given(*_METHODS)):
        raise click.UsageError(f"{option} is of one prompt and not of {where}: give --prompt TEXT")
