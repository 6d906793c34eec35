"""What an exception becomes for the user: a sentence about the input or the machine, or a notice of a bug."""

from __future__ import annotations

import errno
import os
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from mergelab.cli.guard import EXIT_INTERRUPTED, EXIT_TERMINATED
from mergelab.errors import MergelabError
from mergelab.refusals import one_line, refusal, refused_file

__all__ = [
    "EXIT_BUG",
    "EXIT_CLOSED_PIPE",
    "EXIT_REFUSED",
    "Bug",
    "ClosedPipe",
    "Failure",
    "Interrupted",
    "Stopped",
    "failure_of",
]

EXIT_REFUSED = 2
EXIT_BUG = 70  # EX_SOFTWARE of sysexits.h
EXIT_CLOSED_PIPE = 141  # 128 + SIGPIPE, as of any program whose reader has gone

_READERS = {
    "json.decoder.JSONDecodeError": "it is not valid JSON",
    "yaml.error.YAMLError": "it is not valid YAML",
    "builtins.UnicodeDecodeError": "its text is not UTF-8",
    "builtins.UnicodeEncodeError": "it holds characters that cannot be written",
    "builtins.RecursionError": "it is nested too deeply, or refers to itself",
    "builtins.OverflowError": "a number in it is too large",
    "builtins.EOFError": "it ends too early",
    "safetensors_rust.SafetensorError": "it is not a valid safetensors file",
    "safetensors._safetensors_rust.SafetensorError": "it is not a valid safetensors file",
    "zipfile.BadZipFile": "it is not a valid zip archive",
    "zipfile.LargeZipFile": "it is not a valid zip archive",
    "zlib.error": "its compressed data are damaged",
    "_lzma.LZMAError": "its compressed data are damaged",
    "binascii.Error": "its encoded data are damaged",
    "_pickle.UnpicklingError": "it is not a valid pickle",
    "tokenize.TokenError": "its header is damaged",
    "tokenize.TokenizeError": "its header is damaged",
    "struct.error": "its binary data are damaged",
    "re.error": "a pattern in it is not valid",
    "re.PatternError": "a pattern in it is not valid",
    "jinja2.exceptions.TemplateError": "a template in it cannot be rendered",
    "pyo3_runtime.PanicException": "a library failed on it",
}
"""Full names of exceptions by which libraries refuse their input: names, so that none has to be imported."""

_TEXTS = {
    "integer string conversion": "a number in it has too many digits",
    "array is too big": "an array in it is too large",
    "Maximum allowed dimension exceeded": "an array in it is too large",
    "Unable to initialize backend": "JAX finds no such device here; check JAX_PLATFORMS",
    "UNAVAILABLE:": "a device or another process of the run cannot be reached",
    "DEADLINE_EXCEEDED:": "a device or another process of the run does not answer",
}
"""Words in a ValueError or RuntimeError of a library that say the input or the machine is at fault."""


class Failure(click.ClickException):
    """Bad input or a failed environment: one `error:` line per fault on stderr, exit status 2."""

    exit_code = EXIT_REFUSED

    def __init__(self, error: MergelabError | str) -> None:
        self.faults: Sequence[str] = (MergelabError(error) if isinstance(error, str) else error).faults
        super().__init__("\n".join(self.faults))

    def show(self, file: Any = None) -> None:
        for line in self.faults:
            click.echo(f"error: {line}", file=file, err=file is None)


class Bug(click.ClickException):
    """An exception that nobody foresaw: a notice where to report it, with its traceback in a file."""

    exit_code = EXIT_BUG

    def __init__(self, error: BaseException) -> None:
        from mergelab.version import __version__

        said = one_line(str(error))
        name = f"{type(error).__name__}: {said}" if said else type(error).__name__
        super().__init__(
            f"this is a bug in mergelab {__version__}: {name}; please report it {_where_to_report()}, "
            f"with the command and the traceback{_kept_traceback(error)}"
        )

    def show(self, file: Any = None) -> None:
        click.echo(f"error: {self.message}", file=file, err=file is None)


def _where_to_report() -> str:
    """The project's page of issues, if the installed package names one."""
    from importlib.metadata import PackageNotFoundError, metadata

    try:
        urls = metadata("mergelab").get_all("Project-URL") or []
    except PackageNotFoundError:
        urls = []
    pages = [url.partition(", ")[2] for url in urls if url.startswith("Issues,") and "/OWNER/" not in url]
    return f"at {pages[0]}" if pages else "to those you have mergelab from"


class ClosedPipe(click.ClickException):
    """The reader of standard output has gone, as `head` does: nothing to say and nobody to say it to."""

    exit_code = EXIT_CLOSED_PIPE

    def show(self, file: Any = None) -> None:
        pass


class Interrupted(click.ClickException):
    """Ctrl-C: SIGINT was received."""

    exit_code = EXIT_INTERRUPTED

    def __init__(self) -> None:
        super().__init__("interrupted")

    def show(self, file: Any = None) -> None:
        click.echo(self.message, file=file, err=file is None)


class Stopped(Interrupted):
    """SIGTERM was received."""

    exit_code = EXIT_TERMINATED


def failure_of(error: BaseException, subject: str, output: str | None = None) -> click.ClickException:
    """What to tell the user of an exception.

    Args:
        error: anything that a command raised.
        subject: what the command was given, to be named where the exception names no file.
        output: what it was asked to write.
    """
    if os.environ.get("MERGELAB_TRACEBACK"):
        click.echo("".join(traceback.format_exception(error)), err=True, nl=False)
    return _refusal_of(error, subject, output) or Bug(error)


def _refusal_of(error: BaseException, subject: str, output: str | None) -> click.ClickException | None:
    """What is wrong with the input or the machine; None for a bug."""
    if isinstance(error, BaseExceptionGroup):
        found = (_refusal_of(one, subject, output) for one in error.exceptions)
        return next((refused for refused in found if refused is not None), None)
    if isinstance(error, MergelabError):
        return Failure(error)
    if isinstance(error, OSError) and _of_a_standard_stream(error):
        return _stream_failure(error, output)
    sentence = _sentence(error)
    return None if sentence is None else Failure(f"{refused_file(error) or subject}: {sentence}")


def _sentence(error: BaseException) -> str | None:
    """What is wrong and what to do, without the file's name; None for a bug."""
    text = one_line(str(error))
    quoted = f" ({text})" if text else ""
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}
    reader = next((said for name, said in _READERS.items() if name in names), None)
    kinds = OSError | MemoryError | ValueError | RuntimeError | ImportError
    foreign = isinstance(error, kinds) and not isinstance(error, NotImplementedError)
    if (foreign or reader is not None) and (why := refusal(error)):
        return why
    if isinstance(error, ImportError) and not (error.name or "mergelab").startswith("mergelab"):
        return f"the package {error.name} is missing or of another version{quoted}; install mergelab again"
    if reader is not None:
        return f"{reader}{quoted}; check the file"
    if isinstance(error, ValueError | RuntimeError):
        for words, said in _TEXTS.items():
            if words in text:
                return f"{said}{quoted}"
    # Downloads and pipes raise OSError without a number, tokenizers an Exception of no class.
    return f"it failed{quoted}" if isinstance(error, OSError) or type(error) is Exception else None


def _of_a_standard_stream(error: OSError) -> bool:
    """Whether printing failed: the exception came through click's `echo`, our flush, or a progress bar."""
    return any(
        frame.f_code is click.echo.__code__
        or frame.f_code.co_name == "flush_output"
        or frame.f_globals.get("__name__", "").startswith("tqdm.")
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )


def _stream_failure(error: OSError, output: str | None) -> click.ClickException:
    if error.errno == errno.EPIPE:
        return ClosedPipe("")
    whole = f"{output} itself is whole; " if output and Path(output).exists() else ""
    reason = one_line(error.strerror or str(error))
    return Failure(f"standard output cannot be written ({reason}); {whole}send what is printed elsewhere")


def _kept_traceback(error: BaseException) -> str:
    """Writes the traceback to a file of its own; returns ` in FILE`, or how to see it."""
    if os.environ.get("MERGELAB_TRACEBACK"):
        return " above"
    try:
        number, name = tempfile.mkstemp(prefix="mergelab-bug-", suffix=".txt")
        with open(number, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(traceback.format_exception(error))
    except OSError:
        return " that MERGELAB_TRACEBACK=1 shows"
    return f" in {name} (MERGELAB_TRACEBACK=1 shows it here)"
