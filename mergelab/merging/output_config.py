"""The merged model's `config.json`: the donor's, with layers, per-layer lists, dtype and vocabulary set."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from mergelab.checkpoints.tied_head import is_tied, untied_config
from mergelab.merging.architecture import Architecture, layer_counts
from mergelab.merging.job import Job
from mergelab.merging.vocabulary.embeddings import is_output_embedding, is_token_tensor

__all__ = ["config_differences", "output_config"]

_COMPARED = (
    "model_type",
    "hidden_size",
    "n_embd",
    "num_attention_heads",
    "n_head",
    "num_key_value_heads",
    "head_dim",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "sliding_window",
    "hidden_act",
    "activation_function",
    "rms_norm_eps",
)
_TOWER_WORDS = ("vision", "visual", "image", "audio", "speech", "encoder", "decoder", "text")


def config_differences(configs: Mapping[str, Mapping[str, Any]], donor: str) -> list[str]:
    """One sentence per setting in which a model differs from the donor, whose value the merge takes."""
    found = []
    reference = configs[donor]
    for name, config in configs.items():
        for key in _COMPARED:
            if key in reference and key in config and config[key] != reference[key]:
                found.append(
                    f"{key} is {config[key]!r} in model {name!r} and {reference[key]!r} in {donor!r}: "
                    "the merge takes the latter, which may not suit weights from the former"
                )
    return found


def output_config(
    configs: Mapping[str, Mapping[str, Any]],
    donor: str,
    architecture: Architecture,
    layers: Mapping[str, tuple[tuple[str, int], ...]],
    jobs: Iterable[Job],
    updates: Mapping[str, Any],
) -> tuple[dict[str, Any], list[str]]:
    """The output config and warnings about it.

    Args:
        configs: every model's config, by reference.
        donor: the model whose config is the starting point.
        architecture: the donor's.
        layers: per module with blocks, the (model, block) each output block comes from.
        jobs: the output tensors, for the dtype and the vocabulary size.
        updates: keys to set last, such as those of a merged vocabulary.
    """
    jobs = tuple(jobs)
    config = copy.deepcopy(dict(configs[donor]))
    if not config:
        return {}, [f"model {donor!r} has no config.json, so the output gets none"]
    warnings: list[str] = []
    for name, blocks in layers.items():
        module = architecture.modules.get(name)
        if module is not None and module.stack is not None:
            warnings += _set_layers(config, configs, donor, module.stack.prefix, module.stack.count, blocks)
    _set_dtype(config, jobs)
    for key, value in {**_rows(config, jobs), **updates}.items():
        _set_everywhere(config, key, value)
    warnings += _untie(config, configs, jobs)
    return config, warnings


def _set_layers(
    config: dict[str, Any],
    configs: Mapping[str, Mapping[str, Any]],
    donor: str,
    prefix: str,
    count: int,
    blocks: tuple[tuple[str, int], ...],
) -> list[str]:
    if blocks == tuple((donor, i) for i in range(count)):
        return []
    places = [(path, key) for path, key, value in layer_counts(config) if value == count]
    words = [word for word in _TOWER_WORDS if word in prefix]
    places = (
        [p for p in places if any(w in ".".join((*p[0], p[1])) for w in words)]
        or [p for p in places if not any(w in ".".join((*p[0], p[1])) for w in _TOWER_WORDS if w != "text")]
        or places
    )
    if not places:
        return [
            f"no key of config.json states the {count} layers of {prefix!r}: set it to {len(blocks)} by hand"
        ]
    warnings = []
    for path, key in places:
        part = _at(config, path)
        for other, value in list(part.items()):
            if isinstance(value, list) and ("layer" in other or "block" in other or "pattern" in other):
                if len(value) == count:
                    part[other] = [_entry(configs[model], path, other, i, value) for model, i in blocks]
                elif value and len(blocks) != count:
                    warnings.append(f"config.json: {other!r} may list layer numbers of {donor!r}; check it")
        part[key] = len(blocks)
    return warnings


def _entry(
    config: Mapping[str, Any], path: tuple[str, ...], key: str, index: int, fallback: list[Any]
) -> Any:
    """One block's entry of a per-layer list, from the config of the model the block comes from."""
    values = _at(config, (*path, key))
    if isinstance(values, list) and index < len(values):
        return values[index]
    return fallback[min(index, len(fallback) - 1)]


def _at(config: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        config = config.get(key, {}) if isinstance(config, Mapping) else {}
    return config


def _set_dtype(config: dict[str, Any], jobs: tuple[Job, ...]) -> None:
    weights: dict[str, int] = {}
    for job in jobs:
        if job.dtype.kind in "fV":
            weights[str(job.dtype)] = weights.get(str(job.dtype), 0) + job.bytes_out
    if not weights:
        return
    name = max(weights, key=lambda dtype: weights[dtype])
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    for key in keys:
        _set_everywhere(config, key, name)


def _rows(config: Mapping[str, Any], jobs: tuple[Job, ...]) -> dict[str, int]:
    """`vocab_size`, if an embedding was cut below what the config says."""
    rows = [job.shape[0] for job in jobs if is_token_tensor(job.name) and len(job.shape) == 2]
    stated = config.get("vocab_size", _at(config, ("text_config",)).get("vocab_size"))
    return {"vocab_size": min(rows)} if rows and isinstance(stated, int) and min(rows) < stated else {}


def _set_everywhere(config: dict[str, Any], key: str, value: Any) -> None:
    """Sets a key where the config has it: at the top, in the text part, or else newly at the top."""
    parts = (config, config.get("text_config"), config.get("llm_config"))
    holders = [part for part in parts if isinstance(part, dict) and key in part] or [config]
    for part in holders:
        part[key] = value


def _untie(
    config: dict[str, Any], configs: Mapping[str, Mapping[str, Any]], jobs: tuple[Job, ...]
) -> list[str]:
    """A head merged from tied and untied models is a tensor of its own: the config must not tie it."""
    heads = [job for job in jobs if is_output_embedding(job.name) and job.name.endswith(".weight")]
    mixed = any(source.name != head.name for head in heads for source in head.sources)
    tied = is_tied(config)
    untied_models = [name for name, other in configs.items() if other.get("tie_word_embeddings") is False]
    if not heads or not tied or not (mixed or untied_models):
        return []
    config.update(untied_config(config))
    return [
        f"{heads[0].name!r} differs from the embedding after merging: tie_word_embeddings is set to false"
    ]
