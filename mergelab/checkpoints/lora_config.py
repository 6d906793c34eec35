"""A PEFT adapter's `adapter_config.json`, typed, with every option that would change the weights refused."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergelab.checkpoints.json_data import read_json_object
from mergelab.errors import CheckpointError

__all__ = ["LoraConfig", "read_lora_config"]

# Options that say how the adapter was trained or where it applies; the tensors themselves show the rest.
_HARMLESS = frozenset((
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_bias", "lora_dropout", "lora_ga_config",
    "megatron_config", "megatron_core", "modules_to_save", "peft_type", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type", "velora_config",
))  # fmt: skip
_READ = frozenset(["r", "lora_alpha", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern"])
_KEEPS_BASE = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
"""`init_lora_weights` under which training starts from the unchanged base; pissa and others alter it."""


@dataclass(frozen=True)
class LoraConfig:
    """What merging needs of an adapter's configuration.

    Attributes:
        r, alpha: rank and scale numerator of modules that no pattern names.
        use_rslora: scale is `alpha / sqrt(r)` instead of `alpha / r`.
        fan_in_fan_out: weights are stored `[in, out]`; decides only where the shape cannot.
        rank_pattern, alpha_pattern: values for modules whose name ends in (or matches) the key.
    """

    r: int
    alpha: float
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def rank(self, module: str) -> int:
        """Returns the rank of a module, e.g. `model.layers.0.self_attn.q_proj`."""
        return _lookup(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """Returns what `B @ A` is multiplied with for a module."""
        r = self.rank(module)
        return _lookup(self.alpha_pattern, module, self.alpha) / (math.sqrt(r) if self.use_rslora else r)


def _lookup(pattern: dict[str, Any], module: str, default: Any) -> Any:
    """First key that matches the whole name, or its end after a dot, as PEFT reads patterns."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def read_lora_config(path: Path) -> LoraConfig:
    """Reads `adapter_config.json`.

    Raises:
        CheckpointError: not a LoRA adapter, a wrong type, or an option (DoRA, QALoRA, aLoRA, ...) whose
            effect is not `W + scale * B @ A`.
    """
    data = read_json_object(path)
    if data.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path}: peft_type is {data.get('peft_type')!r}, but only 'LORA' adapters can be merged; "
            "merge it with PEFT and use the resulting model"
        )
    for key, value in data.items():
        if value and key not in _HARMLESS | _READ:
            raise CheckpointError(
                f"{path}: {key} = {value!r} changes the weights in a way that is not W + scale*B@A; "
                "merge the adapter with PEFT and use the resulting model"
            )
    start = data.get("init_lora_weights")
    if start not in _KEEPS_BASE:
        raise CheckpointError(
            f"{path}: init_lora_weights = {start!r} trains against an altered base; convert the adapter "
            "when saving it with PEFT (path_initial_model_for_weight_conversion)"
        )
    config = LoraConfig(
        r=_number(data, "r", path, 8),
        alpha=_number(data, "lora_alpha", path, 8),
        use_rslora=bool(data.get("use_rslora")),
        fan_in_fan_out=bool(data.get("fan_in_fan_out")),
        rank_pattern=_pattern(data, "rank_pattern", path),
        alpha_pattern=_pattern(data, "alpha_pattern", path),
    )
    if min([config.r, *config.rank_pattern.values()]) < 1:
        raise CheckpointError(f"{path}: a rank is below 1; the adapter holds nothing to merge")
    return config


def _number(data: dict[str, Any], key: str, path: Path, default: int) -> Any:
    value = data.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise CheckpointError(f"{path}: {key} is {value!r} where a number was expected; correct it")
    return value


def _pattern(data: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    pattern = data.get(key) or {}
    if not isinstance(pattern, dict):
        raise CheckpointError(
            f"{path}: {key} is {pattern!r} where an object of module names was expected; correct it"
        )
    for name in pattern:
        try:
            re.compile(name)
        except re.error as error:
            raise CheckpointError(
                f"{path}: {key} has the invalid pattern {name!r} ({error}); correct it"
            ) from error
    return {name: _number(pattern, name, path, 0) for name in pattern}
