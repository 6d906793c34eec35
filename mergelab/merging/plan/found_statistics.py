"""Statistics that a recipe names beside its models: opened, checked against the model, fingerprinted."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mergelab.checkpoints import Checkpoint
from mergelab.checkpoints.folder import bounded_digest
from mergelab.checkpoints.locations import is_url
from mergelab.checkpoints.remote import fetch_files
from mergelab.checkpoints.safetensors_file import SafetensorsFile, open_safetensors
from mergelab.checkpoints.source import TensorSource
from mergelab.errors import CheckpointError, MergelabError, quoted
from mergelab.merging.recipe.faults import FieldPath, Origin, raise_faults
from mergelab.operators.declare import Operator

__all__ = ["FoundStatistics", "Owner", "find_statistics", "input_axes"]

Owner = tuple[str, str]
"""A model's reference and its statistics' path, both as the recipe writes them."""

_DIGESTED = 2**24


@dataclass(frozen=True)
class FoundStatistics:
    """A model's statistics.

    Attributes:
        tensors: one source per parameter that has a statistic, by the parameter's name in the model's files.
        axes: the axis along which a parameter reads its inputs, where the model's table says so.
        fingerprint: SHA-256 over sizes and contents of the files (of large ones, over pieces).
        paths: the files.
    """

    tensors: Mapping[str, TensorSource]
    axes: Mapping[str, int]
    fingerprint: str
    paths: tuple[Path, ...]


def find_statistics(
    texts: Mapping[Owner, FieldPath],
    operator: Operator,
    models: Mapping[str, Checkpoint],
    origin: Origin,
    base_dir: Path | None = None,
) -> dict[Owner, FoundStatistics]:
    """Opens every model's statistics; relative paths are looked up as those of models.

    Args:
        texts: models and the paths of their statistics, with their place in the recipe.
        operator: the merge method, which takes statistics of one kind.
        models: the opened models, by reference.
        origin: where the recipe was read from.
        base_dir: what to use in place of the recipe's folder.

    Raises:
        RecipeError: statistics that cannot be found, are of another kind or of another model; all at once.
    """
    folders = [Path.cwd(), *(folder for folder in (base_dir or origin.folder,) if folder is not None)]
    found: dict[Owner, FoundStatistics] = {}
    faults: list[str] = []
    for (model, text), place in texts.items():
        try:
            found[model, text] = _open(text, folders, operator, model, models[model])
        except MergelabError as error:
            faults.append(origin.sentence(place, str(error)))
    raise_faults(faults)
    return found


def _open(
    text: str, folders: list[Path], operator: Operator, model: str, checkpoint: Checkpoint
) -> FoundStatistics:
    files = _files(text, folders)
    tensors: dict[str, TensorSource] = {}
    for file in files:
        kind = file.metadata.get("kind", operator.statistics)
        if kind != operator.statistics:
            raise CheckpointError(
                f"{file.file.path} holds statistics of the kind {quoted(kind)}, but {operator.name!r} takes "
                f"{operator.statistics!r}: write them with 'mergelab statistics --kind {operator.statistics}'"
            )
        twice = next((name for name in file.tensors if name in tensors), None)
        if twice is not None:
            raise CheckpointError(
                f"{file.file.path}: tensor {twice!r} is in another file too; keep one of them"
            )
        tensors.update(file.tensors)
    if not tensors.keys() & checkpoint.tensors.keys():
        example = f" (such as {min(tensors)!r})" if tensors else ""
        raise CheckpointError(
            f"statistics {quoted(text, 200)} name no tensor of model {quoted(model, 200)}{example}: each is "
            "to be named as the parameter it is of"
        )
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.header_sha256} {bounded_digest(file.file.path, _DIGESTED)} ".encode())
    paths = tuple(file.file.path for file in files)
    return FoundStatistics(tensors, input_axes(checkpoint), digest.hexdigest(), paths)


def _files(text: str, folders: list[Path]) -> list[SafetensorsFile]:
    """The safetensors files of the first folder (or the first file) called `text`."""
    if is_url(text):
        return [open_safetensors(file) for file in fetch_files(f"{text.rstrip('/')}/*.safetensors")]
    for folder in folders:
        try:
            path = folder / Path(text).expanduser()
            if path.is_file():
                return [open_safetensors(path)]
            if path.is_dir():
                files = sorted(path.glob("*.safetensors"))
                if not files:
                    raise CheckpointError(f"{path} holds no statistics: expected *.safetensors in it")
                return [open_safetensors(file) for file in files]
        except (OSError, RuntimeError, ValueError) as error:  # no file's name, or not to be looked up
            raise CheckpointError(f"statistics {quoted(text, 200)} cannot be looked up ({error})") from None
    places = " and ".join(str(folder) for folder in dict.fromkeys(folders))
    raise CheckpointError(
        f"statistics {quoted(text, 200)} do not exist: looked in {places}; write them with "
        "'mergelab statistics'"
    )


def input_axes(checkpoint: Checkpoint) -> dict[str, int]:
    """The axis of each kernel in the files that counts inputs, by name; empty for unknown families.

    A torch `Linear` is [out, in], GPT-2's `Conv1D` [in, out]: where both are equal, only the table can say.
    """
    from mergelab.models.families import model_from_config  # takes seconds to import, and few merges need it

    try:
        leaves = model_from_config(checkpoint.config).for_tensors(checkpoint.tensors.keys()).table()
    except MergelabError:
        return {}
    axes: dict[str, int] = {}
    for leaf in leaves:
        if leaf.path[-1] == "kernel" and len(leaf.hf_shape) == 2:
            turned = leaf.transform == "transpose" or getattr(leaf.transform, "transposed", False)
            axes.update(dict.fromkeys(leaf.hf_names, 1 if turned else 0))
    return axes
