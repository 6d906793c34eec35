"""`mergelab sae eval`: how good SAEs are, on stored activations or on their model and a text."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from mergelab.cli.joined import joins_run
from mergelab.cli.numbers import Seed, WholeNumber
from mergelab.cli.options import LOCAL_PATH, MESH, TEXT, judged_text, model_mesh, token_options
from mergelab.cli.verbosity import is_quiet

if TYPE_CHECKING:
    from mergelab.sae.evaluation.scorecard import Scorecard
    from mergelab.sae.sae import SAE

__all__ = ["command"]


class MetricsOption(click.Option):
    """An option whose help lists the evaluations, which are imported only where the help is shown."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        from mergelab.sae.evaluation.scorecard import METRICS

        found = super().get_help_record(ctx)
        if found is None:
            return None
        listed = (f"{m.name}{'' if m.default else '*'} ({m.about})" for m in METRICS.values())
        return found[0], f"{found[1]} {', '.join(listed)}."


@click.command("eval")
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="SOURCE...")
@click.option(
    "--data", multiple=True, metavar="FILES", help="Glob or folder of files with activations [tokens, d]."
)
@click.option(
    "--target-data",
    multiple=True,
    metavar="FILES",
    help="Targets of a transcoder (with --data) for the same tokens (default: those beside them in a "
    "folder of mergelab activations).",
)
@click.option("--rows", type=WholeNumber(1), help="Maximum number of rows (with --data) (default: all).")
@click.option(
    "--batch", type=WholeNumber(1), default=4096, show_default=True, help="Rows per batch (with --data)."
)
@click.option("--model", type=click.Path(path_type=Path), help="Folder of the SAE's model.")
@click.option(
    "--text",
    "texts",
    multiple=True,
    metavar="PLACE",
    help="Text the SAE was not trained on: file, glob, folder or data set; .py is labeled as Python. "
    "Repeatable.",
)
@TEXT
@judged_text
@click.option("--site", help="Site the SAE reads, such as blocks.8.resid_post (default: as it says).")
@click.option("--target-site", help="Site a transcoder writes (default: as it says).")
@click.option(
    "--context",
    type=WholeNumber(2),
    help="Tokens in a context (default: as in the SAE's training, or 64).",
)
@click.option(
    "--metrics",
    cls=MetricsOption,
    metavar="A,B",
    help="Evaluations to run (default: all that apply, but those marked *):",
)
@click.option(
    "--controls",
    is_flag=True,
    help="Also evaluate three controls: a random SAE, a frozen decoder, and a random model.",
)
@click.option(
    "--control-steps",
    type=WholeNumber(1),
    default=500,
    show_default=True,
    help="Training steps of each control.",
)
@click.option(
    "--labels",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Texts with labels of your own, to be probed: records (JSON lines, JSON, CSV, TSV, parquet) with "
    "text and label, or labels of its tokens, words or spans; alone, or beside --text.",
)
@click.option(
    "--label-field", metavar="NAME", help="Field with the label or labels (default: label, labels)."
)
@click.option(
    "--balance/--no-balance",
    default=True,
    show_default=True,
    help="Whether both answers to a question weigh the same in the accuracy of probes.",
)
@click.option(
    "--curve",
    type=LOCAL_PATH,
    help="Loss curve of the model's own training: a folder of checkpoints in folders named by step, or JSON "
    "[[step, loss], ...].",
)
@click.option(
    "--latents",
    "latents_file",
    type=LOCAL_PATH,
    help="New CSV file with a row for each latent of the one SOURCE (with --model): density, norms, cosines.",
)
@click.option(
    "--keep",
    type=LOCAL_PATH,
    help="File that keeps scores; those it holds are not computed again.",
)
@click.option("--mesh", type=MESH, metavar="AXES", help="Device mesh for the model, such as tensor=8.")
@click.option("--any-model", is_flag=True, help="Accept a model other than the recorded one.")
@click.option("--seed", type=Seed(0), default=0, show_default=True, help="Random seed.")
@token_options
@click.option("--json", "as_json", is_flag=True, help="Print the scores as JSON.")
@joins_run
def command(sources: tuple[Path, ...], as_json: bool, **options: Any) -> None:
    """Judge SAEs on activations or text they were not trained on.

    With --data, one SAE's reconstruction and sparsity. With --model and --text, all that
    docs/sae_evaluation.md describes; the first half of the text fits what must be fitted, and the second
    judges. Several SOURCEs that differ in nothing but the seed of their training are shown as mean and
    standard deviation; others stand side by side. A transcoder is judged on the site it writes.

    Scores are of the tokens that count: not the first of each context, special ones, or those far longer than
    the others. Scores that end in _all include them.

    \b
    Examples:
      mergelab sae eval run --data 'held-out/*.npy'
      mergelab sae eval run --model model --text held-out.py --controls
      mergelab sae eval seed0 seed1 seed2 --model model --text a.txt --metrics downstream --json
      mergelab sae eval run --model model --labels reviews.csv --metrics labels
    """
    if bool(options["data"]) == bool(options["model"] and (options["texts"] or options["labels"])):
        raise click.UsageError("give either --data, or both --model and --text (or --labels).")
    _check_given("--data" if options["data"] else "--model")
    if options["label_field"] and not options["labels"]:
        raise click.UsageError("--label-field goes with --labels.")
    if options["latents_file"] is not None and sources[1:]:
        raise click.UsageError("--latents goes with --model and one SOURCE.")
    if options["latents_file"] is not None and options["latents_file"].exists():
        raise click.UsageError(f"--latents {options['latents_file']}: is there already; choose a new file.")
    if options["data"]:
        source, *others = sources
        if others:
            raise click.UsageError("--data judges one SOURCE; with --model and --text there may be several.")
        from mergelab.cli.sae_eval_data import judge_files

        figures, judged = judge_files(source, options)
        if as_json:
            told = {"transcoder": not judged.is_autoencoder, "target_known": judged.target_known}
            click.echo(json.dumps({**figures, **told}))
            return
        for name, value in figures.items():
            click.echo(f"{name.replace('_', ' '):20} {value:,.6g}")
        if not judged.target_known:
            click.echo(_taken(source, judged))
        return
    _check_metrics(options["metrics"])
    columns, seconds, checked, opened = _on_text(sources, options, quiet=as_json)
    unlike = _unlike(opened)
    if as_json:
        found = {
            name: {
                part: {**vars(score), "value": _number(score.value)} for part, score in card.scores.items()
            }
            for name, card in columns.items()
        }
        told = {"host_checked": checked, "sites": _sites_of(sources, opened), "unlike": unlike}
        click.echo(json.dumps({"dictionaries": found, "seconds": seconds, **told}))
        return
    click.echo(_table(columns, [str(source) for source in sources], alike=not unlike))
    if unlike:
        click.echo(f"Not averaged as seeds of one training, as they differ in {'; '.join(unlike)}.")
    for source, one in zip(sources, opened, strict=True):
        if not one.target_known:
            click.echo(_taken(source, one))
    if not checked:
        click.echo("The SAE does not say which weights it belongs to, or they are others.")


def _asked(metrics: str | None) -> list[str] | None:
    """The names of metrics that were given."""
    return None if metrics is None else [name.strip() for name in metrics.split(",")]


def _check_metrics(metrics: str | None) -> None:
    """Checks the names before a model is opened."""
    from mergelab.sae.evaluation.scorecard import check_metrics

    check_metrics(_asked(metrics))


_OF_DATA = ("target_data", "rows", "batch")
_OF_BOTH = ("data", "site", "target_site", "any_model", "as_json")
_OF_BOTH += ("skip_positions", "skip_special", "max_norm_multiple")


def _check_given(kind: str) -> None:
    """Refuses options of the other kind of evaluation: what is passed over would seem to be measured."""
    context = click.get_current_context()
    for option in context.command.params:
        given = context.get_parameter_source(option.name or "") == ParameterSource.COMMANDLINE
        if not given or not isinstance(option, click.Option) or option.name in _OF_BOTH:
            continue
        if (option.name in _OF_DATA) != (kind == "--data"):
            other = "--model" if kind == "--data" else "--data"
            more = "; with --model it is --target-site" if option.name == "target_data" else ""
            raise click.UsageError(f"{option.opts[0]} goes with {other}, not with {kind}{more}.")


def _unlike(saes: Sequence[SAE]) -> list[str]:
    """What SAEs differ in besides the seed."""
    from mergelab.sae.evaluation.settings import differences, settings_of

    return differences([settings_of(one) for one in saes])


def _sites_of(sources: Sequence[Path], saes: Sequence[SAE]) -> dict[str, Any]:
    """What the SAE was judged as, by source."""
    return {
        str(source): {
            "reads": one.config.reads,
            "writes": one.config.reads if one.is_autoencoder else one.config.writes,
            "transcoder": not one.is_autoencoder,
            "target_known": one.target_known,
        }
        for source, one in zip(sources, saes, strict=True)
    }


def _taken(source: Path, sae: SAE) -> str:
    """The line that says what was taken for granted."""
    reads = sae.config.reads
    what = "what it reads" if reads is None else f"{reads[0]}, which it reads"
    return (
        f"{source} does not say what it writes and was judged on {what}; if it is a transcoder, name its "
        "target (--target-site, --target-data)."
    )


def _number(value: float) -> float | None:
    """JSON knows no NaN: what could not be had is null."""
    return value if math.isfinite(value) else None


def _on_text(
    sources: tuple[Path, ...], options: Mapping[str, Any], *, quiet: bool
) -> tuple[dict[str, Scorecard], dict[str, float], bool, list[SAE]]:
    """Scorecards by source and control, seconds by metric of the first, whether all are known to belong to
    the model, and the SAEs as what they were judged.
    """
    from tqdm import tqdm

    from mergelab.checkpoints.folder import weights_sha256
    from mergelab.checkpoints.locations import local_path
    from mergelab.cli.options import open_sae
    from mergelab.cli.subject import open_labels
    from mergelab.sae.belonging import warn_where_foreign
    from mergelab.sae.evaluation.controls import CONTROLS
    from mergelab.sae.evaluation.metric import Evidence, Options
    from mergelab.sae.evaluation.probing_tasks import label_texts
    from mergelab.sae.evaluation.scorecard import (
        EvaluationJournal,
        control_scorecard,
        evaluation_key,
        scorecard,
    )
    from mergelab.sae.sae import at_sites
    from mergelab.sae.subject_model import check_subject_model, check_target
    from mergelab.text.tokenizer import load_tokenizer

    model, texts = local_path(options["model"]), options["texts"]
    mesh = None if options["mesh"] is None else model_mesh(options["mesh"])
    opened = [open_sae(source) for source in sources]
    opened = [at_sites(one, options["site"], options["target_site"]) for one in opened]
    first = opened[0]
    _check_same_sites(sources, opened)
    any_model = options["any_model"]
    subject, labeled = open_labels(opened, model, texts, {**options, "mesh": mesh})
    checked = [check_subject_model(one, model, any_model=any_model) for one in opened]
    for one, known in zip(opened, checked, strict=True):
        check_target(one, subject)
        if one is not first and not known and not any_model:
            warn_where_foreign(one, subject)
    asked = _asked(options["metrics"])
    count, size = subject.tokens.shape
    # The answers that texts give themselves; labeled texts have others.
    labels = label_texts(model, texts, size, subject.text).labels if texts else {}
    resources = {
        "labels": {task: answers[:count] for task, answers in labels.items()} or None,
        "own_labels": labeled,
        "mask_token": load_tokenizer(model).mask_id,
        "curve": _curve(options["curve"], subject, mesh),
    }
    if options["latents_file"] is not None:
        _write_latents(options["latents_file"], sources, first, subject, texts)
    evidence = Evidence(subject, resources)
    how = Options(metrics=asked, seed=options["seed"], balance=options["balance"])
    weights = weights_sha256(model) if options["keep"] else ""

    def memory(sae: Any, *settings: Any) -> Any:
        if options["keep"] is None:
            return None
        key = evaluation_key(sae, evidence, how, weights, *settings)
        return EvaluationJournal(options["keep"], key)

    columns: dict[str, Scorecard] = {}
    with tqdm(unit="metric", disable=quiet or is_quiet() or None, dynamic_ncols=True) as bar:

        def progress(metric: str) -> None:
            bar.set_description(metric)
            bar.update()

        for source, one in zip(sources, opened, strict=True):
            columns[str(source)] = scorecard(one, evidence, how, memory=memory(one), progress=progress)
        for kind in CONTROLS if options["controls"] else ():
            bar.set_description(kind)
            k = first.config.k or _active(first, subject)
            steps = options["control_steps"]
            kept = memory(first, kind, k, steps)
            columns[kind] = control_scorecard(kind, first, evidence, how, k=k, steps=steps, memory=kept)
    return columns, dict(columns[str(sources[0])].seconds), all(checked), opened


def _write_latents(path: Path, sources: Sequence[Path], sae: SAE, subject: Any, texts: Sequence[str]) -> None:
    from mergelab.checkpoints.publish import publish_file
    from mergelab.sae.features.figures_of_latents import latents_csv

    inputs = [*sources, *(Path(text) for text in texts if Path(text).exists())]
    publish_file(path, latents_csv(sae, subject).encode(), inputs=inputs)


def _check_same_sites(sources: Sequence[Path], saes: Sequence[SAE]) -> None:
    """Checks that all are of the sites of the first, as far as they say."""
    from mergelab.errors import SAEError

    first = saes[0]
    for source, one in zip(sources, saes, strict=True):
        same = one.is_autoencoder == first.is_autoencoder and all(
            mine is None or other is None or mine == other
            for mine, other in (
                (one.config.reads, first.config.reads),
                (one.config.writes, first.config.writes),
            )
        )
        if not same:
            raise SAEError(
                f"{source}: the SAE is of {one.mapping()}, but that of {sources[0]} of "
                f"{first.mapping()}; judge SAEs of other sites by themselves, or name one (--site)."
            )


def _active(sae: Any, source: Any) -> int:
    from mergelab.sae.evaluation.reconstruction import reconstruction_on_model

    found = reconstruction_on_model(sae, source, contexts=source.batch)
    return max(1, min(round(found.l0), sae.n_latents))


def _curve(path: Path | None, source: Any, mesh: Any) -> Any:
    """The loss curve of the option, or None."""
    import numpy as np

    from mergelab.activations.model_activations import halves
    from mergelab.checkpoints.json_data import read_json
    from mergelab.errors import MergelabError, SAEError
    from mergelab.sae.evaluation.training_curve import open_loss_curve

    if path is None:
        return None
    if path.is_dir():
        return open_loss_curve(path, halves(source)[1], mesh=mesh)
    try:
        points = np.array(read_json(path), np.float64)
    except (MergelabError, ValueError, TypeError, OverflowError) as error:
        raise SAEError(
            f"{path}: no curve can be read ({error}); expected JSON [[step, loss], ...]."
        ) from error
    if points.ndim != 2 or points.shape[1] != 2:
        raise SAEError(f"{path}: holds an array of shape {list(points.shape)}; expected [[step, loss], ...].")
    return points[:, 0], points[:, 1]


def _table(columns: Mapping[str, Scorecard], sources: list[str], *, alike: bool) -> str:
    from mergelab.report.tables import text_table
    from mergelab.sae.evaluation.scorecard import seed_spread

    cards = [columns[source] for source in sources]
    whole = alike and len(cards) > 1 and len({tuple(card.scores) for card in cards}) == 1
    spread = seed_spread(cards) if whole else None
    shown = {name: card for name, card in columns.items() if spread is None or name not in sources}
    header = ["score", *(["mean", "sd"] if spread else []), *shown, "unit", "measured against"]
    rows = []
    # What one SAE lacks, another may have.
    every = list(columns.values())
    scores = {name: score for card in reversed(every) for name, score in card.scores.items()}
    nothing = (float("nan"), float("nan"))
    for name in dict.fromkeys(name for card in every for name in card.scores):
        score = scores[name]
        values = [*(spread.get(name, nothing) if spread else ())]
        others = [card.scores[name].value if name in card.scores else float("nan") for card in shown.values()]
        cells = [f"{value:.4g}" for value in (*values, *others)]
        rows.append([name, *cells, score.unit or "-", score.against])
    return text_table(header, rows)
