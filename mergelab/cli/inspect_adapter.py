"""`mergelab inspect ADAPTER`: what a LoRA adapter's folder holds, from its configuration and headers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergelab.cli.options import readable

__all__ = ["adapter_lines", "describe_adapter"]


def describe_adapter(folder: Path) -> dict[str, Any]:
    """What an adapter changes, of which model, as plain data.

    Args:
        folder: folder of a PEFT adapter.

    Raises:
        CheckpointError: its files are missing or damaged, or of a kind of adapter that is not LoRA.
    """
    from mergelab.checkpoints.adapter_factors import open_adapter
    from mergelab.checkpoints.json_data import read_json_object

    checkpoint, config, parts = open_adapter(folder)
    fields = read_json_object(folder / "adapter_config.json")
    tensors = checkpoint.tensors
    variants = {
        "DoRA": config.use_dora,
        "rsLoRA": config.use_rslora,
        str(config.start): config.start is not None,
        "factors of stacked experts": bool(config.target_parameters),
    }
    dtypes: Counter[str] = Counter()
    for tensor in tensors.values():
        dtypes[str(tensor.dtype)] += math.prod(tensor.shape) * tensor.dtype.itemsize
    base = fields.get("base_model_name_or_path")
    return {
        "path": str(folder),
        "adapter": "LoRA",
        "variants": [name for name, there in variants.items() if there],
        "base": base if isinstance(base, str) and base else None,
        "modules": {
            module: {"rank": config.rank(module), "scale": config.scale(module)} for module in parts.modules
        },
        "token_rows": sorted(parts.tokens),
        "stored_whole": sorted(parts.whole),
        "parameters": sum(math.prod(tensor.shape) for tensor in tensors.values()),
        "bytes": sum(dtypes.values()),
        "dtypes": dict(dtypes),
        "files": [file.file.path.name for file in checkpoint.files],
        "tensors": {name: {"dtype": str(t.dtype), "shape": list(t.shape)} for name, t in tensors.items()},
    }


def adapter_lines(report: Mapping[str, Any]) -> list[str]:
    """The same in lines, without its tensors."""
    modules = report["modules"].values()
    kinds = Counter(name.rpartition(".")[2] for name in report["modules"])
    listed = ", ".join(f"{name} x {count}" if count > 1 else name for name, count in kinds.items())
    rows = {
        "path": report["path"],
        "adapter": ", ".join([report["adapter"], *report["variants"]]),
        "base": report["base"] or "not named",
        "ranks": _range([module["rank"] for module in modules]),
        "scales": _range([module["scale"] for module in modules]),
        "changes": f"{len(modules)} module{'s' * (len(modules) != 1)}" + (f": {listed}" if listed else ""),
    }
    if report["token_rows"]:
        rows["rows"] = f"trained tokens of {', '.join(report['token_rows'])}"
    if report["stored_whole"]:
        whole = report["stored_whole"]
        rows["whole"] = ", ".join(whole[:4]) + (f" and {len(whole) - 4} more" if len(whole) > 4 else "")
    stored = ", ".join(f"{kind} {readable(size)}" for kind, size in report["dtypes"].items())
    rows["parameters"] = f"{report['parameters']:,} in {len(report['tensors'])} tensors"
    rows["stored"] = f"{stored}, in {len(report['files'])} file{'s' * (len(report['files']) > 1)}"
    return [f"{name:<10} {value}" for name, value in rows.items()]


def _range(values: list[float]) -> str:
    if not values:
        return "none"
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
