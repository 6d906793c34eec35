"""`mergelab quickstart`: train a small model family on text of Python's own, merge it, judge the merges."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergelab.cli.numbers import Seed

if TYPE_CHECKING:
    from mergelab.quickstart.experiment import Progress
    from mergelab.quickstart.results import Results

__all__ = ["command"]


@click.command("quickstart")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("mergelab-quickstart"),
    show_default=True,
    help="Folder for models, merges, results and report.",
)
@click.option("--seed", type=Seed(0), default=0, show_default=True, help="Random seed of every step.")
@click.option(
    "--preset",
    type=click.Choice(["default", "tiny"]),
    default="default",
    show_default=True,
    help="Size of the experiment; tiny takes seconds and only shows the mechanics.",
)
@click.option("--force", is_flag=True, help="Repeat every stage, including those an earlier run completed.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON, without progress.")
def command(out: Path, seed: int, preset: str, force: bool, as_json: bool) -> None:
    """Train a small model family, merge it, and see which merges help.

    Needs no network and no accelerator: the text ships with Python. Trains a base model and three
    specialists, merges them with the recipes of configs/quickstart, and scores every model on held-out text.
    Results of an earlier run with the same settings are reused.

    \b
    Examples:
      mergelab quickstart
      mergelab quickstart --preset tiny --out /tmp/try
      mergelab quickstart --seed 1 --out seed-1 --json
    """
    from mergelab.quickstart.experiment import run
    from mergelab.quickstart.presets import PRESETS

    with _progress(quiet=as_json) as on_progress:
        results = run(out, PRESETS[preset], seed=seed, force=force, on_progress=on_progress)
    _write_report(results, out)
    if as_json:
        click.echo(json.dumps(results.to_dict(), indent=2))
    else:
        click.echo(_summary(results, out))


def _write_report(results: Results, out: Path) -> None:
    from mergelab.checkpoints.publish import publish_file
    from mergelab.report.comparison import save_figure
    from mergelab.report.pages import render_page

    save_figure(results, out)
    names = [score.name for score in results.scores if score.kind == "merge"]
    recipes = {name: (out / "recipes" / f"{name}.yaml").read_text(encoding="utf-8") for name in names}
    page = render_page(results, "mergelab quickstart", recipes)
    publish_file(out / "report.html", page.encode())


def _summary(results: Results, out: Path) -> str:
    from mergelab.report.comparison import cells
    from mergelab.report.tables import text_table

    header, rows = cells(results)
    first_merge = 1 + len(results.domains)
    return "\n".join(
        [
            "Bits per byte of held-out text: lower is better, * is the best of a column.",
            "`keeps` is the part of a specialist's gain over the base that a merge retains.",
            "",
            text_table(header, rows, rules_before=(1, first_merge)),
            "",
            *results.verdict,
            "",
            _features(results),
            "",
            f"report   {out / 'report.html'}",
            f"figure   {out / 'figure.png'}",
            f"numbers  {out / 'results.json'}",
            f"models   {out / 'models'}, {out / 'merges'}, {out / 'sae' / 'final'}",
        ]
    )


def _features(results: Results) -> str:
    figures = results.features["figures"]
    return (
        f"A sparse autoencoder of {figures['latents']} latents on {figures['site']} of the base model leaves "
        f"{figures['nmse']:.1%} of the variance of held-out activations unexplained with {figures['l0']:.0f} "
        f"latents a token;\nthe report shows {len(results.features['latents'])} of them in the text."
    )


@contextmanager
def _progress(quiet: bool) -> Iterator[Progress]:
    """Shows one bar per kind of stage on stderr; stages that were done before show none."""
    from tqdm import tqdm

    bars: dict[str, tqdm] = {}

    def on_progress(stage: str, done: int, total: int) -> None:
        if stage not in bars:
            for bar in bars.values():
                bar.close()
            bars[stage] = tqdm(desc=f"{stage:<12}", total=total, file=sys.stderr, disable=quiet, leave=True)
        bars[stage].update(done - bars[stage].n)

    try:
        yield on_progress
    finally:
        for bar in bars.values():
            bar.close()
