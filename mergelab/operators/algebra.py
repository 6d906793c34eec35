"""The merge algebra: stages, reductions, and the `Merge` they compose into.

    deltas = models - base                     where the merge works on differences
    deltas = stage(deltas) ...                 each keeps the number of models
    merged = base + scale * reduce(deltas)     or reduce(models, base) itself

Everything here is a pure function of arrays. A stack of models is a tuple of equally shaped arrays rather
than one stacked array: nothing is copied to build it, sharding is kept, and loops over models unroll.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mergelab.errors import OperatorError
from mergelab.operators.arithmetic import coefficient, rounded
from mergelab.operators.in_memory import merge_trees
from mergelab.operators.measures import Measure, Sum
from mergelab.operators.region import Region

__all__ = ["Granularity", "Inputs", "Merge", "Part", "Reduction", "Stacked", "Stage", "algebraic", "chain"]

Granularity = Literal["element", "row", "column"]
BaseUse = Literal["required", "optional", "as_input"]
Known = tuple[Any, ...]
Arrays = tuple[jax.Array, ...]
T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def algebraic(cls: type[T]) -> type[T]:
    """Class decorator: a frozen dataclass that is also a pytree.

    Fields are hyper-parameters (leaves: traced, differentiable, vmappable) unless declared with
    `dataclasses.field(metadata={"static": True})`.
    """
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


class Part:
    """What stages and reductions share: the measures they need, and the blocks they can work on.

    Attributes:
        granularity: `element` if any flat piece of a tensor will do, `row` if a block must hold whole rows
            (the last axis), `column` if it must keep the first axis whole rows apart (`[first, rest]`).
        per_model: the fields that hold one value for all models, or a sequence of one value per model.
    """

    granularity: ClassVar[Granularity] = "element"
    per_model: ClassVar[tuple[str, ...]] = ()

    def measures(self) -> tuple[Measure, ...]:
        """What must be known of the whole tensor, in order; later ones may use earlier ones."""
        return ()

    @property
    def grain(self) -> Granularity:
        """The granularity of this instance."""
        return self.granularity

    def check_models(self, models: int, operator: str) -> None:
        """Checks that every per-model field holds one value, or as many as there are models.

        Raises:
            OperatorError: it holds another number of values.
        """
        for field in self.per_model:
            values = getattr(self, field)
            one_for_all = not isinstance(values, list | tuple) and jnp.ndim(values) == 0
            if not one_for_all and len(values) != models:
                raise OperatorError(
                    f"{operator}: parameter {field!r} has {len(values)} value(s) for {models} model(s), "
                    "the base not counted; give one per model, in their order, or a single number for all."
                )

    def check(self, known: Known, name: str) -> None:
        """Called once all measures of tensor `name` are known and concrete.

        Raises:
            OperatorError: the measures leave the part without a meaningful result.
        """


class Stage(Part):
    """Maps the models' arrays to as many arrays: trimming, dropping, electing signs, ..."""

    def apply(self, xs: Arrays, base: jax.Array | None, region: Region, known: Known) -> Arrays:
        """Acts on one block: `[*block]` float32 per model; `known` holds the measures' results."""
        raise NotImplementedError


class Reduction(Part):
    """Maps the models' arrays to one array: a sum, a mean, a point on a sphere, ...

    Attributes:
        transparent: whether a NaN or infinity in any input always shows in the output, so that looking at
            the output is enough to find it.
    """

    transparent: ClassVar[bool] = False

    def apply(self, xs: Arrays, base: jax.Array | None, region: Region, known: Known) -> jax.Array:
        """Acts on one block: `[*block]` float32 per model to `[*block]`."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a merge takes: declared by named operators, checked before anything is computed.

    Attributes:
        operator: the operator's name, for messages.
        base: `required`, `optional`, or `as_input` (a base is one more ordinary model).
        min_models, max_models: how many models besides the base (`max_models` None: any number).
    """

    operator: str = "this merge"
    base: BaseUse = "optional"
    min_models: int = 1
    max_models: int | None = None

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


@algebraic
class Stacked:
    """The same block of all models in one array `[models, *block]`, the base last if `with_base`.

    Handing one array to the device costs a fraction of handing over one per model.
    """

    array: Any
    with_base: bool = dataclasses.field(metadata={"static": True})

    def arrays(self) -> tuple[Arrays, jax.Array | None]:
        """The models' arrays, and the base's."""
        every = tuple(self.array[i] for i in range(self.array.shape[0]))
        return (every[:-1], every[-1]) if self.with_base else (every, None)


@algebraic
class Merge:
    """A merge: stages, then a reduction; call it on models.

    Attributes:
        stages: applied in order.
        reduce: the reduction.
        scale: lambda, the factor on the reduced delta (used when `deltas`).
        deltas: whether models enter as differences from the base (if there is one), which is added back
            at the end.
        inputs: how many models, and whether a base.
    """

    stages: tuple[Stage, ...]
    reduce: Reduction
    scale: ArrayLike = 1.0
    deltas: bool = dataclasses.field(default=True, metadata={"static": True})
    inputs: Inputs = dataclasses.field(default=Inputs(), metadata={"static": True})

    @property
    def parts(self) -> tuple[Part, ...]:
        return (*self.stages, self.reduce)

    @property
    def grain(self) -> Granularity:
        """The coarsest granularity among the parts."""
        grains = {part.grain for part in self.parts}
        return "column" if "column" in grains else "row" if "row" in grains else "element"

    @property
    def transparent(self) -> bool:
        """Whether a NaN or infinity in any input always shows in the output."""
        return not self.stages and self.reduce.transparent

    def steps(self) -> tuple[tuple[int, int, Measure], ...]:
        """All measures in the order they can be taken: (part, measure, declaration)."""
        return tuple((p, m, d) for p, part in enumerate(self.parts) for m, d in enumerate(part.measures()))

    def check(self, models: int, has_base: bool) -> None:
        """Checks the number of models, the presence of a base, and the number of per-model values.

        Raises:
            OperatorError: they are not what the merge takes.
        """
        self.inputs.check(models, has_base)
        for part in self.parts:
            part.check_models(models, self.inputs.operator)

    def __call__(self, models: Sequence[Any], base: Any = None, *, seed: int = 0, dtype: Any = None) -> Any:
        """Merges pytrees of arrays: on one device, sharded, or under `jit`, `vmap` and `grad`.

        Args:
            models: one pytree per model, equal in structure and shapes.
            base: the base model's pytree, where the operator uses one.
            seed: seeds the random draws, which also depend on tensor names and model order.
            dtype: the dtype of the result; by default each tensor's promoted input dtype.

        Returns:
            A pytree of the models' structure. Computed in float32; non-float leaves are copied.

        Raises:
            OperatorError: structures or shapes differ, a needed base is missing, or a non-float leaf differs
                between models.
        """
        return merge_trees(self, models, base, seed=seed, dtype=dtype)


def _upto(
    merge: Merge, values: Arrays | Stacked, base: jax.Array | None, region: Region, known: Known, stop: int
) -> Any:
    """Runs the merge up to (not including) part `stop`: the arrays that part sees, and the base."""
    if isinstance(values, Stacked):
        values, base = values.arrays()
    wide = jax.numpy.float32
    base = None if base is None else base.astype(wide)
    xs = tuple(v.astype(wide) for v in values)
    if merge.deltas and base is not None:
        # Unrounded differences keep XLA's CPU backend from vectorising the sums over them (10 x slower).
        xs = tuple(rounded(x - base) for x in xs)
    for stage, results in zip(merge.stages[:stop], known, strict=False):
        xs = stage.apply(xs, base, region, results)
    return xs, base


@partial(jax.jit, static_argnames=("part", "measure"))
def measure_block(
    merge: Merge,
    values: Arrays | Stacked,
    base: jax.Array | None,
    region: Region,
    known: Known,
    *,
    part: int,
    measure: int,
) -> Any:
    """Evaluates one measure on one block of a tensor."""
    xs, base = _upto(merge, values, base, region, known, part)
    owner = merge.parts[part]
    return owner.measures()[measure].of(owner, xs, base, region, known[part])


@partial(jax.jit, static_argnames=("part", "measure"))
def finish_measure(merge: Merge, totals: Any, *, part: int, measure: int) -> Any:
    """Turns a `Sum`'s totals into what its part wants to know."""
    owner = merge.parts[part]
    declared = owner.measures()[measure]
    assert isinstance(declared, Sum)
    return declared.finish(owner, totals)


@partial(jax.jit, static_argnames=("dtype",))
def merge_block(
    merge: Merge,
    values: Arrays | Stacked,
    base: jax.Array | None,
    region: Region,
    known: Known,
    *,
    dtype: Any,
) -> jax.Array:
    """Merges one block: `[*block]` per model in, `[*block]` of `dtype` out."""
    xs, base = _upto(merge, values, base, region, known, len(merge.stages))
    out = merge.reduce.apply(xs, base, region, known[len(merge.stages)])
    if merge.deltas and base is not None:
        out = base + rounded(out * coefficient(merge.scale))
    return out.astype(dtype)


def chain(*parts: Stage | Reduction, scale: ArrayLike = 1.0, deltas: bool = True) -> Merge:
    """Composes stages and one final reduction into a merge, as `optax.chain` composes updates.

    Example:
        >>> from mergelab import operators as ops
        >>> merge = ops.chain(ops.Trim(0.2), ops.ElectSign(), ops.DisjointMean())
    """
    *stages, reduce = parts
    inputs = Inputs(base="required" if deltas else "optional")
    return Merge(tuple(stages), reduce, scale, deltas, inputs)  # type: ignore[arg-type]
