"""Quantized checkpoints: every quantized tensor as one source in float32, computed as it is read."""

from typing import TYPE_CHECKING

from mergelab.lazy import lazy_names

if TYPE_CHECKING:
    from mergelab.checkpoints.quantized.box_source import BoxSource
    from mergelab.checkpoints.quantized.detect import SplitConfig, dequantized, split_config

__all__ = ["BoxSource", "SplitConfig", "dequantized", "split_config"]

__getattr__, __dir__ = lazy_names(__name__)
