"""A model by whatever names it: a folder, a GGUF file, a place on the hub, an adapter, or a recipe."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.checkpoints.companions import has_companion
from mergelab.checkpoints.folder import open_checkpoint
from mergelab.checkpoints.json_data import read_json_object
from mergelab.checkpoints.locations import exists, local_path
from mergelab.checkpoints.lora import with_lora
from mergelab.checkpoints.source import Checkpoint
from mergelab.checkpoints.sparse_delta import is_delta, with_delta
from mergelab.errors import CheckpointError, quoted
from mergelab.models.load import load_model as load_opened
from mergelab.models.model import Model, Params
from mergelab.processes.agreement import span_processes, together
from mergelab.text.tokenizer import Tokenizer
from mergelab.text.tokenizer import load_tokenizer as load_stored_tokenizer

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from mergelab.merging.recipe.schema import Recipe
    from mergelab.models.streamed import StreamedParams
    from mergelab.sharding import Rules

__all__ = ["load_model", "load_tokenizer", "open_model", "stream"]

_ADAPTER = "adapter_config.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


def load_model(
    path: str | Path | Checkpoint | Recipe,
    *,
    mesh: Mesh | None = None,
    dtype: Any = None,
    rules: Rules | None = None,
) -> tuple[Model, Params]:
    """Loads a model: a folder or a file, an adapter on its base, or a merge that is not written.

    Bytes go from the files to the device that holds them. Of a recipe, each tensor is merged while it is
    read, so that what the host holds beside the loaded arrays is the blocks of the engine; the values are, to
    the bit, those of the folder that `merge` writes.

    Args:
        path: a model folder, a weight file or a GGUF file; a model on the Hugging Face hub, written
            `org/name[@revision][:subfolder]`; a URL such as `gs://bucket/model`; the folder of a LoRA adapter
            that names its base; `base+adapter`; a recipe, or its `.yaml` file; or a checkpoint that is open
            already (`open_merge(...)`, `with_lora(...)`).
        mesh: where the weights go (`mergelab.make_mesh`); JAX's default device if None.
        dtype: the parameters' dtype; the stored one if None.
        rules: logical axis -> mesh axes; `mergelab.sharding.DEFAULT_RULES` if None.

    Raises:
        CheckpointError: the folder, its config or a tensor is missing, unknown, damaged, or of another shape.
        NonFiniteError: a weight leaves the range of `dtype`.
        RecipeError: the recipe cannot be run (every reason at once).
        MeshError: a rule is missing, the mesh has an axis that no rule names, or another process failed.

    Example:
        >>> model, params = load_model("ties.yaml")                                 # doctest: +SKIP
    """
    distributed = mesh is not None and span_processes(mesh.devices.flat)
    with together("opening the model", distributed=distributed):
        opened = _opened(path)
    return load_opened(opened, mesh=mesh, dtype=dtype, rules=rules)


def stream(
    path: str | Path | Checkpoint | Recipe,
    *,
    mesh: Mesh | None = None,
    dtype: Any = None,
    rules: Rules | None = None,
    spill: str | Path | None = None,
) -> tuple[Model, StreamedParams]:
    """Opens a model whose weights stay in their files, for one that memory cannot hold.

    It is used as a loaded model is: `model.apply(params, tokens, capture=, edit=)`, and the functions of
    mergelab that run a model on text. Each block is read once for all tokens of such a call, while the block
    before it computes, and dropped; what is held is two blocks, the stream of all tokens, and what one batch
    computes. Quantized weights are dequantized, and those of a recipe merged, block by block.

    Args:
        path: what `load_model` takes.
        mesh: where blocks go; each device reads its slices.
        dtype: the parameters' dtype; the stored one if None.
        rules: logical axis -> mesh axes; `mergelab.sharding.DEFAULT_RULES` if None.
        spill: folder in which activations wait on disk; None to hold them in memory.

    Raises:
        CheckpointError: the folder, its config or a tensor is missing, unknown, or of another shape.
        RecipeError: the recipe cannot be run (every reason at once).

    Example:
        >>> model, params = stream("a-model-of-70-billion")                         # doctest: +SKIP
        >>> found = capture(model, params, tokens, ["blocks.40.resid_post"])        # doctest: +SKIP
    """
    from mergelab.models.streamed import stream_model

    return stream_model(open_model(path), mesh=mesh, dtype=dtype, rules=rules, spill=spill)


def load_tokenizer(path: str | Path | Checkpoint | Recipe) -> Tokenizer:
    """Reads the tokenizer of a model, of whatever `load_model` takes.

    Of a model on the hub or at a URL, only the small files are fetched; of a recipe, the tokenizer is the one
    that its merge would have.

    Raises:
        CheckpointError: there is no `tokenizer.json`, or one of the files is malformed.
        RecipeError: the recipe cannot be run.
    """
    if isinstance(path, str | Path) and not _is_recipe_file(path) and not _is_composed(path):
        place = local_path(path, "tokenizer")
        if has_companion(place, "tokenizer.json") or not (place / _ADAPTER).is_file():
            return load_stored_tokenizer(place)
    opened = _opened(path)
    return load_stored_tokenizer(opened if isinstance(opened, str | Path) else opened.path)


def open_model(
    path: str | Path | Checkpoint | Recipe, adapter: str | Path | None = None, **options: Any
) -> Checkpoint:
    """A model as an open checkpoint: headers and configs are read, and no weights.

    Args:
        path: what `load_model` takes.
        adapter: LoRA adapter or sparse task vector that is added to it.
        options: how a recipe is planned and read, fields of `MergeOptions`.

    Raises:
        CheckpointError: it cannot be opened, or the adapter does not fit it.
        RecipeError: the recipe cannot be run (every reason at once).
    """
    opened = _opened(path, **options)
    checkpoint = open_checkpoint(opened) if isinstance(opened, str | Path) else opened
    if adapter is None:
        return checkpoint
    folder = local_path(adapter)
    return with_delta(checkpoint, folder) if is_delta(folder) else with_lora(checkpoint, folder)


def _opened(path: str | Path | Checkpoint | Recipe, **options: Any) -> Checkpoint | str | Path:
    """An open checkpoint of what is no plain model; plain ones as they are."""
    if not isinstance(path, str | Path):
        if isinstance(path, Checkpoint):
            return path
        return _merge(path, **options)
    if _is_recipe_file(path):
        return _merge(path, **options)
    if _is_composed(path):
        base, _, adapter = os.fspath(path).partition("+")
        return open_model(base, adapter, **options)
    place = local_path(path)
    if place.is_dir() and (place / _ADAPTER).is_file() and not _has_weights(place):
        return open_model(_base_of(place), place, **options)
    return place


def _merge(recipe: str | Path | Recipe, **options: Any) -> Checkpoint:
    from mergelab.merging.unwritten_merge import open_merge  # pydantic takes longer than opening a model

    return open_merge(recipe, **options)


def _is_recipe_file(path: str | Path) -> bool:
    """Whether a path is called as recipes are; a model folder of such a name is a folder."""
    return Path(path).suffix.lower() in (".yaml", ".yml") and not Path(path).is_dir()


def _is_composed(path: str | Path) -> bool:
    """Whether a text is `base+adapter`, and no path whose own name holds a `+`."""
    base, plus, adapter = os.fspath(path).partition("+")
    return bool(base and plus and adapter) and not exists(Path(path))


def _has_weights(folder: Path) -> bool:
    """Whether weights lie in a folder that are not an adapter's."""
    names = [file.name for file in folder.iterdir() if file.name.endswith(_WEIGHTS)]
    return any(not name.startswith("adapter_") and name != "training_args.bin" for name in names)


def _base_of(folder: Path) -> Path | str:
    """The base that an adapter's config names: a path, also from the adapter's folder on, or a place."""
    named = read_json_object(folder / _ADAPTER).get("base_model_name_or_path")
    if not isinstance(named, str) or not named.strip():
        raise CheckpointError(
            f"{folder / _ADAPTER}: base_model_name_or_path is {quoted(named)}, which names no base model; "
            f"write its folder there, or name the base with the adapter: BASE+{folder}"
        )
    if exists(Path(named)):
        return Path(named)
    if exists(folder / named):
        return folder / named
    try:
        found = local_path(named)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / _ADAPTER}: the base {quoted(named)}: {error}") from None
    if not exists(found):
        raise CheckpointError(
            f"{folder / _ADAPTER} names the base {quoted(named)}, which does not exist; correct the path, or "
            f"name the base with the adapter: BASE+{folder}"
        )
    return found
