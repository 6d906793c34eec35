"""Commands as members of a run of several processes: their options, who prints, and what ends all of them."""

from __future__ import annotations

import functools
import os
import re
import shlex
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from mergelab.cli.failures import Interrupted, Stopped
from mergelab.cli.numbers import WholeNumber
from mergelab.cli.verbosity import warn
from mergelab.errors import quoted
from mergelab.processes.joining import current_run, join_run, leave_run
from mergelab.processes.launch import find_launch, unjoined_tasks

if TYPE_CHECKING:
    from mergelab.processes.run import Run

__all__ = ["DURATION", "end_together", "joins_run", "show_failure"]


class _Duration(click.ParamType):
    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,3})?)(s|min|m|h)?", str(value).strip())
        seconds = float(match[1]) * {"m": 60, "min": 60, "h": 3600}.get(match[2], 1) if match else 0.0
        if not 1 <= seconds <= 1e6:
            self.fail(f"{quoted(value)} is not a time from one second on; write 60s or 5m", param, ctx)
        return seconds


DURATION = _Duration()


def joins_run(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command the options of a run of several processes, and joins it before the command begins."""

    @functools.wraps(command)
    def joined(
        *arguments: Any,
        coordinator: str | None,
        processes: int | None,
        process_id: int | None,
        join_timeout: float,
        heartbeat: float,
        **options: Any,
    ) -> Any:
        place = {"coordinator": coordinator, "processes": processes, "process_id": process_id}
        if find_launch(place, os.environ, _perhaps) is not None:
            run = join_run(**place, join_timeout=join_timeout, heartbeat=heartbeat)
            if run is not None:
                run.advice = _advice()
                _share_streams(run)
        elif processes is None and (sentence := unjoined_tasks(os.environ)):
            warn(sentence)
        return command(*arguments, **options)

    options = (
        click.option(
            "--coordinator",
            metavar="HOST:PORT",
            help="Address of process 0, where one run has several processes (default: "
            "JAX_COORDINATOR_ADDRESS, else what Slurm or a TPU pod says).",
        ),
        click.option(
            "--processes",
            type=WholeNumber(1),
            help="Number of processes of the run (default: JAX_NUM_PROCESSES, else as above); 1 stands "
            "alone.",
        ),
        click.option(
            "--process-id",
            type=WholeNumber(0),
            help="Number of this process, from 0 (default: JAX_PROCESS_ID, else as above).",
        ),
        click.option(
            "--join-timeout",
            type=DURATION,
            default="300s",
            show_default=True,
            help="Time within which all processes have to come.",
        ),
        click.option(
            "--heartbeat",
            type=DURATION,
            default="100s",
            show_default=True,
            help="Time without a sign of life after which a process counts as gone, and the run ends.",
        ),
    )
    for option in reversed(options):
        joined = option(joined)
    return joined


def _perhaps() -> tuple[str, int, int, None]:
    """Stands for a cluster that has not been asked yet: `join_run` asks it."""
    return "cluster:1", 1_000_000, 0, None


def _advice() -> str:
    """How to go on after another process has ended this one."""
    context = click.get_current_context(silent=True)
    known = (
        {name for parameter in context.command.params for name in parameter.opts} if context else set[str]()
    )
    words = ["mergelab", *sys.argv[1:]]
    if "--resume" in known and "--resume" not in words:
        words.append("--resume")
    return f"start all processes again; this one with `{shlex.join(words)}`"


def _share_streams(run: Run) -> None:
    """Leaves the console to process 0; what others have to say when they fail goes past these streams.

    Native libraries write notes of their own to standard output, which holds results: they lose it.
    """
    out = sys.stdout
    if out is not sys.__stdout__ or sys.stderr is not sys.__stderr__ or out is None:
        return  # in a test, or in a program that catches what is printed
    out.flush()
    if run.process == 0:
        own = os.dup(1)
        sys.stdout = open(own, "w", buffering=1, encoding=out.encoding, errors="backslashreplace")  # noqa: SIM115
    else:
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)


def show_failure(failure: click.ClickException) -> int:
    """Shows what failed, in a run with the process it came from, tells the others, and gives the status."""
    run = current_run()
    if run is None:
        failure.show()
        return failure.exit_code
    if run.follows(failure.__cause__ or failure):
        run.cause()
    ended = run.fail(failure.message)
    if ended is None:
        failure.show(file=sys.__stderr__)
        return failure.exit_code
    for line in run.lines(ended):
        click.echo(f"error: {line}", file=sys.__stderr__)
    return run.status(ended)


def end_together(failure: click.ClickException | None = None) -> None:
    """Waits, in a run, for the others to have done their part; also where all were stopped at one step."""
    run = current_run()
    if run is None or (isinstance(failure, Interrupted) and not _agreed(run, failure)):
        return
    leave_run(run)


def _agreed(run: Run, failure: Interrupted) -> bool:
    return isinstance(failure, Stopped) and run.stopped
