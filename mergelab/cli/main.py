"""The `mergelab` command: a table of contents of subcommands, each loaded only when it is used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click

from mergelab import __version__
from mergelab.errors import MergelabError, did_you_mean

__all__ = ["SECTIONS", "CommandTable", "Failure", "cli", "main"]

SECTIONS: Mapping[str, Sequence[str]] = {
    "Start here": ("quickstart",),
    "Merge models": ("merge", "soup", "extract-lora"),
    "Run models": ("generate", "convert"),
    "Train and judge features": ("activations", "sae", "abliterate"),
    "Look things up": ("inspect", "operators"),
}
"""Commands by the heading they stand under; the module `mergelab.cli.NAME` holds each as `command`."""

EXIT_INTERRUPTED = 130  # 128 + SIGINT, what a shell reports for Ctrl-C


class Failure(click.ClickException):
    """Bad input or a failed environment: one `error:` line per fault on stderr, exit status 2."""

    exit_code = 2

    def __init__(self, error: MergelabError) -> None:
        self.faults: Sequence[str] = getattr(error, "faults", (str(error),))
        super().__init__("\n".join(self.faults))

    def show(self, file: Any = None) -> None:
        for fault in self.faults:
            click.echo(f"error: {fault}", file=file, err=file is None)


class CommandTable(click.Group):
    """A group that finds its commands in a table of section headings and imports them on use."""

    def __init__(self, sections: Mapping[str, Sequence[str]], **attributes: Any) -> None:
        super().__init__(**attributes)
        self.sections = sections

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for names in self.sections.values() for name in names]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        return importlib.import_module(f"mergelab.cli.{cmd_name.replace('-', '_')}").command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        names = self.list_commands(ctx)
        if not args[0].startswith("-") and args[0] not in names:
            hint = did_you_mean(args[0], names)
            ctx.fail(f"there is no command {args[0]!r}{hint}; the commands are {', '.join(names)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.list_commands(ctx)))
        for heading, names in self.sections.items():
            commands = [(name, self.get_command(ctx, name)) for name in names]
            with formatter.section(heading):
                formatter.write_dl(
                    [(name.ljust(width), c.get_short_help_str(90)) for name, c in commands if c],
                )

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # a closed pipe is met here, where click handles it, not at interpreter exit
            return result
        except MergelabError as error:
            raise Failure(error) from error
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(EXIT_INTERRUPTED)


@click.command(
    cls=CommandTable,
    sections=SECTIONS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="`mergelab COMMAND --help` shows a command's options with examples.",
)
@click.version_option(__version__, prog_name="mergelab", message="%(prog)s %(version)s")
def cli() -> None:
    """Merge language models: exact operators, streamed from disk to disk, in JAX."""


def main() -> None:
    """Runs the command line and exits: 0 done, 2 bad input (said in one sentence), 130 interrupted."""
    cli.main(prog_name="mergelab")
