"""`mergelab soup`: average fine-tuned checkpoints: all, the last few, a running mean, or those that help."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergelab.cli.numbers import Number, WholeNumber
from mergelab.cli.options import PUSH, SIZE, check_push_option, push_output
from mergelab.cli.output import byte_bar, print_result

if TYPE_CHECKING:
    from mergelab.merging.soups.evaluators import CommandEvaluator, TextLoss
    from mergelab.merging.soups.scores import Objective, SoupSelection
    from mergelab.merging.soups.trace import SoupTrace

__all__ = ["command"]

METHODS = ("uniform", "last", "running", "ema", "greedy")
_ONLY = {  # options that one method reads; elsewhere they would have no effect, which is an error
    "last": ("last",),
    "decay": ("ema",),
    **dict.fromkeys(
        ("evaluate", "text", "test_evaluate", "test_text", "timeout", "metric", "limit"), ("greedy",)
    ),
    **dict.fromkeys(("rule", "min_delta", "patience", "max_size", "direction"), ("greedy",)),
    **dict.fromkeys(("dtype", "overwrite"), ("uniform", "last", "greedy")),
}
_ENGINE = ("memory", "threads", "allow_nonfinite", "dtype", "overwrite")  # passed on to every merge


@click.command("soup")
@click.argument("checkpoints", nargs=-1, required=True, metavar="CHECKPOINT...")
@click.option("--out", "-o", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--method", type=click.Choice(METHODS), default="uniform", show_default=True)
@click.option("--last", type=WholeNumber(1), help="Number of checkpoints that `--method last` averages.")
@click.option("--decay", type=Number(0, 1), help="Decay of `--method ema`.")
@click.option(
    "--evaluate", metavar="COMMAND", help="Command that scores a model on validation data; see above."
)
@click.option("--text", type=click.Path(path_type=Path), help="Validation text, scored in bits per byte.")
@click.option(
    "--test-evaluate", metavar="COMMAND", help="Command that scores the finished soup on test data."
)
@click.option(
    "--test-text",
    type=click.Path(path_type=Path),
    help="Test text, scored in bits per byte once the soup is made.",
)
@click.option("--timeout", type=Number(0, min_open=True), help="Time limit of one evaluation, in seconds.")
@click.option(
    "--metric", multiple=True, metavar="NAME[:min|:max][=WEIGHT]", help="Metric that decides; repeatable."
)
@click.option(
    "--direction", type=click.Choice(["max", "min"]), help="Direction in which metrics improve.  [max]"
)
@click.option(
    "--limit",
    multiple=True,
    metavar="NAME[:min|:max]=X",
    help="Metric that may get worse by at most X; repeatable.",
)
@click.option(
    "--rule", type=click.Choice(["paper", "code"]), help="Rule for ties: `paper` accepts them.  [paper]"
)
@click.option("--min-delta", type=Number(0), help="Minimum improvement that keeps a checkpoint.  [0]")
@click.option("--patience", type=WholeNumber(1), help="Number of rejections in a row after which to stop.")
@click.option("--max-size", type=WholeNumber(1), help="Maximum number of members.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="Stored dtype.")
@click.option(
    "--memory", type=SIZE, default="1GB", show_default=True, help="Memory for the tensors held at once."
)
@click.option("--threads", type=WholeNumber(1), help="Number of threads that read, compute and write.")
@click.option("--allow-nonfinite", is_flag=True, help="Accept NaN and infinity in the inputs.")
@click.option("--overwrite", is_flag=True, help="Replace the output and discard an interrupted greedy soup.")
@PUSH
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    checkpoints: tuple[str, ...],
    out: Path,
    method: str,
    push_to: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Average fine-tuned checkpoints of one model, streamed: all, the last few, or those that help.

    \b
    uniform  the mean of all checkpoints
    last     the mean of the last N (by the number that ends their names, else as given)
    running  fold checkpoints into the float32 average in the output folder, starting it if need be
    ema      the same for an exponential average
    greedy   best first, keep each checkpoint whose addition does not hurt on validation

    An evaluation COMMAND gets a model's folder in place of {model} and prints, as its last line, a number or
    a JSON object such as {"accuracy": 0.91}. Several --metric decide in turn, or as a weighted sum if they
    have weights. The greedy soup leaves its decisions in OUT.trace.json; interrupted, the same command goes
    on after the last evaluation.

    \b
    Examples:
      mergelab soup run/checkpoint-* --method last --last 5 --out averaged
      mergelab soup run/checkpoint-900 --method running --out average
      mergelab soup ft-*/ --method greedy --text valid.txt --test-text test.txt --out soup
      mergelab soup ft-*/ --method greedy --evaluate 'python eval.py {model} valid' --metric accuracy \\
          --test-evaluate 'python eval.py {model} test' --out soup
    """
    from mergelab.errors import RecipeError

    given = {name: v for name, v in options.items() if v is not None and v is not False and v != ()}
    for name in given:
        if method not in _ONLY.get(name, METHODS):
            raise RecipeError(
                f"--{name.replace('_', '-')} has no effect with --method {method}; leave it out."
            )
    check_push_option(push_to, out)
    from mergelab.cli.options import configure_jax

    configure_jax(merging=method != "greedy")  # whose evaluations run models, in children of this process too
    # How much a greedy search will read is not known beforehand: bytes and throughput, no end.
    with byte_bar("averaging") as bar:
        engine = {name: given[name] for name in _ENGINE if name in given}
        make = _greedy if method == "greedy" else partial(_average, method=method)
        result, text = make(checkpoints, out, given=given, engine={**engine, "progress": bar.update})
    print_result(lambda: result, lambda: text, as_json=as_json)
    push_output(out, push_to)


def _average(
    checkpoints: Sequence[str], out: Path, *, method: str, given: Mapping[str, Any], engine: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
    """Makes a soup that needs no evaluation; returns the result as data and as text."""
    from mergelab.errors import RecipeError
    from mergelab.merging.soups.folders import average_checkpoints, by_step, update_average

    paths = by_step(checkpoints)
    if method in ("running", "ema"):
        if method == "ema" and "decay" not in given:
            raise RecipeError("--method ema needs --decay, such as --decay 0.9.")
        state = update_average(paths, out, decay=given.get("decay"), **engine)
        members = list(state.checkpoints)
    else:
        if method == "last" and "last" not in given:
            raise RecipeError("--method last needs --last N, the number of checkpoints to average.")
        paths = paths[-given.get("last", 0) :]
        members = [str(path) for path in paths]
        average_checkpoints(paths, out, **engine)
    text = f"{method} average of {len(members)}: {', '.join(members)}\nwritten to {out}"
    return {"method": method, "members": members, "out": str(out)}, text


def _greedy(
    checkpoints: Sequence[str], out: Path, *, given: Mapping[str, Any], engine: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
    """Makes a greedy soup; returns its trace as data and as text."""
    from mergelab.errors import RecipeError
    from mergelab.merging.soups.greedy_folders import greedy_soup_checkpoints, trace_path

    evaluate = _evaluator(given, "")
    if evaluate is None:
        raise RecipeError("--method greedy needs --evaluate COMMAND or --text FILE to choose by.")
    selection = _selection(given)

    def report(members: tuple[str, ...], scores: Mapping[str, float]) -> None:
        click.echo(f"{_scores(scores)}  {' + '.join(members)}", err=True)

    settings = ("rule", "min_delta", "patience", "max_size")
    trace = greedy_soup_checkpoints(
        checkpoints,
        out,
        evaluate,
        selection=selection,
        test_evaluate=_evaluator(given, "test_"),
        evaluation=evaluate.subject,
        on_evaluation=report,
        inputs=[Path(given[name]) for name in ("text", "test_text") if name in given],
        **{name: given[name] for name in settings if name in given},
        **engine,
    )
    return trace.to_json(), f"{_summary(trace)}\nwritten to {out}, every decision to {trace_path(out)}"


def _evaluator(given: Mapping[str, Any], prefix: str) -> CommandEvaluator | TextLoss | None:
    from mergelab.errors import RecipeError

    command, text = given.get(f"{prefix}evaluate"), given.get(f"{prefix}text")
    if command is not None and text is not None:
        flag = prefix.replace("_", "-")
        raise RecipeError(f"--{flag}evaluate and --{flag}text both name an evaluator; keep one.")
    if text is not None:
        from mergelab.merging.soups.evaluators import TextLoss

        return TextLoss(text)
    if command is not None:
        from mergelab.merging.soups.evaluators import CommandEvaluator

        return CommandEvaluator(command, given.get("timeout"))
    return None


def _selection(given: Mapping[str, Any]) -> SoupSelection:
    from mergelab.errors import RecipeError
    from mergelab.merging.soups.scores import Guarded, Lexicographic, Objective, WeightedScores

    default = "min" if "text" in given else "max"
    direction = given.get("direction", default)
    if "metric" in given:
        metrics = [_metric(text, direction) for text in given["metric"]]
    else:
        metrics = [(Objective("bits_per_byte" if "text" in given else "score", direction), None)]
    weights = [weight for _, weight in metrics if weight is not None]
    if weights and len(weights) != len(metrics):
        raise RecipeError(
            "Some --metric have a =WEIGHT and some have none; give it to all of them or to none."
        )
    rule: SoupSelection = (
        WeightedScores(tuple((metric, weight) for metric, weight in metrics if weight is not None))
        if weights
        else Lexicographic(tuple(metric for metric, _ in metrics))
    )
    limits = [(text, *_metric(text, direction)) for text in given.get("limit", ())]
    if bare := next((text for text, _, bound in limits if bound is None), None):
        raise RecipeError(f"--limit {bare} names no bound; write --limit {bare}=0.01.")
    bounds = tuple((metric, bound) for _, metric, bound in limits if bound is not None)
    return Guarded(rule, bounds) if bounds else rule


def _metric(text: str, direction: Any) -> tuple[Objective, float | None]:
    """Reads `NAME[:min|:max][=NUMBER]`."""
    from mergelab.errors import RecipeError
    from mergelab.merging.soups.scores import Objective

    name, equals, number = text.partition("=")
    name, colon, own = name.partition(":")
    try:
        value = float(number) if equals else None
    except ValueError:
        raise RecipeError(
            f"{text!r}: {number!r} is not a number; expected NAME[:min|:max][=NUMBER]."
        ) from None
    if colon and own not in ("min", "max"):
        raise RecipeError(f"{text!r}: direction {own!r} is neither min nor max.")
    return Objective(name, own if colon else direction), value  # pyright: ignore[reportArgumentType]


def _scores(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.6g}" for name, value in scores.items())


def _summary(trace: SoupTrace) -> str:
    lines = ["alone, best first:"]
    lines += [f"  {r.name}: {_scores(r.scores)}" for r in trace.ranking]
    lines += ["added to the soup in that order:"]
    lines += [
        f"  {'kept   ' if d.accepted else 'left out'} {d.candidate}: {d.reason}" for d in trace.decisions
    ]
    lines += [f"soup of {len(trace.members)}: {' + '.join(trace.members)}"]
    lines += [f"on validation: {_scores(trace.validation)}"]
    if trace.test:
        lines += ["on test:"]
        lines += [f"  {name.replace('_', ' ')}: {_scores(scores)}" for name, scores in trace.test.items()]
    return "\n".join(lines)
