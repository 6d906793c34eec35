"""A training step compiled for a TPU slice you do not have: does it fit, and what does it cost at least?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mergelab.aot import Chip, ChipReport, Roofline, chip_of, compile_for_topology, is_one_chip, roofline
from mergelab.errors import SAEError
from mergelab.sae.training.config import TrainConfig, TrainingRecipe
from mergelab.sae.training.initialize import fresh_state, sample_shapes, state_shapes
from mergelab.sae.training.state import mesh_axes
from mergelab.sae.training.step import make_step
from mergelab.sae.variants import make_variant

__all__ = ["StepPlan", "lower_step", "plan_step"]


@dataclass(frozen=True)
class StepPlan:
    """What one training step takes of each chip.

    Attributes:
        topology: the slice.
        mesh: the sizes of its axes.
        parameters: number of parameters of the SAE, over all chips.
        state: bytes of the training state over all chips: parameters, Adam's moments, the moving average.
        report: the compiled step.
        auxiliary: whether AuxK is part of the step: the compiler counts it as if every latent were dead.
        chip: the chip's figures.
        bound: the least time of a step, from the compiler's counts and the chip's peaks.
    """

    topology: str
    mesh: Mapping[str, int]
    parameters: int
    state: int
    auxiliary: bool
    report: ChipReport
    chip: Chip
    bound: Roofline


def plan_step(
    config: TrainConfig,
    topology: str,
    mesh: Mapping[str, int] | None = None,
    *,
    d_out: int | None = None,
    timeout: float = 1800.0,
) -> StepPlan:
    """Compiles the training step of a configuration for a TPU topology; needs no TPU and no data.

    It proves that the step compiles and fits, and counts operations, traffic and exchanges; what it says of
    time is a lower bound, never a measurement.

    Args:
        config: the configuration; `sae.d_in` must be given, since no data is opened.
        topology: TPU slice, such as `v5p:4x8x8`.
        mesh: sizes of the axes `data` and `latents`; by default the configuration's.
        d_out: width of the targets, for a transcoder.
        timeout: seconds after which the compiler is stopped.

    Raises:
        SAEError: the configuration does not say what is needed.
        DependencyError: the TPU compiler is not installed.
        MeshError: no such topology, a mesh that does not fit it, or a step that does not fit the chips.
    """
    if config.sae.d_in is None:
        raise SAEError("sae.d_in is missing: no data is opened to take it from; add it.")
    mesh = mesh or config.mesh
    if mesh is None and is_one_chip(topology):
        mesh = {"data": 1, "latents": 1}
    if mesh is None:
        raise SAEError("mesh is missing: say how the chips share the work, such as {data: 1, latents: 256}.")
    variant = config.sae.build(config.sae.d_in, d_out)
    recipe = config.train.build()
    shapes = jax.eval_shape(partial(fresh_state, variant, recipe), _key_shape(), sample_shapes(variant))
    chip = chip_of(topology)
    request = {"variant": {"name": variant.name, **asdict(variant)}, "recipe": asdict(recipe)}
    program = f"{__name__}:lower_step"
    report = compile_for_topology(program, topology, mesh, request, timeout=timeout)
    return StepPlan(
        topology=topology,
        mesh=dict(mesh),
        parameters=sum(leaf.size for leaf in shapes.params.values()),
        state=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)),
        auxiliary=variant.uses_aux_k and recipe.aux_coefficient * recipe.auxiliary_k(variant.width_out) > 0,
        report=report,
        chip=chip,
        bound=roofline(report, chip),
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
