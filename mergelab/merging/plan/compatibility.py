"""What forbids merging a set of models before a weight is read: incomplete, or of another kind."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from mergelab.checkpoints import Checkpoint
from mergelab.merging.plan.output_tensors import OutputPlace
from mergelab.merging.structure.architecture import HEADS, OTHER_TOWERS, Structure, layer_counts
from mergelab.merging.vocabulary.embedding_rows import is_output_embedding
from mergelab.models.saved_names import is_buffer

__all__ = ["absent", "incomplete", "mixed"]

_NUMBER = re.compile(r"\.(\d{1,9})\.")
_SHARES_LAYERS = ("num_hidden_groups",)  # ALBERT applies one stored layer many times


def incomplete(models: Mapping[str, Checkpoint]) -> list[str]:
    """One sentence per model that lacks blocks its config states, or leaves numbers out among them."""
    found = (_missing_blocks(name, model.tensors, model.config) for name, model in models.items())
    return [sentence for sentence in found if sentence is not None]


def _missing_blocks(model: str, names: Iterable[str], config: Mapping[str, Any]) -> str | None:
    counts = {
        count
        for path, key, count in layer_counts(config)
        if count > 0 and not any(word in part for part in (*path, key) for word in OTHER_TOWERS)
    }
    if not counts or any(key in config for key in _SHARES_LAYERS):
        return None
    blocks: dict[str, dict[int, int]] = {}
    for name in names:
        if match := _NUMBER.search(name):
            numbers = blocks.setdefault(name[: match.start() + 1], {})
            numbers[int(match[1])] = numbers.get(int(match[1]), 0) + 1
    if not blocks:
        return (
            f"model {model!r}: config.json states {max(counts)} layers, but no tensor belongs to one; the "
            "checkpoint is incomplete: finish the download"
        )
    prefix, present = max(blocks.items(), key=lambda item: sum(item[1].values()))
    top = max(present) + 1
    stated = min((count for count in counts if count >= top), default=top)
    if len(present) == stated:
        return None
    # Some models count the blocks of several stacks together (prelude, core and coda).
    if sum(len(numbers) for numbers in blocks.values() if len(numbers) == max(numbers) + 1) in counts:
        return None
    lacking = list(islice((i for i in range(stated) if i not in present), 5))
    more = stated - len(present) - len(lacking)
    listed = ", ".join(map(str, lacking)) + (f" and {more} more" if more > 0 else "")
    says = f"config.json states {stated} layers" if stated in counts else f"it has a layer {top - 1}"
    return (
        f"model {model!r}: {says}, but the weights lack layer {listed} ({prefix}N); the checkpoint is "
        "incomplete: finish the download, or correct config.json"
    )


def mixed(configs: Mapping[str, Mapping[str, Any]], donor: str) -> list[str]:
    """One sentence per model whose `model_type`, and that of its text tower, is none of the donor's."""
    kinds = {name: _kinds(config) for name, config in configs.items()}
    return [
        f"model {name!r} is of model_type {configs[name]['model_type']!r} and {donor!r} of "
        f"{configs[donor]['model_type']!r}: equal shapes do not make their weights alike; take models of one "
        "architecture, or pass --allow-mixed-architectures to merge them all the same"
        for name, kind in kinds.items()
        if kind and kinds[donor] and not kind & kinds[donor]
    ]


def _kinds(config: Mapping[str, Any]) -> set[str]:
    """The model type of a config and of its text tower; `gemma3_text` and `gemma3` are one."""
    parts = [config, *(config.get(key) for key in ("text_config", "llm_config", "language_config"))]
    types = [part.get("model_type") for part in parts if isinstance(part, Mapping)]
    if not isinstance(config.get("model_type"), str):
        return set()
    found = {kind for kind in types if isinstance(kind, str)}
    if len(parts) > 1 or any(word in key for key in config for word in OTHER_TOWERS):
        from mergelab.models.families.wrappers import text_family  # takes seconds, and few merges need it

        found |= {family for family in (text_family(config),) if family is not None}
    return {kind.removesuffix("_text") for kind in found}


def _towers(config: Mapping[str, Any]) -> tuple[object, ...]:
    """The model type, and the parts of a config that speak of towers of their own."""
    parts = sorted(key for key, value in config.items() if isinstance(value, Mapping) and "_config" in key)
    return config.get("model_type"), *(part for part in parts if part != "quantization_config")


def absent(
    lacking: Mapping[tuple[str, ...], Sequence[OutputPlace]],
    models: Mapping[str, Structure],
    configs: Mapping[str, Mapping[str, Any]],
    donor: str,
) -> list[str]:
    """One sentence per group of models that lack tensors which belong to the architecture the others show.

    Not counted: buffers, heads (they may be tied, or belong to another task), and modules that a model of
    another `model_type` than the donor's has none of, such as the vision tower in a language model.
    """
    others = {name for name, config in configs.items() if _towers(config) != _towers(configs[donor])}
    sentences = []
    for owners, places in lacking.items():
        bare = [models[name] for name in owners] if others.issuperset(owners) else []
        wanted = [place.name for place in places if not _may_lack(place, bare)]
        if wanted:
            first = repr(wanted[0])
            many = f"tensor {first} is" if len(wanted) == 1 else f"{len(wanted)} tensors ({first}, ...) are"
            sentences.append(
                f"{many} missing from {', '.join(map(repr, owners))}, though other models have "
                f"{'it' if len(wanted) == 1 else 'them'}: the checkpoint is incomplete or of another "
                "architecture; take a whole one, or pass --allow-mixed-architectures to merge without"
            )
    return sentences


def _may_lack(place: OutputPlace, owners: Sequence[Structure]) -> bool:
    parts = place.name.split(".")
    head: Callable[[str], bool] = lambda part: part in HEADS or part.endswith("_head")  # noqa: E731
    outside = not _NUMBER.search(place.name)
    return (
        is_buffer(place.name)
        or is_output_embedding(place.name)
        or (outside and any(map(head, parts)))
        or (bool(owners) and all(place.module not in owner.modules for owner in owners))
    )
