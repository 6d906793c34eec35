"""Tensors that two models spell in two ways within a block: one spelling for the merge of both.

The first BERT files call a norm's weight and bias `gamma` and `beta`. A merge of such files alone keeps these
names; beside a model with today's names they are read under today's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mergelab.checkpoints import Checkpoint
from mergelab.models.saved_names import has_old_norms, in_todays_spelling

__all__ = ["one_spelling"]


def one_spelling(models: Mapping[str, Checkpoint]) -> tuple[dict[str, Checkpoint], list[str]]:
    """The models with one name for each norm, and a sentence for each whose names were changed.

    Args:
        models: model of each name; what a source calls itself, in messages, stays its name in the file.
    """
    old = {name for name, model in models.items() if has_old_norms(model.tensors)}
    if not old or len(old) == len(models):
        return dict(models), []
    found = {name: _renamed(model) if name in old else model for name, model in models.items()}
    notes = [
        f"model {name!r} calls its norms by the old names LayerNorm.gamma and LayerNorm.beta: they are "
        "merged with LayerNorm.weight and LayerNorm.bias of the others"
        for name in models
        if name in old
    ]
    return found, notes


def _renamed(model: Any) -> Any:
    """The same kind of checkpoint, each of which is a dataclass with a field of its tensors."""
    tensors: dict[str, Any] = {}
    for name, source in model.tensors.items():
        today = in_todays_spelling(name)
        tensors[name if today in model.tensors else today] = source
    return replace(model, tensors=tensors)
