"""A checkpoint seen through a LoRA adapter: the tensors it would have after `merge_and_unload`.

Semantics are those of PEFT 0.21 (https://huggingface.co/docs/peft): `W + scale * B @ A` for linear layers,
its transpose for `Conv1D` and embeddings; tensors saved whole (`modules_to_save`, biases) replace the base's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergelab.checkpoints.cast_tensor import CastTensor
from mergelab.checkpoints.dtypes import is_float
from mergelab.checkpoints.folder import FolderCheckpoint, open_checkpoint
from mergelab.checkpoints.lora_config import LoraConfig, read_lora_config
from mergelab.checkpoints.lora_tensor import BiasedTensor, FactorCache, LowRankTensor
from mergelab.checkpoints.source import TensorSource
from mergelab.checkpoints.text_file import read_bytes
from mergelab.errors import CheckpointError, did_you_mean

__all__ = ["LoraCheckpoint", "with_lora"]

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PARTS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", "lora_B.bias")
_WHOLE = ("modules_to_save.default.", "modules_to_save.", "base_layer.")


@dataclass(frozen=True)
class LoraCheckpoint:
    """A base checkpoint with an adapter applied as its tensors are read; config and files are the base's."""

    base: FolderCheckpoint | LoraCheckpoint
    adapter: FolderCheckpoint
    adapter_config_sha256: str
    tensors: Mapping[str, TensorSource]

    @property
    def path(self) -> Path:
        return self.base.path

    @property
    def config(self) -> Mapping[str, Any]:
        return self.base.config

    def fingerprint(self) -> str:
        """Returns a SHA-256 hex digest of the base's and the adapter's; reads no weights."""
        parts = (self.base.fingerprint(), self.adapter.fingerprint(), self.adapter_config_sha256)
        return hashlib.sha256("+".join(parts).encode()).hexdigest()


def with_lora(checkpoint: FolderCheckpoint | LoraCheckpoint, adapter_path: Path | str) -> LoraCheckpoint:
    """Returns `checkpoint` with a PEFT LoRA adapter merged into it, computed piece by piece when read.

    Every tensor of the adapter is used exactly once. A square `Conv1D` weight cannot be told from a linear
    one by its shape; there `fan_in_fan_out` of the adapter's config decides.

    Args:
        checkpoint: the model the adapter was trained on.
        adapter_path: folder with `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).

    Raises:
        CheckpointError: a missing file, a variant other than plain LoRA, a module the model does not have, or
            shapes and ranks that do not fit.
    """
    folder = Path(adapter_path)
    config_path = folder / "adapter_config.json"
    if not config_path.is_file():
        raise CheckpointError(f"{folder} has no adapter_config.json; name the folder of a PEFT adapter")
    config = read_lora_config(config_path)
    found = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"{folder} has no {' or '.join(_WEIGHTS)}; finish the download")
    adapter = open_checkpoint(found)
    tensors = dict(checkpoint.tensors)
    # Whole tensors first: a low-rank update applies on top of a replaced weight.
    modules, whole = _sort(adapter.tensors, folder)
    replaced: set[str] = set()
    for name, source in whole.items():
        target = _once(_target(name, tensors, folder), replaced, folder)
        _check_shape(target, tensors[target].shape, source.shape, folder)
        tensors[target] = CastTensor(target, tensors[target].dtype, source)
    cache, updated = FactorCache(), set()
    for module, parts in modules.items():
        _once(_target(f"{module}.weight", tensors, folder), updated, folder)
        _apply(module, parts, tensors, config, cache, folder)
    digest = hashlib.sha256(read_bytes(config_path)).hexdigest()
    return LoraCheckpoint(checkpoint, adapter, digest, tensors)


def _sort(
    tensors: Mapping[str, TensorSource], folder: Path
) -> tuple[dict[str, dict[str, TensorSource]], dict[str, TensorSource]]:
    """Splits an adapter into low-rank parts by module, and tensors that replace the base's, by name."""
    modules: dict[str, dict[str, TensorSource]] = {}
    whole: dict[str, TensorSource] = {}
    for full, source in tensors.items():
        name = full.removeprefix("base_model.model.")
        module, _, part = name.partition(".lora_")
        part = f"lora_{part.replace('.default', '', 1)}"
        if part in _PARTS:
            place, key = modules.setdefault(module, {}), part
        elif ".lora_" in name or "trainable_tokens" in name:
            variant = "DoRA" if "magnitude" in name else "not plain LoRA"
            raise CheckpointError(
                f"{folder}: tensor {full!r} is of a variant that cannot be merged here ({variant}); "
                "merge the adapter with PEFT and use the resulting model"
            )
        else:
            for infix in _WHOLE:
                name = name.replace(f".{infix}", ".", 1)
            place, key = whole, name
        if key in place:
            raise CheckpointError(
                f"{folder}: tensor {full!r} says the same as another one; save the adapter again"
            )
        place[key] = source
    return modules, whole


def _target(name: str, tensors: Mapping[str, TensorSource], folder: Path) -> str:
    """Returns the model's name of a tensor: the same one, or the only one that differs by a leading part."""
    if name in tensors:
        return name
    near = [n for n in tensors if n.endswith(f".{name}") or name.endswith(f".{n}")]
    if len(near) != 1:
        raise CheckpointError(
            f"{folder}: the adapter changes {name!r}, which the model does not have"
            f"{did_you_mean(name, tensors)}; "
            "use the model the adapter was trained on"
        )
    return near[0]


def _once(name: str, seen: set[str], folder: Path) -> str:
    """Returns `name`, which two tensors of the adapter must not both change."""
    if name in seen:
        raise CheckpointError(f"{folder}: two modules of the adapter change {name!r}; save the adapter again")
    seen.add(name)
    return name


def _check_shape(name: str, found: tuple[int, ...], needed: tuple[int, ...], folder: Path) -> None:
    if found != needed:
        raise CheckpointError(
            f"{folder}: the adapter needs {name!r} to have shape {needed} but the model's has {found}; "
            "use the model the adapter was trained on"
        )


def _apply(
    module: str,
    parts: dict[str, TensorSource],
    tensors: dict[str, TensorSource],
    config: LoraConfig,
    cache: FactorCache,
    folder: Path,
) -> None:
    """Replaces a module's weight (and bias) in `tensors` by the updated one."""
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    keys = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    bias = parts.get("lora_B.bias")
    if any(key not in parts for key in keys) or len(parts) != 2 + (bias is not None):
        raise CheckpointError(
            f"{folder}: module {module!r} has {', '.join(sorted(parts))} where {' and '.join(keys)} were "
            "expected; save the adapter again"
        )
    a, b = parts[keys[0]], parts[keys[1]]
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise CheckpointError(
            f"{folder}: module {module!r} has {len(a.shape)}-D factors; only matrices can be merged here: "
            "merge the adapter with PEFT"
        )
    rank = config.rank(module)
    if a.shape[0] != rank or b.shape[1] != rank:
        raise CheckpointError(
            f"{folder}: module {module!r} has factors {a.shape} and {b.shape} but its config gives rank "
            f"{rank}; correct r or rank_pattern in adapter_config.json"
        )
    name = _target(f"{module}.weight", tensors, folder)
    weight = tensors[name]
    if not is_float(weight.dtype) or not (is_float(a.dtype) and is_float(b.dtype)):
        raise CheckpointError(f"{folder}: {name!r} is stored as {weight.dtype}; dequantise the model first")
    linear, transposed = (b.shape[0], a.shape[1]), (a.shape[1], b.shape[0])
    if embedding or (weight.shape == transposed and (linear != transposed or config.fan_in_fan_out)):
        _check_shape(name, weight.shape, transposed, folder)
        tensors[name] = LowRankTensor(weight, (a, True), (b, True), config.scale(module), cache)
    else:
        _check_shape(name, weight.shape, linear, folder)
        tensors[name] = LowRankTensor(weight, (b, False), (a, False), config.scale(module), cache)
    if bias is not None:
        name = _target(f"{module}.bias", tensors, folder)
        _check_shape(name, tensors[name].shape, bias.shape, folder)
        tensors[name] = BiasedTensor(tensors[name], bias, config.scale(module))
