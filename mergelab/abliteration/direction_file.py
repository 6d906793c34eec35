"""`direction.safetensors`: what was removed from a model, kept so that it is removed or added elsewhere.

Tensors of float32: `direction [width]`, of length 1; and where a model was edited with it, the rest of the
`Ablation`: `directions [layers + 1, width]`, `embeddings []`, `attention [layers]` and `mlp [layers]`. The
metadata say the site, the length of the difference of means, the norms kept, and what it was computed from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save

from mergelab.abliteration.ablation import Ablation, unit
from mergelab.abliteration.removal import KeepNorms
from mergelab.checkpoints import is_float, open_safetensors, read_whole
from mergelab.checkpoints.json_data import parse_json_object
from mergelab.checkpoints.new_files import NewFiles
from mergelab.checkpoints.publish import publish_file
from mergelab.errors import CheckpointError, MergelabError
from mergelab.interp.steering import SteeringVector
from mergelab.models.model import Model

__all__ = ["DIRECTION_FILE", "SavedDirection", "load_direction", "save_direction"]

DIRECTION_FILE = "abliteration/direction.safetensors"
"""Its place in an edited folder: servers that read every `*.safetensors` of a model look in no subfolder."""

_FORMAT = "mergelab-direction-1"
_PARTS = ("directions", "embeddings", "attention", "mlp")


@dataclass(frozen=True, eq=False)
class SavedDirection:
    """A direction of refusals, and how it was removed.

    Attributes:
        vector: the direction, of length 1, with the site it was found at; its `norm` is the length of the
            difference of means, so that `steer(vector, 1.0)` adds what separates harmful from harmless
            prompts, `steer(vector, -1.0)` takes that away, and `ablate(vector)` removes the component.
        ablation: what was removed where; None of a direction that says nothing of it.
        keep_norms: norms that edited matrices kept.
        computed_from: what it was computed from, as plain data: `model`, `prompts`, `kind`, ....
    """

    vector: SteeringVector
    ablation: Ablation | None = None
    keep_norms: KeepNorms = None
    computed_from: Mapping[str, Any] = field(default_factory=dict)

    def for_model(self, model: Model) -> Ablation:
        """What to remove from a model: as it was removed before, or else everywhere.

        Raises:
            MergelabError: the direction is of a model of another width or depth.
        """
        layers, width = model.config.n_layers, model.config.d_model
        found = self.vector.vector.shape[0]
        if found != width or (self.ablation is not None and self.ablation.layers != layers):
            depth = "" if self.ablation is None else f" and {self.ablation.layers} layers"
            raise MergelabError(
                f"the direction is of a model of width {found}{depth}, but this one has width {width} and "
                f"{layers} layers; take the direction of a model of the same shape."
            )
        return Ablation.everywhere(self.vector.vector, layers) if self.ablation is None else self.ablation

    def to_bytes(self) -> bytes:
        """The content of the file."""
        tensors = {"direction": np.asarray(self.vector.vector, np.float32)}
        if self.ablation is not None:
            tensors |= {name: np.asarray(getattr(self.ablation, name), np.float32) for name in _PARTS}
        metadata = {
            "format": _FORMAT,
            "site": self.vector.site,
            "model_type": self.vector.model_type,
            "norm": repr(float(self.vector.norm)),
            "keep_norms": self.keep_norms or "none",
            "computed_from": json.dumps(dict(self.computed_from), ensure_ascii=False),
        }
        # Contiguous, since the writer takes the memory as it lies.
        return save({name: np.asarray(array, order="C") for name, array in tensors.items()}, metadata)


def save_direction(direction: SavedDirection, path: str | Path, *, overwrite: bool = False) -> Path:
    """Writes a direction, from which `load_direction` and `abliterate --direction` read it.

    Args:
        direction: the direction.
        path: the file, `NAME.safetensors`.
        overwrite: replace the file if it is there.

    Returns:
        The file.

    Raises:
        OutputError: the file is there, or cannot be written.
    """
    out, content = Path(path), direction.to_bytes()
    if overwrite:
        return publish_file(out, content)
    with NewFiles([out]) as files:
        files.publish({out: content})
        return files.paths[0]


def load_direction(path: str | Path) -> SavedDirection:
    """Reads the direction that was removed from a model.

    Args:
        path: a folder that `abliterate` wrote; its `abliteration/direction.safetensors`; or any safetensors
            file with a tensor `direction [width]`.

    Raises:
        CheckpointError: there is no such file, it is damaged, or its tensors are no direction.
    """
    path = Path(path)
    if path.is_dir():
        path = path / DIRECTION_FILE
    stored = open_safetensors(path)
    arrays: dict[str, np.ndarray] = {}
    for name in ("direction", *_PARTS):
        tensor = stored.tensors.get(name)
        if tensor is not None and not is_float(tensor.dtype):
            raise CheckpointError(f"{path}: tensor {name!r} is {tensor.dtype}, not floating-point numbers")
        if tensor is not None:
            arrays[name] = read_whole(tensor).astype(np.float32)
    direction = arrays.get("direction")
    if direction is None or direction.ndim != 1:
        found = "no tensor" if direction is None else f"{list(direction.shape)}"
        raise CheckpointError(
            f"{path} has {found} as its 'direction', but one vector [width] was expected; name a file that "
            "abliterate or save_direction wrote"
        )
    _check_finite(path, arrays)
    if not direction.any():
        raise CheckpointError(f"{path}: the direction is zero; find it again")
    said = stored.metadata
    kept = said.get("keep_norms", "none")
    if kept not in ("none", "written", "coordinate"):
        raise CheckpointError(
            f"{path}: keep_norms is {kept[:40]!r}, but none, written or coordinate was expected"
        )
    length = float(np.linalg.norm(direction))
    try:
        norm = float(said.get("norm", length))
    except ValueError:
        norm = length
    vector = SteeringVector(
        unit(jnp.asarray(direction)),
        jnp.float32(norm if np.isfinite(norm) and norm > 0 else length),
        said.get("site", ""),
        said.get("model_type", ""),
    )
    origin = said.get("computed_from")
    computed = {} if origin is None else parse_json_object(origin.encode(), f"{path}: computed_from")
    return SavedDirection(vector, _ablation(path, arrays), None if kept == "none" else kept, computed)


def _check_finite(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise CheckpointError(f"{path}: tensor {name!r} holds NaN or infinity; find the direction again")


def _ablation(path: Path, arrays: Mapping[str, np.ndarray]) -> Ablation | None:
    missing = [name for name in _PARTS if name not in arrays]
    if len(missing) == len(_PARTS):
        return None
    layers, width = arrays.get("mlp", np.zeros(0)).size, arrays["direction"].size
    expected = {"directions": (layers + 1, width), "embeddings": (), "attention": (layers,), "mlp": (layers,)}
    wrong = [
        f"{name} {list(arrays[name].shape)} in place of {list(shape)}"
        for name, shape in expected.items()
        if name in arrays and arrays[name].shape != shape
    ]
    if missing or wrong:
        what = [*(f"{name} is missing" for name in missing), *wrong]
        raise CheckpointError(f"{path} says only partly what is removed: {'; '.join(what)}; find it again")
    lengths = np.linalg.norm(arrays["directions"], axis=-1)
    if (np.abs(lengths - 1) > 1e-3).any(where=lengths > 0):
        raise CheckpointError(f"{path}: 'directions' are not of length 1; find them again")
    return Ablation(*(jnp.asarray(arrays[name]) for name in _PARTS))
