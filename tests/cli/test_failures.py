"""What an exception of a command becomes: a sentence and status 2, or a notice of a bug and status 70."""

from __future__ import annotations

import asyncio
import binascii
import errno
import io
import json
import lzma
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import click
import jax
import jinja2
import numpy as np
import pytest
import safetensors
import tokenizers
import yaml
from click.testing import CliRunner, Result

from mergelab.cli import main
from mergelab.cli.failures import failure_of
from mergelab.cli.main import CommandTable, cli
from mergelab.errors import MeshError, RecipeError
from mergelab.processes import Terminated
from mergelab.refusals import one_line, refusal, refused_file
from mergelab.version import __version__


def _raise(error: BaseException) -> Callable[[], None]:
    def run() -> None:
        raise error

    return run


def _raised(run: Callable[[], object]) -> BaseException:
    try:
        run()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], Result]:
    """Runs a command that does what it is given."""

    def invoke(run: Callable[[], object]) -> Result:
        @click.command()
        @click.argument("source")
        @click.option("--out")
        def command(source: str, out: str | None) -> None:
            run()

        monkeypatch.setattr(CommandTable, "get_command", lambda self, ctx, name: command)
        return CliRunner().invoke(cli, ["merge", "--out", "merged", "recipe.yaml"])

    return invoke


def _os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number), "models/a.bin")


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "the disk is full; free some space"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EFBIG, "the file is larger than the disk or a limit allows"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "permission is denied"),
        (errno.EPERM, "permission is denied"),
        (errno.ENOENT, "there is no such file or folder"),
        (errno.ENAMETOOLONG, "the name is too long"),
        (errno.EMFILE, "too many files are open"),
        (errno.ENOTDIR, "a part of the path is a file"),
        (errno.EISDIR, "it is a folder"),
        (errno.ELOOP, "symbolic links lead in a circle"),
        (errno.EIO, "the disk or the network fails"),
        (errno.ENOMEM, "there is not enough memory"),
        (errno.ENOTTY, "Inappropriate ioctl for device"),
    ],
)
def test_what_the_system_refuses_names_the_file_and_a_remedy(
    fail: Callable[..., Result], number: int, said: str
) -> None:
    result = fail(_raise(_os_error(number)))
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: models/a.bin: {said}")
    assert result.stderr.count("\n") == 1


def _bad_unicode() -> None:
    b"\xff\xfe".decode("utf-8")


def _nested(depth: int = 0) -> None:
    _nested(depth + 1)


def _safetensors() -> None:
    safetensors.deserialize(b"not safetensors")


def _group() -> None:
    raise ExceptionGroup("tasks", [KeyError("of no use"), _os_error(errno.ENOSPC)])


READERS: dict[str, tuple[Callable[[], object], str]] = {
    "json": (lambda: json.loads("{"), "it is not valid JSON"),
    "yaml": (lambda: yaml.safe_load("[a"), "it is not valid YAML"),
    "unicode": (_bad_unicode, "its text is not UTF-8"),
    "recursion": (_nested, "it is nested too deeply"),
    "overflow": (lambda: float(10**400), "a number in it is too large"),
    "digits": (lambda: int("9" * 5000), "a number in it has too many digits"),
    "safetensors": (_safetensors, "it is not a valid safetensors file"),
    "zip": (_raise(zipfile.BadZipFile("Bad CRC-32")), "it is not a valid zip archive"),
    "zlib": (lambda: zlib.decompress(b"x"), "its compressed data are damaged"),
    "lzma": (lambda: lzma.decompress(b"x"), "its compressed data are damaged"),
    "base64": (lambda: binascii.a2b_base64("x"), "its encoded data are damaged"),
    "pickle": (lambda: pickle.loads(b"x"), "it is not a valid pickle"),
    "struct": (lambda: struct.unpack("<I", b""), "its binary data are damaged"),
    "pattern": (lambda: re.compile("("), "a pattern in it is not valid"),
    "template": (lambda: jinja2.Template("{% if %}"), "a template in it cannot be rendered"),
    "end": (_raise(EOFError("end of file")), "it ends too early"),
    "tokenizer": (lambda: tokenizers.Tokenizer.from_str("{}"), "it failed"),
    "memory": (_raise(MemoryError()), "there is not enough memory; close"),
    "numpy": (lambda: np.empty(2**57), "there is not enough memory (Unable to allocate"),
    "shape": (lambda: np.empty(2**62), "an array in it is too large"),
    "dimension": (lambda: np.empty(2**64), "an array in it is too large"),
    "threads": (_raise(RuntimeError("can't start new thread")), "there is not enough memory"),
    "device": (
        _raise(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.")),
        "there is not enough memory (RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.)",
    ),
    "no device": (
        _raise(RuntimeError("Unable to initialize backend 'tpu': none")),
        "JAX finds no such device here",
    ),
    "orbax": (
        _raise(ValueError("OUT_OF_RANGE: Failed to write 12 bytes to file 4: No space left on device [...]")),
        "the disk is full",
    ),
    "download": (_raise(OSError("no connection to huggingface.co")), "it failed (no connection"),
    "package": (_raise(ModuleNotFoundError("none", name="yaml")), "the package yaml is missing"),
    "version": (_raise(ImportError("no such name", name="jax")), "the package jax is missing or of another"),
    "extension": (_raise(ImportError("x.so: Too many open files", name="jax")), "too many files are open"),
}


@pytest.mark.parametrize("kind", READERS)
def test_what_a_library_raises_is_one_sentence_about_what_the_command_was_given(
    fail: Callable[..., Result], kind: str
) -> None:
    run, said = READERS[kind]
    result = fail(run)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: recipe.yaml: {said}")
    assert result.stderr.count("\n") == 1
    assert len(result.stderr) < 1000


def test_of_several_exceptions_the_one_that_says_why_counts(fail: Callable[..., Result]) -> None:
    assert fail(_group).stderr.startswith("error: models/a.bin: the disk is full")


BUGS = [
    KeyError("name"), ValueError("shapes (2,) and (3,)"), AssertionError(), NotImplementedError("later"),
    TypeError("'int' object is not iterable"), ZeroDivisionError("division by zero"),
    RuntimeError("generator raised StopIteration"), asyncio.CancelledError(),
    ExceptionGroup("several", [KeyError()]),
]  # fmt: skip


@pytest.mark.parametrize("error", BUGS, ids=repr)
def test_a_bug_is_a_short_notice_and_a_traceback_in_a_file(
    fail: Callable[..., Result], error: BaseException, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = fail(_raise(error))
    (file,) = tmp_path.iterdir()
    assert result.exit_code == 70
    assert f"this is a bug in mergelab {__version__}: {type(error).__name__}" in result.stderr
    assert f"the traceback in {file}" in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback (most recent call last)" in file.read_text().replace("Exception Group ", "")


def test_a_traceback_is_shown_on_request(
    fail: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MERGELAB_TRACEBACK", "1")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert "Traceback (most recent call last)" in fail(_raise(KeyError("name"))).stderr
    assert "Traceback (most recent call last)" in fail(_raise(_os_error(errno.ENOSPC))).stderr
    assert not list(tmp_path.iterdir())


def test_a_bug_on_a_full_disk_is_a_notice_too(
    fail: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.mkstemp", lambda **_: _raise(_os_error(errno.ENOSPC))())
    assert "the traceback that MERGELAB_TRACEBACK=1 shows" in fail(_raise(KeyError("name"))).stderr


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (Terminated(), 143)])
def test_an_interruption_is_one_word(fail: Callable[..., Result], error: BaseException, status: int) -> None:
    result = fail(_raise(error))
    assert (result.exit_code, result.stderr) == (status, "interrupted\n")


def test_a_panic_of_a_library_in_rust_is_no_traceback(fail: Callable[..., Result]) -> None:
    panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})
    result = fail(_raise(panic("index out of bounds")))
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "a library failed on it (index out of bounds)" in result.stderr


def test_many_faults_and_long_ones_are_cut(fail: Callable[..., Result]) -> None:
    result = fail(_raise(RecipeError([f"fault {number}" for number in range(1000)])))
    assert result.stderr.splitlines()[-2:] == ["error: fault 19", "error: and 980 more"]
    assert len(fail(_raise(MeshError("x" * 10**6))).stderr) < 2100
    assert len(fail(_raise(RecipeError(["x" * 1500] * 5))).stderr) < 2100


@pytest.mark.parametrize("arguments", [["--out", "o", "r"], ["r", "--out=o"], ["r", "--out"], ["--no", "r"]])
def test_what_a_command_was_given_is_found_among_its_options(arguments: list[str]) -> None:
    @click.command()
    @click.argument("source")
    @click.option("--out")
    def command(source: str, out: str) -> None: ...

    context = click.Context(cli)
    context.meta[main._RESOLVED] = "merge", command, tuple(arguments)
    assert main._given(context)[0] in ("r", "merge")
    assert main._given(context) == ("r", "o") or len(arguments) == 2


class _FullDisk(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failed_print_is_no_failed_output(tmp_path: Path) -> None:
    error = _raised(lambda: click.echo("text", file=_FullDisk()))
    assert isinstance(error, OSError)
    out = tmp_path / "merged"
    out.mkdir()
    assert failure_of(error, "recipe.yaml", str(out)).format_message() == (
        f"standard output cannot be written (No space left on device); {out} itself is whole; "
        "send what is printed elsewhere"
    )
    assert "whole" not in failure_of(error, "recipe.yaml", str(tmp_path / "absent")).format_message()


def _mergelab(*arguments: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-m", "mergelab", *arguments], **options)  # type: ignore[call-overload]


@pytest.mark.skipif(sys.platform != "linux", reason="a device of Linux")
def test_a_full_device_as_standard_output_is_one_sentence() -> None:
    with open("/dev/full", "w") as full:
        run = _mergelab("operators", stdout=full, stderr=subprocess.PIPE)
    assert run.returncode == 2
    assert run.stderr.startswith(b"error: standard output cannot be written (No space left on device)")
    assert run.stderr.count(b"\n") == 1


def test_a_reader_that_has_gone_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    run = _mergelab("operators", stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (run.returncode, run.stderr) == (141, b"")


def test_an_encoding_that_lacks_a_letter_is_no_error() -> None:
    ascii_only = {**os.environ, "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    run = _mergelab("merge", "rezept-ü.yaml", "--dry-run", capture_output=True, env=ascii_only)
    assert (run.returncode, run.stderr.count(b"\n")) == (2, 1)
    assert b"does not exist" in run.stderr


@pytest.mark.parametrize("text", ["", "one\ntwo   three", "x" * 1000])
def test_text_on_one_line(text: str) -> None:
    assert "\n" not in one_line(text)
    assert len(one_line(text)) <= 305


def test_other_errors_are_no_refusals() -> None:
    assert refusal(ValueError("shapes differ")) is None
    assert refusal(KeyError("name")) is None
    assert refused_file(ValueError("shapes differ")) is None
    assert refused_file(OSError(errno.ENOENT, "no", b"bytes\xff")) == "bytes\udcff"
    assert refused_file(OSError(errno.ENOENT, "no", 3)) is None
