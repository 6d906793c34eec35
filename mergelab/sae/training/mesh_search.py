"""The meshes of a kind of chip that could train an SAE: the smallest that holds it, and all by time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from mergelab.aot import chip_of, device_count, slices
from mergelab.sae.training.aot import Held, StepPlan, held_bytes, plan_step, shapes_of, sharing_faults
from mergelab.sae.training.config import TrainConfig
from mergelab.sharding import shown_sizes

__all__ = ["meshes_by_time", "possible_meshes", "smallest_fit"]

_TRIES = 4
"""Meshes that are compiled, at most, to find one that fits."""

Told = Callable[[str], None]


def possible_meshes(config: TrainConfig, topology: str, d_out: int | None = None) -> list[dict[str, int]]:
    """The meshes of a slice that can share batch and latents, most axes of `data` first.

    Raises:
        SAEError: `sae.d_in` is missing, or an option is out of range.
        MeshError: no such topology.
    """
    variant, recipe, _ = shapes_of(config, d_out)
    devices = device_count(topology)
    sizes = [
        {"data": devices // latents, "latents": latents}
        for latents in range(1, devices + 1)
        if devices % latents == 0
    ]
    return [mesh for mesh in sizes if not sharing_faults(variant, recipe, mesh)]


def smallest_fit(
    config: TrainConfig,
    kind: str,
    *,
    d_out: int | None = None,
    known: StepPlan | None = None,
    most: int = 1024,
    tell: Told | None = None,
    timeout: float = 1800.0,
) -> StepPlan | None:
    """The plan on the smallest slice of a kind of chip that holds a training step.

    Arithmetic chooses on each slice the mesh that needs least of a chip, and passes over what cannot fit; the
    compiler decides.

    Args:
        config: the configuration.
        kind: kind of chip, or a slice of it.
        d_out: width of the targets, for a transcoder.
        known: plan that did not fit, whose temporaries correct the estimate.
        most: largest number of chips.
        tell: function that is told what is compiled.
        timeout: seconds after which the compiler is stopped.

    Returns:
        None where none was found: in no more than four attempts, or up to `most` chips.

    Raises:
        MergelabError: as `plan_step`.
    """
    variant, recipe, shapes = shapes_of(config, d_out)
    usable, tries = chip_of(kind).usable, 0
    factor = 1.0
    if known is not None and known.compiled and known.held.working:
        factor = min(1.0, known.report.temporaries / known.held.working)

    def needed(held: Held) -> float:
        return held.state + held.batch + factor * held.working

    for topology in slices(kind, most):
        meshes = possible_meshes(config, topology, d_out)
        if not meshes:
            continue
        sized = [(held_bytes(variant, recipe, shapes, mesh), mesh) for mesh in meshes]
        held, mesh = min(sized, key=lambda pair: needed(pair[0]))
        if needed(held) > usable:
            continue
        if tell is not None:
            tell(f"compiling for {topology} as {shown_sizes(mesh)}")
        plan = plan_step(config, topology, mesh, d_out=d_out, timeout=timeout)
        if plan.fits:
            return plan
        tries += 1
        if tries == _TRIES:
            return None
        factor = max(factor, plan.report.temporaries / plan.held.working)
    return None


def meshes_by_time(
    config: TrainConfig,
    kind: str,
    *,
    d_out: int | None = None,
    most: int = 16,
    tell: Told | None = None,
    timeout: float = 1800.0,
) -> list[StepPlan]:
    """The plans of all meshes of a kind of chip on which a training step fits, the fastest bound first.

    Args:
        config: the configuration.
        kind: kind of chip, for its usual slices, or one slice.
        d_out: width of the targets, for a transcoder.
        most: largest number of chips of a slice.
        tell: function that is told what is compiled.
        timeout: seconds after which the compiler is stopped, for each mesh.

    Raises:
        MergelabError: as `plan_step`.
    """
    found = []
    for topology, mesh in _held(config, [kind] if ":" in kind else slices(kind, most), d_out):
        if tell is not None:
            tell(f"compiling for {topology} as {shown_sizes(mesh)}")
        plan = plan_step(config, topology, mesh, d_out=d_out, timeout=timeout)
        if plan.fits:
            found.append(plan)
    return sorted(found, key=lambda plan: (plan.bound.seconds, plan.report.chips, plan.report.peak))


def _held(
    config: TrainConfig, topologies: list[str], d_out: int | None
) -> Iterator[tuple[str, Mapping[str, int]]]:
    """The meshes whose chips hold their part of state and batch."""
    variant, recipe, shapes = shapes_of(config, d_out)
    for topology in topologies:
        for mesh in possible_meshes(config, topology, d_out):
            held = held_bytes(variant, recipe, shapes, mesh)
            if held.state + held.batch <= chip_of(topology).usable:
                yield topology, mesh
