"""Which model and site a training's activations come from: what its dictionary must remember."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergelab.checkpoints.folder import open_checkpoint, weights_sha256
from mergelab.checkpoints.json_data import read_json_object
from mergelab.errors import CheckpointError
from mergelab.models.families import model_from_config
from mergelab.models.model import Model
from mergelab.sae.config import DataSection

__all__ = ["host_metadata", "store_facts"]


def host_metadata(data: DataSection) -> dict[str, Any]:
    """`site`, `model`, `model_hash` and `context` of the activations, as far as the data says it.

    With targets also their site, `target_site`. A model is asked for the digest of its weights; files of
    `mergelab activations` carry it beside them.

    Args:
        data: of a training's configuration.

    Raises:
        CheckpointError: the model's folder holds no weights, or the file beside a store's is damaged.
    """
    if data.kind == "model" and data.model is not None:
        target = {} if data.target_site is None else {"target_site": data.target_site}
        found = {"site": data.site, **target, "model": data.model, "model_hash": weights_sha256(data.model)}
        # A default context beyond the model's positions is cut where the data is opened.
        return found | {"context": min(data.context, _read_model(data.model).config.max_length)}
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
    site, widths = sites.pop(), facts.get("sites")
    if not str(facts.get("format")).startswith("mergelab-activations"):
        return {}
    model, digest = facts.get("model"), facts.get("model_sha256")
    if not isinstance(widths, dict) or not isinstance(model, str) or not isinstance(digest, str):
        raise CheckpointError(
            f"{store} does not map sites to widths and name a model and its model_sha256, as `mergelab "
            "activations` writes it; collect the activations again."
        )
    found = {"site": site, "model": model, "model_hash": digest}
    if isinstance(facts.get("context"), int):
        found["context"] = facts["context"]
    return found if site in widths else {}


def _read_model(folder: str) -> Model:
    checkpoint = open_checkpoint(folder)
    return model_from_config(checkpoint.config, str(checkpoint.path / "config.json"))
