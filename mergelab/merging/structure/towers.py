"""Towers of models that also see or hear: which are the same in two models, and what recipes call them.

A vision model and the language model it was built on hold the same text tower under other names
(`language_model.model.layers.` against `model.layers.`). Towers are matched by what their blocks hold, the
suffixes of their tensors' names; from then on both models' modules go by one name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from mergelab.merging.structure.architecture import Module, Structure

__all__ = ["align_towers", "called", "widest"]

_ALIKE = 0.5
"""Least fraction of suffixes that two towers share, of all that either has, to be the same."""

_TEXT = ("text", "language", "llm", "layers", "decoder")
_VISION = ("vision", "visual", "image")
_PROJECTOR = ("projector", "connector", "merger", "aligner", "adapter")


def widest(models: Mapping[str, Structure], donor: str) -> str:
    """The model whose modules the output has: the donor, unless another has all of its towers and more."""
    best = donor
    for name, structure in models.items():
        theirs = {module.name for module in structure.towers}
        if theirs > {module.name for module in models[best].towers}:
            best = name
    return best


def align_towers(models: Mapping[str, Structure], donor: str) -> tuple[dict[str, Structure], list[str]]:
    """The models with one name for each tower that they share, and what was matched, one sentence each.

    Args:
        models: the structure of each model.
        donor: the model whose names count among those with equally many towers.
    """
    reference = max((donor, *models), key=lambda name: len(models[name].towers))
    aligned = {name: _aligned(structure, models[reference]) for name, structure in models.items()}
    notes = []
    for name, structure in aligned.items():
        others = [label for label in aligned[reference].modules if label not in structure.modules]
        shared = [m for m in structure.towers if m.name in aligned[reference].modules]
        if not others or not shared or name == reference:
            continue
        pairs = ", ".join(
            f"{module.stack.prefix}N is merged with {there.stack.prefix}N"
            for module in shared
            if module.stack and (there := aligned[reference].modules[module.name]).stack
        )
        notes.append(
            f"model {name!r} holds only the text tower of {reference!r} ({pairs}); what it lacks "
            f"({', '.join(others)}) is taken from the models that have it"
        )
    return aligned, notes


def _aligned(structure: Structure, reference: Structure) -> Structure:
    """The structure with the reference's names for towers that hold the same."""
    names: dict[str, str] = {}
    free = [m for m in reference.towers if m.name not in structure.modules]
    for module in structure.towers:
        if module.name in reference.modules or not free:
            continue
        best = max(free, key=lambda other: _likeness(module, other))
        if _likeness(module, best) >= _ALIKE:
            names[module.name] = best.name
            free.remove(best)
    return _renamed(structure, names)


def _likeness(one: Module, other: Module) -> float:
    """The fraction of suffixes that two towers share."""
    left, right = _suffixes(one), _suffixes(other)
    return len(left & right) / max(len(left | right), 1)


def _suffixes(module: Module) -> set[str]:
    return set() if module.stack is None else {name for block in module.stack.suffixes for name in block}


def _renamed(structure: Structure, names: Mapping[str, str]) -> Structure:
    if not names:
        return structure
    modules = [replace(module, name=names.get(label, label)) for label, module in structure.modules.items()]
    return Structure({module.name: module for module in modules}, structure.names)


def called(structure: Structure, wanted: Collection[str]) -> Structure:
    """The structure with its modules named as a recipe names them, where the recipe uses mergekit's names.

    mergekit calls the text tower `text_decoder`, the other `vision_tower` or `vision_model`, what joins them
    `multi_modal_projector` (in Qwen's models a part of the vision tower, `visual.merger`), and the embedding
    and head of T5 `shared`.
    """
    unknown = [name for name in wanted if name not in structure.modules]
    if "multi_modal_projector" in unknown and not _first(structure, _PROJECTOR, towers=False):
        structure = _split(structure, "multi_modal_projector", lambda name: "merger" in name)
    if "shared" in unknown:
        structure = _split(structure, "shared", lambda name: name in ("shared.weight", "lm_head.weight"))
    names: dict[str, str] = {}
    for name in unknown:
        words, towers = _WORDS.get(name, ((), True))
        found = _first(structure, words, towers=towers) if name not in structure.modules else None
        if found is not None and found not in wanted:
            names[found] = name
    return _renamed(structure, names)


_WORDS: Mapping[str, tuple[Sequence[str], bool]] = {
    "text_decoder": ((*_TEXT, "default"), True),
    "vision_tower": (_VISION, True),
    "vision_model": (_VISION, True),
    "multi_modal_projector": (_PROJECTOR, False),
}


def _first(structure: Structure, words: Sequence[str], *, towers: bool) -> str | None:
    """The first module (with blocks, or without) whose name holds one of the words."""
    modules = [m for m in structure.modules.values() if (m.stack is not None) == towers]
    return next((m.name for m in modules if any(word in m.name for word in words)), None)


def _split(structure: Structure, name: str, belongs: Callable[[str], bool]) -> Structure:
    """The structure with the loose tensors that belong to a part of a module as a module of their own."""
    modules = dict(structure.modules)
    pre: list[str] = []
    post: list[str] = []
    for label, module in structure.modules.items():
        pre += [tensor for tensor in module.pre if belongs(tensor)]
        post += [tensor for tensor in module.post if belongs(tensor)]
        modules[label] = replace(
            module,
            pre=tuple(tensor for tensor in module.pre if not belongs(tensor)),
            post=tuple(tensor for tensor in module.post if not belongs(tensor)),
        )
    if not pre and not post:
        return structure
    return Structure({**modules, name: Module(name, None, tuple(pre), tuple(post))}, structure.names)
