"""`mergelab sae train`: from a configuration to a finished SAE."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from mergelab.checkpoints.locations import location_text
from mergelab.cli.joined import DURATION, joins_run
from mergelab.cli.options import PUSH, check_push_option, push_output
from mergelab.cli.output import count_bar
from mergelab.cli.verbosity import warn

__all__ = ["command"]


@click.command("train")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="New folder for the run.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Setting that overrides CONFIG; repeatable.",
)
@click.option(
    "--resume", is_flag=True,
    help="Resume a run that was interrupted; with --set train.tokens=MORE make it longer, finished or not.",
)  # fmt: skip
@click.option(
    "--from", "start_from", metavar="SAE",
    help="SAE to start from (fine-tuning), of any readable format (default: from random parameters).",
)  # fmt: skip
@click.option(
    "--grace", type=DURATION, default="60s", show_default=True,
    help="Time after SIGTERM within which a checkpoint is written; then the run is ended.",
)  # fmt: skip
@PUSH
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@joins_run
def command(
    config: Path,
    out: Path,
    overrides: tuple[str, ...],
    resume: bool,
    start_from: str | None,
    grace: float,
    push_to: str | None,
    as_json: bool,
) -> None:
    """Train a sparse autoencoder from the YAML file CONFIG.

    OUT/final gets the SAE (cfg.json, sae.safetensors), OUT/metrics.jsonl the metrics,
    OUT/checkpoints what --resume continues from. A run that was killed and resumed produces the
    same bytes as one that was not.

    \b
    Examples:
      mergelab sae train configs/sae/toy.yaml --out toy
      mergelab sae train sae.yaml --out run --set train.lr=1e-3 --set sae.k=64
      mergelab sae train sae.yaml --out run --resume
      mergelab sae train sae.yaml --out run --resume --set train.tokens=200000000
      mergelab sae train sae.yaml --out tuned --from run --set train.lr=1e-4
    """
    check_push_option(push_to, out)
    from mergelab.sae.training import train

    if start_from is not None:
        overrides = (*overrides, f"start_from={json.dumps(start_from)}")

    spliced: dict[str, Any] = {}  # of the last step at which the model's losses were taken

    with count_bar("step", quiet=as_json) as bar:

        def progress(done: int, total: int, metrics: Mapping[str, float]) -> None:
            bar.total = total
            if "delta_ce" in metrics:
                spliced["delta_ce"] = f"{metrics['delta_ce']:.3f}"
            bar.set_postfix(
                loss=f"{metrics['loss']:.4f}",
                nmse=f"{metrics['nmse']:.4f}",
                dead=f"{metrics['dead_fraction']:.1%}",
                **spliced,
                tok_s=f"{metrics['tokens_per_second']:,.0f}",
                refresh=False,
            )
            bar.update(done - bar.n)

        def notice(message: str) -> None:
            bar.clear()
            warn(message)

        def tell(line: str) -> None:
            bar.clear()
            click.echo(line, err=True)

        def reading(tokens: int) -> None:
            bar.set_description(f"{tokens:,} tokens read", refresh=False)
            bar.update(0)

        result = train(
            config,
            out,
            resume=resume,
            overrides=overrides,
            progress=progress,
            notice=notice,
            tell=None if as_json else tell,
            grace=grace,
            reading=reading,
        )
    path = location_text(result.path)
    push_output(result.path, push_to)
    if as_json:
        said: dict[str, Any] = {
            "path": path,
            "steps": result.steps,
            "metrics": result.metrics,
        }
        click.echo(json.dumps(said))
        return
    if result.resumed:
        click.echo("the run has finished before; nothing was left to train")
    last = result.metrics
    if "delta_ce" in last:
        click.echo(
            f"model loss {last['ce']:.4f}, spliced {last['ce_spliced']:.4f} (+{last['delta_ce']:.4f}): "
            f"{last.get('recovered_mean', float('nan')):.1%} recovered of what the mean costs, on held-out "
            "contexts"
        )
    click.echo(
        f"nmse {last['nmse']:.4f}  L0 {last['l0']:.1f}  dead {last['dead_fraction']:.2%}  "
        f"{last['tokens']:,.0f} tokens at {last['tokens_per_second']:,.0f} a second\n{path}"
    )
