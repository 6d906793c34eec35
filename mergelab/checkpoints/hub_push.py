"""Uploads to the Hugging Face hub: one commit for a finished folder or file, with a card it accepts."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from pathlib import Path

from mergelab.checkpoints.hub import HubPlace, hub_client, hub_reason, parse_hub_place, quiet_off_terminals
from mergelab.checkpoints.locations import is_url, location_text
from mergelab.checkpoints.model_card import CardFacts, short_card
from mergelab.errors import MergelabError, OutputError, quoted
from mergelab.refusals import one_line
from mergelab.version import __version__

__all__ = ["check_push", "push"]

_CARD = "README.md"
# Weight files of which an earlier push may have left others than are now in the folder.
_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")


def check_push(repo: str) -> None:
    """Refuses a push that cannot succeed, before any work is done for it; writes nothing on the hub.

    Args:
        repo: `org/name`.

    Raises:
        OutputError: the name is not an id, there is no token, the hub refuses it, or cannot be reached.
    """
    place = _target(repo)
    hub = hub_client()
    if hub.constants.HF_HUB_OFFLINE:
        raise OutputError(f"nothing can be pushed to {repo} while HF_HUB_OFFLINE is set; unset it")
    token = hub.get_token()
    if token is None:
        raise OutputError(
            f"pushing to {repo} needs a token of the hub: log in with `hf auth login`, or set HF_TOKEN to a "
            "token that may write"
        )
    try:
        owner = hub.HfApi(endpoint=hub.constants.ENDPOINT).whoami(token=token)
    except Exception as error:  # the client raises many unrelated types
        raise OutputError(f"pushing to {repo} is not possible: {_reason(error, place)}") from None
    role = owner.get("auth", {}).get("accessToken", {}).get("role") if isinstance(owner, dict) else None
    if role == "read":
        raise OutputError(
            f"the hub token of {owner.get('name')} may only read, so nothing can be pushed to {repo}; set "
            "HF_TOKEN to one that may write"
        )


def push(
    path: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    card: bytes | None = None,
) -> str:
    """Uploads a finished model, adapter, autoencoder or single file to the Hugging Face hub.

    The repository is made if it is not there. All files arrive in one commit, so that readers see the old
    state or the new one. After an interruption the same call uploads what is missing: the hub keeps the
    large files that had arrived. Hidden files and folders stay here. Of an earlier push, weight files of the
    same kind that are no longer part of the folder are removed. Where there is no `README.md`, here or
    there, a short card is added.

    Args:
        path: Folder, or file such as a steering vector. Of a training run of an SAE its `final` is meant.
        repo: `org/name`.
        private: Whether a new repository is private; as the organization has it if None.
        revision: Branch to commit to; the main one if None.
        message: Message of the commit.
        card: Content of `README.md` where there is none, here or there; a short one by default.

    Returns:
        Address of the commit.

    Raises:
        OutputError: `path` does not exist, the name is not an id, there is no token, or the hub refuses.

    Example:
        >>> push("merged", "org/merged", private=True)                                  # doctest: +SKIP
    """
    place = _target(repo)
    if is_url(path):
        raise OutputError(f"{location_text(path)} is not on this machine; push a local folder or file")
    path = Path(path)
    if (path / "final" / "cfg.json").is_file():
        path = path / "final"
    files = _files(path)
    check_push(repo)
    hub = hub_client()
    api = hub.HfApi(endpoint=hub.constants.ENDPOINT)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        there = api.list_repo_files(repo, revision=revision)
        adds = [hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files]
        names = {name for name, _ in files}
        if _CARD not in names and _CARD not in there:
            adds.append(hub.CommitOperationAdd(_CARD, card or _plain_card(repo, names)))
        deletes = [hub.CommitOperationDelete(name) for name in _stale(there, names)]
        with quiet_off_terminals(hub):
            done = api.create_commit(
                repo,
                operations=[*adds, *deletes],
                commit_message=message or f"Upload with mergelab {__version__}",
                revision=revision,
            )
    except MergelabError:
        raise
    except Exception as error:
        raise OutputError(
            f"{path} is complete, but pushing it to {repo} failed: {_reason(error, place)}; what has arrived "
            f'is kept, so push it again: mergelab.push("{path}", "{repo}")'
        ) from None
    return str(done.commit_url)


def _target(repo: str) -> HubPlace:
    place = parse_hub_place(repo)
    if place is None or place.revision or place.within:
        raise OutputError(
            f"{quoted(repo)} is not the name of a hub repository; write org/name, of letters, digits, '-', "
            "'_' and '.'"
        )
    return place


def _files(path: Path) -> list[tuple[str, Path]]:
    """The files to upload by their names there."""
    if path.is_file():
        return [(path.name, path)]
    if not path.is_dir():
        raise OutputError(f"{path} does not exist, so it cannot be pushed; name a finished folder or file")
    found = [(file.relative_to(path), file) for file in sorted(path.rglob("*")) if file.is_file()]
    kept = [(name, file) for name, file in found if not any(part.startswith(".") for part in name.parts)]
    if not kept:
        raise OutputError(f"{path} is empty, so there is nothing to push")
    return [(name.as_posix(), file) for name, file in kept]


def _stale(there: Iterable[str], names: set[str]) -> list[str]:
    """Weight files of an earlier push that would be taken for a part of this one."""
    return [
        name
        for name in there
        if name not in names and any(fnmatch.fnmatchcase(name, pattern) for pattern in _WEIGHTS)
        if any(fnmatch.fnmatchcase(mine, pattern) for mine in names for pattern in _WEIGHTS)
    ]


def _plain_card(repo: str, names: set[str]) -> bytes:
    what = ", ".join(f"`{name}`" for name in sorted(names)[:5])
    said = f"Written with mergelab {__version__}: {what}."
    return short_card(repo.partition("/")[2], "mergelab", ["mergelab"], CardFacts(), [said])


def _reason(error: Exception, place: HubPlace) -> str:
    """What the hub refused, as a clause; of a card it says which field."""
    text = str(error)
    if isinstance(error, ValueError) and "README.md" in text:
        said = one_line(re.sub(r"\n[- ]*", " ", text))
        return f"the hub refuses the card ({said}); correct README.md"
    cause: BaseException = error
    while getattr(cause, "response", None) is None and cause.__cause__ is not None:
        cause = cause.__cause__  # the client wraps what went wrong with one of several uploads
    return hub_reason(cause, place)
