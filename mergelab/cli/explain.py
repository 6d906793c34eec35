"""`mergelab explain`: what a merge did to its parents, in the latents of an SAE of their base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mergelab.checkpoints.locations import location_text
from mergelab.cli.numbers import Seed, WholeNumber
from mergelab.cli.options import stream_layers, streaming
from mergelab.cli.output import StageBar, print_result

__all__ = ["command"]


@click.command("explain")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--sae", required=True, type=click.Path(path_type=Path), help="SAE of a site of the base.")
@click.option(
    "--text", "texts", multiple=True, required=True, metavar="PLACE",
    help="Text of the kinds that the parents are for: file, glob, folder or data set; repeatable.",
)  # fmt: skip
@click.option("--out", "-o", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    help="Common base of the models.  [default: the recipe's base_model]",
)
@click.option("--site", help="Site that the SAE reads.  [default: the one it says]")
@click.option(
    "--context", type=WholeNumber(2), help="Tokens in a context.  [default: as in the SAE's training]"
)
@click.option(
    "--contexts", type=WholeNumber(4), default=256, show_default=True, help="Maximum number of contexts."
)
@click.option(
    "--batch", type=WholeNumber(1), default=8, show_default=True, help="Contexts in one forward pass."
)
@click.option(
    "--latents", type=WholeNumber(1), default=200, show_default=True,
    help="Maximum number of latents of each parent that are told in full.",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Dtype that the models are run in.  [default: the stored one]",
)  # fmt: skip
@click.option(
    "--any-model", is_flag=True, help="Accept an SAE that belongs to other weights than the base's."
)
@click.option("--seed", type=Seed(0, fold=False), default=0, show_default=True, help="Seed of all draws.")
@stream_layers
@click.option("--overwrite", is_flag=True, help="Replace the output folder if it is not empty.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    recipe: Path, sae: Path, texts: tuple[str, ...], out: Path, as_json: bool, **options: Any
) -> None:
    """Say what the merge of RECIPE did to its parents, in features.

    Base, parents and merge run on the same text. OUT gets explanation.html and explanation.json: the latents
    that each parent gained, beside controls; which of them survived, weakened, were interfered with or lost;
    and whether putting the lost ones back returns the parent's loss. docs/explain.md says how.

    \b
    Examples:
      mergelab explain recipe.yaml --sae sae --text code.txt --out explained
      mergelab explain recipe.yaml --sae sae --text a.txt --text b.txt --out explained --contexts 512 --json
    """
    from mergelab.cli.options import configure_jax

    options["streamed"] = streaming(options)
    configure_jax()
    from mergelab.explain import explain_merge

    with StageBar(quiet=as_json) as bar:
        found = explain_merge(recipe, sae, texts, out, progress=bar.show, **options)
    print_result(
        found.to_json,
        lambda: "\n".join([*found.verdict(), location_text(out)]),
        as_json=as_json,
        indent=None,
    )
