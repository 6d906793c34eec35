"""`mergelab sae`: train sparse autoencoders, judge and look at them, put them in other libraries' files."""

from __future__ import annotations

import importlib

import click

from mergelab.cli.main import CommandTable
from mergelab.cli.verbosity import add_options

__all__ = ["command"]


class _SAETable(CommandTable):
    """Subcommands live in `mergelab.cli.sae_NAME`."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        return add_options(importlib.import_module(f"mergelab.cli.sae_{cmd_name}").command)


@click.command(
    "sae",
    cls=_SAETable,
    sections={"Sparse autoencoders": ("train", "eval", "features", "export", "plan")},
    epilog="`mergelab sae COMMAND --help` shows a command's options with examples.",
)
def command() -> None:
    """Train sparse autoencoders on activations, judge them, export them.

    \b
    Examples:
      mergelab sae train configs/sae/toy.yaml --out toy
      mergelab sae eval toy --data heldout.npy
      mergelab sae features run --model model --text corpus.txt --out features.html
      mergelab sae export toy --format saelens --out toy-saelens
    """
