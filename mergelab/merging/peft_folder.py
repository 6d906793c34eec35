"""Writes a LoRA adapter as PEFT reads it: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from mergelab.checkpoints import CheckpointWriter, TensorSpec, plan_shards
from mergelab.checkpoints.output_target import MARKER
from mergelab.checkpoints.work_folder import WorkFolder
from mergelab.version import __version__

__all__ = ["adapter_config", "write_adapter"]

_WEIGHTS = "adapter_model.safetensors"


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


def write_adapter(
    work: WorkFolder,
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    identity: Mapping[str, str],
    extracted: Mapping[str, Any],
) -> int:
    """Writes the folder under its final name once it is complete; returns the bytes of its weight file.

    Args:
        work: the folder's work folder, entered and prepared.
        tensors: factors and whole tensors by the names that PEFT gives them.
        config: the content of `adapter_config.json`.
        identity: digests of all that decides the content.
        extracted: what `mergelab.json` says of the extraction.

    Raises:
        OutputError: the disk is full or fails.
    """
    specs = [TensorSpec(name, array.dtype, array.shape) for name, array in tensors.items()]
    plan = plan_shards(specs, shard_bytes=1 + sum(spec.nbytes for spec in specs))
    plan = dataclasses.replace(plan, shards=(dataclasses.replace(plan.shards[0], file=_WEIGHTS),))
    facts = {"mergelab": __version__, "extracted": {**extracted, "nbytes": plan.nbytes}}
    with CheckpointWriter(work, plan, identity) as writer:
        for name, array in tensors.items():
            writer.write(name, 0, np.ascontiguousarray(array).reshape(-1))
        writer.add_file("adapter_config.json", _text(config))
        writer.add_file(MARKER, _text(facts))
        writer.commit()
    return plan.nbytes


def _text(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
