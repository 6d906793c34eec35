"""Sentences about how well the models of a plan fit together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mergelab.merging.architecture import Architecture
from mergelab.merging.layout import Place

__all__ = ["absences", "shortened", "strangers"]

MAX_FAULTS = 20


def strangers(models: Mapping[str, Architecture], donor: str) -> list[str]:
    """One sentence per model that has not one tensor, block or other, in common with the donor."""
    kinds = {name: _kinds(architecture) for name, architecture in models.items()}
    return [
        f"model {name!r} has no tensor name in common with {donor!r} (such as {min(found)!r} against "
        f"{min(kinds[donor])!r}): models of different architectures cannot be merged"
        for name, found in kinds.items()
        if found and kinds[donor] and not found & kinds[donor]
    ]


def _kinds(architecture: Architecture) -> set[str]:
    """The names of a model's tensors without block numbers and their prefixes."""
    found: set[str] = set()
    for module in architecture.modules.values():
        found.update(module.pre, module.post)
        if module.stack is not None:
            found.update(suffix for suffixes in module.stack.suffixes for suffix in suffixes)
    return found


def absences(lacking: Mapping[tuple[str, ...], Sequence[Place]], skipped: Sequence[str]) -> list[str]:
    """One sentence per group of models that lack the same tensors, and one for tensors not made at all."""
    found = []
    for models, places in lacking.items():
        names = [place.name for place in places if place.name not in skipped]
        if not names:
            continue
        first = repr(names[0])
        many = f"tensor {first} is" if len(names) == 1 else f"{len(names)} tensors ({first}, ...) are"
        found.append(
            f"{many} missing from {', '.join(map(repr, models))} and made from the other models alone"
        )
    if skipped:
        found.append(
            f"{len(skipped)} tensor(s) are left out because the base model lacks them: "
            + ", ".join([*skipped[:5], *(["..."] if len(skipped) > 5 else [])])
        )
    return found


def shortened(faults: Sequence[str], rejected: Mapping[str, Sequence[str]]) -> list[str]:
    """One sentence per reason an operator gave, then the first faults, and how many more there are."""
    groups = [
        f"tensor {names[0]!r}" + (f" and {len(names) - 1} more" if len(names) > 1 else "") + f": {reason}"
        for reason, names in rejected.items()
    ]
    unique = [*groups, *dict.fromkeys(faults)]
    rest = len(unique) - MAX_FAULTS
    return unique if rest <= 0 else [*unique[:MAX_FAULTS], f"and {rest} more tensors like these"]
