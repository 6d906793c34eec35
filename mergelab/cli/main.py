"""The `mergelab` command: a table of contents of subcommands, each loaded only when it is used."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import click

from mergelab.accelerators import idle_accelerator
from mergelab.cli.failures import ClosedPipe, Failure, Interrupted, Stopped, failure_of
from mergelab.cli.guard import guarded
from mergelab.cli.joined import end_together, show_failure
from mergelab.cli.verbosity import add_options, warn
from mergelab.errors import did_you_mean
from mergelab.processes.termination import Terminated
from mergelab.version import __version__

__all__ = ["SECTIONS", "CommandTable", "Failure", "cli", "main", "run"]

SECTIONS: Mapping[str, Sequence[str]] = {
    "Start here": ("quickstart",),
    "Merge models": ("merge", "soup", "check", "diff", "explain", "extract-lora", "extract-delta"),
    "Train models": ("finetune",),
    "Run models": ("generate", "evaluate", "solve", "trace-decision", "statistics", "convert"),
    "Train and judge features": ("activations", "sae", "abliterate"),
    "Look things up": ("inspect", "operators", "schema"),
}
"""Commands by the heading they stand under; the module `mergelab.cli.NAME` holds each as `command`."""


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
        return add_options(importlib.import_module(f"mergelab.cli.{cmd_name.replace('-', '_')}").command)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        names = self.list_commands(ctx)
        if not args[0].startswith("-") and args[0] not in names:
            hint = did_you_mean(args[0], names)
            ctx.fail(f"there is no command {args[0]!r}{hint}; the commands are {', '.join(names)}")
        name, command, rest = super().resolve_command(ctx, args)
        ctx.meta[_RESOLVED] = name, command, tuple(rest)  # a copy: parsing consumes the list
        return name, command, rest

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
            flush_output()  # a closed pipe is met here, and not at interpreter exit
            if ctx.parent is None:
                _logger.info("done; at most %s of memory were resident", _peak())
            return result
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt as error:
            raise (Stopped if isinstance(error, Terminated) else Interrupted)() from error
        except (SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # extensions in Rust panic with a BaseException
            subject, output = _given(ctx)
            raise failure_of(error, subject, output) from error


_logger = logging.getLogger(__name__)

_READS_ONLY = {"check", "convert", "diff", "inspect", "operators", "schema"}
"""Commands that compute nothing, and so do without an accelerator."""

_RESOLVED = "mergelab.resolved"  # key of `Context.meta`: the command, its name and its arguments


def _given(ctx: click.Context) -> tuple[str, str | None]:
    """What the command was given first (else its name), and what it was asked to write."""
    name, command, arguments = ctx.meta.get(_RESOLVED, (None, None, []))
    if command is None:
        return ctx.info_name or "mergelab", None
    try:
        parsed = command.make_context(name, list(arguments), parent=ctx, resilient_parsing=True)
    except Exception:
        return str(name), None
    values = [parsed.params.get(str(p.name)) for p in command.params if isinstance(p, click.Argument)]
    firsts = [value[0] if isinstance(value, tuple) and value else value for value in values]
    out = parsed.params.get("out")
    return str(firsts[0]) if firsts and firsts[0] else str(name), None if out is None else str(out)


def _peak() -> str:
    """The largest amount of memory that this process has held."""
    try:
        import resource
    except ImportError:  # Windows
        return "an unknown amount"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in kB; in bytes on macOS
    return f"{peak / (2**20 if sys.platform == 'darwin' else 2**10):,.0f} MiB"


def flush_output() -> None:
    """Writes out what is buffered for standard output, if there is one."""
    if sys.stdout is not None:
        sys.stdout.flush()


@click.command(
    cls=CommandTable,
    sections=SECTIONS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="`mergelab COMMAND --help` shows a command's options with examples. Exit status: 0 done, "
    "1 `check` found something, 2 refused (said in a sentence), 70 a bug in mergelab, 130 interrupted, "
    "143 terminated.",
)
@click.version_option(__version__, prog_name="mergelab", message="%(prog)s %(version)s")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Merge language models, train and evaluate sparse autoencoders, and edit models, in JAX."""
    name, _, arguments = ctx.meta[_RESOLVED]
    asks = {"-h", "--help"} & {*arguments}
    if name not in _READS_ONLY and not asks and (sentence := idle_accelerator()):
        warn(sentence)


add_options(cli)


def main() -> None:
    """Runs the command line and exits.

    The status is 0 if all was done, 2 if input or machine do not allow it (said in a sentence), 70 for a bug
    in mergelab, 130 after Ctrl-C, 143 after SIGTERM, 141 if the reader of standard output has gone.
    """
    guarded(run)


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line, shows what failed, and returns the exit status.

    Args:
        arguments: those of the command line; `sys.argv` if None.
    """
    if not os.environ.get("MERGELAB_TRACEBACK"):
        _quiet_libraries()
    for stream in (sys.stdout, sys.stderr):
        # A name or text that the locale's encoding lacks is no reason to fail.
        if stream is not None and stream.errors == "strict":  # pyright: ignore[reportAttributeAccessIssue]
            stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        status = cli.main(arguments, prog_name="mergelab", standalone_mode=False)
        end_together()
        return status if isinstance(status, int) else 0
    except click.Abort:
        raise KeyboardInterrupt from None
    except click.ClickException as failure:
        return _shown(failure)
    except SystemExit as leaving:
        if isinstance(leaving.__context__, BrokenPipeError):
            return ClosedPipe.exit_code
        return leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
    except Exception as error:
        return _shown(failure_of(error, "mergelab"))


def _shown(failure: click.ClickException) -> int:
    if isinstance(failure, Interrupted):
        end_together(failure)
        raise (Terminated if isinstance(failure, Stopped) else KeyboardInterrupt) from failure
    try:
        return show_failure(failure)
    except OSError:  # nobody listens on standard error
        return failure.exit_code


def _quiet_libraries() -> None:
    """Drops what libraries print of an error that they raise too, in threads and event loops of their own."""
    for name in ("absl", "asyncio", "concurrent.futures"):
        logging.getLogger(name).addFilter(lambda record: False)
    # The line about an idle accelerator says it with the cure.
    said = "may be present on this machine"
    logging.getLogger("jax._src.xla_bridge").addFilter(lambda record: said not in record.getMessage())
    threading.excepthook = lambda arguments: None
    sys.unraisablehook = lambda unraisable: None
    usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
        # What mergelab itself warns of is one line, as in the reports of commands.
        if category is UserWarning:
            warn(message)
        else:
            usual(message, category, *place)

    warnings.showwarning = show
