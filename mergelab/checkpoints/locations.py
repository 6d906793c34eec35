"""Where a model is: one rule that turns what a user writes into a folder or file of this machine."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from mergelab.checkpoints.wanted_files import Need
from mergelab.errors import CheckpointError, shortened

__all__ = ["exists", "is_url", "local_path", "location_text"]

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):/{1,2}(?=[^/]|$)", re.IGNORECASE)


def location_text(place: str | os.PathLike[str]) -> str:
    """The text of a place; a URL that went through a `Path`, which keeps one slash of two, is made whole."""
    text = os.fspath(place)
    if (match := _SCHEME.match(text)) and not os.path.exists(text):
        return f"{match[1]}://{text[match.end() :]}"
    return text


def is_url(place: str | os.PathLike[str]) -> bool:
    """Whether a place is in an object store or another file system: `gs://bucket/model`."""
    return _SCHEME.match(os.fspath(place)) is not None and not os.path.exists(place)


def local_path(place: str | os.PathLike[str], need: Need = "model") -> Path:
    """The local folder or file of a place.

    A path that exists is that path, whatever else its name could mean. `org/name[@revision][:subfolder]` is a
    model on the Hugging Face hub, whose needed files are fetched into the hub's cache. `gs://...`, `s3://...`
    and other URLs are copied into mergelab's cache. Everything else is returned as a path, for the reader to
    say that it does not exist.

    Args:
        place: a path, a model on the hub, or a URL.
        need: what is fetched of it: a whole `model`, the `tokenizer` with the config, or an `sae`.

    Raises:
        CheckpointError: the place cannot be looked up, or neither this machine nor the hub has it.

    Example:
        >>> local_path("HuggingFaceTB/SmolLM2-135M-Instruct@main")                      # doctest: +SKIP
    """
    if is_url(place):
        from mergelab.checkpoints.remote import fetch_url

        return fetch_url(location_text(place), need)
    path = Path(place)
    if exists(path):
        return path
    from mergelab.checkpoints.hub import fetch_from_hub, parse_hub_place

    hub = parse_hub_place(os.fspath(place))
    if hub is None:
        return path
    try:
        return fetch_from_hub(hub, need)
    except CheckpointError as error:
        raise CheckpointError(f"{place} does not exist on this machine, and {error}") from None


def exists(path: Path) -> bool:
    """Whether something is there; what can be no file's name (too long, not text) is not.

    Raises:
        CheckpointError: the system does not say.
    """
    try:
        return path.exists()
    except ValueError:
        return False
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise CheckpointError(f"{shortened(str(path), 200)} cannot be looked up ({error.strerror})") from None
