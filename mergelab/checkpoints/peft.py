"""A PEFT folder's configuration, read and made."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mergelab.checkpoints.json_data import read_json_object
from mergelab.checkpoints.name_pattern import compile_pattern, matches_name
from mergelab.errors import CheckpointError

__all__ = ["LoraConfig", "adapter_config", "read_lora_config"]


# Options that say how the adapter was trained or where it applies; the tensors themselves show the rest.
_HARMLESS = frozenset((
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_bias", "lora_dropout", "lora_ga_config",
    "megatron_config", "megatron_core", "modules_to_save", "peft_type", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type", "velora_config",
))  # fmt: skip
_READ = frozenset((
    "r", "lora_alpha", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "use_dora",
    "trainable_token_indices", "target_parameters",
))  # fmt: skip
_LARGEST = 1e9
_KEEPS_BASE = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
"""`init_lora_weights` under which training starts from the unchanged base."""
_PISSA = re.compile(r"pissa(_niter_\d+)?")


@dataclass(frozen=True)
class LoraConfig:
    """What merging needs of an adapter's configuration.

    Attributes:
        r, alpha: rank and scale numerator of modules that no pattern names.
        use_rslora: scale is `alpha / sqrt(r)` instead of `alpha / r`.
        fan_in_fan_out: weights are stored `[in, out]`; decides only where the shape cannot.
        rank_pattern, alpha_pattern: values for modules whose name ends in (or matches) the key.
        modules_to_save: ends of the names of modules that PEFT trains as copies of their own.
        target_modules: ends of the names of modules with factors; None where a pattern chooses them.
        ensure_weight_tying: whether the copies of a tied embedding and head are one.
        use_dora: whether each output's weights are scaled to a magnitude of its own (DoRA).
        start: what the base is altered by when training starts, or None.
        token_indices: rows of embeddings that are trained, by the ends of their modules' names; the empty end
            is the input embedding's.
        target_parameters: ends of the names of parameters with factors that are not a module's `weight`.
    """

    r: int
    alpha: float
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    target_modules: tuple[str, ...] | None = None
    ensure_weight_tying: bool = False
    use_dora: bool = False
    start: Literal["pissa", "olora"] | None = None
    token_indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    target_parameters: tuple[str, ...] = ()

    def tokens_of(self, module: str) -> tuple[int, ...] | None:
        """The rows that are trained of a module; None if it has none."""
        ends = (end for end in self.token_indices if end in ("", module) or module.endswith(f".{end}"))
        end = next(ends, None)
        return None if end is None else self.token_indices[end]

    def is_saved(self, module: str) -> bool:
        """Whether PEFT keeps a copy of its own of a module, instead of loading into the base's."""
        return module.endswith(self.modules_to_save)

    def is_targeted(self, module: str) -> bool:
        """Whether PEFT puts factors on a module, as far as `target_modules` says."""
        names = self.target_modules
        return names is None or any(module == name or module.endswith(f".{name}") for name in names)

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
        if matches_name(key, module):
            return value
    return default


def read_lora_config(path: Path) -> LoraConfig:
    """Reads `adapter_config.json`.

    Raises:
        CheckpointError: not a LoRA adapter, a wrong type, or an option (QALoRA, aLoRA, ...) whose effect is
            none of those known here.
    """
    data = read_json_object(path)
    if data.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path}: peft_type is {_shown(data.get('peft_type'))}, but only 'LORA' adapters can be merged; "
            "merge it with PEFT and use the resulting model"
        )
    for key, value in data.items():
        if value and key not in _HARMLESS | _READ:
            raise CheckpointError(
                f"{path}: {key} = {_shown(value)} changes the weights in a way that is not W + scale*B@A; "
                "merge the adapter with PEFT and use the resulting model"
            )
    start, kind = data.get("init_lora_weights"), _start(data.get("init_lora_weights"))
    if kind is None and start not in _KEEPS_BASE:
        raise CheckpointError(
            f"{path}: init_lora_weights = {_shown(start)} trains against an altered base; convert the "
            "adapter when saving it with PEFT (path_initial_model_for_weight_conversion)"
        )
    config = LoraConfig(
        r=_number(data, "r", path, 8),
        alpha=_number(data, "lora_alpha", path, 8),
        use_rslora=bool(data.get("use_rslora")),
        fan_in_fan_out=bool(data.get("fan_in_fan_out")),
        rank_pattern=_pattern(data, "rank_pattern", path),
        alpha_pattern=_pattern(data, "alpha_pattern", path),
        modules_to_save=_names(data, "modules_to_save", path),
        target_modules=None
        if isinstance(data.get("target_modules"), str)
        else _names(data, "target_modules", path) or None,
        ensure_weight_tying=bool(data.get("ensure_weight_tying")),
        use_dora=bool(data.get("use_dora")),
        start=kind,
        token_indices=_token_indices(data.get("trainable_token_indices"), path),
        target_parameters=_names(data, "target_parameters", path),
    )
    if min([config.r, *config.rank_pattern.values()]) < 1:
        raise CheckpointError(f"{path}: a rank is below 1; the adapter holds nothing to merge")
    return config


def _start(value: object) -> Literal["pissa", "olora"] | None:
    if not isinstance(value, str):
        return None
    if value.lower() == "olora":
        return "olora"
    return "pissa" if _PISSA.fullmatch(value) else None


def _token_indices(value: object, path: Path) -> dict[str, tuple[int, ...]]:
    """Rows by module; a list alone is for the input embedding, whatever its name."""
    by_module: dict[str, Any] = value if isinstance(value, dict) else {"": value} if value else {}
    for rows in by_module.values():
        whole = isinstance(rows, list) and all(type(row) is int and 0 <= row < 2**31 for row in rows)
        if not whole:
            raise CheckpointError(
                f"{path}: trainable_token_indices holds {_shown(rows)} where a list of token ids was "
                "expected; correct it"
            )
    return {module: tuple(rows) for module, rows in by_module.items()}


def _number(data: dict[str, Any], key: str, path: Path, default: int) -> Any:
    value = data.get(key, default)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # An integer may have more digits than any float, and than Python prints.
    if not number or not -_LARGEST <= value <= _LARGEST:
        found = "out of all bounds" if number else _shown(value)
        raise CheckpointError(f"{path}: {key} is {found} where a number was expected; correct it")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _names(data: dict[str, Any], key: str, path: Path) -> tuple[str, ...]:
    names = data.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(
            f"{path}: {key} is {_shown(names)} where a list of module names was expected; correct it"
        )
    return tuple(names)


def _pattern(data: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    pattern = data.get(key) or {}
    if not isinstance(pattern, dict):
        raise CheckpointError(
            f"{path}: {key} is {_shown(pattern)} where an object of module names was expected; correct it"
        )
    for name in pattern:
        try:
            compile_pattern(name)
        except ValueError as error:
            raise CheckpointError(
                f"{path}: {key} has the invalid pattern {_shown(name)} ({error}); write names of modules or "
                "their ends, at most with . [] () | * + ? and {n}"
            ) from error
    return {name: _number(pattern, name, path, 0) for name in pattern}


def adapter_config(
    ranks: Mapping[str, int],
    whole_modules: Collection[str],
    module_names: Collection[str],
    *,
    base: str,
    model_config: Mapping[str, Any],
    fan_in_fan_out: bool,
    with_biases: bool,
    keeps_tie: bool,
) -> dict[str, Any]:
    """The fields of `adapter_config.json`.

    The commonest rank is `r`; the others stand in `rank_pattern`, and `alpha_pattern` repeats them, so that
    the scale alpha / r is 1 everywhere.

    Args:
        ranks: the rank of every module that has factors, e.g. `model.layers.0.self_attn.q_proj`.
        whole_modules: modules stored whole.
        module_names: all modules of the base that have tensors.
        base: what `base_model_name_or_path` says.
        model_config: the base's `config.json`.
        fan_in_fan_out: the modules store their weights `[in, out]`.
        with_biases: biases are among the stored tensors.
        keeps_tie: embedding and head are both stored whole, and are one.
    """
    common = Counter(ranks.values()).most_common(1)[0][0]
    # PEFT takes the first pattern that ends a module's name: a longer name must come before its own end.
    others = {
        module: ranks[module] for module in sorted(ranks, key=len, reverse=True) if ranks[module] != common
    }
    architecture = next(iter(model_config.get("architectures") or ()), "")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if architecture.endswith(("ForCausalLM", "LMHeadModel")) else None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "bias": "all" if with_biases else "none",
        "fan_in_fan_out": fan_in_fan_out,
        "target_modules": _shortest(ranks, module_names),
        "modules_to_save": list(whole_modules) or None,
        "ensure_weight_tying": keeps_tie,
        "init_lora_weights": True,
        "use_rslora": False,
    }


def _shortest(targets: Collection[str], modules: Collection[str]) -> list[str]:
    """The targets by their last names (`q_proj`) where those name no other module, else in full."""
    containers = {part for module in modules for part in module.split(".")[:-1]}
    others = {module.rpartition(".")[2] for module in modules if module not in targets}
    return list(
        dict.fromkeys(
            module if (last := module.rpartition(".")[2]) in others | containers else last
            for module in targets
        )
    )
