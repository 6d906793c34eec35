"""`mergelab sae plan`: a training step compiled for chips that are not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergelab.cli.numbers import WholeNumber
from mergelab.cli.options import MESH, readable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mergelab.sae.training.aot import StepPlan

__all__ = ["command"]


@click.command("plan")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--topology", metavar="NAME", help="TPU slice: v5e:4x4, v5p:4x8x8, v7x:2x2x1; v5e is one chip.")
@click.option(
    "--chips", metavar="KIND", help="Kind of chip, such as v5e, whose meshes to list by time per step."
)
@click.option(
    "--most",
    type=WholeNumber(1, 9216),
    help="Largest number of chips for --chips (default: 16), and for the smallest slice that fits (default: "
    "1024).",
)
@click.option("--mesh", type=MESH, help="Mesh in place of CONFIG's: data=1,latents=256; one may be -1.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Setting that overrides CONFIG; repeatable.",
)
@click.option("--d-out", type=WholeNumber(1), help="Width of the targets, for a transcoder.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def command(
    config: Path,
    topology: str | None,
    chips: str | None,
    most: int | None,
    mesh: dict[str, int] | None,
    overrides: tuple[str, ...],
    d_out: int | None,
    as_json: bool,
) -> None:
    """Compile the training step of CONFIG for a TPU slice you do not need to have.

    Shows the bytes each chip needs and whether they fit, what the chips exchange, the operations of a step,
    and a lower bound of its time. Where it does not fit, the smallest slice that holds it is looked for. With
    --chips, all meshes of that kind of chip are compiled and listed by their bounds. Needs the TPU compiler,
    pip install 'jax[tpu]', but no TPU and no data.

    \b
    Examples:
      mergelab sae plan configs/sae/pod-16m.yaml --topology v5p:4x8x8 --mesh data=1,latents=256
      mergelab sae plan sae.yaml --topology v5e:2x4 --mesh data=2,latents=-1 --set train.batch_size=4096
      mergelab sae plan sae.yaml --chips v5e
      mergelab sae plan sae.yaml --chips v6e:4x4
    """
    if (topology is None) == (chips is None):
        raise click.UsageError(
            "say for which chips: --topology v5e:4x4 plans one mesh, --chips v5e lists all of them"
        )
    if chips is not None and mesh is not None:
        raise click.UsageError("--chips lists all meshes and takes no --mesh; give --topology with it")
    from mergelab.sae.training.aot import plan_step
    from mergelab.sae.training.config import load_config
    from mergelab.sae.training.mesh_search import meshes_by_time, smallest_fit

    def tell(line: str) -> None:
        click.echo(line, err=True)

    settings = load_config(config, overrides)
    batch_size = settings.train.batch_size
    if chips is not None:
        plans = meshes_by_time(settings, chips, d_out=d_out, most=most or 16, tell=tell)
        if as_json:
            click.echo(json.dumps({"meshes": [_plain(plan) for plan in plans]}, indent=2))
        else:
            click.echo(_table(plans, batch_size, chips, most or 16))
        return
    assert topology is not None
    plan = plan_step(settings, topology, mesh, d_out=d_out)
    smallest = None
    if not plan.fits:
        smallest = smallest_fit(settings, topology, d_out=d_out, known=plan, most=most or 1024, tell=tell)
    if as_json:
        said = _plain(plan) | ({} if plan.fits else {"smallest": smallest and _plain(smallest)})
        click.echo(json.dumps(said, indent=2))
        return
    click.echo(_text(plan, batch_size))
    if not plan.fits:
        click.echo(_instead(plan, smallest, most or 1024))


def _plain(plan: StepPlan) -> dict[str, Any]:
    import dataclasses

    return dataclasses.asdict(plan) | {
        "peak": plan.report.peak,
        "fits": plan.fits,
        "bound_seconds": plan.bound.seconds,
    }


def _gb(count: float) -> str:
    """Memory as vendors count it, as in `Fit`."""
    return f"{count / 2**30:.3g} GB"


def _text(plan: StepPlan, batch_size: int) -> str:
    from mergelab.sharding import shown_sizes

    report, bound, held = plan.report, plan.bound, plan.held
    temporaries = _gb(report.temporaries) if plan.compiled else "not compiled: no room for them"
    lines = [
        f"a step of {batch_size:,} tokens, {plan.parameters:,} parameters, {readable(plan.state)} of state, "
        f"on each of {report.chips} chips ({report.device}) of {plan.topology} as {shown_sizes(plan.mesh)}",
        f"  state              {_gb(held.state)}",
        f"  batch              {_gb(held.batch)}",
        f"  temporaries        {temporaries}",
        f"  together           {_gb(report.peak)} of {_gb(plan.chip.memory)}",
    ]
    if not plan.fits:
        return "\n".join([*lines, str(plan.fit)])
    lines += [
        f"  operations         {report.flops:.3g} floating-point{_precision(plan)}",
        f"  memory traffic     {readable(report.traffic)}",
    ]
    for exchange in report.collectives:
        lines.append(f"  {exchange.kind:<18} {exchange.count} x, {readable(exchange.nbytes)} in all")
    if plan.auxiliary:
        lines.append("  (operations and traffic count AuxK as if every latent were dead)")
    return "\n".join(
        [
            *lines,
            str(plan.fit),
            f"roofline: no step can take less than {1000 * bound.seconds:.3g} ms ({_slowest(plan)}), "
            f"{batch_size / bound.seconds:,.0f} tokens a second at most; a bound, not a measurement",
            f"compiled in {report.seconds:.1f} s",
        ]
    )


def _precision(plan: StepPlan) -> str:
    """How products of float32 are counted: a chip multiplies bfloat16 numbers."""
    report = plan.report
    if not report.float32:
        return ""
    passes = (report.passes - 1 + report.float32) / report.float32
    exact = report.flops * (1 - report.float32 + 6 * report.float32) / plan.chip.flops
    how = (
        "JAX's default precision, which rounds them"
        if passes < 1.5
        else "as jax_default_matmul_precision says"
    )
    more = f"; to full float32 precision, in 6, {1000 * exact:.3g} ms" if passes < 5.5 else ""
    return f", of products {report.float32:.0%} float32 in {passes:.2g} bfloat16 pass each ({how}{more})"


def _slowest(plan: StepPlan) -> str:
    return max(("compute", "memory", "network"), key=lambda part: getattr(plan.bound, part))


def _instead(plan: StepPlan, smallest: StepPlan | None, most: int) -> str:
    from mergelab.sharding import shown_sizes

    kind = plan.topology.partition(":")[0]
    if smallest is None:
        return (
            f"no slice of up to {most:,} chips of {kind} was found that holds it; take fewer latents, a "
            "smaller batch, or chips with more memory"
        )
    needed = f"{_gb(smallest.report.peak)} of {_gb(smallest.chip.memory)}"
    return (
        f"the smallest slice of {kind} that holds it: --topology {smallest.topology} --mesh "
        f"{shown_sizes(smallest.mesh)} ({needed} on each of {smallest.report.chips} chips, compiled)"
    )


def _table(plans: Sequence[StepPlan], batch_size: int, chips: str, most: int) -> str:
    from mergelab.sharding import shown_sizes

    if not plans:
        return (
            f"no mesh of {chips}, up to {most:,} chips, holds the step and can share {batch_size:,} tokens; "
            "look further with --most"
        )
    rows = [("slice", "mesh", "GB a chip", "ms a step", "tokens/s", "bound by")]
    rows += [
        (
            plan.topology,
            shown_sizes(plan.mesh),
            f"{plan.report.peak / 2**30:.3g} of {plan.chip.memory / 2**30:g}",
            f"{1000 * plan.bound.seconds:.3g}",
            f"{batch_size / plan.bound.seconds:,.0f}",
            _slowest(plan),
        )
        for plan in plans
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join([*lines, "each compiled; times are lower bounds by the chips' peaks, not measurements"])
