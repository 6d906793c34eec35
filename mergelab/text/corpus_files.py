"""The files of a corpus: paths, globs, folders, data sets on the hub and URLs, in a fixed order."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from mergelab.checkpoints.hub import (
    HubPlace,
    hub_client,
    hub_reason,
    parse_hub_place,
    quiet_off_terminals,
)
from mergelab.checkpoints.json_data import read_json_object
from mergelab.checkpoints.locations import exists, is_url, location_text
from mergelab.checkpoints.remote import fetch_files
from mergelab.errors import CheckpointError, CorpusError, MergelabError, quoted

__all__ = ["CorpusFile", "corpus_files"]

_PACKED = (".gz", ".bz2", ".xz", ".zst")
_RECORDS = (".parquet", ".arrow", ".jsonl", ".ndjson", ".json")
_TEXTS = (".txt", ".text")
_SPLIT = re.compile(r"(?:^|.*[-_.])(train|validation|valid|val|dev|test|eval)(?:[-_.]|$)", re.ASCII)
_FACTS = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")


@dataclass(frozen=True)
class CorpusFile:
    """A file of a corpus.

    Attributes:
        name: path, or place on the hub with its commit.
        path: path on this machine; None until a file on the hub is fetched.
    """

    name: str
    path: Path | None
    _fetch: Callable[[], Path] | None = None

    def local(self) -> Path:
        """The path on this machine; a file on the hub is fetched when its turn comes.

        Raises:
            CorpusError: it cannot be fetched.
        """
        if self.path is not None:
            return self.path
        assert self._fetch is not None
        return self._fetch()


def corpus_files(places: str | Path | Iterable[str | Path]) -> list[CorpusFile]:
    """The files that places name; those of a glob or a folder in the order of their names.

    A place is a file, a glob (`corpus/**/*.jsonl.gz`), a folder of files, a folder of `datasets`
    (`save_to_disk`), a data set on the Hugging Face hub (`org/name[@revision][:folder, file or glob]`, of
    which the split `train` is read), or a URL of `fsspec` that may hold `*`.

    Raises:
        CorpusError: nothing is there, or it is not clear which files are meant.
    """
    found: list[CorpusFile] = []
    for place in [places] if isinstance(places, str | Path) else places:
        found += _files_of(os.fspath(place))
    if not found:
        raise CorpusError("no text was given; name a file, a glob, a folder or a data set.")
    return found


def _files_of(place: str) -> list[CorpusFile]:
    if is_url(place):
        return [CorpusFile(str(path), path) for path in _at_url(location_text(place))]
    path = Path(place)
    if exists(path):
        return [CorpusFile(str(one), one) for one in (_in_folder(path) if path.is_dir() else [path])]
    if (glob.has_magic(place) and parse_hub_place(place.partition(":")[0]) is None) or "**" in place:
        matches = sorted(one for one in glob.glob(place, recursive=True) if os.path.isfile(one))
        if not matches:
            raise CorpusError(f"{place}: no file matches; check the path")
        return [CorpusFile(one, Path(one)) for one in matches]
    repo, _, within = place.partition(":")
    hub = parse_hub_place(repo)
    if hub is None or (path.suffix in (*_RECORDS, *_TEXTS, *_PACKED) and not within):
        raise CorpusError(f"{place} cannot be read: it does not exist; check the path")
    return _on_hub(HubPlace(hub.repo, hub.revision, within.strip("/")), place)


def _at_url(url: str) -> list[Path]:
    if "*" in url:
        return fetch_files(url)
    try:
        return fetch_files(url)
    except CheckpointError:
        kinds = _choice(fetch_files(f"{url.rstrip('/')}/*"), url)
        return [Path(one) for one in kinds]


def _plain(name: str) -> str:
    """A file's name without the ending that says how it is packed."""
    return next((name.removesuffix(end) for end in _PACKED if name.endswith(end)), name)


def _choice(names: Iterable[Any], place: str) -> list[Any]:
    """The files of records among those of a folder, or else its `.txt` files."""
    names = [
        n for n in names if os.path.basename(n) not in _FACTS and not os.path.basename(n).startswith(".")
    ]
    for kinds in (_RECORDS, _TEXTS):
        if found := [one for one in names if _plain(str(one)).endswith(kinds)]:
            return sorted(found)
    raise CorpusError(
        f"{place}: no .txt, .jsonl, .parquet or .arrow file is in it; name others by a glob, such as "
        f"{place}/*.md"
    )


def _in_folder(folder: Path) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        splits = read_json_object(folder / "dataset_dict.json").get("splits")
        splits = [one for one in splits if isinstance(one, str)] if isinstance(splits, list) else []
        if "train" not in splits and len(splits) != 1:
            raise CorpusError(
                f"{folder} holds the splits {', '.join(splits) or 'of no name'}; name one, as in "
                f"{folder}/{splits[0] if splits else 'train'}"
            )
        folder = folder / ("train" if "train" in splits else splits[0])
    if (folder / "state.json").is_file():
        return _saved(folder)
    files = (path for path in folder.rglob("*") if path.is_file())
    hidden = (path for path in files if not any(p.startswith(".") for p in path.relative_to(folder).parts))
    return _choice(hidden, str(folder))


def _saved(folder: Path) -> list[Path]:
    """The arrow files of a folder that `Dataset.save_to_disk` wrote, in its order."""
    state = read_json_object(folder / "state.json")
    listed = state.get("_data_files")
    names = (
        [one.get("filename") for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    )
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise CorpusError(f"{folder / 'state.json'} does not list the data set's files; save it again")
    if state.get("_indices_files"):
        raise CorpusError(
            f"{folder} is a data set that selects rows by a list of indices; save it again after "
            "`.flatten_indices()`"
        )
    return [folder / str(name) for name in names]


def _on_hub(place: HubPlace, told: str) -> list[CorpusFile]:
    hub = hub_client()
    try:
        with quiet_off_terminals(hub):
            names, commit = _listing(hub, place)
    except MergelabError:
        raise
    except Exception as error:  # the client raises many unrelated types
        reason = hub_reason(error, place, kind="data set")
        raise CorpusError(f"{told} does not exist on this machine, and {reason}") from None
    found = _inside(names, place, told)
    at = HubPlace(place.repo, commit)
    return [CorpusFile(f"{at}:{name}", None, partial(_fetch, place, commit, name)) for name in found]


def _listing(hub: Any, place: HubPlace) -> tuple[list[str], str]:
    """The files of a data set and its commit; without a network those in the cache."""
    options = {"repo_type": "dataset", "revision": place.revision}
    if not hub.constants.HF_HUB_OFFLINE:
        info = hub.HfApi(endpoint=hub.constants.ENDPOINT).repo_info(place.repo, **options)
        return [sibling.rfilename for sibling in info.siblings or ()], info.sha
    folder = Path(hub.snapshot_download(place.repo, local_files_only=True, **options))
    return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()], folder.name


def _fetch(place: HubPlace, commit: str, name: str) -> Path:
    hub = hub_client()
    options = {"repo_type": "dataset", "endpoint": hub.constants.ENDPOINT}
    try:
        with quiet_off_terminals(hub):
            # The revision as it was asked for, so that the cache knows it too where there is no network.
            path = Path(hub.hf_hub_download(place.repo, name, revision=place.revision, **options))
            if commit not in path.parts:  # which has moved on meanwhile
                path = Path(hub.hf_hub_download(place.repo, name, revision=commit, **options))
    except Exception as error:
        reason = hub_reason(error, place, kind="data set")
        raise CorpusError(f"{place.repo}: {name} cannot be fetched: {reason}") from None
    return path


def _inside(names: Sequence[str], place: HubPlace, told: str) -> list[str]:
    """The files that are meant of a data set: in one folder, of one split."""
    within = place.within
    if within in names:
        return [within]
    if glob.has_magic(within):
        found = sorted(name for name in names if fnmatchcase(name, within))
        if not found:
            raise CorpusError(f"{told}: no file of the data set matches {quoted(within)}")
        return found
    prefix = f"{within}/" if within else ""
    inside = [name for name in names if name.startswith(prefix)]
    if not inside:
        folders = sorted({name.rpartition("/")[0] for name in names} - {""})
        raise CorpusError(f"{told}: the data set has no {quoted(within)}; its folders are {_some(folders)}")
    found = _choice(inside, told)
    splits = {name: _SPLIT.match(_split_part(name)) for name in found}
    if any(match and match[1] == "train" for match in splits.values()):
        found = [name for name in found if (match := splits[name]) and match[1] == "train"]
    elif len(kinds := sorted({match[1] for match in splits.values() if match})) > 1:
        raise CorpusError(f"{told} has the splits {', '.join(kinds)}; name files, as in {told}:{found[0]}")
    folders = sorted({name.rpartition("/")[0] for name in found})
    if len(folders) > 1:
        raise CorpusError(f"{told} holds data in {_some(folders)}; name one, as in {place.repo}:{folders[0]}")
    return found


def _split_part(name: str) -> str:
    return name.rpartition("/")[2]


def _some(names: Sequence[str]) -> str:
    first = ", ".join(name or "its top" for name in names[:4])
    return f"{first} and {len(names) - 4} more" if len(names) > 4 else first
