"""A training step compiled for a TPU slice you do not have: does it fit, and what does it cost at least?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mergelab.aot import (
    Chip,
    ChipReport,
    Fit,
    Roofline,
    chip_kind,
    chip_of,
    compile_for_topology,
    device_count,
    is_one_chip,
    roofline,
)
from mergelab.errors import SAEError
from mergelab.sae.training.config import TrainConfig, TrainingRecipe
from mergelab.sae.training.initialize import fresh_state, sample_shapes, state_shapes
from mergelab.sae.training.state import (
    TrainState,
    batch_fault,
    latents_fault,
    mesh_axes,
    state_specs,
)
from mergelab.sae.training.step import make_step
from mergelab.sae.variants import Variant, make_variant
from mergelab.sharding import SAE_AXES, fill_sizes

__all__ = [
    "Held",
    "StepPlan",
    "held_bytes",
    "lower_step",
    "plan_step",
    "shapes_of",
    "sharing_faults",
]


@dataclass(frozen=True)
class Held:
    """What arithmetic says that one chip holds between and at the beginning of steps.

    Attributes:
        state: bytes of the training state: parameters, Adam's moments, the moving average, counters.
        batch: bytes of inputs and targets.
        working: estimate of what a step needs besides: gradients, and the pre-activations of its tokens.
    """

    state: int
    batch: int
    working: int


@dataclass(frozen=True)
class StepPlan:
    """What one training step takes of each chip.

    Attributes:
        topology: the slice.
        mesh: the sizes of its axes.
        parameters: number of parameters of the SAE, over all chips.
        state: bytes of the training state over all chips: parameters, Adam's moments, the moving average.
        auxiliary: whether AuxK is part of the step: the compiler counts it as if every latent were dead.
        held: bytes of state and batch on one chip, by arithmetic.
        compiled: whether the step was compiled; state and batch alone may be more than a chip has.
        report: the compiled step; where `held` is too much, nothing but that.
        chip: the chip's figures.
        bound: the least time of a step, from the compiler's counts and the chip's peaks; 0 where unknown.
    """

    topology: str
    mesh: Mapping[str, int]
    parameters: int
    state: int
    auxiliary: bool
    held: Held
    compiled: bool
    report: ChipReport
    chip: Chip
    bound: Roofline

    @property
    def fits(self) -> bool:
        """Whether state, batch and temporaries fit on each chip together."""
        return self.compiled and self.report.fits

    @property
    def fit(self) -> Fit:
        """What each chip needs of what it has."""
        return Fit(self.report.peak, self.chip.memory, self.chip.usable)


def plan_step(
    config: TrainConfig,
    topology: str,
    mesh: Mapping[str, int] | None = None,
    *,
    d_out: int | None = None,
    timeout: float = 1800.0,
) -> StepPlan:
    """Compiles the training step of a configuration for a TPU topology; needs no TPU and no data.

    It proves that the step compiles and fits, or that it does not fit (`StepPlan.fits`), and counts
    operations, traffic and exchanges; what it says of time is a lower bound, never a measurement. A state and
    a batch that are more than a chip has are not compiled.

    Args:
        config: the configuration; `sae.d_in` must be given, since no data is opened.
        topology: TPU slice, such as `v5p:4x8x8`.
        mesh: sizes of the axes `data` and `latents`, one of which may be -1; by default the configuration's.
        d_out: width of the targets, for a transcoder.
        timeout: seconds after which the compiler is stopped.

    Raises:
        SAEError: the configuration does not say what is needed, or the chips cannot share its batch or its
            latents.
        DependencyError: the TPU compiler is not installed.
        MeshError: no such topology, or a mesh that does not fit it.
    """
    variant, recipe, shapes = shapes_of(config, d_out)
    mesh = mesh or config.mesh
    if mesh is None and is_one_chip(topology):
        mesh = {"data": 1, "latents": 1}
    if mesh is None:
        raise SAEError("mesh is missing: say how the chips share the work, such as {data: 1, latents: 256}.")
    chip, devices = chip_of(topology), device_count(topology)
    sizes = fill_sizes(mesh, devices, axes=SAE_AXES, all_of_them=True, place=f"chips of {topology}")
    if faults := sharing_faults(variant, recipe, sizes):
        raise SAEError(faults)
    held = held_bytes(variant, recipe, shapes, sizes)
    compiled = held.state + held.batch <= chip.usable
    if compiled:
        request = {"variant": {"name": variant.name, **asdict(variant)}, "recipe": asdict(recipe)}
        program = f"{__name__}:lower_step"
        report = compile_for_topology(program, topology, sizes, request, timeout=timeout)
        if not report.fits:
            report = replace(report, arguments=held.state + held.batch)
    else:
        nothing = {"outputs": 0, "aliased": 0, "temporaries": 0, "flops": 0.0, "traffic": 0.0, "seconds": 0.0}
        report = ChipReport(
            devices, chip_kind(topology), held.state + held.batch, **nothing, collectives=(), fits=False
        )
    return StepPlan(
        topology=topology,
        mesh=sizes,
        parameters=sum(leaf.size for leaf in shapes.params.values()),
        state=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)),
        auxiliary=variant.uses_aux_k and recipe.aux_coefficient * recipe.auxiliary_k(variant.width_out) > 0,
        held=held,
        compiled=compiled,
        report=report,
        chip=chip,
        bound=roofline(report, chip),
    )


def shapes_of(config: TrainConfig, d_out: int | None) -> tuple[Variant, TrainingRecipe, TrainState]:
    """What a configuration trains, how, and the shapes of its state.

    Raises:
        SAEError: `sae.d_in` is missing, or an option is out of range.
    """
    if config.sae.d_in is None:
        raise SAEError("sae.d_in is missing: no data is opened to take it from; add it.")
    variant, recipe = config.sae.build(config.sae.d_in, d_out), config.train.build()
    shapes = jax.eval_shape(partial(fresh_state, variant, recipe), _key_shape(), sample_shapes(variant))
    return variant, recipe, shapes


def sharing_faults(variant: Variant, recipe: TrainingRecipe, sizes: Mapping[str, int]) -> list[str]:
    """Why a mesh cannot share a batch or the latents, in the sentences of the training itself."""
    data, latents = sizes.get("data", 1), sizes.get("latents", 1)
    faults = []
    if recipe.batch_size % data:
        faults.append(batch_fault(recipe.batch_size, data))
    if variant.n_latents % latents:
        faults.append(latents_fault(variant.n_latents, latents))
    return faults


def held_bytes(
    variant: Variant, recipe: TrainingRecipe, shapes: TrainState, sizes: Mapping[str, int]
) -> Held:
    """State and batch on one device of a mesh, by arithmetic."""
    data, latents = sizes.get("data", 1), sizes.get("latents", 1)
    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)  # noqa: E731
    specs = jax.tree.leaves(state_specs(shapes), is_leaf=is_spec)
    state = sum(
        leaf.size * leaf.dtype.itemsize // (latents if any(spec) else 1)
        for leaf, spec in zip(jax.tree.leaves(shapes), specs, strict=True)
    )
    tokens = recipe.batch_size // data
    gradients = 4 * sum(leaf.size for leaf in shapes.params.values()) // latents
    return Held(
        state=state,
        batch=4 * tokens * (variant.d_in + variant.width_out),
        working=gradients + 4 * tokens * variant.n_latents // latents,
    )


def lower_step(mesh: Mesh, request: Mapping[str, Any]) -> jax.stages.Lowered:
    """The training step as the compiler's process builds it from a request of `plan_step`."""
    options = {name: tuple(v) if isinstance(v, list) else v for name, v in request["variant"].items()}
    name: Any = options.pop("name")
    variant = make_variant(name, **options)
    recipe = TrainingRecipe(**request["recipe"])
    state = state_shapes(variant, recipe, mesh)
    rows = NamedSharding(mesh, PartitionSpec(mesh_axes(mesh)[0], None))
    x = jax.ShapeDtypeStruct((recipe.batch_size, variant.d_in), jnp.float32, sharding=rows)
    y = jax.ShapeDtypeStruct((recipe.batch_size, variant.width_out), jnp.float32, sharding=rows)
    return make_step(variant, recipe, mesh).lower(state, x, y)  # pyright: ignore[reportFunctionMemberAccess]


def _key_shape() -> Any:
    return jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
