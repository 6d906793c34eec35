"""The tensors of a LoRA adapter by what they are: low-rank parts of modules, and tensors saved whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mergelab.checkpoints.lora_config import LoraConfig
from mergelab.checkpoints.source import TensorSource
from mergelab.errors import CheckpointError

__all__ = ["AdapterParts", "sort_adapter"]

_PARTS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", "lora_B.bias")
_COPY = (".modules_to_save.default.", ".modules_to_save.")
_REPLACED = ".original_module."


@dataclass(frozen=True)
class AdapterParts:
    """An adapter's tensors.

    Attributes:
        modules: by module, its low-rank parts by their own names.
        whole: tensors that replace the base's, by name.
        saved: the modules of `whole` that PEFT trains as copies of their own (`modules_to_save`).
    """

    modules: dict[str, dict[str, TensorSource]] = field(default_factory=dict)
    whole: dict[str, TensorSource] = field(default_factory=dict)
    saved: set[str] = field(default_factory=set)


def sort_adapter(tensors: Mapping[str, TensorSource], config: LoraConfig, folder: Path) -> AdapterParts:
    """Sorts the tensors of an adapter's file.

    An adapter that was saved after the vocabulary was resized holds an embedding up to three times: as PEFT's
    copy, under its plain name with the same values, and as it was before training. The copy counts.

    Raises:
        CheckpointError: a tensor of a variant other than plain LoRA, or two that say the same.
    """
    found = AdapterParts()
    copies: dict[str, TensorSource] = {}
    for full, source in tensors.items():
        name = full.removeprefix("base_model.model.")
        module, _, part = name.partition(".lora_")
        part = f"lora_{part.replace('.default', '', 1)}"
        infix = next((each for each in _COPY if each in name), None)
        if part in _PARTS:
            place, key = found.modules.setdefault(module, {}), part
        elif ".lora_" in name or "trainable_tokens" in name:
            variant = "DoRA" if "magnitude" in name else "not plain LoRA"
            raise CheckpointError(
                f"{folder}: tensor {full!r} is of a variant that cannot be merged here ({variant}); "
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
                f"{folder}: tensor {full!r} says the same as another one; save the adapter again"
            )
        place[key] = source
    found.whole.update(copies)
    modules = {name.rpartition(".")[0] for name in found.whole}
    copied = {name.rpartition(".")[0] for name in copies}
    # A module with factors is no copy, whatever else the config says of it.
    found.saved.update(
        module
        for module in modules
        if module in copied or (config.is_saved(module) and module not in found.modules)
    )
    return found
