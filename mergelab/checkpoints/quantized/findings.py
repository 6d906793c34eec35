"""What readers of quantized formats share: the tensors of a checkpoint, its settings, and what they find."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mergelab.checkpoints.lora_tensor import read_whole
from mergelab.checkpoints.quantized.box_source import BoxSource, Transposed
from mergelab.checkpoints.source import TensorSource
from mergelab.errors import quoted

__all__ = ["Findings", "Settings"]


@dataclass(frozen=True)
class Settings:
    """What a `quantization_config` says that the files do not.

    Attributes:
        method: `quant_method`, in lower case; None where none is named.
        block: Rows and columns of a block; None where they are not stated.
        group: Codes of a row that share a scale; None where it is not stated.
        bits: Bits of codes that are mentioned, in the order of the config.
        asymmetric: Whether all weights are said to have zero points.
        checkpoint_format: GPTQ's: `gptq` (the first version), `gptq_v2`, or another's name.
        packing: Auto-Round's `packing_format`, and AWQ's `version`; empty where none is named.
    """

    method: str | None = None
    block: tuple[int, int] | None = None
    group: int | None = None
    bits: tuple[int, ...] = ()
    asymmetric: bool = False
    checkpoint_format: str = "gptq"
    packing: str = ""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Settings:
        """Reads the fields that are of the expected type and passes over all else: the files decide."""
        groups = config.get("config_groups")
        schemes = [group.get("weights") for group in _mappings(groups)]
        weights = [scheme for scheme in schemes if isinstance(scheme, Mapping)]
        holders = [config, *weights]
        blocks = [holder.get(key) for holder in holders for key in ("weight_block_size", "block_structure")]
        lengths = [holder.get(key) for holder in holders for key in ("group_size", "q_group_size")]
        bits = [holder.get(key) for holder in holders for key in ("bits", "num_bits", "w_bit")]
        method = config.get("quant_method", config.get("quant_algo"))
        packing = config.get("packing_format", config.get("version"))
        stated = config.get("checkpoint_format")
        return cls(
            method.lower() if isinstance(method, str) else None,
            next(((each[0], each[1]) for each in blocks if _are_two_sizes(each)), None),
            next((each for each in lengths if _is_size(each)), None),
            tuple(each for each in bits if _is_size(each) and each <= 8),
            bool(weights) and all(scheme.get("symmetric") is False for scheme in weights),
            stated.lower() if isinstance(stated, str) else "gptq",
            packing.lower() if isinstance(packing, str) else "",
        )


def _mappings(value: object) -> list[Mapping[str, Any]]:
    return (
        [each for each in value.values() if isinstance(each, Mapping)] if isinstance(value, Mapping) else []
    )


def _is_size(value: object) -> bool:
    return type(value) is int and value > 0


def _are_two_sizes(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_size, value))


@dataclass
class Findings:
    """The tensors of one checkpoint while readers look for quantized ones among them.

    Attributes:
        place: Folder or file, for messages.
        tensors: Stored tensors by name.
        settings: What its config says of quantization.
        conv1d: Last names of modules whose plain weights are stored `[in, out]`, though their quantized ones
            are `[out, in]` (GPT-2's).
        found: Dequantized tensors by the name of the stored tensor whose place they take.
        used: Stored tensors that are no tensors of the model: codes, scales, what belongs to activations.
        faults: One sentence for each tensor that cannot be read.
    """

    place: str
    tensors: Mapping[str, TensorSource]
    settings: Settings
    conv1d: tuple[str, ...] = ()
    found: dict[str, BoxSource] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)

    def give(self, source: BoxSource, codes: str, *more: str) -> None:
        """Records a dequantized tensor, the codes it replaces, and further tensors it makes useless."""
        module, _, last = source.name.rpartition(".")
        if last == "weight" and len(source.shape) == 2 and module.rpartition(".")[2] in self.conv1d:
            source = Transposed.of(source)
        if source.name != codes and source.name in self.tensors:
            self.fault(source.name, f"is stored beside {codes!r}, which is its quantized form; remove one")
        self.found[codes] = source
        self.used.update((codes, *(part.name for part in source.parts), *more))

    def fault(self, name: str, sentence: str, *used: str) -> None:
        """Records that a tensor cannot be read, and the stored tensors this has been said of."""
        self.faults.append(f"{self.place}: tensor {name!r} {sentence}")
        self.used.update((name, *used))

    def companions(self, stem: str, *lasts: str) -> tuple[str, ...]:
        """Which of the tensors `stem + last` there are."""
        return tuple(name for name in (stem + last for last in lasts) if name in self.tensors)

    def scalar(self, name: str, *used: str) -> np.ndarray | None:
        """The value of a tensor of one number, float32 of shape `[]`; a fault, and None, if it is none."""
        source = self.tensors[name]
        if math.prod(source.shape) != 1:
            self.fault(name, f"has shape {list(source.shape)} where one number was expected; {COPY}", *used)
            return None
        return read_whole(source).reshape(()).astype(np.float32)


COPY = "download or quantize the model again"


def described(source: TensorSource) -> str:
    """`int8 [64, 32]`, for messages."""
    return f"{source.dtype} {quoted(list(source.shape))}"
