"""Outputs at URLs: made in a local folder like any other, then sent, with what makes them readable last."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

from mergelab.checkpoints.locations import is_url, location_text
from mergelab.checkpoints.output_target import MARKER
from mergelab.checkpoints.remote import Store, cache_folder, open_store
from mergelab.errors import OutputError

__all__ = ["local_output", "mirror", "shown", "writes_anywhere"]

P = ParamSpec("P")
R = TypeVar("R")

_LAST = ("model.safetensors.index.json", "tensors.json", "store.json", "config.json", "cfg.json", MARKER)
"""What readers open first; it is sent after everything else, so that a half-sent folder is not read."""

_SENDING = ".mergelab-sending"
"""The file that stands at a URL while an output is being sent there."""

_open: dict[Path, tuple[Store, dict[str, tuple[int, int]]]] = {}
"""Local folders of outputs at URLs that are being made, and what of them has been sent: sizes and times."""


def shown(out: str | os.PathLike[str]) -> str:
    """An output's place as the user wrote it; a URL keeps its two slashes."""
    return location_text(out)


@contextlib.contextmanager
def local_output(
    out: str | os.PathLike[str], *, overwrite: bool = False, resume: bool = False
) -> Iterator[Path]:
    """The local path to write an output to; of a URL the output is sent there when the block ends well.

    The local folder is in mergelab's cache and goes when all has arrived. It stays where the block fails or
    the sending does, and `resume` goes on with it; where this machine has none, `resume` fetches what is at
    the URL, as a training run needs it.

    Args:
        out: a path, or a URL such as `gs://bucket/merged`.
        overwrite: whether an output that mergelab wrote there is replaced.
        resume: whether an earlier output that was interrupted is gone on with.

    Raises:
        OutputError: the URL holds other files, or the store refuses.
    """
    if not is_url(out):
        yield Path(out)
        return
    jax = sys.modules.get("jax")
    if jax is not None and jax.process_count() > 1:
        raise OutputError(
            f"{shown(out)} cannot be written by several processes; give a folder that all of them see, and "
            "copy it there afterwards"
        )
    store = open_store(shown(out))
    base = cache_folder() / "outputs" / hashlib.sha256(store.url.encode()).hexdigest()[:16]
    folder = base / (store.url.rpartition("/")[2] or "root")
    there = _check_vacant(store, folder, overwrite=overwrite, resume=resume)
    if not resume:
        shutil.rmtree(base, ignore_errors=True)
    base.mkdir(parents=True, exist_ok=True)
    if resume and there and not folder.exists():
        _fetch_all(store, folder, there)
    _open[folder] = store, {}
    try:
        yield folder
        _send(store, folder, there)
        shutil.rmtree(base, ignore_errors=True)
    finally:
        _open.pop(folder, None)


def _check_vacant(store: Store, folder: Path, *, overwrite: bool, resume: bool) -> list[str]:
    """The names of the files at a URL, which may be replaced or gone on with."""
    with store.errors("cannot be looked up", OutputError):
        there = list(store.find())
        if not there and not overwrite and not resume and store.system.isfile(store.root):
            raise OutputError(f"{store.url} is there already; choose another name or pass overwrite")
    if not there or resume or _SENDING in there:
        return there
    if not overwrite:
        raise OutputError(f"{store.url} is not empty; choose another place or pass --overwrite")
    if MARKER not in there and "cfg.json" not in there:
        raise OutputError(
            f"{store.url} was not written by mergelab (it has no {MARKER}), so it is not replaced; choose "
            "another place, or delete it yourself"
        )
    return there


def _fetch_all(store: Store, folder: Path, names: list[str]) -> None:
    with store.errors("cannot be read", OutputError):
        for name in names:
            if name != _SENDING:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                store.system.get_file(store.at(name), str(folder / name))


def _send(store: Store, folder: Path, there: list[str]) -> None:
    """Sends a finished output: what is there is taken back first, and what makes it readable comes last."""
    with store.errors("cannot be written", OutputError):
        if folder.is_file():
            store.system.put_file(str(folder), store.root)
            return
        if not folder.is_dir():
            return  # a command that had nothing to do
        store.system.pipe_file(store.at(_SENDING), b"")
        _drop(store, [name for name in there if name.rpartition("/")[2] in _LAST])
        names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
        names.sort(key=lambda name: _LAST.index(last) if (last := name.rpartition("/")[2]) in _LAST else -1)
        for name in names:
            _put(store, folder, name)
        _drop(store, [name for name in there if name not in names and name != _SENDING])
        _drop(store, [_SENDING])


def _put(store: Store, folder: Path, name: str) -> None:
    parent = store.at(name).rpartition("/")[0]
    store.system.makedirs(parent, exist_ok=True)
    store.system.put_file(str(folder / name), store.at(name))


def _drop(store: Store, names: list[str]) -> None:
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            store.system.rm_file(store.at(name))


def mirror(folder: Path) -> None:
    """Sends what is new below the local folder of an output at a URL; does nothing for other folders.

    A training run calls it after each checkpoint, so that a machine that is taken away loses no more than
    what came after it.

    Raises:
        OutputError: the store refuses.
    """
    root = next((one for one in _open if folder == one or one in folder.parents), None)
    if root is None:
        return
    store, sent = _open[root]
    now: dict[str, tuple[int, int]] = {}
    for file in sorted(root.rglob("*")):
        name = file.relative_to(root)
        if file.is_file() and not any(part.startswith(".") for part in name.parts):
            now[name.as_posix()] = (file.stat().st_size, file.stat().st_mtime_ns)
    with store.errors("cannot be written", OutputError):
        for name, facts in now.items():
            if sent.get(name) != facts:
                _put(store, root, name)
                sent[name] = facts
        gone = [name for name in sent if name not in now]
        _drop(store, gone)
        for name in gone:
            del sent[name]


def writes_anywhere(name: str = "out") -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Lets the output of a function be a URL; its `overwrite` and `resume` mean the same there.

    Args:
        name: the argument that is the output. What the function returns names the URL in place of the local
            folder.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            bound = signature.bind(*args, **kwargs)
            out = bound.arguments.get(name)
            if not isinstance(out, str | os.PathLike) or not is_url(out):
                return function(*args, **kwargs)
            bound.apply_defaults()
            given = {**bound.arguments, **bound.arguments.get("changes", {})}
            options = given.get("options")
            flags = {
                flag: bool(given.get(flag, getattr(options, flag, False))) for flag in ("overwrite", "resume")
            }
            with local_output(out, **flags) as folder:
                bound.arguments[name] = folder
                found = function(*bound.args, **bound.kwargs)
            return cast(R, _renamed(found, folder, location_text(out)))

        return call

    return decorate


def _renamed(found: Any, folder: Path, url: str) -> Any:
    """A result in which paths in the local folder are those at the URL."""
    if isinstance(found, Path) and (found == folder or folder in found.parents):
        return Path(url) / found.relative_to(folder)
    if is_dataclass(found) and not isinstance(found, type):
        paths = {
            one.name: _renamed(value, folder, url)
            for one in fields(found)
            if isinstance(value := getattr(found, one.name), Path)
        }
        return replace(found, **paths)
    return found
