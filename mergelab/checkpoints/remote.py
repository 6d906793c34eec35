"""Models at URLs (`gs://`, `s3://`, ...): listed and copied through fsspec into a cache.

A copy is taken, not read in place: a merge reads its inputs more than once and from many threads, and a
store answers each piece in a tenth of a second. What the cache holds is fetched again only where the
store's own mark of a file (its ETag, hash, generation or time) has changed.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mergelab.checkpoints.json_data import parse_json_object, read_optional_json
from mergelab.checkpoints.wanted_files import Need, wanted_files
from mergelab.errors import CheckpointError, DependencyError, MergelabError
from mergelab.refusals import one_line, refusal

__all__ = ["Store", "cache_folder", "fetch_files", "fetch_url", "open_store", "sparse_copy"]

_STAMPS = (
    "ETag",
    "etag",
    "md5Hash",
    "generation",
    "mtime",
    "LastModified",
    "last_modified",
    "updated",
    "created",
)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz", ".npy")
_THREADS = 4
_GGUF_HEADER = 64 * 2**20  # tokenizers are in it


def cache_folder() -> Path:
    """Where copies are kept: `$XDG_CACHE_HOME/mergelab/remote`, or `~/.cache/mergelab/remote`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mergelab" / "remote"


@dataclass(frozen=True)
class Store:
    """A file system elsewhere, and a place in it.

    Attributes:
        url: location in the user's words.
        system: the file system of fsspec.
        root: the place, as the file system writes it.
    """

    url: str
    system: Any
    root: str

    def find(self) -> dict[str, Mapping[str, Any]]:
        """The facts of all files below the place, by their paths from there.

        Raises:
            CheckpointError: the store refuses or cannot be reached, or a path leaves the place.
        """
        with self.errors("cannot be listed"):
            try:
                self.system.invalidate_cache()
                found = self.system.find(self.root, detail=True)
            except FileNotFoundError:
                return {}
        prefix = f"{self.root.rstrip('/')}/"
        inside = {
            name.removeprefix(prefix): facts for name, facts in found.items() if name.startswith(prefix)
        }
        return {checked(name, self.url): facts for name, facts in inside.items() if name}

    def at(self, name: str) -> str:
        """The path of a file below the place."""
        return f"{self.root.rstrip('/')}/{name}"

    @contextlib.contextmanager
    def errors(self, what: str, kind: type[MergelabError] = CheckpointError) -> Iterator[None]:
        """Turns what the store refuses into one sentence about the URL."""
        try:
            yield
        except (MergelabError, FileNotFoundError):
            raise
        except Exception as error:  # every store's client raises types of its own
            own = refusal(error) if isinstance(error, OSError) and error.filename else None
            why = own or one_line(str(error), 300) or type(error).__name__
            raise kind(f"{self.url} {what} ({why}); check the address, the login and the network") from None


def open_store(url: str) -> Store:
    """The store that a URL names, through fsspec.

    Raises:
        DependencyError: the package for this kind of store is missing.
        CheckpointError: there is no such kind, or the store cannot be opened.
    """
    scheme = url.partition("://")[0]
    try:
        from fsspec.core import url_to_fs

        system, root = url_to_fs(url)
    except ImportError as error:
        raise DependencyError(
            f"{url} needs another package ({one_line(str(error), 200)}); install mergelab[remote], or the "
            f"one for {scheme}://"
        ) from None
    except Exception as error:
        raise CheckpointError(
            f"{url} cannot be opened ({one_line(str(error), 200) or type(error).__name__}); gs://, s3:// and "
            "the other file systems of fsspec can"
        ) from None
    return Store(url.rstrip("/"), system, str(root).rstrip("/"))


def checked(name: str, url: str) -> str:
    """Returns the name of a file of a store if it stays below the folder it is copied to.

    Raises:
        CheckpointError: it does not; anybody who may write there chooses names.
    """
    if any(part in ("", ".", "..") for part in name.split("/")) or "\\" in name or "\0" in name:
        raise CheckpointError(
            f"{url} has a file named {name!r}, which is not a path inside it; do not use it"
        )
    return name


def fetch_url(url: str, need: Need = "model") -> Path:
    """The local copy of what is needed of a model at a URL, a folder or one file.

    Raises:
        CheckpointError: there is nothing, or it cannot be read.
        DependencyError: the package for this kind of store is missing.
    """
    store = open_store(url)
    found = store.find()
    within = ""
    if not found:  # perhaps it is one file
        parent, _, within = store.root.rpartition("/")
        store = Store(store.url.rpartition("/")[0], store.system, parent)
        with store.errors("cannot be listed"):
            entries = []
            with contextlib.suppress(FileNotFoundError):
                entries = store.system.ls(parent, detail=True)
        files = [entry for entry in entries if entry.get("type") == "file"]
        found = {checked(entry["name"].rpartition("/")[2], url): entry for entry in files}
        if within not in found:
            raise CheckpointError(f"{url} does not exist, or holds no files; check the address")
    read = partial(_index, store)
    wanted = wanted_files(found, within, need, url, read)
    if need == "model" and not any(name.endswith(_WEIGHTS) for name in wanted):
        wanted = sorted(found)  # in Orbax form, or of another kind: readers will say
    folder = _copy(store, {name: found[name] for name in wanted}, found)
    return folder / within


def fetch_files(pattern: str) -> list[Path]:
    """Local copies of the files that a URL with `*` matches, or of those in a folder, by their names.

    Raises:
        CheckpointError: none does, or one cannot be read.
    """
    parent, _, last = pattern.rpartition("/")
    store = open_store(parent)
    found = store.find()
    names = sorted(name for name in found if "/" not in name and fnmatch.fnmatchcase(name, last))
    if not names and any(name.startswith(f"{last}/") for name in found):
        return fetch_files(f"{pattern}/*")
    if not names:
        raise CheckpointError(f"{pattern}: no file matches; check the address")
    beside = [name for name in found if "/" not in name and name.endswith(".json")]
    folder = _copy(store, {name: found[name] for name in {*names, *beside}}, found)
    return [folder / name for name in names]


def _index(store: Store, name: str) -> Mapping[str, Any]:
    with store.errors("cannot be read"):
        return parse_json_object(store.system.cat_file(store.at(name)), f"{store.url}/{name}")


def _copy(
    store: Store, wanted: Mapping[str, Mapping[str, Any]], everything: Mapping[str, Mapping[str, Any]]
) -> Path:
    """Brings the copy of a place up to date; returns its folder, which is called as the place."""
    base = cache_folder() / hashlib.sha256(store.url.encode()).hexdigest()[:16]
    folder, note = base / (store.url.rpartition("/")[2] or "root"), base / "stamps.json"
    folder.mkdir(parents=True, exist_ok=True)
    stamps = {str(name): str(stamp) for name, stamp in read_optional_json(note).items()}
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        if file.relative_to(folder).as_posix() not in everything:
            file.unlink()  # a shard of before would be taken for a part of the model
    due = {
        name: facts
        for name, facts in wanted.items()
        if stamps.get(name) != stamp_of(facts) or not _is_whole(folder / name, facts)
    }
    needed = sum(int(facts.get("size") or 0) for facts in due.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{store.url}: the copy needs {needed / 1e9:.3f} GB, but {folder} has only {free / 1e9:.3f} GB "
            "free; free some space, or set XDG_CACHE_HOME to another disk"
        )
    with _bar(store.url, needed) as advance, ThreadPoolExecutor(_THREADS) as pool:
        tasks = {
            pool.submit(_fetch, store, name, folder / name, int(facts.get("size") or 0), advance): name
            for name, facts in due.items()
        }
        for task, name in tasks.items():
            task.result()
            stamps[name] = stamp_of(due[name])
            _write_note(note, stamps)
    return folder


def stamp_of(facts: Mapping[str, Any]) -> str:
    """What tells one content of a file from another, as its store says it."""
    marks = [f"{name} {facts[name]}" for name in _STAMPS if facts.get(name) is not None]
    return f"{facts.get('size')} {' '.join(marks)}"


def _is_whole(path: Path, facts: Mapping[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == facts.get("size")


def _fetch(store: Store, name: str, target: Path, size: int, advance: Callable[[int], object]) -> None:
    """Copies one file beside its place, and gives it its name when it is whole."""
    from fsspec.callbacks import Callback

    class Advance(Callback):
        def relative_update(self, inc: int = 1) -> None:
            advance(inc)

    target.parent.mkdir(parents=True, exist_ok=True)
    number, partial_name = tempfile.mkstemp(prefix=".", suffix=".part", dir=target.parent)
    os.close(number)
    try:
        with store.errors(f"does not give {name!r}"):
            try:
                store.system.get_file(store.at(name), partial_name, callback=Advance())
            except FileNotFoundError:
                raise CheckpointError(f"{store.url}/{name} is gone; another program is writing it") from None
        if size and os.path.getsize(partial_name) != size:
            raise CheckpointError(f"{store.url}/{name} broke off before its {size:,} bytes; run again")
        os.replace(partial_name, target)
    finally:
        Path(partial_name).unlink(missing_ok=True)


@contextlib.contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], object]]:
    if not total or sys.stderr is None:
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc=what, disable=None, leave=False) as bar:
        yield bar.update


def _write_note(path: Path, stamps: Mapping[str, str]) -> None:
    partial_path = path.with_suffix(f".{os.getpid()}.part")
    partial_path.write_text(json.dumps(dict(stamps)))
    os.replace(partial_path, path)


def sparse_copy(size: int, read: Callable[[int, int], bytes], target: Path) -> None:
    """Makes a weight file of a header and a hole: as long as the real one, and no larger on the disk.

    Args:
        size: bytes of the real file.
        read: its bytes from `start` to `stop`.
        target: the file to make, of which only headers may be asked.
    """
    if target.suffix == ".gguf":
        header = read(0, min(size, _GGUF_HEADER))
    else:
        header = read(0, min(size, 8))
        length = int.from_bytes(header, "little")
        if length <= min(size, 100_000_000):
            header += read(8, min(size, 8 + length))
    with target.open("wb") as file:
        file.write(header)
        file.truncate(size)
