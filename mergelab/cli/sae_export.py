"""`mergelab sae export`: a finished SAE in another library's files."""

from __future__ import annotations

from pathlib import Path

import click

from mergelab.cli.numbers import WholeNumber
from mergelab.cli.options import PUSH, check_push_option, push_output

__all__ = ["command"]

_FORMATS = ["saelens", "sparsify", "openai", "dictionary_learning", "gemma-scope", "mergelab"]


@click.command("export")
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "--format", "format", type=click.Choice(_FORMATS), required=True, help="Library whose files to write."
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="New folder (openai: new file) to write."
)
@click.option("--site", help="Site it reads, if it does not say so: blocks.8.resid_post.")
@click.option("--target-site", help="Site a transcoder writes, if it does not say so.")
@click.option("--step", type=WholeNumber(1), help="Step of a run's checkpoint (default: its result).")
@PUSH
def command(
    source: Path,
    format: str,
    out: Path,
    site: str | None,
    target_site: str | None,
    step: int | None,
    push_to: str | None,
) -> None:
    """Write the SAE in SOURCE for another library.

    SOURCE is a run's folder, its `final`, or an SAE of any format that can be read; of a run that has not
    finished, the newest checkpoint is taken. What a format has no place for is an error, not a loss. Sites
    are written under the other library's names.

    \b
    Examples:
      mergelab sae export run --format saelens --out run-saelens
      mergelab sae export run --format openai --out run.pt
      mergelab sae export run --step 2000 --format mergelab --out run-2000
      mergelab sae export run-saelens --format mergelab --out back
      mergelab sae export old --format saelens --out new --target-site blocks.3.mlp.out
    """
    check_push_option(push_to, out)
    from mergelab.checkpoints.remote_output import local_output, shown
    from mergelab.cli.options import open_sae
    from mergelab.sae.formats import reserve, sae_path, save_sae
    from mergelab.sae.formats.card import sae_card
    from mergelab.sae.sae import at_sites

    with (
        local_output(out) as folder,
        reserve(folder, format, inputs=[sae_path(source)]) as place,
    ):
        sae = at_sites(open_sae(source, step), site, target_site)
        save_sae(sae, place, format)
    if not sae.target_known:
        click.echo(
            f"{source} does not say what it writes and was exported as an autoencoder; if it is a "
            "transcoder, name its target (--target-site).",
            err=True,
        )
    click.echo(shown(out))
    push_output(out, push_to, sae_card(sae, format, push_to))
