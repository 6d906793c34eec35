"""A place in the output to the job that fills it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from mergelab.checkpoints import Checkpoint, is_float, promote
from mergelab.checkpoints.source import TensorSource
from mergelab.errors import CheckpointError, MergelabError, OperatorError
from mergelab.merging.engine.job import Job
from mergelab.merging.plan.found_statistics import FoundStatistics, Owner, input_axes
from mergelab.merging.plan.output_tensors import OutputPlace
from mergelab.merging.plan.suspicions import FactorsSeen
from mergelab.merging.recipe.scopes import ScopedSlice, ScopedSource, resolve
from mergelab.merging.structure.layer_parts import LayerParts, MovedLayers, with_moved_parts
from mergelab.merging.vocabulary import VocabularyPlan
from mergelab.merging.vocabulary.embedding_rows import RowSource, input_embedding, is_token_tensor
from mergelab.models.saved_names import is_buffer
from mergelab.operators import WeightedSum, chain
from mergelab.operators.compose import Merge
from mergelab.operators.declare import Operator
from mergelab.operators.statistics import read_along, statistic_fault

__all__ = ["Ingredients", "JobBuilder", "RowPrefix", "find_tensor", "outcome"]


_CAST = chain(WeightedSum(np.float32(1)), deltas=False)
"""One model's tensor, written in another dtype."""

Action = Literal["merge", "copy", "skip", "fault"]


@dataclass(frozen=True)
class Ingredients:
    """The tensors of one output tensor that exist.

    Attributes:
        inputs: the models that have it, with what they have.
        base: the base model's tensor, or None.
        statistics: what each of `inputs` has of it, with its model's table's axis; empty if one has none.
    """

    inputs: tuple[tuple[ScopedSource, TensorSource], ...]
    base: TensorSource | None
    statistics: tuple[tuple[TensorSource, int | None], ...] = ()

    @property
    def everyone(self) -> tuple[TensorSource, ...]:
        """The tensors of the inputs, then that of the base."""
        return (*(tensor for _, tensor in self.inputs), *([] if self.base is None else [self.base]))


def _is_constant(found: Ingredients) -> bool:
    """Whether these are buffers, which transformers makes itself and some checkpoints happen to hold."""
    return any(is_buffer(tensor.name, len(tensor.shape)) for tensor in found.everyone)


def find_tensor(checkpoint: Checkpoint, name: str) -> TensorSource | None:
    """A model's tensor, or, for a head or embedding it lacks, the input embedding it shares weights with."""
    found = checkpoint.tensors.get(name)
    if found is None and is_token_tensor(name) and name.endswith(".weight"):
        return input_embedding(checkpoint)
    return found


def outcome(
    operator: Operator, piece: ScopedSlice, found: Ingredients
) -> tuple[Action, Sequence[TensorSource]]:
    """Decides what to do: `("merge", ...)`, `("copy", [one tensor])`, `("skip", [])` or `("fault", [])`.

    The operator declares what becomes of tensors that too few models have (`lone`) or that the base lacks
    (`absent`); a tensor that only the base has is the base's.
    """
    inputs = [tensor for _, tensor in found.inputs]
    needs_base = operator.base == "required" or (operator.base == "optional" and piece.base is not None)
    if needs_base and found.base is None:
        if operator.absent == "copy" and len(inputs) == 1:
            return "copy", inputs
        return ("skip" if operator.absent == "omit" else "fault"), []
    too_few = len(inputs) < operator.min_models
    if found.base is not None and (not inputs or (too_few and operator.lone == "base")):
        return "copy", [found.base]
    if too_few:
        return ("copy", inputs) if operator.lone == "copy" else ("fault", [])
    return "merge", inputs


@dataclass(frozen=True)
class RowPrefix:
    """A `TensorSource` of the first `rows` rows of another; rows are contiguous, so offsets are the same."""

    source: TensorSource
    rows: int

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, *self.source.shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.source.dtype

    def over(self, change: Callable[[TensorSource], TensorSource]) -> RowPrefix:
        """The same rows of another tensor."""
        return RowPrefix(change(self.source), self.rows)

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fills `out` with flat elements `[start, start + out.size)` of the kept rows."""
        self.source.read_into(start, out)


@dataclass
class JobBuilder:
    """Builds jobs one by one and collects what is wrong or noteworthy over all of them.

    Attributes:
        operator: the merge method.
        models: the opened models by reference.
        vocabulary: the merged vocabulary, or None to leave rows as they are.
        dtype: the stored dtype, or None for the promotion of each tensor's inputs.
        truncate_rows: whether embeddings of different length are cut to the shortest.
        stacks: where the layers of the output come from, for tensors with a part per layer.
        statistics: the opened statistics, by model and path.
        faults: one sentence per impossible tensor.
        lacking: output tensors by the models that lack them.
        rejected: tensor names by the reason their operator gives for refusing its parameters.
        skipped: tensors that are not made at all.
        buffers: constants that some models hold and some lack, which are not made either.
        factors: how strongly models enter, where that is worth a warning.
        settings: the hyper-parameters of each job, in order; part of a plan's identity.
    """

    operator: Operator
    models: Mapping[str, Checkpoint]
    vocabulary: VocabularyPlan | None = None
    dtype: np.dtype[Any] | None = None
    truncate_rows: bool = False
    stacks: Sequence[MovedLayers] = ()
    statistics: Mapping[Owner, FoundStatistics] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    lacking: dict[tuple[str, ...], list[OutputPlace]] = field(default_factory=dict)
    rejected: dict[str, list[str]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    buffers: list[str] = field(default_factory=list)
    factors: FactorsSeen = field(default_factory=FactorsSeen)
    settings: list[str] = field(default_factory=list)
    _merges: dict[str, Merge] = field(default_factory=dict)
    _read_along: dict[str, Mapping[str, int]] = field(default_factory=dict)

    def build(self, place: OutputPlace) -> Job | None:
        """The job for a place, or None if there is none (a fault or a skipped tensor, then on record)."""
        try:
            if place.copied is not None:
                return self._alone(place, place.copied)
            found = self._find(place)
            if len(found.everyone) < len(place.piece.sources) and _is_constant(found):
                self.buffers.append(place.name)
                return None
            kind, tensors = outcome(self.operator, place.piece, found)
            if kind == "skip":
                self.skipped.append(place.name)
                return None
            if kind == "fault":
                self.faults.append(self._too_few(place, found))
                return None
            return self._copy(place, found, tensors[0]) if kind == "copy" else self._merge(place, found)
        except OperatorError as error:
            self.rejected.setdefault(str(error), []).append(place.name)
            return None
        except MergelabError as error:
            self.faults.append(str(error))
            return None

    def _alone(self, place: OutputPlace, model: str) -> Job | None:
        """The copy of a tensor of a module that no other model has."""
        names = {source.model: name for source, name in zip(place.piece.sources, place.names, strict=True)}
        tensor = self.models[model].tensors.get(names[model])
        if tensor is None:
            return None
        source = next(source for source in place.piece.sources if source.model == model)
        return self._copy(place, Ingredients(((source, tensor),), None), tensor)

    def _find(self, place: OutputPlace) -> Ingredients:
        present: list[TensorSource | None] = []
        beside: list[tuple[TensorSource, int | None] | None] = []
        named = {source.model: name for source, name in zip(place.piece.sources, place.names, strict=True)}

        def find(model: str) -> TensorSource | None:
            tensor = find_tensor(self.models[model], named.get(model, place.name))
            if tensor is None or self.vocabulary is None:
                return tensor
            return self.vocabulary.source(model, tensor, role=place.name)

        for i, source in enumerate(place.piece.sources):
            # The same model may be there twice, with unlike names of blocks.
            named[source.model] = place.names[i]
            tensor = find(source.model)
            if tensor is not None:
                tensor = with_moved_parts(tensor, place.name, i, self.stacks, find)
            present.append(tensor)
            beside.append(self._statistic(source, place.names[i], tensor))
        lacking = tuple(s.model for s, t in zip(place.piece.sources, present, strict=True) if t is None)
        shapes = [tensor.shape for tensor in present if tensor is not None]
        if lacking and not (shapes and is_buffer(place.name, len(shapes[0]))):
            self.lacking.setdefault(lacking, []).append(place)
        if self.truncate_rows and is_token_tensor(place.name):
            rows = min(tensor.shape[0] for tensor in present if tensor is not None)
            cut = [t is not None and t.shape[0] != rows for t in present]
            present = [RowPrefix(t, rows) if t and c else t for t, c in zip(present, cut, strict=True)]
            beside = [None if c else s for s, c in zip(beside, cut, strict=True)]
        count = len(place.piece.inputs)
        inputs = [(s, t) for s, t in zip(place.piece.inputs, present[:count], strict=True) if t is not None]
        base = present[count] if place.piece.base is not None else None
        known = [s for s, t in zip(beside[:count], present[:count], strict=True) if t is not None]
        every = tuple(statistic for statistic in known if statistic is not None)
        return Ingredients(tuple(inputs), base, every if len(every) == len(known) else ())

    def _statistic(
        self, source: ScopedSource, name: str, tensor: TensorSource | None
    ) -> tuple[TensorSource, int | None] | None:
        """What a model has of its tensor, and the axis its table says it reads along; None if nothing."""
        found = self.statistics.get((source.model, source.statistics or ""))
        # Nobody has taken statistics of rows or layers that are put together anew.
        if found is None or name not in found.tensors or isinstance(tensor, RowSource | LayerParts):
            return None
        return found.tensors[name], found.axes.get(name)

    def _copy(self, place: OutputPlace, found: Ingredients, tensor: TensorSource) -> Job:
        dtype = self._dtype(place, [tensor])
        self.settings.append("copy")
        names = [source.model for source, t in found.inputs if t is tensor]
        if not names and place.piece.base is not None:
            names = [place.piece.base.model]
        merge = None if dtype == tensor.dtype else _CAST
        return Job(place.name, tuple(tensor.shape), dtype, (tensor,), None, merge, tuple(names))

    def _merge(self, place: OutputPlace, found: Ingredients) -> Job:
        inputs = [tensor for _, tensor in found.inputs]
        everyone = [*inputs, *([] if found.base is None else [found.base])]
        owners = [source.model for source, _ in found.inputs]
        if found.base is not None and place.piece.base is not None:
            owners.append(place.piece.base.model)
        self._check_shapes(place, everyone, owners)
        dtype = self._dtype(place, everyone)
        shape = tuple(everyone[0].shape)
        if not is_float(everyone[0].dtype):
            self.settings.append(self.operator.integers)
            kept = 1 if self.operator.integers == "first" else len(everyone)
            return Job(place.name, shape, dtype, tuple(everyone[:kept]), None, None, tuple(owners[:kept]))
        given = dict(zip((s.model for s in place.piece.sources), place.names, strict=True))
        named = [(source, given[source.model]) for source, _ in found.inputs]
        arguments = resolve(self.operator, place.piece, named, place.name, place.t)
        self.factors.add(self.operator, arguments, [source.model for source, _ in found.inputs], place.name)
        setting = repr(sorted(arguments.items()))
        self.settings.append(setting)
        if self.operator.copies(arguments) and dtype == inputs[0].dtype:
            return Job(place.name, shape, dtype, tuple(inputs), None, None, tuple(owners))
        if setting not in self._merges:
            self._merges[setting] = self.operator(**arguments)
        merge, beside = self._merges[setting], tuple(statistic for statistic, _ in found.statistics)
        reads = self._check_statistics(place, found, shape, owners)
        if reads is None and merge.grain == "tensor":
            source, _ = found.inputs[0]
            reads = self._axes(source.model).get(given[source.model])
        names = tuple(owners)
        return Job(
            place.name, shape, dtype, tuple(inputs), found.base, merge, names, beside, reads, depth=place.t
        )

    def _axes(self, model: str) -> Mapping[str, int]:
        """The axis along which each matrix of a model reads, as far as its table says so."""
        if model not in self._read_along:
            self._read_along[model] = input_axes(self.models[model])
        return self._read_along[model]

    def _check_statistics(
        self, place: OutputPlace, found: Ingredients, shape: tuple[int, ...], owners: list[str]
    ) -> int | None:
        """Checks the shapes of a tensor's statistics; returns the axis that Gram matrices belong to."""
        kind = self.operator.statistics
        if kind is None or not found.statistics:
            return None
        for (statistic, axis), owner in zip(found.statistics, owners, strict=False):
            fault = statistic_fault(kind, shape, tuple(statistic.shape), axis)
            if fault is not None:
                raise CheckpointError(
                    f"the statistic of tensor {place.name!r} of model {owner!r} {fault}; compute it for this "
                    "model with 'mergelab statistics'"
                )
        first, axis = found.statistics[0]
        return read_along(kind, shape, tuple(first.shape), axis)

    def _dtype(self, place: OutputPlace, tensors: list[TensorSource]) -> np.dtype[Any]:
        kinds = {tensor.dtype for tensor in tensors}
        if all(is_float(kind) for kind in kinds):
            return self.dtype or promote(kinds)
        if len(kinds) > 1:
            found = ", ".join(sorted(str(kind) for kind in kinds))
            raise CheckpointError(
                f"tensor {place.name!r} is {found} in different models; a tensor without weights must "
                "have one dtype, and equal values, in all models"
            )
        return next(iter(kinds))

    def _check_shapes(self, place: OutputPlace, tensors: list[TensorSource], owners: list[str]) -> None:
        first = tuple(tensors[0].shape)
        for tensor, owner in zip(tensors, owners, strict=True):
            if tuple(tensor.shape) == first:
                continue
            remedy = "models that are merged must have the same sizes"
            if is_token_tensor(place.name) and tuple(tensor.shape[1:]) == first[1:]:
                remedy = (
                    "the vocabularies differ: set 'tokenizer_source: union', or cut them to the shortest "
                    "with --unsafe-truncate-embeddings"
                )
            raise CheckpointError(
                f"tensor {place.name!r} is {list(first)} in model {owners[0]!r} and {list(tensor.shape)} in "
                f"{owner!r}; {remedy}"
            )

    def _too_few(self, place: OutputPlace, found: Ingredients) -> str:
        base = place.piece.base
        if base is not None and found.base is None:
            return (
                f"tensor {place.name!r} is missing from the base model {base.model!r}, which "
                f"{self.operator.name!r} takes differences from; use a base model of the same architecture"
            )
        have = ", ".join(repr(source.model) for source, _ in found.inputs) or "no model"
        return (
            f"tensor {place.name!r}: only {have} has it, and {self.operator.name!r} needs "
            f"{self.operator.min_models}; use models of the same architecture"
        )
