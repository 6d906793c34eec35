"""The tensors that models have in common: under one name, of one shape, embeddings token by token."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mergelab.checkpoints.source import Checkpoint, TensorSource
from mergelab.errors import CheckpointError
from mergelab.merging.vocabulary.embedding_rows import RowMap, RowSource, is_token_tensor
from mergelab.models.saved_names import is_buffer

__all__ = ["MatchedTensor", "Pairing", "is_matrix", "layer_of", "pair_tensors"]

_LAYER = re.compile(r"^(.*?\.\d{1,9})\.(.+)$")
_SHOWN = 3


@dataclass(frozen=True)
class MatchedTensor:
    """One tensor of every model.

    Attributes:
        name: Name in the first model.
        sources: Tensor of each model, in the order of the models; all of one shape.
        rows: Tokens that the rows belong to, where models number them differently; None: row i is token i.
    """

    name: str
    sources: tuple[TensorSource, ...]
    rows: tuple[str, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.sources[0].shape)

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def has_tokens(self) -> bool:
        """Whether it has one row for each token."""
        return is_token_tensor(self.name) and len(self.shape) == 2


@dataclass(frozen=True)
class Pairing:
    """What models have in common, and what not.

    Attributes:
        tensors: Tensors of all models.
        lacking: Names that some models lack, by the model that has them.
        notes: Sentences about names and shapes, one each.
    """

    tensors: tuple[MatchedTensor, ...]
    lacking: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]


def layer_of(name: str) -> tuple[str, str] | None:
    """The layer that a tensor belongs to and its name there; None outside of layers.

    >>> layer_of("model.layers.3.mlp.up_proj.weight")
    ('model.layers.3', 'mlp.up_proj.weight')
    """
    found = _LAYER.match(name)
    return None if found is None else (found[1], found[2])


def is_matrix(tensor: MatchedTensor) -> bool:
    """Whether a tensor tells of a model's origin: a matrix of a layer, in floating point."""
    return (
        len(tensor.shape) > 1
        and tensor.size >= 16
        and layer_of(tensor.name) is not None
        and not tensor.has_tokens
        and all(source.dtype.kind not in "iub" for source in tensor.sources)
    )


def pair_tensors(models: Mapping[str, Checkpoint], vocabularies: Mapping[str, Mapping[str, int]]) -> Pairing:
    """Finds the tensors that all models have; reads no weights.

    A model whose names differ by a prefix alone (`model.`, `language_model.`) is matched without it. Tensors
    with a row for each token are compared over the tokens that all models have.

    Args:
        models: Open checkpoints by name.
        vocabularies: Token -> id, of those models that have a tokenizer.

    Raises:
        CheckpointError: the models have no tensor in common.
    """
    names = list(models)
    first = models[names[0]].tensors
    notes: list[str] = []
    own: dict[str, dict[str, str]] = {}
    for model, checkpoint in models.items():
        own[model], note = _respelled(checkpoint.tensors, first)
        if note:
            notes.append(f"model {model!r} {note}")
    shared = [name for name in first if all(name in known for known in own.values())]
    if not shared:
        raise CheckpointError(
            f"models {', '.join(map(repr, names))} have no tensor in common ({_some(first)} against "
            f"{_some(models[names[-1]].tensors)}); compare models of one architecture"
        )
    found: list[MatchedTensor] = []
    for name in shared:
        sources = tuple(models[model].tensors[own[model][name]] for model in names)
        matched = _matched(name, names, sources, vocabularies)
        if matched is None:
            shapes = ", ".join(f"{list(s.shape)} in {m!r}" for m, s in zip(names, sources, strict=True))
            notes.append(f"tensor {name!r} is not compared: its shape is {shapes}")
            continue
        rows = {source.shape[0] for source in sources if source.shape}
        if matched.rows is not None or (matched.has_tokens and len(rows) > 1):
            by = "tokens that all models have" if matched.rows is not None else "first rows"
            notes.append(
                f"tensor {name!r} is compared over the {matched.shape[0]:,} {by}: it has "
                + ", ".join(f"{s.shape[0]:,} rows in {m!r}" for m, s in zip(names, sources, strict=True))
            )
        found.append(matched)
    if not found:
        raise CheckpointError(
            f"models {', '.join(map(repr, names))} share names, but no tensor of one shape; compare models "
            "of one architecture and size"
        )
    lacking = {
        model: tuple(name for name in known if name not in shared and not is_buffer(name))
        for model, known in own.items()
    }
    return Pairing(tuple(found), {m: lost for m, lost in lacking.items() if lost}, tuple(notes))


def _some(names: Iterable[str]) -> str:
    return repr(min(names, default="none at all"))


def _respelled(names: Iterable[str], wanted: Mapping[str, object]) -> tuple[dict[str, str], str]:
    """Name as the first model spells it -> own name, and what was done to a prefix."""
    mine = list(names)
    plain = {name: name for name in mine}
    numbered = [name for name in wanted if _LAYER.match(name)] or list(wanted)
    if sum(name in wanted for name in mine) * 2 >= min(len(mine), len(wanted)):
        return plain, ""
    probe = numbered[0] if numbered else ""
    changes: Counter[tuple[str, str]] = Counter()
    for name in mine:
        if name.endswith("." + probe):
            changes[name.removesuffix(probe), ""] += 1
        elif probe.endswith("." + name):
            changes["", probe.removesuffix(name)] += 1
    best: tuple[int, dict[str, str], str] = (sum(name in wanted for name in mine), plain, "")
    for removed, added in changes:
        renamed = {
            (added + name.removeprefix(removed) if name.startswith(removed) else name): name for name in mine
        }
        common = sum(name in wanted for name in renamed)
        if common > best[0]:
            best = (
                common,
                renamed,
                f"spells its tensors with {removed or added!r} " + ("in front" if removed else "omitted"),
            )
    return best[1], best[2]


def _matched(
    name: str,
    models: Sequence[str],
    sources: tuple[TensorSource, ...],
    vocabularies: Mapping[str, Mapping[str, int]],
) -> MatchedTensor | None:
    shapes = {tuple(source.shape) for source in sources}
    tokens = is_token_tensor(name) and all(len(shape) >= 1 for shape in shapes)
    if not tokens:
        return MatchedTensor(name, sources) if len(shapes) == 1 else None
    if len({shape[1:] for shape in shapes}) > 1:
        return None
    known = [vocabularies.get(model) for model in models]
    present = [v for v in known if v is not None]
    same = all(v == present[0] for v in present) if present else True
    if len(present) < len(models) or same:
        if len(shapes) == 1:
            return MatchedTensor(name, sources)
        count = min(shape[0] for shape in shapes)
        places = [np.arange(count)] * len(models)
        return MatchedTensor(name, _taken(models, sources, places))
    shared = [
        token
        for token in present[0]
        if all(v.get(token, 1 << 62) < s.shape[0] for v, s in zip(present, sources, strict=True))
    ]
    if not shared:
        return None
    places = [np.array([vocabulary[token] for token in shared], np.int64) for vocabulary in present]
    return MatchedTensor(name, _taken(models, sources, places), tuple(shared))


def _taken(
    models: Sequence[str], sources: Sequence[TensorSource], places: Sequence[np.ndarray]
) -> tuple[TensorSource, ...]:
    """Each tensor's rows at its places."""
    return tuple(
        RowSource(source, RowMap(model, index.astype(np.int64), {}, index.size), {})
        for model, source, index in zip(models, sources, places, strict=True)
    )
