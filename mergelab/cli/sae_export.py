"""`mergelab sae export`: a finished dictionary in another library's files."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["command"]

_FORMATS = ["saelens", "sparsify", "openai", "dictionary_learning", "gemma-scope", "mergelab"]


@click.command("export")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--format", "format", type=click.Choice(_FORMATS), required=True, help="Whose files to write.")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="A new folder (openai: a new file)."
)
def command(source: Path, format: str, out: Path) -> None:
    """Write the dictionary in SOURCE for another library.

    SOURCE is a run's folder, its `final`, or a dictionary of any format that can be read. What a format has
    no place for is an error, not a loss.

    \b
    Examples:
      mergelab sae export run --format saelens --out run-saelens
      mergelab sae export run --format openai --out run.pt
      mergelab sae export run-saelens --format mergelab --out back
    """
    from mergelab.cli.sae_folder import open_dictionary
    from mergelab.sae.formats import reserve, save_dictionary

    with reserve(out, format, inputs=[source]) as place:
        save_dictionary(open_dictionary(source), place, format)
    click.echo(str(out))
