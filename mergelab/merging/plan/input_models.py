"""Model references to opened checkpoints: folders, hub snapshots, adapters, and results still to come."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.checkpoints import Checkpoint, FolderCheckpoint, LoraCheckpoint, open_checkpoint, with_lora
from mergelab.checkpoints.hub import HubPlace, fetch_from_hub, hub_origin, parse_hub_place
from mergelab.checkpoints.locations import exists, is_url, local_path
from mergelab.checkpoints.model_files import put_file
from mergelab.checkpoints.source import TensorSource
from mergelab.checkpoints.sparse_delta import DeltaCheckpoint, is_delta, with_delta
from mergelab.errors import CheckpointError, DependencyError, MergelabError, did_you_mean, quoted
from mergelab.merging.engine.job import Job
from mergelab.merging.recipe.faults import FieldPath, Origin, raise_faults
from mergelab.merging.recipe.model_refs import ModelRef, parse_model_ref

__all__ = [
    "FoundModel",
    "PlannedCheckpoint",
    "PlannedTensor",
    "find_models",
    "is_planned",
    "locate_adapters",
    "with_results",
]


@dataclass(frozen=True)
class PlannedTensor:
    """A `TensorSource` of a merge that has not run: it can be planned with, not read.

    Attributes:
        stage: Name of that merge's recipe.
        name, shape, dtype: The tensor's own.
    """

    stage: str
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def read_into(self, start: int, out: np.ndarray) -> None:
        raise CheckpointError(f"tensor {self.name!r} belongs to a merge that has not run yet; run that first")


@dataclass(frozen=True)
class PlannedCheckpoint:
    """A `Checkpoint` of tensors that can be planned with but not read.

    Attributes:
        path: a folder with the planned config and tokenizer files.
        config: the planned `config.json`.
        tensors: tensor of each name.
        identity: the plan's.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorSource]
    identity: str

    @classmethod
    def of(
        cls,
        folder: Path,
        stage: str,
        *,
        config: Mapping[str, Any],
        files: Mapping[str, bytes],
        jobs: Iterable[Job],
        identity: str,
    ) -> PlannedCheckpoint:
        """Writes a plan's small files to `folder`, which must not exist; the jobs name its tensors."""
        folder.mkdir(parents=True)
        for name, content in files.items():
            put_file(folder, name, content)
        (folder / "config.json").write_text(json.dumps(config))
        tensors = {job.name: PlannedTensor(stage, job.name, job.shape, job.dtype) for job in jobs}
        return cls(folder, config, tensors, identity)


def with_results(source: TensorSource, results: Mapping[str, Mapping[str, TensorSource]]) -> TensorSource:
    """The source with the tensors of stages that have run in place of their planned ones.

    A source that reads others offers `over(change)`: the same view of `change` of each of them.

    Args:
        source: A tensor of a plan.
        results: Tensors by name, by the name of the stage that has made them.
    """
    if isinstance(source, PlannedTensor):
        return results[source.stage][source.name] if source.stage in results else source
    over = getattr(source, "over", None)
    return source if over is None else over(lambda inner: with_results(inner, results))


def is_planned(checkpoint: Checkpoint) -> bool:
    """Whether a model is the result of a merge that has not run, or an adapter on one."""
    while isinstance(checkpoint, LoraCheckpoint | DeltaCheckpoint):
        checkpoint = checkpoint.base
    return isinstance(checkpoint, PlannedCheckpoint)


_SAMPLE = 1024
_SAMPLES = 4


@dataclass(frozen=True)
class FoundModel:
    """An opened input model.

    Attributes:
        name: its reference as the recipe writes it.
        checkpoint: its tensors, with the adapter added if the reference names one.
        revision: the hub commit it was taken from, or None.
        fingerprint: SHA-256 over config, headers and a sample of every tensor, and over the adapter.
        paths: the model and the adapter on this disk; empty if it is the result of another recipe.
    """

    name: str
    checkpoint: Checkpoint
    revision: str | None
    fingerprint: str
    paths: tuple[Path, ...] = ()


def find_models(
    texts: Mapping[str, FieldPath],
    origin: Origin,
    base_dir: Path | None = None,
    stages: Mapping[str, Checkpoint] | None = None,
) -> dict[str, FoundModel]:
    """Opens every model; relative paths are looked up in the working directory, then in the recipe's folder.

    Args:
        texts: model references, with their place in the recipe.
        origin: where the recipe was read from.
        base_dir: what to use in place of the recipe's folder.
        stages: results of other recipes, by name; these names come before folders.

    Raises:
        RecipeError: models that cannot be found or opened, all named at once.
    """
    folders = [Path.cwd(), *(folder for folder in (base_dir or origin.folder,) if folder is not None)]
    found: dict[str, FoundModel] = {}
    faults: list[str] = []
    for text, path in texts.items():
        try:
            found[text] = _open(text, folders, stages or {})
        except DependencyError:
            raise
        except MergelabError as error:
            faults.append(origin.sentence(path, str(error)))
    raise_faults(faults)
    return found


def locate_adapters(
    texts: Iterable[str], origin: Origin, base_dir: str | Path | None = None
) -> dict[str, Path]:
    """The local folders of adapters by their references, `adapter` or `base+adapter`, found as models are.

    Raises:
        RecipeError: adapters that cannot be found, all named at once.
    """
    own = origin.folder if base_dir is None else Path(base_dir)
    folders = [Path.cwd(), *([] if own is None else [own])]
    found: dict[str, Path] = {}
    faults: list[str] = []
    for text in texts:
        reference = parse_model_ref(text)
        if any(exists(folder / text) for folder in folders):
            reference = ModelRef(text)  # a folder whose own name holds '@' or '+'
        name, revision = reference.adapter, reference.adapter_revision
        if name is None:
            name, revision = reference.path, reference.revision
        try:
            found[text] = _locate(name, revision, folders, [])[0]
        except DependencyError:
            raise
        except MergelabError as error:
            faults.append(str(error))
    raise_faults(faults)
    return found


def _open(text: str, folders: list[Path], stages: Mapping[str, Checkpoint]) -> FoundModel:
    reference = parse_model_ref(text)
    if any(exists(folder / text) for folder in folders):
        reference = ModelRef(text)  # a folder whose own name holds '@' or '+'
    paths: list[Path] = []
    if reference.path in stages:
        checkpoint, revision = stages[reference.path], None
    else:
        path, revision = _locate(reference.path, reference.revision, folders, list(stages))
        checkpoint = open_checkpoint(path)
        paths.append(path)
    fingerprint = _fingerprint(checkpoint)
    if reference.adapter is not None:
        adapter, _ = _locate(reference.adapter, reference.adapter_revision, folders, [])
        sparse = is_delta(adapter)
        checkpoint = with_delta(checkpoint, adapter) if sparse else with_lora(checkpoint, adapter)
        paths.append(adapter)
        files = sorted(adapter.glob("delta*" if sparse else "adapter_*"))
        parts = [fingerprint, *(_digest(p) for p in files if p.is_file())]
        fingerprint = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return FoundModel(text, checkpoint, revision, fingerprint, tuple(paths))


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fingerprint(checkpoint: Checkpoint) -> str:
    """Headers alone do not tell a model from its fine-tune: values from all over every tensor do."""
    if isinstance(checkpoint, PlannedCheckpoint):
        return checkpoint.identity
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    if isinstance(checkpoint, FolderCheckpoint) and checkpoint.quantization:
        digest.update(json.dumps(checkpoint.quantization, sort_keys=True).encode())
    for name, tensor in checkpoint.tensors.items():
        digest.update(f"{name} {tensor.dtype} {tensor.shape} ".encode())
        size = math.prod(tensor.shape)
        whole = size <= _SAMPLE * _SAMPLES
        values = np.empty(size if whole else _SAMPLE, tensor.dtype)
        for number in range(1 if whole else _SAMPLES):
            tensor.read_into(number * (size - len(values)) // (_SAMPLES - 1), values)
            digest.update(values.tobytes())
    return digest.hexdigest()


def _locate(
    path: str, revision: str | None, folders: list[Path], stages: list[str]
) -> tuple[Path, str | None]:
    """The local path of a model or adapter, and the hub commit it is of."""
    if is_url(path):
        return local_path(path), None
    try:
        expanded = Path(path).expanduser()
    except RuntimeError:  # "~name" of somebody whom this machine does not know
        expanded = Path(path)
    for folder in folders:
        if exists(folder / expanded):
            return folder / expanded, None
    # A subfolder may stand behind the revision, which recipes write as one text.
    text = path if revision is None else f"{path}@{revision}"
    if (place := parse_hub_place(text)) is not None:
        return _fetched(place, text, folders)
    siblings = [name for folder in folders for name in _names_beside(folder / expanded)]
    near = did_you_mean(expanded.name, siblings) or did_you_mean(path, stages)
    raise CheckpointError(f"model {quoted(path, 200)} does not exist{near}: looked in {_places(folders)}")


def _names_beside(path: Path) -> list[str]:
    try:
        return [entry.name for entry in islice(path.parent.iterdir(), 10_000)]
    except (OSError, ValueError):
        return []


def _places(folders: list[Path]) -> str:
    names = ["the working directory", "the recipe's folder"]
    pairs = zip(names, dict.fromkeys(folders), strict=False)
    return " and ".join(f"{name} ({folder})" for name, folder in pairs)


def _fetched(place: HubPlace, text: str, folders: list[Path]) -> tuple[Path, str | None]:
    try:
        folder = fetch_from_hub(place)
    except CheckpointError as error:
        raise CheckpointError(
            f"model {quoted(text)} is not a folder (looked in {_places(folders)}), and {error}"
        ) from None
    origin = hub_origin(folder)
    return folder, None if origin is None else origin.revision
