"""`mergelab.json` in the output: what it was made from, for programs; and how a finished output is known."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab import __version__
from mergelab.errors import OutputError

if TYPE_CHECKING:
    from mergelab.merging.plan import Plan

__all__ = ["PROVENANCE", "SHA256SUMS", "provenance", "recorded_identity", "write_sha256"]

PROVENANCE = "mergelab.json"
SHA256SUMS = "SHA256SUMS"


def provenance(plan: Plan, digests: Mapping[str, str]) -> bytes:
    """The file's content: version, seed, inputs with fingerprints, and a digest of every output tensor."""
    content: dict[str, Any] = {
        "mergelab": __version__,
        "identity": plan.identity,
        "seed": plan.seed,
        "recipe": plan.recipe.to_yaml(),
        "models": [
            {"model": model.name, "revision": model.revision, "fingerprint": model.fingerprint}
            for model in plan.models
        ],
        "tensors": dict(digests),
    }
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def recorded_identity(out: Path) -> str | None:
    """The identity of the plan that `out` is the result of, or None; folders appear only when complete."""
    try:
        content = json.loads((out / PROVENANCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content.get("identity") if isinstance(content, dict) else None


def write_sha256(out: Path) -> dict[str, str]:
    """Writes `SHA256SUMS` for the weight files of `out`, as `sha256sum -c` reads it; returns name -> digest.

    Raises:
        OutputError: a file cannot be read, or the sums cannot be written.
    """
    try:
        digests = {}
        for file in sorted(out.glob("*.safetensors")):
            with file.open("rb") as stream:
                digests[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
        (out / SHA256SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in digests.items()))
    except OSError as error:
        raise OutputError(f"{out}: SHA-256 sums could not be written ({error}); check the folder") from error
    return digests
