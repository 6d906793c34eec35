"""`mergelab quickstart`: train a small model family on text of Python's own, merge it, judge the merges."""

from __future__ import annotations

import json
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

import click

from mergelab.cli.numbers import Seed
from mergelab.cli.verbosity import is_quiet

if TYPE_CHECKING:
    from tqdm import tqdm

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
    help="Size of the experiment; tiny takes about a minute and only shows the mechanics.",
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

    started = time.monotonic()
    silent = as_json or is_quiet()
    if not silent:
        click.echo(_announcement(out, preset, len(PRESETS[preset].recipes)), err=True)
    with _Bars(quiet=silent) as bars:
        results = run(out, PRESETS[preset], seed=seed, force=force, on_progress=bars.show)
        reused = not bars.shown
        bars.show("report", 0, 1)
        _write_report(results, out)
        bars.show("report", 1, 1)
    if as_json:
        click.echo(json.dumps(results.to_dict(), indent=2))
    else:
        if not silent:
            click.echo(_took(time.monotonic() - started, reused), err=True)
        click.echo(_summary(results, out, seed))


_TIMES = {"default": "a few minutes on two cores", "tiny": "about a minute on two cores"}


def _announcement(out: Path, preset: str, recipes: int) -> str:
    """What will happen, where it is written, and how long it takes."""
    return textwrap.fill(
        f"Trains a base model and 3 specialists, merges them by {recipes} recipes, evaluates all of them on "
        f"held-out text, and trains a sparse autoencoder. Writes to {out}; takes {_TIMES[preset]}, and no "
        "network. What an earlier run has done is kept.",
        80,
    )


def _took(seconds: float, reused: bool) -> str:
    if reused:
        return "Nothing was left to do: these are the results of an earlier run (--force repeats it)."
    return f"Done in {seconds / 60:.1f} minutes." if seconds >= 90 else f"Done in {seconds:.0f} seconds."


def _write_report(results: Results, out: Path) -> None:
    from mergelab.checkpoints.publish import publish_file
    from mergelab.report.comparison import figure_files
    from mergelab.report.pages import render_page

    for name, content in figure_files(results).items():
        publish_file(out / name, content)
    names = [score.name for score in results.scores if score.kind == "merge"]
    recipes = {name: (out / "recipes" / f"{name}.yaml").read_text(encoding="utf-8") for name in names}
    page = render_page(results, "mergelab quickstart", recipes)
    publish_file(out / "report.html", page.encode())


def _summary(results: Results, out: Path, seed: int) -> str:
    from mergelab.report.comparison import kept_cells, score_cells
    from mergelab.report.tables import text_table

    header, rows = score_cells(results)
    first_merge = 1 + len(results.domains)
    best = min((s for s in results.scores if s.kind == "merge"), key=lambda s: s.mean).name
    base = out / "models" / "base"
    commands = [
        f"mergelab generate {out / 'merges' / best} --prompt 'def '",
        f"mergelab evaluate {base} {out / 'merges' / best} --text {out / 'held-out.txt'}",
        f"mergelab sae features {out / 'sae'} --model {base} "
        f"--text {out / 'held-out.txt'} --out features.html",
    ]
    paragraphs = [
        *results.verdict,
        _features(results),
        f"One seed ({seed}): intervals are over held-out documents, drawn anew (the same for a model and "
        f"the base), not over trained models. Repeat it with --seed {seed + 1} before you believe a small "
        "difference.",
    ]
    return "\n".join(
        [
            "Bits per byte of held-out text: lower is better, * is the best of a column.",
            "",
            text_table(header, rows, rules_before=(1, first_merge)),
            "",
            "100 % is as good as the specialist on its domain, 0 % as good as the base:",
            "",
            text_table(*kept_cells(results)),
            "",
            *(line for paragraph in paragraphs for line in [textwrap.fill(paragraph, 80), ""]),
            f"report   {out / 'report.html'}",
            f"figure   {out / 'figure.png'}",
            f"numbers  {out / 'results.json'}",
            f"models   {out / 'models'}, {out / 'merges'}, {out / 'sae'}",
            "",
            "Try next:",
            *(f"  {command}" for command in commands),
        ]
    )


def _features(results: Results) -> str:
    figures = results.features["figures"]
    return (
        f"A sparse autoencoder of {figures['latents']} latents on {figures['site']} of the base model leaves "
        f"{figures['nmse']:.1%} of the variance of held-out activations unexplained with {figures['l0']:.0f} "
        f"latents a token; the report shows {len(results.features['latents'])} of them in the text."
    )


class _Bars:
    """One bar for each stage, on stderr; it is closed when the stage ends, so that none stands at 100 %."""

    def __init__(self, quiet: bool) -> None:
        self.shown: list[str] = []
        self._quiet = quiet
        self._bar: tqdm | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def show(self, stage: str, done: int, total: int) -> None:
        """Moves the bar of a stage, or begins it."""
        from tqdm import tqdm

        if stage not in self.shown:
            self._close()
            self.shown.append(stage)
            self._bar = tqdm(
                desc=f"{stage:<12}", total=total, file=sys.stderr, disable=self._quiet, leave=True
            )
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
            if done >= total:
                self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None
