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

from mergelab.checkpoints.folder import FolderCheckpoint, open_checkpoint
from mergelab.checkpoints.lora_config import read_lora_config
from mergelab.checkpoints.lora_merge import LoraMerge
from mergelab.checkpoints.lora_parts import sort_adapter
from mergelab.checkpoints.source import TensorSource
from mergelab.checkpoints.text_file import read_bytes
from mergelab.checkpoints.tied_head import untied_config
from mergelab.errors import CheckpointError

__all__ = ["LoraCheckpoint", "with_lora"]

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class LoraCheckpoint:
    """A base checkpoint with an adapter applied as its tensors are read; its files are the base's.

    Attributes:
        base: the model the adapter was trained on.
        adapter: the adapter's tensors.
        adapter_config_sha256: digest of its `adapter_config.json`.
        tensors: those of the merged model.
        untied: whether the head is a tensor of its own in it, though the base's is its embedding.
        warnings: what PEFT would warn about, one sentence each.
    """

    base: FolderCheckpoint | LoraCheckpoint
    adapter: FolderCheckpoint
    adapter_config_sha256: str
    tensors: Mapping[str, TensorSource]
    untied: bool = False
    warnings: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        return self.base.path

    @property
    def config(self) -> Mapping[str, Any]:
        """The base's, with `tie_word_embeddings` false where the adapter parts head and embedding."""
        return untied_config(self.base.config) if self.untied else self.base.config

    def fingerprint(self) -> str:
        """Returns a SHA-256 hex digest of the base's and the adapter's; reads no weights."""
        parts = (self.base.fingerprint(), self.adapter.fingerprint(), self.adapter_config_sha256)
        return hashlib.sha256("+".join(parts).encode()).hexdigest()


def with_lora(checkpoint: FolderCheckpoint | LoraCheckpoint, adapter_path: Path | str) -> LoraCheckpoint:
    """Returns `checkpoint` with a PEFT LoRA adapter merged into it, computed piece by piece when read.

    Every tensor of the adapter is used exactly once. A square `Conv1D` weight cannot be told from a linear
    one by its shape; there the model's type decides or, where it is not known, `fan_in_fan_out` of the
    adapter's config.

    A head tied to the embedding is treated as PEFT's merge treats it: updates of either are added to the
    matrix they share, but where one of them is in `modules_to_save` they part, and the config of the result
    says so.

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
    parts = sort_adapter(adapter.tensors, config, folder)
    merge = LoraMerge.of(checkpoint, config, folder, parts.saved)
    # Whole tensors first: a low-rank update applies on top of a replaced weight.
    merge.replace(parts.whole)
    merge.update(parts.modules)
    untied = merge.finish()
    digest = hashlib.sha256(read_bytes(config_path)).hexdigest()
    return LoraCheckpoint(checkpoint, adapter, digest, merge.tensors, untied, tuple(merge.warnings))
