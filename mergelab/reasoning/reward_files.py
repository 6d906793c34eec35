"""Reward models in files: the sequence and token classifiers that transformers saves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from mergelab.checkpoints.folder import open_checkpoint
from mergelab.checkpoints.source import TensorSource
from mergelab.errors import CheckpointError, quoted
from mergelab.models.families import model_from_config
from mergelab.models.load import load_params
from mergelab.models.model import Params
from mergelab.models.save import save_params
from mergelab.reasoning.reward_model import RewardKind, RewardModel
from mergelab.sharding import DEFAULT_RULES, Rules, check_axes, rule_axes

__all__ = ["load_reward_model", "save_reward_model"]

_KINDS: tuple[tuple[str, RewardKind], ...] = (
    ("ForSequenceClassification", "outcome"),
    ("ForTokenClassification", "process"),
    ("ForProcessRewardModel", "process"),
    ("ForRewardModel", "outcome"),
)
"""Ends of the names of HF's classes; the last two are Qwen2.5-Math's."""

_MODULES = ("score", "classifier")

_CLASSES = {
    "bert": "Bert", "bloom": "Bloom", "deepseek_v2": "DeepseekV2", "deepseek_v3": "DeepseekV3",
    "falcon": "Falcon", "gemma": "Gemma", "gemma2": "Gemma2", "gemma3_text": "Gemma3Text", "glm": "Glm",
    "glm4": "Glm4", "gpt2": "GPT2", "gpt_neo": "GPTNeo", "gpt_neox": "GPTNeoX", "gpt_oss": "GptOss",
    "gptj": "GPTJ", "jamba": "Jamba", "llama": "Llama", "mistral": "Mistral", "mixtral": "Mixtral",
    "olmo": "Olmo", "olmo2": "Olmo2", "olmo3": "Olmo3", "opt": "OPT", "phi": "Phi", "phi3": "Phi3",
    "qwen2": "Qwen2", "qwen2_moe": "Qwen2Moe", "qwen3": "Qwen3", "qwen3_5_text": "Qwen3_5Text",
    "qwen3_moe": "Qwen3Moe", "qwen3_next": "Qwen3Next", "smollm3": "SmolLM3", "stablelm": "StableLm",
    "starcoder2": "Starcoder2",
}  # fmt: skip
"""What names of HF's classes begin with."""


def load_reward_model(
    path: str | Path,
    *,
    kind: RewardKind | None = None,
    positive: int | str | None = None,
    mesh: Mesh | None = None,
    dtype: Any = None,
    rules: Rules | None = None,
) -> tuple[RewardModel, Params]:
    """Opens a folder with a sequence classifier (outcomes) or a token classifier (a process).

    The head is a linear layer `score` or `classifier`, or several with ReLU between them, such as that of
    Qwen2.5-Math-PRM; none of the folder's own code is run.

    Args:
        path: a model folder, hub id or URL, as `load_model` takes.
        kind: what the head is read at; what `architectures` in `config.json` says if None.
        positive: label that means right, its number or its name; the last if None.
        mesh: where the weights go; JAX's default device if None.
        dtype: the parameters' dtype; the stored one if None.
        rules: logical axis -> mesh axes; `DEFAULT_RULES` if None.

    Raises:
        CheckpointError: the folder has no such head or does not say which it is, or as `load_model`.
        MeshError: as `load_model`.
    """
    if mesh is not None:
        check_axes(mesh.axis_names, rule_axes(DEFAULT_RULES if rules is None else rules))
    checkpoint = open_checkpoint(path)
    place, config = str(checkpoint.path), checkpoint.config
    model = model_from_config(config, f"{place}/config.json").for_tensors(checkpoint.tensors)
    read = kind or _kind(config, place)
    if read == "outcome" and not model.family.architecture.causal:
        raise CheckpointError(
            f"{place} is a sequence classifier on a {model.family.model_type!r} model, whose pooler is not "
            "computed here; give one on a decoder, or a token classifier."
        )
    module, layers = _head(checkpoint.tensors, place)
    widths = [checkpoint.tensors[f"{name}.weight"].shape[0] for name in layers]
    biased = [f"{name}.bias" in checkpoint.tensors for name in layers]
    if len(set(biased)) > 1:
        raise CheckpointError(f"{place}: some layers of the head {module!r} have a bias, and some do not.")
    labels = _labels(config, widths[-1])
    reward = RewardModel(
        model, read, labels, _positive(positive, labels, place), tuple(widths[:-1]), biased[0], module
    )
    params = load_params(
        checkpoint.tensors, reward.table(), place, unused=model.is_unused, mesh=mesh, dtype=dtype, rules=rules
    )
    return reward, params


def save_reward_model(
    reward: RewardModel,
    params: Params,
    path: str | Path,
    *,
    files: Mapping[str, bytes | Path] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a folder that transformers opens as a sequence or token classifier.

    Args:
        reward: the reward model.
        params: its parameters, on any mesh.
        path: a folder that is empty or does not exist.
        files: further files by name, such as a tokenizer's.
        overwrite: replace a folder that mergelab wrote.

    Raises:
        OutputError: the folder is not empty, or a parameter is missing or of another shape.
    """
    suffix = next(end for end, kind in _KINDS if kind == reward.kind)
    family = _CLASSES.get(reward.model.family.model_type, "")
    names = dict(enumerate(reward.labels))
    config = {
        **reward.model.hf_config,
        "architectures": [f"{family}{suffix}"],
        "num_labels": len(reward.labels),
        "id2label": {str(n): name for n, name in names.items()},
        "label2id": {name: n for n, name in names.items()},
    }
    text = (json.dumps(config, indent=2) + "\n").encode()
    contents = {"config.json": text, **(files or {})}
    return save_params(params, reward.table(), path, files=contents, overwrite=overwrite)


def _kind(config: Mapping[str, Any], place: str) -> RewardKind:
    classes = config.get("architectures")
    for name in classes if isinstance(classes, list) else ():
        for end, kind in _KINDS:
            if str(name).endswith(end):
                return kind
    raise CheckpointError(
        f"{place}/config.json has architectures {quoted(classes)}, which is neither a sequence nor a token "
        "classifier; say what its head is read at (kind='outcome' or kind='process')."
    )


def _head(tensors: Mapping[str, TensorSource], place: str) -> tuple[str, list[str]]:
    """The head's name, and those of its layers from the first."""
    for module in _MODULES:
        if f"{module}.weight" in tensors:
            return module, [module]
        layers = [f"{module}.{2 * n}" for n in range(len(tensors)) if f"{module}.{2 * n}.weight" in tensors]
        if layers:
            return module, layers
    raise CheckpointError(
        f"{place} has no tensor 'score.weight' or 'classifier.weight', the head of a classifier; give a "
        "reward model, or make one of a language model (new_reward_model)."
    )


def _labels(config: Mapping[str, Any], count: int) -> tuple[str, ...]:
    named = config.get("id2label")
    named = named if isinstance(named, dict) else {}
    return tuple(str(named.get(str(n), f"LABEL_{n}")) for n in range(count))


def _positive(wanted: int | str | None, labels: tuple[str, ...], place: str) -> int:
    if wanted is None:
        return len(labels) - 1
    if wanted in labels:
        return labels.index(str(wanted))
    if isinstance(wanted, int) and 0 <= wanted < len(labels):
        return wanted
    raise CheckpointError(
        f"{place} has no label {quoted(wanted)}; its {len(labels)} labels are {quoted(list(labels))}."
    )
