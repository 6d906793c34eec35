"""`mergelab merge`: run a recipe, or show what it would do."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergelab.cli.numbers import Seed, WholeNumber
from mergelab.cli.options import PUSH, SIZE, check_push_option, push_output, readable
from mergelab.cli.output import byte_bar, print_result
from mergelab.cli.verbosity import warn

if TYPE_CHECKING:
    from mergelab.merging.plan.planner import Plan

__all__ = ["command"]


def _rank_of(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """`rank=8`, or 8 alone."""
    if value is None:
        return None
    number = value.removeprefix("rank=")
    if not number.isascii() or not number.isdigit() or not 1 <= len(number) <= 6 or int(number) < 1:
        raise click.BadParameter(f"{value!r} is no rank; write rank=R, such as rank=16")
    return int(number)


DTYPES = ("bfloat16", "float16", "float32", "float64")


@click.command("merge")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--out", "-o", type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--seed",
    type=Seed(fold=False),
    default=0,
    show_default=True,
    help="Seed of the random draws of DARE and DELLA.",
)
@click.option("--dtype", type=click.Choice(DTYPES), help="Stored dtype; overrides the recipe's.")
@click.option(
    "--shard-size", type=SIZE, default="5GB", show_default=True, help="Largest size of one weight file."
)
@click.option(
    "--memory", type=SIZE, default="1GB", show_default=True, help="Bytes of tensors held in memory at once."
)
@click.option("--threads", type=WholeNumber(1), help="Number of threads that read, compute and write.")
@click.option("--dry-run", is_flag=True, help="Print the plan; read no weights and write nothing.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run of the same recipe.")
@click.option("--overwrite", is_flag=True, help="Replace the output folder if it is not empty.")
@click.option("--allow-nonfinite", is_flag=True, help="Accept NaN and infinity in the inputs.")
@click.option(
    "--unsafe-truncate-embeddings", is_flag=True, help="Cut embeddings of different length to the shortest."
)
@click.option(
    "--allow-mixed-architectures",
    is_flag=True,
    help="Merge models of different model_type, and tensors that only some models have.",
)
@click.option("--sha256", is_flag=True, help="Also write SHA256SUMS of the weight files.")
@click.option(
    "--as-adapter",
    metavar="rank=R",
    callback=_rank_of,
    help="Merge LoRA adapters to one adapter of rank R instead of a model.",
)
@click.option(
    "--judge",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Held-out text on which parents, base and merge are compared afterwards.",
)
@PUSH
@click.option("--json", "as_json", is_flag=True, help="Print the plan or the result as JSON.")
def command(
    recipe: Path,
    out: Path | None,
    dry_run: bool,
    push_to: str | None,
    as_json: bool,
    memory: int,
    as_adapter: int | None,
    judge: Path | None,
    **options: Any,
) -> None:
    """Merge checkpoints as RECIPE says, a YAML file in mergekit's format.

    Relative model paths are looked up in the working directory, then beside the recipe. The output is a
    complete Hugging Face folder: weights, config, tokenizer, model card.

    \b
    Examples:
      mergelab merge ties.yaml --out merged
      mergelab merge ties.yaml --dry-run
      mergelab merge dare.yaml --out merged --seed 7 --dtype bfloat16 --shard-size 2GB
      mergelab merge big.yaml --out merged --memory 500MB --resume
      mergelab merge ties.yaml --out merged --judge held-out.txt
      mergelab merge ties.yaml --out merged --push org/merged
      mergelab merge adapters.yaml --as-adapter rank=16 --out adapter
    """
    started = time.perf_counter()
    planning = {
        "seed": options["seed"],
        "dtype": options["dtype"],
        "shard_bytes": options["shard_size"],
        "truncate_embeddings": options["unsafe_truncate_embeddings"],
        "allow_mixed_architectures": options["allow_mixed_architectures"],
    }
    if out is None and not dry_run:
        raise click.UsageError("name the folder to write with --out DIR, or look at the plan with --dry-run")
    if as_adapter is not None and (dry_run or options["resume"] or options["sha256"]):
        raise click.UsageError("--as-adapter takes no --dry-run, --resume or --sha256")
    if judge is not None:
        _check_judge(out, dry_run=dry_run, as_adapter=as_adapter is not None)
    check_push_option(None if dry_run else push_to, out)
    from mergelab.cli.options import configure_jax
    from mergelab.merging.plan.planner import plan_merge

    configure_jax(merging=judge is None)
    if as_adapter is not None:
        assert out is not None
        _merge_adapters(recipe, out, as_adapter, options, as_json=as_json)
        push_output(out, push_to)
        return
    plan = plan_merge(recipe, **planning)
    if dry_run:
        summary = plan.summary(memory, out or Path.cwd())
        print_result(lambda: summary, lambda: _text(plan, summary), as_json=as_json)
        return
    assert out is not None
    warnings = tuple(dict.fromkeys(w for p in (*plan.stages.values(), plan) for w in p.warnings))
    for warning in warnings:
        warn(warning)

    from mergelab.checkpoints.locations import location_text
    from mergelab.merging.run_merge import merge
    from mergelab.platform import keep_freed_memory

    keep_freed_memory()
    trial = None
    if judge is not None:
        from mergelab.verdict.merge_verdict import prepare_verdict

        trial = prepare_verdict(plan, judge)
    total = sum(p.bytes_out for p in (*plan.stages.values(), plan))
    with byte_bar("merging", total) as bar:
        merged = merge(
            plan,
            out,
            memory=memory,
            threads=options["threads"],
            resume=options["resume"],
            overwrite=options["overwrite"],
            allow_nonfinite=options["allow_nonfinite"],
            sha256=options["sha256"],
            progress=bar.update,
        )
    seconds = time.perf_counter() - started
    verdict = None
    if trial is not None:
        tell = partial(click.echo, err=True)
        verdict = trial.of_merge(merged.out, "the merge", lambda name: tell(f"judging {name}"))
        verdict.write_to_card(merged.out)

    def report() -> dict[str, Any]:
        judged = {} if verdict is None else {"verdict": verdict.to_dict()}
        return {
            "out": location_text(merged.out),
            "seconds": seconds,
            "seconds_streaming": merged.seconds_streaming,
            "tensors": len(merged.plan.jobs),
            "bytes_in": merged.plan.bytes_in,
            "bytes_out": merged.plan.bytes_out,
            "seed": merged.plan.seed,
            "identity": merged.plan.identity,
            "warnings": list(warnings),
            "sha256": dict(merged.sha256),
            **judged,
        }

    size = readable(merged.plan.bytes_out)
    text = f"{location_text(merged.out)}: {len(merged.plan.jobs)} tensors, {size}, in {seconds:.1f} s"
    if verdict is not None:
        text = f"{text}\n\n{verdict.comparison.table()}\n\n{verdict.sentence}"
    print_result(report, lambda: text, as_json=as_json)
    push_output(out, push_to)


def _check_judge(out: Path | None, *, dry_run: bool, as_adapter: bool) -> None:
    """Refuses, before any work, a merge that cannot be judged."""
    from mergelab.checkpoints.locations import is_url

    if dry_run or as_adapter:
        raise click.UsageError("--judge compares a model that is written: omit --dry-run and --as-adapter")
    if out is not None and is_url(out):
        raise click.UsageError("--judge reads what was merged: give a folder of this machine with --out")


def _merge_adapters(recipe: Path, out: Path, rank: int, options: dict[str, Any], *, as_json: bool) -> None:
    """Merges adapters to an adapter and says what its factors miss."""
    from mergelab.checkpoints.locations import location_text
    from mergelab.merging.adapter_merge import merge_adapters

    started = time.perf_counter()
    chosen = {name: options[name] for name in ("seed", "dtype", "overwrite")}
    merged = merge_adapters(recipe, out, rank=rank, **chosen)
    seconds = time.perf_counter() - started
    for warning in merged.warnings:
        warn(warning)
    worst = sorted(merged.errors.items(), key=lambda item: -item[1])

    def report() -> dict[str, Any]:
        modules = {n: {"rank": r, "relative_error": merged.errors[n]} for n, r in merged.ranks.items()}
        return {
            "out": location_text(merged.out),
            "seconds": seconds,
            "bytes": merged.nbytes,
            "modules": modules,
            "warnings": list(merged.warnings),
        }

    lines = [
        f"{location_text(merged.out)}: {len(merged.ranks)} modules of rank {max(merged.ranks.values())} at "
        f"most, {readable(merged.nbytes)}, in {seconds:.1f} s",
        "largest part of a merged change that is missed:",
        *(f"  {error:7.2%}  {name}" for name, error in worst[:5]),
    ]
    print_result(report, lambda: "\n".join(lines), as_json=as_json)


def _text(plan: Plan, summary: dict[str, Any]) -> str:
    operations = ", ".join(f"{count} {name}" for name, count in summary["operations"].items())
    enough = "" if summary["disk_needed"] <= summary["disk_free"] else "  NOT ENOUGH"
    rows = {
        "method": summary["merge_method"],
        "models": ", ".join(summary["models"]),
        "tensors": f"{summary['tensors']} ({operations})",
        "read": readable(summary["bytes_in"]),
        "write": f"{readable(summary['bytes_out'])} ({_dtypes(plan)})",
        "memory": f"about {readable(summary['peak_memory'])} at peak",
        "disk": f"{readable(summary['disk_needed'])} needed, {readable(summary['disk_free'])} free{enough}",
    }
    lines = []
    for name, stage in plan.stages.items():
        lines += [f"first, {name}:", _indented(_text(stage, summary["stages"][name])), ""]
    lines += [f"{key:<8} {value}" for key, value in rows.items()]
    lines += [f"warning: {warning}" for warning in summary["warnings"]]
    return "\n".join(lines)


def _dtypes(plan: Plan) -> str:
    return ", ".join(dict.fromkeys(str(job.dtype) for job in plan.jobs))


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
