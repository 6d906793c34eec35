"""`mergelab diff`: how models differ."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergelab.cli.numbers import WholeNumber
from mergelab.cli.options import stream_layers, streaming
from mergelab.cli.output import byte_bar, print_result

if TYPE_CHECKING:
    from mergelab.merging.diff import ModelDiff

__all__ = ["command"]


@click.command("diff")
@click.argument("models", nargs=-1, required=True)
@click.option("--base", help="Model that the others were tuned from (default: found among three or more).")
@click.option("--spectra", is_flag=True, help="Find the singular values of every change; takes minutes.")
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    help="Text on which the first two models are run: activations, outputs, losses between them.",
)
@click.option("--tokens", type=WholeNumber(2), help="Number of tokens of the text to read (default: 2048).")
@stream_layers
@click.option("--out", "-o", type=click.Path(path_type=Path), help="Folder to write a page and a figure to.")
@click.option("--overwrite", is_flag=True, help="Replace the output folder if it is not empty.")
@click.option("--threads", type=WholeNumber(1), help="Number of threads that read and add.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def command(models: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Compare MODELS: A against B, and further ones, tensor by tensor and layer by layer.

    Weights are streamed within bounded memory. With a base, or where one of three models or more looks
    like the base of the others, their task vectors are compared too: angles, and signs that disagree.

    \b
    Examples:
      mergelab diff tuned base
      mergelab diff law code --base base --out diff
      mergelab diff tuned base --spectra --json
      mergelab diff tuned base --text prose.txt
    """
    options["streamed"] = streaming(options)
    if options["text"] is not None:
        from mergelab.cli.options import configure_jax

        configure_jax()
    from mergelab.merging.diff import diff_models

    with byte_bar("comparing") as bar:
        found = diff_models(*models, progress=bar.update, **options)
    print_result(found.as_data, lambda: _text(found, options["out"]), as_json=as_json)


def _text(found: ModelDiff, out: Path | None) -> str:
    from mergelab.checkpoints.locations import location_text
    from mergelab.merging.diff.page import layer_rows, percent, tensor_rows, verdict
    from mergelab.report import text_table

    header, rows = layer_rows(found)
    lines = [*verdict(found), "", text_table(header, rows, rules_before=[len(rows) - 1])]
    header, rows = tensor_rows(found.tensors, most=8)
    lines += ["", text_table(header, rows)]
    if found.moved_rows:
        moved = ", ".join(
            f"{row.row if row.token is None else repr(row.token)} {percent(row.relative_change)}"
            for row in found.moved_rows
        )
        lines += ["", f"rows that moved most: {moved}"]
    if (text := found.on_text) is not None:
        cells = [
            [layer.site, percent(layer.relative_change), f"{layer.cosine:.4f}", f"{layer.cka:.4f}"]
            for layer in text.layers
        ]
        lines += ["", text_table(["activations", "change", "cosine", "linear CKA"], cells)]
    if out is not None:
        lines += ["", location_text(out / "page.html")]
    return "\n".join(lines)
