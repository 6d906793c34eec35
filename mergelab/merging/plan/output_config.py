"""The merged model's `config.json`: the donor's, with layers, per-layer lists, dtype and vocabulary set."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mergelab.checkpoints import Checkpoint, TensorSource
from mergelab.checkpoints.tied_head import is_tied, untied_config
from mergelab.errors import CheckpointError
from mergelab.merging.engine.job import Job
from mergelab.merging.plan.output_tensors import OutputPlace
from mergelab.merging.recipe.faults import raise_faults
from mergelab.merging.structure.architecture import BlockRun, Structure, layer_counts
from mergelab.merging.structure.moved_layers import Tower, move_layers, unlike_sources
from mergelab.merging.vocabulary.embedding_rows import input_embedding, is_output_embedding, is_token_tensor

__all__ = ["config_differences", "output_config", "set_dtype", "tied_heads"]

_SAMPLE, _SAMPLES = 1 << 14, 16

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
# Lists of all layers, which some model types have in place of a number of layers.
_LISTS_OF_ALL = ("layers_block_type", "layer_types", "hybrid_override_pattern")
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
    architecture: Structure,
    layers: Mapping[str, tuple[tuple[str, int], ...]],
    jobs: Iterable[Job],
    updates: Mapping[str, Any],
    *,
    sources: Mapping[str, Sequence[tuple[tuple[str, int], ...]]] | None = None,
    architectures: Mapping[str, Structure] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """The output config and warnings about it.

    Args:
        configs: every model's config, by reference.
        donor: the model whose config is the starting point.
        architecture: the donor's.
        layers: (model, block) that each output block comes from, per module with blocks.
        jobs: the output tensors, for the dtype and the vocabulary size.
        updates: keys to set last, such as those of a merged vocabulary.
        sources: origins, per module with blocks: every (model, block) that each output block is merged from;
            by default that in `layers` alone.
        architectures: every model's; by default the others have as many blocks as the donor.

    Raises:
        RecipeError: a layer comes to stand where no config can say that it is of the kind it is.
    """
    jobs = tuple(jobs)
    config = copy.deepcopy(dict(configs[donor]))
    if not config:
        return {}, [f"model {donor!r} has no config.json, so the output gets none"]
    warnings: list[str] = []
    faults: list[str] = []
    for name, blocks in layers.items():
        module = architecture.modules.get(name)
        if module is not None and module.stack is not None:
            each = (sources or {}).get(name) or [(block,) for block in blocks]
            counts = _layer_numbers({**(architectures or {}), donor: architecture}, name)
            found, doubts = _set_layers(config, configs, donor, module.stack, counts, each)
            faults += found
            warnings += doubts
    raise_faults(faults)
    set_dtype(config, jobs)
    for key, value in {**_rows(config, jobs), **updates}.items():
        _set_everywhere(config, key, value)
    warnings += _untie(config, configs, jobs)
    return config, warnings


def _layer_numbers(architectures: Mapping[str, Structure], module: str) -> dict[str, int]:
    """How many blocks each model's module has."""
    found = {model: each.modules.get(module) for model, each in architectures.items()}
    return {m: each.stack.count for m, each in found.items() if each is not None and each.stack is not None}


def _set_layers(
    config: dict[str, Any],
    configs: Mapping[str, Mapping[str, Any]],
    donor: str,
    stack: BlockRun,
    counts: Mapping[str, int],
    sources: Sequence[tuple[tuple[str, int], ...]],
) -> tuple[list[str], list[str]]:
    """Faults and warnings; `sources` are the layers that each output layer is merged from."""
    count = stack.count
    blocks = tuple((donor, i) if (donor, i) in each else each[0] for i, each in enumerate(sources))
    unmoved = blocks == tuple((donor, i) for i in range(count))
    merged = any(len(each) > 1 for each in sources)
    if unmoved and not merged:
        return [], []
    places = _places(config, stack.prefix, count)
    if not places:
        sentence = f"no key of config.json states the {count} layers of {stack.prefix!r}"
        return [], [] if len(blocks) == count else [f"{sentence}: set it to {len(blocks)} by hand"]
    faults: list[str] = []
    warnings: list[str] = []
    for path, keys in places.items():
        tower = Tower(donor, configs, path, keys, counts)
        if merged:
            warnings += unlike_sources(tower, sources)
        if not unmoved:
            found, doubts = move_layers(_at(config, path), tower, blocks)
            faults += found
            warnings += doubts
    return faults, warnings


def _places(config: Mapping[str, Any], prefix: str, count: int) -> dict[tuple[str, ...], tuple[str, ...]]:
    """The parts of a config that describe a stack of layers, and the keys that state how many there are."""
    places = [(path, key) for path, key, value in layer_counts(config) if value == count]
    words = [word for word in _TOWER_WORDS if word in prefix]
    places = (
        [p for p in places if any(w in ".".join((*p[0], p[1])) for w in words)]
        or [p for p in places if not any(w in ".".join((*p[0], p[1])) for w in _TOWER_WORDS if w != "text")]
        or places
    )
    found: dict[tuple[str, ...], tuple[str, ...]] = {}
    for path, key in places:
        found[path] = (*found.get(path, ()), key)
    if not found:
        for path in ((), ("text_config",), ("llm_config",)):
            values = [_at(config, path).get(key) for key in _LISTS_OF_ALL]
            if any(isinstance(value, (list, str)) and len(value) == count for value in values):
                found[path] = ()
    return found


def _at(config: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        config = config.get(key, {}) if isinstance(config, Mapping) else {}
    return config


def set_dtype(config: dict[str, Any], jobs: Iterable[Job]) -> None:
    """Sets a config's dtype to that of most bytes of weights."""
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


def tied_heads(places: Iterable[OutputPlace], models: Mapping[str, Checkpoint]) -> set[str]:
    """Names of heads that are the embedding in every model, though some models store them, too.

    A head that only some of the tied models store would be merged apart from the embedding it is equal to.
    """
    if not all(is_tied(model.config, model.tensors) for model in models.values()):
        return set()
    found: set[str] = set()
    for place in places:
        if not (is_output_embedding(place.name) and place.name.endswith(".weight")):
            continue
        pairs = [
            (models[source.model].tensors.get(name), input_embedding(models[source.model]))
            for source, name in zip(place.piece.sources, place.names, strict=True)
        ]
        stored = [(head, embedding) for head, embedding in pairs if head is not None]
        if len(stored) < len(pairs) and all(e is not None and _alike(head, e) for head, e in stored):
            found.add(place.name)
    return found


def _alike(head: TensorSource, embedding: TensorSource) -> bool:
    """Whether two tensors have equal values in places all over them."""
    if head.shape != embedding.shape or head.dtype != embedding.dtype:
        return False
    size = math.prod(head.shape)
    count = min(size, _SAMPLE)
    starts = {number * (size - count) // (_SAMPLES - 1) for number in range(_SAMPLES)}
    for start in starts:
        left, right = np.empty(count, head.dtype), np.empty(count, head.dtype)
        try:
            head.read_into(start, left)
            embedding.read_into(start, right)
        except CheckpointError:  # of a merge that has not run
            return False
        if left.tobytes() != right.tobytes():
            return False
    return True


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
