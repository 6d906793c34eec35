"""Published SAEs by the names people know them by: a release, and an id in it.

`releases.json` is data: the repository, path, model and kind of files of each, as the table of SAELens has
them (the file names its source and version; `tests/sae/formats/write_releases.py` makes it). An id such as
`layer_#_width_16k` stands for as many as the numbers beside it; `*` in a path is the id.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from mergelab.checkpoints.hub import HubPlace, fetch_from_hub, hub_origin, parse_hub_place
from mergelab.checkpoints.json_data import read_json_object
from mergelab.checkpoints.locations import exists, is_url, local_path
from mergelab.errors import CheckpointError, did_you_mean, quoted
from mergelab.sae.sae import SAE

__all__ = [
    "ReleasedSAE", "as_released", "find_release", "overrides_at", "released_at", "sae_path", "sae_releases",
]  # fmt: skip

_TABLE = Path(__file__).with_name("releases.json")
_TEMPORAL = "temporal"
"""Kind of SAEs that read several tokens at once."""


@dataclass(frozen=True)
class ReleasedSAE:
    """One published SAE.

    Attributes:
        release: name of its release.
        id: its name there.
        place: where its files are on the hub.
        model: name of the model it reads, as its publisher says it.
        kind: kind of its files, as SAELens calls it.
        scale: factor of the activations before the SAE reads them, where its files do not have it.
        says: what the release says beyond its files, by SAELens' names.
    """

    release: str
    id: str
    place: HubPlace
    model: str
    kind: str
    scale: float | None = None
    says: Mapping[str, Any] = field(default_factory=dict, hash=False)


@cache
def _table() -> dict[str, dict[str, Any]]:
    return read_json_object(_TABLE)["releases"]


def _members(entry: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Ids and paths of a release."""
    for name, path, *numbers in entry["saes"]:
        if not numbers:
            yield name, path.replace("*", name)
            continue
        for run in numbers[0].split(","):
            first, _, last = run.partition("-")
            for number in range(int(first), int(last or first) + 1):
                one = name.replace("#", str(number))
                yield one, path.replace("#", str(number)).replace("*", one)


def sae_releases(model: str | None = None) -> dict[str, tuple[str, ...]]:
    """The ids of all published SAEs by release.

    Args:
        model: a part of the name of the model they read; all models if None.

    Example:
        >>> sae_releases("gpt2")["gpt2-small-res-jb"][8]
        'blocks.8.hook_resid_pre'
    """
    return {
        name: tuple(one for one, _ in _members(entry))
        for name, entry in _table().items()
        if model is None or model.lower() in entry["model"].lower()
    }


def find_release(release: str, sae_id: str | None) -> ReleasedSAE:
    """A published SAE.

    Raises:
        CheckpointError: there is no such release, or no such SAE in it.
    """
    entry = _table().get(release)
    if entry is None:
        raise CheckpointError(
            f"there is no release {quoted(release)}{did_you_mean(release, _table())}; sae_releases() lists "
            f"all {len(_table())}"
        )
    paths = dict(_members(entry))
    if sae_id is None or sae_id not in paths:
        some = ", ".join(list(paths)[:3])
        what = "holds several SAEs" if sae_id is None else f"has no SAE {quoted(sae_id)}"
        near = "" if sae_id is None else did_you_mean(sae_id, paths)
        raise CheckpointError(
            f"the release {release} {what}{near}; name one of its {len(paths)}, such as {some}"
        )
    return _released(release, entry, sae_id, paths[sae_id])


def _released(release: str, entry: Mapping[str, Any], sae_id: str, path: str) -> ReleasedSAE:
    within = f"W_enc_{path}.safetensors" if entry["kind"] == "mntss_clt_layer_transcoder" else path
    place = HubPlace(entry["repo"], None, within)
    scale = entry.get("scales", {}).get(sae_id)
    return ReleasedSAE(
        release, sae_id, place, entry["model"], entry["kind"], scale, dict(entry.get("says", {}))
    )


def released_at(path: Path) -> ReleasedSAE | None:
    """The published SAE of which a folder or file in the hub's cache is a copy; None for other paths."""
    origin = hub_origin(path)
    if origin is None:
        return None
    for release, entry in _table().items():
        if entry["repo"] == origin.repo:
            for sae_id, within in _members(entry):
                found = _released(release, entry, sae_id, within)
                if found.place.within == origin.within:
                    return found
    return None


def sae_path(place: str | os.PathLike[str], sae_id: str | None = None) -> Path:
    """The local folder or file of an SAE, which is fetched where it is not on this machine.

    Args:
        place: a path, `org/name[@revision][:subfolder]` on the hub, a URL, or a release of `sae_releases`,
            also with the id in one text, `release:id`.
        sae_id: id in the release; of any other place, the folder or file in it.

    Raises:
        CheckpointError: there is no such place, or it holds an SAE of a kind that cannot be read.
    """
    text = os.fspath(place)
    if exists(Path(place)) or is_url(place):
        return local_path(text if sae_id is None else os.path.join(text, sae_id), "sae")
    hub = parse_hub_place(text)
    if hub is not None:
        within = "/".join(part for part in (hub.within, sae_id) if part)
        return local_path(str(replace(hub, within=within)), "sae")
    release, colon, rest = text.partition(":")
    if sae_id is None and release not in _table():
        near = did_you_mean(release, _table()) if "/" not in release else ""
        if colon or near:
            raise CheckpointError(f"{text}: there is no such file, folder or release{near}")
        return Path(place)
    found = find_release(release if colon and sae_id is None else text, sae_id or rest or None)
    if found.kind == _TEMPORAL:
        raise CheckpointError(
            f"{found.release}, {found.id}: reads several tokens at once by attention, which no SAE here "
            "does; take another SAE"
        )
    try:
        return fetch_from_hub(found.place, "sae")
    except CheckpointError as error:
        raise CheckpointError(f"{found.release}, {found.id}: {error}") from None


def overrides_at(path: Path) -> dict[str, Any]:
    """What the table of releases says beyond the files of an SAE in the hub's cache, by SAELens' names."""
    released = released_at(path)
    if released is None:
        return {}
    return dict(released.says) | ({} if released.scale is None else {"norm_scaling_factor": released.scale})


def as_released(sae: SAE, path: Path) -> SAE:
    """The SAE, with what its release says of it where its files do not."""
    released = released_at(path)
    if released is None:
        return sae
    said = {"model_name": released.model, **released.says, "release": released.release, "sae_id": released.id}
    metadata = {**said, **sae.config.metadata}
    return replace(sae, config=replace(sae.config, metadata=metadata))
