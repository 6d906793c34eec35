"""A merge, callable on whole trees: on one device, sharded over a mesh, or inside a user's transformation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from mergelab.compat import enable_x64
from mergelab.errors import OperatorError, did_you_mean
from mergelab.operators.algebra import (
    Formula,
    Reduction,
    Stage,
    algebraic,
    finish_measure,
    measure_block,
    merge_block,
)
from mergelab.operators.measures import Measure, PerBlock, Rank, RowOrder, Sum, pack_masks
from mergelab.operators.order_statistics import (
    Selection,
    above_place,
    select_on_device,
    select_on_host,
    trivial_selection,
)
from mergelab.operators.region import Region, TensorInfo, tensor_key, whole
from mergelab.operators.statistics import StatisticsKind, axis_of_kernel, read_along, statistic_fault
from mergelab.trees import depths, named_leaves, same_structure

__all__ = ["BaseUse", "Inputs", "IntegerUse", "Merge", "chain"]

BaseUse = Literal["required", "optional", "as_input"]

IntegerUse = Literal["equal", "first"]
"""What becomes of a tensor that is not floating point: a copy, which all models must agree on, or the first
model's, whatever the others hold."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a merge takes: declared by named operators, checked before anything is computed.

    Attributes:
        operator: the operator's name, for messages.
        base: `required`, `optional`, or `as_input` (a base is one more ordinary model).
        min_models, max_models: how many models besides the base (`max_models` None: any number).
        integers: the treatment of tensors that are not floating point.
        statistics: the kind of statistics that it needs beside each model, or None.
    """

    operator: str = "this merge"
    base: BaseUse = "optional"
    min_models: int = 1
    max_models: int | None = None
    integers: IntegerUse = "equal"
    statistics: StatisticsKind | None = None

    def check(self, models: int, has_base: bool) -> None:
        """Checks the number of models and the presence of a base.

        Raises:
            OperatorError: they are not what the operator takes.
        """
        if self.base == "required" and not has_base:
            raise OperatorError(f"{self.operator} works relative to a base model: pass `base`.")
        if self.base == "as_input" and has_base:
            raise OperatorError(f"{self.operator} treats all models alike: pass the base among `models`.")
        if models < self.min_models or (self.max_models is not None and models > self.max_models):
            exactly = self.max_models == self.min_models
            wanted = f"exactly {self.min_models}" if exactly else f"at least {self.min_models}"
            if not exactly and self.max_models is not None:
                wanted = f"{self.min_models} to {self.max_models}"
            besides = " besides the base" if self.base == "required" else ""
            raise OperatorError(f"{self.operator} merges {wanted} model(s){besides}, but got {models}.")

    def check_statistics(self, models: int, statistics: int | None) -> None:
        """Checks the number of statistics; None if none were given.

        Raises:
            OperatorError: they are needed and not given, or given and not taken, or not one per model.
        """
        if self.statistics is None:
            if statistics is not None and self.operator != Inputs.operator:
                raise OperatorError(f"{self.operator} takes no statistics: call it without `statistics`.")
        elif statistics is None:
            what = "Fishers" if self.statistics == "fisher" else "Gram matrices"
            raise OperatorError(
                f"{self.operator} weighs parameters by {what} of each model: pass `statistics`, one tree per "
                "model, named as its parameters."
            )
        if statistics is not None and statistics != models:
            raise OperatorError(
                f"{self.operator}: got statistics of {statistics} model(s) for {models} model(s), the base "
                "not counted; give one tree per model, in their order."
            )


@algebraic
class Merge(Formula):
    """A formula with what it takes: call it on models.

    Attributes:
        inputs: how many models, and whether a base.
    """

    inputs: Inputs = dataclasses.field(default=Inputs(), metadata={"static": True})

    # Hyper-parameters may be arrays, which have no hash: a merge is itself alone, so that it can be jitted.
    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def check(self, models: int, has_base: bool) -> None:
        """Checks the number of models, the presence of a base, and the number of per-model values.

        Raises:
            OperatorError: they are not what the merge takes.
        """
        self.inputs.check(models, has_base)
        for part in self.parts:
            part.check_models(models, self.inputs.operator)

    def __call__(
        self,
        models: Sequence[Any],
        base: Any = None,
        *,
        statistics: Sequence[Any] | None = None,
        seed: int = 0,
        dtype: Any = None,
    ) -> Any:
        """Merges pytrees of arrays: on one device, sharded, or under `jit`, `vmap` and `grad`.

        Args:
            models: one pytree per model, equal in structure and shapes.
            base: the base model's pytree, where the operator uses one.
            statistics: one pytree per model of what the operator needs to know of it (Gram matrices, Fishers;
                see `statistics.StatisticsKind`), its leaves named as the parameters they are of. A tree may
                lack leaves; how their parameters are merged then is the operator's to say. A matrix reads
                along its last axis; a leaf called `kernel`, as in trees of this library, along its first.
            seed: seeds the random draws, which also depend on tensor names and model order.
            dtype: the dtype of the result; by default each tensor's promoted input dtype.

        Returns:
            A pytree of the models' structure. Computed in float32; non-float leaves are copied.

        Raises:
            OperatorError: structures or shapes differ, a needed base is missing, or a non-float leaf differs
                between models; statistics are missing, not taken, or of other names or shapes.
        """
        return _merge_trees(self, models, base, statistics, seed=seed, dtype=dtype)


def chain(*parts: Stage | Reduction, scale: ArrayLike = 1.0, deltas: bool = True) -> Merge:
    """Composes stages and one final reduction into a merge, as `optax.chain` composes updates.

    Example:
        >>> from mergelab import operators as ops
        >>> merge = ops.chain(ops.Trim(0.2), ops.ElectSign(), ops.DisjointMean())
    """
    *stages, reduce = parts
    inputs = Inputs(base="required" if deltas else "optional")
    return Merge(tuple(stages), reduce, scale, deltas, inputs)  # type: ignore[arg-type]


class _Leaf:
    """One tensor of all models on its way through a merge."""

    def __init__(
        self,
        merge: Merge,
        name: str,
        values: list[Any],
        base: Any,
        region: Region,
        statistics: list[Any] | None,
        depth: float,
    ) -> None:
        self.name, self.shape = name, jnp.shape(values[0])
        reads = axis_of_kernel(name)
        if statistics is not None:
            found = [jnp.shape(s) for s in statistics]
            reads = _check_shapes(merge.inputs.statistics, name, self.shape, found, reads)
            arrays = tuple(jnp.atleast_1d(jnp.asarray(s)) for s in statistics)
            region = dataclasses.replace(region, statistics=arrays)
        self.merge = merge.at(TensorInfo(name, self.shape, statistics is not None, reads, depth))
        self.values = tuple(jnp.atleast_1d(jnp.asarray(v)) for v in values)
        self.base = None if base is None else jnp.atleast_1d(jnp.asarray(base))
        self.region = region
        self.known: list[list[Any]] = [[] for _ in merge.parts]

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    def results(self) -> tuple[tuple[Any, ...], ...]:
        return tuple(map(tuple, self.known))


def _check_shapes(
    kind: StatisticsKind | None,
    name: str,
    shape: tuple[int, ...],
    found: list[tuple[int, ...]],
    declared: int | None,
) -> int | None:
    """Checks the shapes of a tensor's statistics; returns the axis that Gram matrices belong to."""
    if kind is None:  # a composed merge: its parts know what they take
        return declared
    for position, one in enumerate(found):
        fault = statistic_fault(kind, shape, one, declared)
        if fault is not None:
            raise OperatorError(f"the statistic of tensor {name!r} of model {position} {fault}.")
    return read_along(kind, shape, found[0], declared)


def _statistics_by_name(
    merge: Merge, statistics: Sequence[Any] | None, names: Sequence[str], models: int
) -> list[dict[str, Any]]:
    """Each model's statistics by parameter name; no entry where none were given."""
    merge.inputs.check_statistics(models, None if statistics is None else len(statistics))
    found = []
    for position, tree in enumerate(statistics or ()):
        keys, leaves, _ = named_leaves(tree)
        if keys and not set(keys) & set(names):
            raise OperatorError(
                f"statistics of model {position} name no tensor of the models (such as {keys[0]!r}"
                f"{did_you_mean(keys[0], names)}); name each as the parameter it is of."
            )
        found.append(dict(zip(keys, leaves, strict=True)))
    return found


def _merge_trees(
    merge: Merge,
    models: Sequence[Any],
    base: Any,
    statistics: Sequence[Any] | None,
    *,
    seed: int,
    dtype: Any,
) -> Any:
    """The body of `Merge.__call__`, which documents it."""
    models = list(models)
    merge.check(len(models), base is not None)
    trees = models if base is None else [*models, base]
    if not models:
        return base
    names, leaves, structure = same_structure(trees)
    beside = _statistics_by_name(merge, statistics, names, len(models))
    traced = any(isinstance(x, Tracer) for x in jax.tree.leaves((merge, trees, beside)))
    outputs: list[Any] = [None] * len(names)
    floats: list[tuple[int, _Leaf]] = []
    for position, (name, depth) in enumerate(zip(names, depths(names), strict=True)):
        values = [tree[position] for tree in leaves]
        if not all(jnp.issubdtype(jnp.result_type(v), jnp.floating) for v in values):
            outputs[position] = values[0] if merge.inputs.integers == "first" else _copied(name, values)
        elif np.prod(jnp.shape(values[0]), dtype=np.int64) == 0:
            outputs[position] = jnp.asarray(values[0])
        else:
            own = [tree[name] for tree in beside if name in tree]
            known = own if own and len(own) == len(models) else None
            floats.append(
                (position, _leaf(merge, name, values, base is not None, known, seed, traced, depth))
            )
    for part, measure, declared in merge.steps():
        _take([leaf for _, leaf in floats], part, measure, declared, traced)
    for position, leaf in floats:
        if not traced:
            for part, known in zip(leaf.merge.parts, leaf.results(), strict=True):
                part.check(known, leaf.name)
        outputs[position] = _merged(leaf, dtype, traced)
    return jax.tree_util.tree_unflatten(structure, outputs)


def _copied(name: str, values: list[Any]) -> Any:
    concrete = [np.asarray(v) for v in values]
    if any(not np.array_equal(concrete[0], other) for other in concrete[1:]):
        raise OperatorError(
            f"tensor {name!r} is not floating point ({concrete[0].dtype}) and differs between models; only "
            "equal integer tensors can be carried over."
        )
    return values[0]


def _leaf(
    merge: Merge,
    name: str,
    values: list[Any],
    with_base: bool,
    statistics: list[Any] | None,
    seed: int,
    traced: bool,
    depth: float,
) -> _Leaf:
    base = values.pop() if with_base else None
    shape = jnp.shape(values[0])
    if np.prod(shape, dtype=np.int64) >= 2**32:
        raise OperatorError(
            f"tensor {name!r} has {np.prod(shape, dtype=np.int64)} elements; merging in memory indexes "
            "fewer than 2^32 per tensor: use the streaming engine (`mergelab.merge`)."
        )
    key = tensor_key(seed, name)
    if traced:
        # As a plain constant it would let the compiler draw all random bits itself, one by one, for minutes.
        key = jax.lax.optimization_barrier(jnp.asarray(key))
    region = whole(shape, key, "float32" if traced else "float64")
    return _Leaf(merge, name, values, base, region, statistics, depth)


def _take(leaves: list[_Leaf], part: int, measure: int, declared: Measure, traced: bool) -> None:
    """Takes one measure of every tensor and files the result with each."""

    def block(leaf: _Leaf) -> Any:
        with enable_x64(not traced and isinstance(declared, Sum)):
            return measure_block(
                leaf.merge, leaf.values, leaf.base, leaf.region, leaf.results(), part=part, measure=measure
            )

    if isinstance(declared, RowOrder):
        for leaf in leaves:
            leaf.known[part].append(pack_masks([above_place(question) for question in block(leaf)]))
    elif isinstance(declared, PerBlock):
        for leaf in leaves:
            leaf.known[part].append(block(leaf))
    elif isinstance(declared, Sum) and declared.needed is not None:
        for leaf in leaves:
            needed = not traced and declared.needed(leaf.merge.parts[part], tuple(leaf.known[part]))
            with enable_x64(not traced):
                leaf.known[part].append(
                    finish_measure(leaf.merge, block(leaf), part=part, measure=measure) if needed else None
                )
    elif isinstance(declared, Sum):
        totals = [block(leaf) for leaf in leaves]
        with enable_x64(not traced):
            if declared.scope == "tree" and totals:
                pooled = jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *totals)
                totals = [pooled] * len(leaves)
            for leaf, total in zip(leaves, totals, strict=True):
                leaf.known[part].append(finish_measure(leaf.merge, total, part=part, measure=measure))
    elif declared.scope == "tree":
        _rank_tree(leaves, part, declared, [block(leaf) for leaf in leaves])
    else:
        for leaf in leaves:
            owner, known = leaf.merge.parts[part], tuple(leaf.known[part])
            counts = declared.counts(owner, known, leaf.size, len(leaf.values))
            leaf.known[part].append(_rank(counts, lambda leaf=leaf: block(leaf), leaf.size, declared.values))


def _rank(
    counts: Sequence[Sequence[Any]], keys: Any, size: int, values: bool
) -> tuple[tuple[Selection, ...], ...]:
    """Selects in one tensor; looks at the keys only if some count is neither none nor all."""
    plain = all(not isinstance(c, Tracer) for stream in counts for c in stream)
    if plain:
        trivial = [[trivial_selection(int(c), size, values=values) for c in stream] for stream in counts]
        if all(s is not None for stream in trivial for s in stream):
            return tuple(tuple(s for s in stream if s is not None) for stream in trivial)
    return tuple(
        tuple(_select(stream_keys, c) for c in stream)
        for stream_keys, stream in zip(keys(), counts, strict=True)
    )


def _select(keys: jax.Array, count: Any) -> Selection:
    traced = isinstance(keys, Tracer) or isinstance(count, Tracer)
    if not traced and len(keys.devices()) == 1 and next(iter(keys.devices())).platform == "cpu":
        return select_on_host(np.asarray(keys), int(count))
    return select_on_device(keys, jnp.asarray(count, jnp.uint32))


def _rank_tree(leaves: list[_Leaf], part: int, declared: Rank, keys: list[Any]) -> None:
    """Selects over all tensors together, in name order; each tensor gets its own share of the ties."""
    if not leaves:
        return
    order = sorted(range(len(leaves)), key=lambda i: leaves[i].name)
    first, size = leaves[0], sum(leaf.size for leaf in leaves)
    counts = declared.counts(first.merge.parts[part], tuple(first.known[part]), size, len(first.values))
    chosen: list[list[list[Selection]]] = [[[] for _ in counts] for _ in leaves]
    for stream, stream_counts in enumerate(counts):
        flat = jnp.concatenate([jnp.reshape(keys[i][stream], -1) for i in order])
        for count in stream_counts:
            pooled = _select(flat, count)
            offset = 0
            for i in order:
                chosen[i][stream].append(_share(pooled, offset, leaves[i].size))
                offset += leaves[i].size
    for leaf, selections in zip(leaves, chosen, strict=True):
        leaf.known[part].append(tuple(map(tuple, selections)))


def _share(pooled: Selection, offset: int, size: int) -> Selection:
    """A pooled selection as one tensor sees it: the cutoff in that tensor's own flat index."""
    cutoff = jnp.asarray(pooled.cutoff[1], jnp.uint32)
    inside = jnp.where(cutoff > jnp.uint32(offset), cutoff - jnp.uint32(offset), jnp.uint32(0))
    inside = jnp.minimum(inside, jnp.uint32(min(size, 2**32 - 1)))
    return Selection(pooled.threshold, jnp.stack([jnp.zeros_like(inside), inside]))


def _merged(leaf: _Leaf, dtype: Any, traced: bool) -> jax.Array:
    inputs = leaf.values if leaf.base is None else (*leaf.values, leaf.base)
    out_dtype = jnp.dtype(dtype) if dtype is not None else _promoted([v.dtype for v in inputs])
    entire = leaf.merge.grain == "tensor"
    with enable_x64(entire and not traced):
        out = merge_block(leaf.merge, leaf.values, leaf.base, leaf.region, leaf.results(), dtype=out_dtype)
    if (entire or leaf.region.statistics is not None) and not traced:
        # What is computed from gathered matrices, or from statistics sharded otherwise, has the inputs'.
        out = jax.device_put(out, inputs[0].sharding)
    return jnp.reshape(out, leaf.shape)


def _promoted(dtypes: list[Any]) -> Any:
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)
