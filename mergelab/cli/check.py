"""`mergelab check`: whether a recipe's merge can mean something."""

from __future__ import annotations

from pathlib import Path

import click

from mergelab.cli.numbers import WholeNumber
from mergelab.cli.output import byte_bar, print_result

__all__ = ["command"]

_FOUND = 1


@click.command("check")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--full", is_flag=True, help="Read all weights, not a part of each tensor.")
@click.option("--threads", type=WholeNumber(1), help="Number of threads that read.")
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
@click.pass_context
def command(context: click.Context, recipe: Path, full: bool, threads: int | None, as_json: bool) -> None:
    """Look for whatever makes the merge of RECIPE meaningless, and say what to do about it.

    Another base, unrelated or equal models, an outlying sibling, extended or re-ordered vocabularies, NaN,
    weights that add up too high, settings and chat templates that differ. Exit status: 0 nothing was found,
    1 there are warnings, 2 the recipe or a model cannot be read.

    \b
    Examples:
      mergelab check ties.yaml
      mergelab check ties.yaml --full --json
    """
    from mergelab.merging.recipe_check import check_recipe

    with byte_bar("checking") as bar:
        found = check_recipe(recipe, full=full, threads=threads, progress=bar.update)

    def text() -> str:
        read = "all" if full else f"{found.entries:,}"
        if not found.findings:
            return f"nothing found in {len(found.models)} models ({read} weights of each read)"
        return "\n".join(f"{finding.kind}: {finding}" for finding in found.findings)

    print_result(found.as_data, text, as_json=as_json)
    if found.findings:
        context.exit(_FOUND)
