"""`mergelab sae eval`: how good dictionaries are, on stored activations or on their model and a text."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergelab.cli.meshes import MESH
from mergelab.cli.numbers import Seed, WholeNumber

if TYPE_CHECKING:
    from mergelab.sae.evaluation.scorecard import Scorecard

__all__ = ["command"]


@click.command("eval")
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="SOURCE...")
@click.option("--data", multiple=True, metavar="FILES", help="Activations [tokens, d]; a glob.")
@click.option("--rows", type=WholeNumber(1), help="With --data: so many rows, from the start.")
@click.option("--batch", type=WholeNumber(1), default=4096, show_default=True, help="With --data: at a time.")
@click.option("--model", type=click.Path(path_type=Path), help="The folder of the dictionary's model.")
@click.option(
    "--text", "texts", multiple=True, type=click.Path(path_type=Path), help="Repeatable; .py is Python."
)
@click.option("--site", help="Such as blocks.8.resid_post; what the dictionary says, if not given.")
@click.option("--context", type=WholeNumber(2), default=64, show_default=True, help="Tokens in a context.")
@click.option(
    "--metrics",
    metavar="A,B",
    help="Of: reconstruction, downstream, embeddings, probing, absorption, sparsity, explanations, "
    "progressive. All that apply, if not given.",
)
@click.option(
    "--controls", is_flag=True, help="Also judge a random, a frozen-decoder and a random-model one."
)
@click.option(
    "--control-steps", type=WholeNumber(1), default=500, show_default=True, help="Of their training."
)
@click.option(
    "--curve",
    type=click.Path(path_type=Path),
    help="Of the model's training: a folder with checkpoints in folders named by their step, or JSON "
    "[[step, loss], ...].",
)
@click.option(
    "--keep",
    type=click.Path(path_type=Path),
    help="Scores go into this file, and are taken from it if known.",
)
@click.option("--mesh", type=MESH, metavar="AXES", help="Spread the model over devices: tensor=8.")
@click.option("--any-model", is_flag=True, help="Accept a model other than the recorded one.")
@click.option("--seed", type=Seed(0), default=0, show_default=True, help="Of everything drawn.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def command(sources: tuple[Path, ...], as_json: bool, **options: Any) -> None:
    """Judge dictionaries on activations or text they were not trained on.

    With --data, one dictionary's reconstruction and sparsity. With --model and --text, all that
    docs/sae_evaluation.md describes; the first half of the text fits what must be fitted, and the second
    judges. Several SOURCEs are seeds of one training: mean and standard deviation are shown.

    \b
    Examples:
      mergelab sae eval run --data 'held-out/*.npy'
      mergelab sae eval run --model model --text held-out.py --controls
      mergelab sae eval seed0 seed1 seed2 --model model --text a.txt --metrics downstream --json
    """
    if bool(options["data"]) == bool(options["model"] and options["texts"]):
        raise click.UsageError("give either --data, or both --model and --text.")
    if options["data"]:
        source, *others = sources
        if others:
            raise click.UsageError("--data judges one SOURCE; with --model and --text there may be several.")
        _print_figures(_on_files(source, options), as_json)
        return
    columns, seconds, checked = _on_text(sources, options, quiet=as_json)
    if as_json:
        found = {
            name: {
                part: {**vars(score), "value": _number(score.value)} for part, score in card.scores.items()
            }
            for name, card in columns.items()
        }
        click.echo(json.dumps({"dictionaries": found, "seconds": seconds, "host_checked": checked}))
        return
    click.echo(_table(columns, [str(source) for source in sources]))
    if not checked:
        click.echo("The dictionary does not say which weights it belongs to, or they are others.")


def _on_files(source: Path, options: Mapping[str, Any]) -> dict[str, float]:
    """Reconstruction on stored activations."""
    import jax.numpy as jnp
    import numpy as np

    from mergelab.cli.sae_folder import open_dictionary
    from mergelab.data.activations import open_activation_files
    from mergelab.errors import SAEError
    from mergelab.sae.evaluation.passes import encode_and_reconstruct
    from mergelab.sae.evaluation.reconstruction import Totals

    dictionary = open_dictionary(source)
    files = open_activation_files(list(options["data"]))
    if files.d_in != dictionary.d_in or dictionary.d_in != dictionary.d_out:
        raise SAEError(
            f"{source}: the dictionary maps {dictionary.d_in} to {dictionary.d_out} wide activations, "
            f"but the data is {files.d_in} wide; give activations of the site it was trained on."
        )
    totals, batch = None, options["batch"]
    count = min(options["rows"] or files.rows, files.rows)
    for start in range(0, count, batch):
        x = files.read(start, min(start + batch, count))
        codes, out = encode_and_reconstruct(dictionary, jnp.asarray(x))
        totals = totals or Totals.zero(x, dictionary.n_latents)
        totals = totals.add(x, np.asarray(out), np.asarray(codes))
    assert totals is not None
    return totals.result().scalars()


def _number(value: float) -> float | None:
    """JSON knows no NaN: what could not be had is null."""
    return value if math.isfinite(value) else None


def _print_figures(figures: Mapping[str, float], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(figures))
        return
    for name, value in figures.items():
        click.echo(f"{name.replace('_', ' '):20} {value:,.6g}")


def _on_text(
    sources: tuple[Path, ...], options: Mapping[str, Any], *, quiet: bool
) -> tuple[dict[str, Scorecard], dict[str, float], bool]:
    """Scorecards by source and control, seconds by metric of the first, and whether all hosts agree."""
    from tqdm import tqdm

    from mergelab.checkpoints.digest import weights_sha256
    from mergelab.cli.sae_folder import open_dictionary
    from mergelab.data.tokenizer import load_tokenizer
    from mergelab.sae.evaluation.controls import CONTROLS
    from mergelab.sae.evaluation.host import check_host, check_reads, open_host
    from mergelab.sae.evaluation.journal import Journal, evaluation_key
    from mergelab.sae.evaluation.probing_tasks import label_texts
    from mergelab.sae.evaluation.scorecard import control_scorecard, scorecard
    from mergelab.sharding import make_mesh

    model, texts, length = options["model"], options["texts"], options["context"]
    mesh = None if options["mesh"] is None else make_mesh(options["mesh"])
    opened = [open_dictionary(source) for source in sources]
    first = opened[0]
    host = open_host(
        first, model, texts, site=options["site"], length=length, any_model=options["any_model"], mesh=mesh
    )
    checked = [check_host(one, model, any_model=options["any_model"]) for one in opened]
    for one in opened:
        check_reads(one, host)
    asked = None if options["metrics"] is None else [name.strip() for name in options["metrics"].split(",")]
    labels = label_texts(model, texts, length).labels
    common: dict[str, Any] = {
        "metrics": asked,
        "labels": labels,
        "mask_token": load_tokenizer(model).mask_id,
        "seed": options["seed"],
    }
    curve = _curve(options["curve"], host, mesh)
    weights = weights_sha256(model) if options["keep"] else ""

    def memory(dictionary: Any, *settings: Any) -> Any:
        if options["keep"] is None:
            return None
        key = evaluation_key(
            dictionary, host, labels, weights, options["seed"], options["curve"] and curve, *settings
        )
        return Journal(options["keep"], key)

    columns: dict[str, Scorecard] = {}
    with tqdm(unit="metric", disable=quiet or None, dynamic_ncols=True) as bar:

        def progress(metric: str) -> None:
            bar.set_description(metric)
            bar.update()

        for source, one in zip(sources, opened, strict=True):
            columns[str(source)] = scorecard(
                one, host, curve=curve, progress=progress, memory=memory(one), **common
            )
        for kind in CONTROLS if options["controls"] else ():
            bar.set_description(kind)
            k = first.config.k or _active(first, host)
            steps = options["control_steps"]
            kept = memory(first, kind, k, steps)
            columns[kind] = control_scorecard(kind, first, host, k=k, steps=steps, memory=kept, **common)
    return columns, dict(columns[str(sources[0])].seconds), all(checked)


def _active(dictionary: Any, host: Any) -> int:
    from mergelab.sae.evaluation.summary import reconstruction_on_model

    found = reconstruction_on_model(dictionary, host, contexts=host.batch)
    return max(1, min(round(found.l0), dictionary.n_latents))


def _curve(path: Path | None, host: Any, mesh: Any) -> tuple[Any, Any] | None:
    import numpy as np

    from mergelab.checkpoints.json_data import read_json
    from mergelab.errors import MergelabError, SAEError
    from mergelab.sae.evaluation.curve import loss_curve
    from mergelab.sae.evaluation.scorecard import halves

    if path is None:
        return None
    if path.is_dir():
        return loss_curve(path, halves(host)[1], mesh=mesh)
    try:
        points = np.array(read_json(path), np.float64)
    except (MergelabError, ValueError, TypeError, OverflowError) as error:
        raise SAEError(
            f"{path}: no curve can be read ({error}); expected JSON [[step, loss], ...]."
        ) from error
    if points.ndim != 2 or points.shape[1] != 2:
        raise SAEError(f"{path}: holds an array of shape {list(points.shape)}; expected [[step, loss], ...].")
    return points[:, 0], points[:, 1]


def _table(columns: Mapping[str, Scorecard], sources: list[str]) -> str:
    from mergelab.report.table import text_table
    from mergelab.sae.evaluation.scorecard import seed_spread

    spread = seed_spread([columns[source] for source in sources]) if len(sources) > 1 else None
    cards = {name: card for name, card in columns.items() if spread is None or name not in sources}
    header = ["score", *(["mean", "sd"] if spread else []), *cards, "unit", "measured against"]
    rows = []
    for name, score in columns[sources[0]].scores.items():
        values = [*(spread[name] if spread else ())]
        others = [card.scores[name].value if name in card.scores else float("nan") for card in cards.values()]
        cells = [f"{value:.4g}" for value in (*values, *others)]
        rows.append([name, *cells, score.unit or "-", score.against])
    return text_table(header, rows)
