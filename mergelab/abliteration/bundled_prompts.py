"""The prompts that come with the package, for whoever has none at hand: short, and matched in form."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mergelab.abliteration.prompts import read_prompts

__all__ = ["built_in_prompts"]

_FOLDER = Path(__file__).with_name("prompt_sets")


def built_in_prompts(kind: Literal["harmful", "harmless", "borderline"]) -> list[str]:
    """English prompts of one kind, written for this package.

    `harmful` are 80 requests that assistants decline; `harmless` are 80 that they answer, each with the verb
    and about the length of the harmful one in the same place; `borderline` are 40 innocent questions with an
    alarming word. One's own prompts, in the language and the manner in which a model is used, are better.
    """
    return read_prompts(_FOLDER / f"{kind}.txt")
