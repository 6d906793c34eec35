"""The merge algebra: stages, reductions, and the `Formula` they compose into, evaluated block by block.

    deltas = models - base                     where the merge works on differences
    deltas = stage(deltas) ...                 each keeps the number of models
    merged = base + scale * reduce(deltas)     or reduce(models, base) itself

Everything here is a pure function of arrays. A stack of models is a tuple of equally shaped arrays rather
than one stacked array: nothing is copied to build it, sharding is kept, and loops over models unroll.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, ClassVar, Literal, Self, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mergelab.compat import register_dataclass
from mergelab.errors import OperatorError
from mergelab.operators.arithmetic import coefficient, rounded
from mergelab.operators.measures import Measure, Sum
from mergelab.operators.region import Region, TensorInfo

__all__ = [
    "Formula",
    "Granularity",
    "Part",
    "Reduction",
    "Stacked",
    "Stage",
    "algebraic",
    "finish_measure",
    "measure_block",
    "merge_block",
]

Granularity = Literal["element", "row", "column", "tensor"]
Known = tuple[Any, ...]
Arrays = tuple[jax.Array, ...]
T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def algebraic(cls: type[T]) -> type[T]:
    """Class decorator: a frozen dataclass that is also a pytree.

    Fields are hyper-parameters (leaves: traced, differentiable, vmappable) unless declared with
    `dataclasses.field(metadata={"static": True})`.
    """
    return register_dataclass(dataclasses.dataclass(frozen=True)(cls))


class Part:
    """What stages and reductions share: the measures they need, and the blocks they can work on.

    Attributes:
        granularity: `element` if any flat piece of a tensor will do, `row` if a block must hold whole rows
            (the last axis), `column` if it must keep the first axis whole rows apart (`[first, rest]`),
            `tensor` if the block must be the whole tensor, unpadded and in its true shape. Such a part is
            run with 64-bit types enabled wherever no user's transformation is: it may compute in
            `region.wide`.
        per_model: the fields that hold one value for all models, or a sequence of one value per model.
        turned: whether a matrix is transposed for the part, whose `workspace` then counts with its transpose.
    """

    granularity: ClassVar[Granularity] = "element"
    per_model: ClassVar[tuple[str, ...]] = ()
    turned: bool = False

    def measures(self) -> tuple[Measure, ...]:
        """What must be known of the whole tensor, in order; later ones may use earlier ones."""
        return ()

    @property
    def grain(self) -> Granularity:
        """The granularity of this instance."""
        return self.granularity

    def at(self, tensor: TensorInfo) -> Self:
        """The part as it acts on one tensor, with the same measures; asked once per tensor, outside of jit.

        What a part notes of the tensor in static fields, such as "it is a matrix", makes one compiled program
        for each value, so it should note no more than it needs, and never the name.
        """
        return self

    def workspace(self, shape: tuple[int, ...], models: int) -> int:
        """Bytes a part of grain `tensor` holds at its peak besides its inputs and output in float32.

        The plan's memory estimate and the runner, which admits tensors to its budget, count with them.
        """
        return 0

    def check_models(self, models: int, operator: str) -> None:
        """Checks that every per-model field holds one value, or as many as there are models.

        Raises:
            OperatorError: it holds another number of values.
        """
        for field in self.per_model:
            values = getattr(self, field)
            if values is None:
                continue
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
class Formula:
    """What is computed for every tensor: stages, then a reduction.

    Attributes:
        stages: applied in order.
        reduce: the reduction.
        scale: lambda, the factor on the reduced delta (used when `deltas`).
        deltas: whether models enter as differences from the base (if there is one), which is added back
            at the end.
    """

    stages: tuple[Stage, ...]
    reduce: Reduction
    scale: ArrayLike = 1.0
    deltas: bool = dataclasses.field(default=True, metadata={"static": True})

    @property
    def parts(self) -> tuple[Part, ...]:
        return (*self.stages, self.reduce)

    @property
    def grain(self) -> Granularity:
        """The coarsest granularity among the parts."""
        grains = {part.grain for part in self.parts}
        coarse: tuple[Granularity, ...] = ("tensor", "column", "row")
        for grain in coarse:
            if grain in grains:
                return grain
        return "element"

    def at(self, tensor: TensorInfo) -> Self:
        """The formula as it acts on one tensor."""
        stages, reduce = tuple(stage.at(tensor) for stage in self.stages), self.reduce.at(tensor)
        return dataclasses.replace(self, stages=stages, reduce=reduce)

    def workspace(self, shape: tuple[int, ...], models: int) -> int:
        """Bytes that the most demanding part holds at its peak."""
        return max(part.workspace(shape[::-1] if part.turned else shape, models) for part in self.parts)

    @property
    def transparent(self) -> bool:
        """Whether a NaN or infinity in any input always shows in the output."""
        return not self.stages and self.reduce.transparent

    def steps(self) -> tuple[tuple[int, int, Measure], ...]:
        """All measures in the order they can be taken: (part, measure, declaration)."""
        return tuple((p, m, d) for p, part in enumerate(self.parts) for m, d in enumerate(part.measures()))


def _upto(
    formula: Formula,
    values: Arrays | Stacked,
    base: jax.Array | None,
    region: Region,
    known: Known,
    stop: int,
) -> Any:
    """Runs the formula up to (not including) part `stop`: the arrays that part sees, and the base."""
    if isinstance(values, Stacked):
        values, base = values.arrays()
    wide = jax.numpy.float32
    base = None if base is None else base.astype(wide)
    xs = tuple(v.astype(wide) for v in values)
    if formula.deltas and base is not None:
        # Unrounded differences keep XLA's CPU backend from vectorizing the sums over them (10 x slower).
        xs = tuple(rounded(x - base) for x in xs)
    for stage, results in zip(formula.stages[:stop], known, strict=False):
        xs = stage.apply(xs, base, region, results)
    return xs, base


@partial(jax.jit, static_argnames=("part", "measure"))
def measure_block(
    formula: Formula,
    values: Arrays | Stacked,
    base: jax.Array | None,
    region: Region,
    known: Known,
    *,
    part: int,
    measure: int,
) -> Any:
    """Evaluates one measure on one block of a tensor."""
    xs, base = _upto(formula, values, base, region, known, part)
    owner = formula.parts[part]
    return owner.measures()[measure].of(owner, xs, base, region, known[part])


@partial(jax.jit, static_argnames=("part", "measure"))
def finish_measure(formula: Formula, totals: Any, *, part: int, measure: int) -> Any:
    """Turns a `Sum`'s totals into what its part wants to know."""
    owner = formula.parts[part]
    declared = owner.measures()[measure]
    assert isinstance(declared, Sum)
    return declared.finish(owner, totals)


@partial(jax.jit, static_argnames=("dtype",))
def merge_block(
    formula: Formula,
    values: Arrays | Stacked,
    base: jax.Array | None,
    region: Region,
    known: Known,
    *,
    dtype: Any,
) -> jax.Array:
    """Merges one block: `[*block]` per model in, `[*block]` of `dtype` out."""
    xs, base = _upto(formula, values, base, region, known, len(formula.stages))
    out = formula.reduce.apply(xs, base, region, known[len(formula.stages)])
    if formula.deltas and base is not None:
        out = base + rounded(out * coefficient(formula.scale))
    return out.astype(dtype)
