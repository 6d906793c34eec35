"""Which model and site a training's activations come from: what its dictionary must remember."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergelab.checkpoints.digest import weights_sha256
from mergelab.checkpoints.json_data import read_json_object
from mergelab.sae.config import DataSection

__all__ = ["host_metadata", "store_facts"]


def host_metadata(data: DataSection) -> dict[str, Any]:
    """`site`, `model` and `model_hash` of the activations, as far as the data says where they come from.

    With targets also their site, `target_site`. A model is asked for the digest of its weights; files of
    `mergelab activations` carry it beside them.

    Args:
        data: of a training's configuration.

    Raises:
        CheckpointError: the model's folder holds no weights, or the file beside a store's is damaged.
    """
    if data.kind == "model" and data.model is not None:
        target = {} if data.target_site is None else {"target_site": data.target_site}
        digest = weights_sha256(data.model)
        return {"site": data.site, **target, "model": data.model, "model_hash": digest}
    if data.kind == "files" and data.path is not None:
        found = store_facts(data.path)
        target = {} if data.target_path is None else store_facts(data.target_path)
        if "site" in target:
            found["target_site"] = target["site"]
        return found
    return {}


def store_facts(patterns: str | Sequence[str]) -> dict[str, Any]:
    """`site`, `model` and `model_hash` of files of `mergelab activations`; nothing of other files.

    Args:
        patterns: a path or glob, or several, all of one site.

    Raises:
        CheckpointError: the file beside a store's is damaged.
    """
    given = [patterns] if isinstance(patterns, str) else patterns
    files = sorted(Path(file) for pattern in given for file in glob.glob(pattern))
    sites = {file.name.rpartition("-")[0] for file in files}
    stores = {file.parent / "store.json" for file in files}
    if len(sites) != 1 or len(stores) != 1 or not (store := stores.pop()).is_file():
        return {}
    facts = read_json_object(store)
    site = sites.pop()
    if site not in facts.get("sites", {}):
        return {}
    return {"site": site, "model": facts["model"], "model_hash": facts["model_sha256"]}
