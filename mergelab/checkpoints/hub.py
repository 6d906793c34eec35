"""Models on the Hugging Face hub: what a name means, what of it is fetched, and where its copy is here."""

from __future__ import annotations

import contextlib
import glob
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mergelab.checkpoints.json_data import read_json_object
from mergelab.checkpoints.wanted_files import Need, wanted_files
from mergelab.errors import CheckpointError, DependencyError, MergelabError
from mergelab.refusals import one_line, refusal

__all__ = [
    "HubPlace",
    "fetch_from_hub",
    "hub_client",
    "hub_origin",
    "hub_reason",
    "parse_hub_place",
    "quiet_off_terminals",
]

_logger = logging.getLogger(__name__)

_WORD = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9_])?"
_PLACE = re.compile(rf"({_WORD}/{_WORD})(?:@([^\s:@+]+))?(?::([^\s:]+))?", re.ASCII)
_LONGEST = 96  # characters of an id; the hub's own limit
_COMMIT = re.compile(r"[0-9a-f]{40}")
_UNREACHABLE = frozenset(
    ["ConnectError", "ConnectionError", "NetworkError", "ProxyError", "TimeoutException", "Timeout"]
)
"""Exceptions of HTTP libraries where no answer came, by name: the hub's client has used three of these."""


@dataclass(frozen=True)
class HubPlace:
    """A model, or a folder or file in it, on the hub: `org/name[@revision][:subfolder]`.

    Attributes:
        repo: `org/name`.
        revision: branch, tag or commit; the main branch if None.
        within: folder or file in the repository; empty for its top.
    """

    repo: str
    revision: str | None = None
    within: str = ""

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"{self.repo}{at}" + (f":{self.within}" if self.within else "")


def parse_hub_place(text: str) -> HubPlace | None:
    """The place that a text names, or None if it cannot be one on the hub."""
    match = _PLACE.fullmatch(text)
    if match is None:
        return None
    repo, revision, within = match[1], match[2], (match[3] or "").rstrip("/")
    if len(repo) > _LONGEST or "--" in repo or ".." in repo or repo.endswith(".git"):
        return None
    if any(part in ("", ".", "..") for part in within.split("/")) and within:
        return None
    return HubPlace(repo, revision, within)


def hub_origin(path: Path) -> HubPlace | None:
    """The place on the hub of which a folder or file in the hub's cache is a copy; None for other paths."""
    parts = path.absolute().parts
    for number in range(len(parts) - 2, 0, -1):
        if parts[number] == "snapshots" and parts[number - 1].startswith("models--"):
            repo = parts[number - 1].removeprefix("models--").replace("--", "/", 1)
            return HubPlace(repo, parts[number + 1], "/".join(parts[number + 2 :]))
    return None


def hub_client() -> Any:
    """The `huggingface_hub` package.

    Raises:
        DependencyError: it is missing, or damaged.
    """
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as error:
        raise DependencyError(
            f"the Hugging Face hub needs the package huggingface_hub ({one_line(str(error))}); install it "
            "with `pip install huggingface_hub`"
        ) from None
    return huggingface_hub


@contextlib.contextmanager
def quiet_off_terminals(hub: Any) -> Iterator[None]:
    """Progress bars of the client only where somebody looks at them, as ours."""
    shown = sys.stderr is not None and sys.stderr.isatty()
    if shown or hub.utils.are_progress_bars_disabled():
        yield
        return
    hub.utils.disable_progress_bars()
    try:
        yield
    finally:
        hub.utils.enable_progress_bars()


def fetch_from_hub(place: HubPlace, need: Need = "model") -> Path:
    """The local copy of what is needed of a place on the hub; files that are here already are kept.

    The token, the cache and the mode without network are those of `huggingface_hub`: `HF_TOKEN` or
    `hf auth login`, `HF_HOME`, `HF_HUB_OFFLINE`. Without a network the copy in the cache is used.

    Returns:
        The folder or file in the hub's cache, below a folder that is called by the commit.

    Raises:
        CheckpointError: the reason as a clause, such as "the hub has no revision 'x' of org/name".
    """
    hub = hub_client()
    try:
        with quiet_off_terminals(hub):
            folder = _cached(hub, place) if hub.constants.HF_HUB_OFFLINE else _download(hub, place, need)
    except MergelabError:
        raise
    except Exception as error:  # the client raises many unrelated types
        folder = _cached_anyway(hub, place) if _unreachable(error) else None
        if folder is None:
            raise CheckpointError(hub_reason(error, place)) from None
    found = folder / place.within
    if not found.exists():
        raise CheckpointError(
            f"the copy of {place.repo} in the hub's cache ({folder}) has no {place.within!r}, and there is "
            "no network to fetch it; unset HF_HUB_OFFLINE, or run again with a network"
        )
    return found


def _download(hub: Any, place: HubPlace, need: Need) -> Path:
    api = hub.HfApi(endpoint=hub.constants.ENDPOINT)
    info = api.repo_info(place.repo, revision=place.revision)
    names = [sibling.rfilename for sibling in info.siblings or ()]
    read = partial(_index, hub, place.repo, info.sha)
    wanted = wanted_files(names, place.within, need, f"hub model {place.repo}", read)
    if not wanted:
        raise CheckpointError(f"the hub's {place.repo} holds no files that can be read here")
    _logger.info("hub %s at %s: %d files", place.repo, info.sha, len(wanted))
    # The revision as it was asked for, so that the cache knows it too where there is no network.
    folder = hub.snapshot_download(
        place.repo,
        revision=place.revision,
        allow_patterns=[glob.escape(name) for name in wanted],
        endpoint=hub.constants.ENDPOINT,
    )
    return Path(folder)


def _index(hub: Any, repo: str, commit: str | None, name: str) -> Mapping[str, Any]:
    path = hub.hf_hub_download(repo, name, revision=commit, endpoint=hub.constants.ENDPOINT)
    return read_json_object(Path(path))


def _cached(hub: Any, place: HubPlace) -> Path:
    """The snapshot in the cache, with whatever files it has: readers name what they miss."""
    folder = hub.snapshot_download(
        place.repo, revision=place.revision, local_files_only=True, allow_patterns=["none of them"]
    )
    return Path(folder)


def _cached_anyway(hub: Any, place: HubPlace) -> Path | None:
    try:
        return _cached(hub, place)
    except Exception:
        return None


def _unreachable(error: BaseException) -> bool:
    """Whether no answer came, or one that says the hub itself fails."""
    chain = [error, *filter(None, (error.__cause__, error.__context__))]
    names = {kind.__name__ for one in chain for kind in type(one).__mro__}
    return bool(names & _UNREACHABLE) or _status(error) >= 500


def _status(error: BaseException) -> int:
    status = getattr(getattr(error, "response", None), "status_code", 0)
    return status if isinstance(status, int) else 0


def hub_reason(error: BaseException, place: HubPlace, *, kind: str = "model") -> str:
    """What the hub or its client refused, as a clause with a remedy.

    Args:
        error: any exception of `huggingface_hub`.
        place: what was asked for.
        kind: what it is, in words.
    """
    hub = hub_client()
    kinds, endpoint = hub.errors, hub.constants.ENDPOINT
    login = "log in with `hf auth login`, or set HF_TOKEN"
    if hub.constants.HF_HUB_OFFLINE or isinstance(error, kinds.OfflineModeIsEnabled):
        return (
            f"HF_HUB_OFFLINE is set and the hub's cache ({hub.constants.HF_HUB_CACHE}) has no copy of "
            f"{place}; unset it, or fetch the {kind} first"
        )
    if isinstance(error, kinds.GatedRepoError):
        return f"the hub's {place.repo} is gated: accept its terms at {endpoint}/{place.repo}, then {login}"
    if isinstance(error, kinds.RevisionNotFoundError):
        return f"the hub's {place.repo} has no revision {place.revision or 'main'!r}; check its spelling"
    if isinstance(error, kinds.RepositoryNotFoundError) and _status(error) != 403:
        return (
            f"the hub has no {kind} {place.repo!r} that you may read; check the spelling, or, if it is "
            f"private, {login}"
        )
    if _status(error) in (401, 403):
        said = one_line(str(getattr(error, "server_message", None) or error), 200)
        return f"the hub refuses {place.repo} with this token ({said}); {login} with one that has the right"
    if _unreachable(error):
        what = f"answers with status {_status(error)}" if _status(error) else "cannot be reached"
        return (
            f"the hub ({endpoint}) {what} ({one_line(str(error), 200)}) and its cache has no copy of "
            f"{place}; try again later, or check the network"
        )
    why = refusal(error) if isinstance(error, OSError) else None
    return why or f"the hub did not give {place}: {one_line(str(error)) or type(error).__name__}"
