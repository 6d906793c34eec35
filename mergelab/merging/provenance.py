"""`mergelab.json` in the output: what it was made from, for programs; and the digests of its weight files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergelab.checkpoints.output_target import disk_errors
from mergelab.merging.plan import Plan
from mergelab.merging.recipe_file import recipe_yaml
from mergelab.version import __version__

__all__ = ["SHA256SUMS", "provenance", "sha256_sums"]

SHA256SUMS = "SHA256SUMS"


def provenance(plan: Plan, digests: Mapping[str, str]) -> bytes:
    """The file's content: version, seed, inputs with fingerprints, and a digest of every output tensor."""
    content: dict[str, Any] = {
        "mergelab": __version__,
        "identity": plan.identity,
        "seed": plan.seed,
        "recipe": recipe_yaml(plan.recipe),
        "models": [
            {"model": model.name, "revision": model.revision, "fingerprint": model.fingerprint}
            for model in plan.models
        ],
        "tensors": dict(digests),
    }
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def sha256_sums(folder: Path) -> tuple[dict[str, str], bytes]:
    """Digests of the weight files of `folder` by name, and the same as `sha256sum -c` reads it.

    Raises:
        OutputError: a file cannot be read.
    """
    digests = {}
    with disk_errors(folder):
        for file in sorted(folder.glob("*.safetensors")):
            with file.open("rb") as stream:
                digests[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests, "".join(f"{digest}  {name}\n" for name, digest in digests.items()).encode()
