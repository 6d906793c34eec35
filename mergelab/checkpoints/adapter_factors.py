"""A PEFT adapter that is nothing but low-rank factors: its products, module by module."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.checkpoints.folder import FolderCheckpoint, open_checkpoint
from mergelab.checkpoints.json_data import read_json_object
from mergelab.checkpoints.locations import local_path
from mergelab.checkpoints.lora import AdapterParts, sort_adapter
from mergelab.checkpoints.lora_tensor import read_whole
from mergelab.checkpoints.peft import LoraConfig, read_lora_config
from mergelab.checkpoints.source import TensorSource
from mergelab.checkpoints.text_file import read_bytes
from mergelab.errors import CheckpointError

__all__ = ["FactorPair", "FactoredAdapter", "is_adapter", "open_adapter", "read_factors"]

_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_LINEAR = ("lora_B.weight", "lora_A.weight")
_EMBEDDING = ("lora_embedding_B", "lora_embedding_A")


@dataclass(frozen=True)
class FactorPair:
    """The factors of one module: its change is `scale * B @ A`, or that transposed.

    Attributes:
        b, a: `[rows, rank]` and `[rank, columns]`, as stored.
        scale: `lora_alpha / r`, or `lora_alpha / sqrt(r)` where the adapter is rank-stabilized.
        names: what PEFT calls the two, behind the module's name.
    """

    b: TensorSource
    a: TensorSource
    scale: float
    names: tuple[str, str]

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """`scale * B` and `A` in float64."""
        return read_whole(self.b).astype(np.float64) * self.scale, read_whole(self.a).astype(np.float64)


@dataclass(frozen=True)
class FactoredAdapter:
    """An adapter of low-rank factors alone.

    Attributes:
        folder: its folder.
        config: what merging needs of its configuration.
        fields: all of `adapter_config.json`.
        modules: factors by the name of their module in the base model.
        digest: SHA-256 of its files.
    """

    folder: Path
    config: LoraConfig
    fields: Mapping[str, Any]
    modules: Mapping[str, FactorPair]
    digest: str


def is_adapter(path: Path) -> bool:
    """Whether a folder is a PEFT adapter's, by its configuration."""
    return (path / _CONFIG).is_file()


def open_adapter(path: Path | str) -> tuple[FolderCheckpoint, LoraConfig, AdapterParts]:
    """Opens a PEFT adapter: its file, its configuration, and its tensors by what they are.

    Raises:
        CheckpointError: a missing or damaged file, or a kind of adapter that is not LoRA.
    """
    folder = local_path(path)
    if not is_adapter(folder):
        raise CheckpointError(f"{folder} has no {_CONFIG}; name the folder of a PEFT adapter")
    config = read_lora_config(folder / _CONFIG)
    found = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"{folder} has no {' or '.join(_WEIGHTS)}; finish the download")
    checkpoint = open_checkpoint(found)
    return checkpoint, config, sort_adapter(checkpoint.tensors, config, folder)


def read_factors(path: Path | str) -> FactoredAdapter:
    """Opens an adapter whose whole effect is one product of factors per module.

    Raises:
        CheckpointError: a missing file, a shape or rank that does not fit, or something besides products
            (DoRA's magnitudes, biases, whole modules, trained tokens, factors relative to an altered base,
            factors of convolutions or of stacked experts), named.
    """
    folder = local_path(path)
    checkpoint, config, parts = open_adapter(folder)
    beyond = {
        "use_dora: magnitudes are no product": config.use_dora,
        "init_lora_weights: its factors count from an altered base": config.start is not None,
        "trainable_token_indices: trained rows are no product": bool(parts.tokens or config.token_indices),
        "target_parameters: its factors are of stacks of experts": bool(config.target_parameters),
    }
    faults = [what for what, there in beyond.items() if there]
    if parts.whole:
        faults.append(f"{min(parts.whole)!r} stored whole (modules_to_save, bias): it is no product")
    modules: dict[str, FactorPair] = {}
    for module, tensors in parts.modules.items():
        pair = next((names for names in (_LINEAR, _EMBEDDING) if tensors.keys() == set(names)), None)
        if pair is not None:
            b, a = (tensors[name] for name in pair)
            modules[module] = FactorPair(b, a, config.scale(module), pair)
            faults += _shape_faults(module, modules[module], config)
        elif not config.use_dora:
            faults.append(f"module {module!r} has {', '.join(sorted(tensors))}, not one B and one A")
    if faults:
        listed = "; ".join(faults[:20])
        raise CheckpointError(
            f"{folder} cannot be merged as an adapter, which holds products B A alone: {listed}; merge it "
            "into the base model (base+adapter in a recipe) instead"
        )
    digest = hashlib.sha256(read_bytes(folder / _CONFIG))
    with checkpoint.files[0].file.path.open("rb") as stream:
        digest.update(hashlib.file_digest(stream, "sha256").digest())
    fields = read_json_object(folder / _CONFIG)
    return FactoredAdapter(folder, config, fields, modules, digest.hexdigest())


def _shape_faults(module: str, pair: FactorPair, config: LoraConfig) -> list[str]:
    if len(pair.b.shape) != 2 or len(pair.a.shape) != 2:
        return [f"module {module!r} has factors {list(pair.b.shape)} and {list(pair.a.shape)}: not matrices"]
    if not pair.b.shape[1] == pair.a.shape[0] == config.rank(module):
        return [
            f"module {module!r} has factors {list(pair.b.shape)} and {list(pair.a.shape)} where rank "
            f"{config.rank(module)} was expected"
        ]
    return []
