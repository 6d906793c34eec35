"""`mergelab sae export`: a finished SAE in another library's files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

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
@click.option(
    "--metadata",
    "facts",
    multiple=True,
    metavar="KEY=VALUE",
    help="A fact to write beside the weights, such as model=gpt2 or context=128; also site and target_site. "
    "Repeatable.",
)
@PUSH
def command(
    source: Path,
    format: str,
    out: Path,
    site: str | None,
    target_site: str | None,
    step: int | None,
    facts: tuple[str, ...],
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
      mergelab sae export mine.pt --format mergelab --out mine --metadata site=blocks.8.resid_post
    """
    check_push_option(push_to, out)
    known = _facts(facts, format)
    site, target_site = (
        _one(key, option, known.pop(key, None))
        for key, option in (("site", site), ("target_site", target_site))
    )
    from mergelab.checkpoints.remote_output import local_output, shown
    from mergelab.cli.options import open_sae
    from mergelab.sae.formats import reserve, sae_path, save_sae
    from mergelab.sae.formats.card import sae_card
    from mergelab.sae.sae import at_sites, with_metadata

    with (
        local_output(out) as folder,
        reserve(folder, format, inputs=[sae_path(source)]) as place,
    ):
        sae = with_metadata(at_sites(open_sae(source, step), site, target_site), known)
        save_sae(sae, place, format)
    if not sae.target_known:
        click.echo(
            f"{source} does not say what it writes and was exported as an autoencoder; if it is a "
            "transcoder, name its target (--target-site).",
            err=True,
        )
    click.echo(shown(out))
    push_output(out, push_to, sae_card(sae, format, push_to))


def _facts(given: tuple[str, ...], format: str) -> dict[str, Any]:
    """Metadata by key; what reads as a JSON number, truth value or null is one, and all else is text.

    Raises:
        click.UsageError: a fact is not KEY=VALUE, stands twice, or the format has no place for it.
    """
    found: dict[str, Any] = {}
    for fact in given:
        key, equals, text = fact.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]{0,99}", key):
            raise click.UsageError(f"--metadata {fact[:100]!r} is not KEY=VALUE, such as model=gpt2.")
        if key in found:
            raise click.UsageError(f"--metadata gives {key!r} twice; give one value.")
        if format not in ("mergelab", "saelens") and key not in ("site", "target_site"):
            raise click.UsageError(
                f"the format {format!r} has no place for --metadata {key}; export to 'mergelab' or 'saelens'."
            )
        found[key] = _value(text)
    return found


def _value(text: str) -> Any:
    from mergelab.checkpoints.json_data import parse_json
    from mergelab.errors import CheckpointError

    try:
        value = parse_json(text.encode(), "--metadata")
    except CheckpointError:
        return text
    return text if isinstance(value, dict | list | str) else value


def _one(key: str, option: str | None, fact: Any) -> str | None:
    """A site, which has an option of its own too."""
    if option is not None and fact is not None and option != fact:
        raise click.UsageError(f"--{key.replace('_', '-')} is {option!r}, but --metadata {key} is {fact!r}.")
    if fact is not None and not isinstance(fact, str):
        raise click.UsageError(f"--metadata {key} is {fact!r}; expected a site, such as blocks.8.resid_post.")
    return option if fact is None else fact
