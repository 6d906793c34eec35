"""A checkpoint with a LoRA adapter added to its weights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergelab.checkpoints.folder import FolderCheckpoint, open_checkpoint
from mergelab.checkpoints.locations import local_path
from mergelab.checkpoints.lora_merge import LoraMerge
from mergelab.checkpoints.peft import LoraConfig, read_lora_config
from mergelab.checkpoints.source import Checkpoint, TensorSource
from mergelab.checkpoints.text_file import read_bytes
from mergelab.checkpoints.tied_head import untied_config
from mergelab.errors import CheckpointError

__all__ = ["AdapterParts", "LoraCheckpoint", "sort_adapter", "with_lora"]


_MAGNITUDE = "lora_magnitude_vector"
_PARTS = (
    "lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", "lora_B.bias", _MAGNITUDE,
)  # fmt: skip
_TOKENS = re.compile(r"(.*?)(\.token_adapter)?\.trainable_tokens_delta(\.default)?")
_COPY = (".modules_to_save.default.", ".modules_to_save.")
_REPLACED = ".original_module."


@dataclass(frozen=True)
class AdapterParts:
    """An adapter's tensors.

    Attributes:
        modules: low-rank parts of each module, by their own names.
        tokens: values of the trained rows of each embedding.
        whole: tensors that replace the base's, by name.
        saved: the modules of `whole` that PEFT trains as copies of their own (`modules_to_save`).
    """

    modules: dict[str, dict[str, TensorSource]] = field(default_factory=dict)
    tokens: dict[str, TensorSource] = field(default_factory=dict)
    whole: dict[str, TensorSource] = field(default_factory=dict)
    saved: set[str] = field(default_factory=set)


def sort_adapter(tensors: Mapping[str, TensorSource], config: LoraConfig, folder: Path) -> AdapterParts:
    """Sorts the tensors of an adapter's file.

    An adapter that was saved after the vocabulary was resized holds an embedding up to three times: as PEFT's
    copy, under its plain name with the same values, and as it was before training. The copy counts.

    Raises:
        CheckpointError: a tensor of a variant that is not known, or two that say the same.
    """
    found = AdapterParts()
    copies: dict[str, TensorSource] = {}
    for full, source in tensors.items():
        name = full.removeprefix("base_model.model.")
        module, _, part = name.partition(".lora_")
        part = f"lora_{part.replace('.default', '', 1)}"
        part = _MAGNITUDE if part == f"{_MAGNITUDE}.weight" else part
        tokens = _TOKENS.fullmatch(name)
        infix = next((each for each in _COPY if each in name), None)
        if part in _PARTS:
            if part == _MAGNITUDE and not config.use_dora:
                raise CheckpointError(
                    f"{folder}: tensor {full!r} is of a DoRA adapter, but use_dora is not true in "
                    "adapter_config.json; correct it"
                )
            place, key = found.modules.setdefault(module, {}), part
        elif tokens is not None:
            place, key = found.tokens, tokens[1]
        elif ".lora_" in name or "trainable_tokens" in name:
            raise CheckpointError(
                f"{folder}: tensor {full!r} is of a variant that cannot be merged here (not plain LoRA); "
                "merge the adapter with PEFT and use the resulting model"
            )
        elif _REPLACED in name:
            continue
        elif infix is not None:
            place, key = copies, name.replace(infix, ".", 1)
        else:
            place, key = found.whole, name.replace(".base_layer.", ".", 1)
        if key in place:
            raise CheckpointError(
                f"{folder}: tensor {full!r} says the same as another one; keep the copy that was trained"
            )
        place[key] = source
    found.whole.update(copies)
    modules = {name.rpartition(".")[0] for name in found.whole}
    copied = {name.rpartition(".")[0] for name in copies}
    # A module with factors is not a copy, whatever else the config says of it.
    found.saved.update(
        module
        for module in modules
        if module in copied or (config.is_saved(module) and module not in found.modules)
    )
    return found


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
        decomposes: whether reading a few values of a tensor decomposes all of it.
    """

    base: Checkpoint
    adapter: FolderCheckpoint
    adapter_config_sha256: str
    tensors: Mapping[str, TensorSource]
    untied: bool = False
    warnings: tuple[str, ...] = ()
    decomposes: bool = False

    @property
    def path(self) -> Path:
        return self.base.path

    @property
    def config(self) -> Mapping[str, Any]:
        """The base's, with `tie_word_embeddings` false where the adapter parts head and embedding."""
        return untied_config(self.base.config) if self.untied else self.base.config

    def fingerprint(self) -> str:
        """Returns a SHA-256 hex digest of the base's and the adapter's; reads no weights."""
        own = getattr(self.base, "fingerprint", None)
        if own is None:
            raise CheckpointError(
                f"{self.path} is the result of a merge to come, which has no fingerprint yet"
            )
        parts = (own(), self.adapter.fingerprint(), self.adapter_config_sha256)
        return hashlib.sha256("+".join(parts).encode()).hexdigest()


def with_lora(checkpoint: Checkpoint, adapter_path: Path | str) -> LoraCheckpoint:
    """Returns `checkpoint` with a PEFT LoRA adapter merged into it, computed piece by piece when read.

    Every tensor of the adapter is used exactly once. A square `Conv1D` weight cannot be told from a linear
    one by its shape; there the model's type decides or, where it is not known, `fan_in_fan_out` of the
    adapter's config.

    DoRA scales each output's weights; an adapter that began with PiSSA or OLoRA is added to the base less
    what they took out of it, as PEFT takes it out when it loads the adapter; trained tokens are rows of the
    embedding; factors of `target_parameters` are added expert by expert.

    A head tied to the embedding is treated as PEFT's merge treats it: updates of either are added to the
    matrix they share, but where one of them is in `modules_to_save` they part, and the config of the result
    says so.

    Args:
        checkpoint: the model the adapter was trained on.
        adapter_path: folder with `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).

    Raises:
        CheckpointError: a missing file, a variant that is not known, a module the model does not have, or
            shapes and ranks that do not fit.
    """
    folder = local_path(adapter_path)
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
    merge.set_tokens(parts.tokens)
    merge.update(parts.modules)
    untied = merge.finish()
    digest = hashlib.sha256(read_bytes(config_path)).hexdigest()
    decomposes = config.start is not None or getattr(checkpoint, "decomposes", False)
    warnings = tuple(merge.warnings)
    return LoraCheckpoint(checkpoint, adapter, digest, merge.tensors, untied, warnings, decomposes)
