"""`mergelab sae plan`: a training step compiled for chips that are not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergelab.aot.chips import Fit
from mergelab.cli.numbers import WholeNumber
from mergelab.cli.options import MESH, readable

if TYPE_CHECKING:
    from mergelab.sae.training.aot import StepPlan

__all__ = ["command"]


@click.command("plan")
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--topology", required=True, metavar="NAME", help="TPU slice: v5e:4x4, v5p:4x8x8; v5e is one chip."
)
@click.option("--mesh", type=MESH, help="Mesh in place of CONFIG's: data=1,latents=256.")
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
    topology: str,
    mesh: dict[str, int] | None,
    overrides: tuple[str, ...],
    d_out: int | None,
    as_json: bool,
) -> None:
    """Compile the training step of CONFIG for a TPU slice you do not need to have.

    Shows the bytes each chip needs, what the chips exchange, the operations of a step, and a lower bound of
    its time. Needs the TPU compiler, pip install 'jax[tpu]', but no TPU and no data.

    \b
    Examples:
      mergelab sae plan configs/sae/pod-16m.yaml --topology v5p:4x8x8 --mesh data=1,latents=256
      mergelab sae plan sae.yaml --topology v5e:2x4 --mesh data=2,latents=4 --set train.batch_size=4096
    """
    import dataclasses

    from mergelab.sae.training.aot import plan_step
    from mergelab.sae.training.config import load_config

    settings = load_config(config, overrides)
    plan = plan_step(settings, topology, mesh, d_out=d_out)
    if as_json:
        said = dataclasses.asdict(plan) | {"peak": plan.report.peak, "bound_seconds": plan.bound.seconds}
        click.echo(json.dumps(said, indent=2))
        return
    click.echo(_text(plan, settings.train.batch_size))


def _text(plan: StepPlan, batch_size: int) -> str:
    report, bound = plan.report, plan.bound
    axes = ",".join(f"{name}={size}" for name, size in plan.mesh.items())
    slowest = max(("compute", "memory", "network"), key=lambda part: getattr(bound, part))
    lines = [
        f"a step of {batch_size:,} tokens, {plan.parameters:,} parameters, {readable(plan.state)} of state, "
        f"on each of {report.chips} chips ({report.device}) of {plan.topology} as {axes}",
        f"  state and batch    {readable(report.arguments)}",
        f"  temporaries        {readable(report.temporaries)}",
        f"  together           {readable(report.peak)} of {readable(plan.chip.memory)}",
        f"  operations         {report.flops:.3g} floating-point",
        f"  memory traffic     {readable(report.traffic)}",
    ]
    for exchange in report.collectives:
        lines.append(f"  {exchange.kind:<18} {exchange.count} x, {readable(exchange.nbytes)} in all")
    if plan.auxiliary:
        lines.append("  (operations and traffic count AuxK as if every latent were dead)")
    return "\n".join(
        [
            *lines,
            str(Fit(report.peak, plan.chip.memory)),
            f"roofline: no step can take less than {1000 * bound.seconds:.3g} ms ({slowest}), "
            f"{batch_size / bound.seconds:,.0f} tokens a second at most; a bound, not a measurement",
            f"compiled in {report.seconds:.1f} s",
        ]
    )
