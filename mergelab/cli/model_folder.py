"""Loads the model of a folder, whichever of the two forms it has: Hugging Face's or Orbax's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["load_either", "read_model"]


def read_model(path: Path) -> Any:
    """The model that a folder's `config.json` describes, in either form, without its parameters.

    Raises:
        CheckpointError: there is none, or it is of no supported family.
    """
    from mergelab.checkpoints.json_data import read_json_object
    from mergelab.errors import CheckpointError
    from mergelab.models.families import model_from_config

    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{path} has no config.json; name the folder of a model")
    return model_from_config(read_json_object(file), str(file))


def load_either(
    path: Path, sizes: Mapping[str, int] | None = None, dtype: str | None = None
) -> tuple[Any, Any]:
    """The model and its parameters.

    Args:
        path: the folder.
        sizes: the axes of the mesh it is spread over; the default device if None.
        dtype: the parameters' dtype; the stored one if None.

    Raises:
        MergelabError: as `load_model`, `load_orbax` and `make_mesh`.
    """
    from mergelab.models.load import load_model
    from mergelab.models.orbax import is_orbax_model, load_orbax
    from mergelab.sharding import make_mesh

    mesh = None if sizes is None else make_mesh(sizes)
    load = load_orbax if is_orbax_model(path) else load_model
    return load(path, mesh=mesh, dtype=dtype)
