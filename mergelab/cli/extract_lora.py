"""`mergelab extract-lora`: the difference of two models as a LoRA adapter."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergelab.checkpoints.locations import location_text
from mergelab.cli.numbers import ANY_NUMBER, Seed, WholeNumber
from mergelab.cli.options import PUSH, check_push_option, push_output, readable
from mergelab.cli.output import byte_bar, print_result
from mergelab.cli.verbosity import warn

if TYPE_CHECKING:
    from mergelab.merging.lora_extraction import ExtractedLora

__all__ = ["command"]

_WORST = 5
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@click.command("extract-lora")
@click.argument("finetuned", type=click.Path(path_type=Path))
@click.option(
    "--base", required=True, type=click.Path(path_type=Path), help="Model that FINETUNED was tuned from."
)
@click.option("--out", "-o", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--rank", type=WholeNumber(1), help="Largest rank of a module's factors.")
@click.option("--energy", type=ANY_NUMBER, help="Fraction of each matrix's squared norm to keep.")
@click.option("--randomized", is_flag=True, help="Use a randomized SVD: much faster for large matrices.")
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="GLOB",
    help="Modules that may enter the adapter; repeatable.",
)
@click.option(
    "--embeddings",
    type=click.Choice(["whole", "low_rank", "skip"]),
    default="whole",
    show_default=True,
    help="Form in which changed embeddings are stored.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Stored dtype of the factors.",
)
@click.option(
    "--for",
    "runtime",
    type=click.Choice(["peft", "vllm"]),
    default="peft",
    show_default=True,
    help="Program that applies it; vLLM takes linear layers alone, of one rank.",
)
@click.option(
    "--seed", type=Seed(fold=False), default=0, show_default=True, help="Seed of the randomized SVD."
)
@click.option("--overwrite", is_flag=True, help="Replace the output folder if it is not empty.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run of the same models and settings.")
@PUSH
@click.option("--json", "as_json", is_flag=True, help="Print ranks and errors of all modules as JSON.")
def command(
    finetuned: Path, base: Path, out: Path, push_to: str | None, as_json: bool, **options: Any
) -> None:
    """Extract from FINETUNED a LoRA adapter for its base model, in PEFT's format.

    Each changed matrix is replaced by its best low-rank approximation; changed norms, biases and embeddings
    are stored whole. `base+adapter` in a recipe applies the adapter again.

    \b
    Examples:
      mergelab extract-lora tuned --base base --rank 16 --out adapter
      mergelab extract-lora tuned --base base --energy 0.9 --out adapter --dtype bfloat16
      mergelab extract-lora big --base base --rank 64 --randomized --target '*.self_attn.*' --out adapter
      mergelab extract-lora tuned --base base --rank 16 --for vllm --out adapter
    """
    if options["rank"] is None and options["energy"] is None:
        raise click.UsageError("say how large the adapter may be, with --rank or --energy")
    check_push_option(push_to, out)
    started = time.perf_counter()
    from mergelab.checkpoints import open_checkpoint
    from mergelab.merging.lora_extraction import extract_lora

    total = open_checkpoint(base).model_bytes
    options["targets"] = options["targets"] or ("*",)
    with byte_bar("extracting", total) as bar:
        extracted = extract_lora(finetuned, base, out, **options, progress=bar.update)
    seconds = time.perf_counter() - started
    print_result(
        lambda: _json(extracted, seconds),
        lambda: _text(extracted, seconds, options["runtime"]),
        as_json=as_json,
    )
    if extracted.skipped:
        names = ", ".join(extracted.skipped[:_WORST])
        warning = f"{len(extracted.skipped)} changed modules were left out: {names}"
        warn(_lost(extracted) if options["runtime"] == "vllm" else warning)
    push_output(out, push_to)


def _lost(extracted: ExtractedLora) -> str:
    """How many changed modules vLLM does not take, and how much they are of the change."""
    names = sorted(extracted.skipped, key=lambda name: -extracted.lost.get(name, 0.0))
    listed = ", ".join(f"{name} ({extracted.lost.get(name, 0.0):.2%})" for name in names[:_WORST])
    more = f" and {len(names) - _WORST} more" if len(names) > _WORST else ""
    share = sum(extracted.lost.values())
    return (
        f"{len(names)} changed modules were left out, since vLLM takes factors of linear layers alone: "
        f"{share:.2%} of the change's squared norm, most in {listed}{more}"
    )


def _json(extracted: ExtractedLora, seconds: float) -> dict[str, Any]:
    return {
        "out": location_text(extracted.out),
        "seconds": seconds,
        "bytes": extracted.nbytes,
        "modules": {
            name: {"rank": rank, "relative_error": extracted.errors[name]}
            for name, rank in extracted.ranks.items()
        },
        "whole": list(extracted.whole),
        "skipped": list(extracted.skipped),
        "lost": dict(extracted.lost),
    }


def _text(extracted: ExtractedLora, seconds: float, runtime: str) -> str:
    ranks = sorted(set(extracted.ranks.values()))
    span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    worst = sorted(extracted.errors.items(), key=lambda item: -item[1])[:_WORST]
    lines = [
        f"{location_text(extracted.out)}: {len(extracted.ranks)} modules of rank {span}, "
        f"{len(extracted.whole)} stored whole, {readable(extracted.nbytes)}, in {seconds:.1f} s",
        "largest part of a change that is missed:",
        *(f"  {error:7.2%}  {name}" for name, error in worst),
    ]
    if runtime == "vllm":
        needed = next(rank for rank in _VLLM_RANKS if rank >= ranks[-1])
        lines.append(f"serve it with: vllm serve BASE --enable-lora --max-lora-rank {needed}")
    return "\n".join(lines)
