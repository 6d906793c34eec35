"""A model elsewhere, seen by its headers: config, tokenizer and the beginnings of its weight files."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from mergelab.checkpoints.hub import hub_client, parse_hub_place
from mergelab.checkpoints.locations import exists, is_url, local_path, location_text
from mergelab.checkpoints.remote import Store, fetch_url, open_store, sparse_copy
from mergelab.errors import CheckpointError

__all__ = ["headers_only"]

_SEEN = (".safetensors", ".gguf")


@contextlib.contextmanager
def headers_only(place: str | os.PathLike[str]) -> Iterator[Path]:
    """A local path whose headers are those of a model; its weights must not be read.

    A path of this machine is itself. Of a model on the hub or at a URL only the small files are fetched, and
    the first bytes of weights: `mergelab inspect` of 140 GB takes as many megabytes. Models of other kinds
    than safetensors and GGUF are fetched whole, as are those in the hub's cache without a network.

    Raises:
        CheckpointError: as `local_path`.
    """
    store, small = _elsewhere(place)
    found = {} if store is None else {name: facts for name, facts in store.find().items() if "/" not in name}
    weights = [name for name in found if name.endswith(_SEEN)]
    if store is None or not weights or "adapter_config.json" in found:
        yield local_path(place)
        return
    folder = small()
    with tempfile.TemporaryDirectory(prefix="mergelab-headers-") as made:
        seen = Path(made) / (location_text(place).rstrip("/").rpartition("/")[2] or "model")
        seen.mkdir()
        for file in folder.iterdir():
            if file.is_file() and not file.name.endswith(_SEEN):
                shutil.copyfile(file, seen / file.name)
        for name in weights:
            sparse_copy(int(found[name].get("size") or 0), _reader(store, name), seen / name)
        yield seen


def _elsewhere(place: str | os.PathLike[str]) -> tuple[Store | None, Callable[[], Path]]:
    """The store that a place is in, or None; and a function that fetches the small files."""
    if is_url(place):
        url = location_text(place)
        return open_store(url), lambda: fetch_url(url, "tokenizer")
    hub = None if exists(Path(place)) else parse_hub_place(os.fspath(place))
    client = hub_client() if hub is not None else None
    if hub is None or client is None or hub.within or client.constants.HF_HUB_OFFLINE:
        return None, lambda: local_path(place)
    small = local_path(place, "tokenizer")  # its refusals are about the place
    system = client.HfFileSystem(endpoint=client.constants.ENDPOINT)
    return Store(str(place), system, f"{hub.repo}@{small.name}"), lambda: small


def _reader(store: Store, name: str) -> Callable[[int, int], bytes]:
    def read(start: int, stop: int) -> bytes:
        if stop <= start:
            return b""
        try:
            with store.errors(f"does not give the header of {name!r}"):
                return store.system.cat_file(store.at(name), start=start, end=stop)
        except FileNotFoundError:
            raise CheckpointError(f"{store.url}/{name} is gone; another program is writing it") from None

    return read
