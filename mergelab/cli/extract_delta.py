"""`mergelab extract-delta`: the difference of two models as a sparse task vector."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from mergelab.checkpoints.locations import location_text
from mergelab.cli.numbers import ANY_NUMBER
from mergelab.cli.options import PUSH, check_push_option, push_output, readable
from mergelab.cli.output import print_result

__all__ = ["command"]


@click.command("extract-delta")
@click.argument("finetuned", type=click.Path(path_type=Path))
@click.option(
    "--base", required=True, type=click.Path(path_type=Path), help="Model that FINETUNED was tuned from."
)
@click.option("--out", "-o", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--density",
    type=ANY_NUMBER,
    default=0.1,
    show_default=True,
    help="Fraction of each tensor's entries to keep, the largest changes.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Stored dtype of the changes.",
)
@click.option("--overwrite", is_flag=True, help="Replace the output folder if it is not empty.")
@PUSH
@click.option("--json", "as_json", is_flag=True, help="Print what was kept of all tensors as JSON.")
def command(
    finetuned: Path,
    base: Path,
    out: Path,
    density: float,
    dtype: str,
    overwrite: bool,
    push_to: str | None,
    as_json: bool,
) -> None:
    """Extract from FINETUNED a sparse task vector for its base model.

    Of each changed tensor the largest changes are kept. `base+delta` in a recipe adds them to the base again.

    \b
    Examples:
      mergelab extract-delta tuned --base base --density 0.1 --out delta
      mergelab extract-delta tuned --base base --density 0.05 --dtype bfloat16 --out delta
    """
    check_push_option(push_to, out)
    started = time.perf_counter()
    from mergelab.merging.delta_extraction import extract_delta

    extracted = extract_delta(finetuned, base, out, density=density, dtype=dtype, overwrite=overwrite)
    seconds = time.perf_counter() - started

    def report() -> dict[str, Any]:
        return {
            "out": location_text(extracted.out),
            "seconds": seconds,
            "bytes": extracted.nbytes,
            "model_bytes": extracted.model_bytes,
            "entries": extracted.entries,
            "kept": dict(extracted.kept),
        }

    text = (
        f"{location_text(extracted.out)}: {sum(extracted.kept.values()):,} of {extracted.entries:,} entries "
        f"of {len(extracted.kept)} tensors, {readable(extracted.nbytes)} for a model of "
        f"{readable(extracted.model_bytes)}, in {seconds:.1f} s"
    )
    print_result(report, lambda: text, as_json=as_json)
    push_output(out, push_to)
