"""Quantized checkpoints as other libraries wrote them, against what these libraries dequantize."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from mergelab.checkpoints import open_checkpoint, read_whole

__all__ = ["recorded_files"]

_DATA = Path(__file__).resolve().parents[2] / "tests" / "checkpoints" / "quantized" / "data"
_NAMES = {
    "fp8_blocks": ("float8 in blocks", "transformers"),
    "fp8_per_tensor": ("float8, one scale", "transformers"),
    "fp8_exponent_scales": ("float8 and FP4, scales that are exponents", "transformers"),
    "mxfp4_experts": ("MXFP4 (gpt-oss)", "transformers"),
    "compressed_int8": ("compressed-tensors int8", "compressed-tensors"),
    "compressed_fp8": ("compressed-tensors float8", "compressed-tensors"),
    "compressed_packed": ("compressed-tensors int2 to int8, packed", "compressed-tensors"),
    "compressed_fp4": ("compressed-tensors NVFP4", "compressed-tensors"),
    "compressed_mxfp4": ("compressed-tensors MXFP4", "compressed-tensors"),
    "bitsandbytes_int8": ("bitsandbytes int8", "transformers, bitsandbytes"),
    "bitsandbytes_nf4": ("bitsandbytes NF4", "transformers, bitsandbytes"),
    "bitsandbytes_nf4_nested": ("bitsandbytes NF4, nested", "transformers, bitsandbytes"),
    "bitsandbytes_fp4": ("bitsandbytes FP4", "transformers, bitsandbytes"),
    "gptq": ("GPTQ, 2 to 8 bits", "AutoGPTQ"),
    "awq": ("AWQ int4", "AutoAWQ"),
}


def recorded_files(work: Path) -> list[Sequence[str]]:
    """One row per recorded file: format, reference, tensors compared, and how many differ in any bit."""
    recorded = json.loads((_DATA / "expected.json").read_text())
    rows = []
    for name, (kind, reference) in _NAMES.items():
        folder = work / name
        folder.mkdir()
        shutil.copy(_DATA / f"{name}.safetensors", folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(recorded[name]["config"]))
        tensors = open_checkpoint(folder).tensors
        wanted = {key: value["sha256"] for key, value in recorded[name]["tensors"].items()}
        found = {key: hashlib.sha256((read_whole(tensors[key]) + 0).tobytes()).hexdigest() for key in wanted}
        unlike = sum(found[key] != digest for key, digest in wanted.items())
        rows.append((kind, reference, str(len(wanted)), f"{unlike} tensors differ" if unlike else "0"))
    return rows
