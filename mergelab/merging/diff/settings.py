"""What two models' small files say differently: tokens, chat template, positions, heads, other settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from mergelab.checkpoints.companions import has_companion
from mergelab.checkpoints.source import Checkpoint
from mergelab.errors import MergelabError
from mergelab.merging.vocabulary.chat_templates import read_chat_template
from mergelab.merging.vocabulary.tokenizer_data import read_tokenizer

__all__ = ["SettingDifference", "SettingsDiff", "compare_settings", "vocabulary_of"]

_NO_MATTER = frozenset(
    [
        "_name_or_path",
        "architectures",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "quantization_config",
        "auto_map",
    ]
)
_KINDS = {
    "positions": ("rope", "rotary", "position", "max_window", "sliding", "layer_types", "original_max"),
    "heads": ("head", "n_head", "kv_"),
    "vocabulary": ("vocab", "token_id", "tie_word"),
    "size": ("hidden_size", "intermediate", "num_hidden", "n_layer", "n_embd", "num_experts"),
}
_EXAMPLES = 8


@dataclass(frozen=True)
class SettingDifference:
    """One setting of `config.json`.

    Attributes:
        kind: `positions`, `heads`, `vocabulary`, `size` or `other`.
        key: Name of the setting, dotted where it is nested.
        value, other: What the model and what the other one has; None where it is not stated.
    """

    kind: str
    key: str
    value: Any
    other: Any


@dataclass(frozen=True)
class SettingsDiff:
    """The small files of one model against those of another.

    Attributes:
        model, other: Names of the models.
        settings: Settings that differ.
        tokens, other_tokens: Number of tokens; None without a tokenizer.
        only, lost, moved: Tokens that the other lacks, that the model lacks, and that have another id.
        examples: Some of them, by `only`, `lost` and `moved`.
        chat_template: `equal`, `differs`, `only in A`, `only in B` with the models' names, or `none`.
        notes: Sentences about files that could not be read.
    """

    model: str
    other: str
    settings: tuple[SettingDifference, ...]
    tokens: int | None
    other_tokens: int | None
    only: int
    lost: int
    moved: int
    examples: Mapping[str, tuple[str, ...]]
    chat_template: str
    notes: tuple[str, ...]


def vocabulary_of(name: str, checkpoint: Checkpoint) -> tuple[Mapping[str, int] | None, str]:
    """Token -> id of a model, and a sentence where its tokenizer cannot be read."""
    if not has_companion(checkpoint.path, "tokenizer.json"):
        return None, ""
    try:
        return read_tokenizer(name, checkpoint.path).vocabulary, ""
    except MergelabError as error:
        return None, f"the tokenizer of {name!r} is not compared: {error}"


def compare_settings(
    names: tuple[str, str],
    models: tuple[Checkpoint, Checkpoint],
    vocabularies: Mapping[str, Mapping[str, int]],
) -> SettingsDiff:
    """Compares configs, vocabularies and chat templates of two models; reads no weights."""
    mine, theirs = (vocabularies.get(name) for name in names)
    found: dict[str, list[str]] = {"only": [], "lost": [], "moved": []}
    if mine is not None and theirs is not None:
        found["only"] = [token for token in mine if token not in theirs]
        found["lost"] = [token for token in theirs if token not in mine]
        found["moved"] = [t for t, number in mine.items() if theirs.get(t, number) != number]
    template, note = _templates(names, models)
    known = all(model.config for model in models)
    return SettingsDiff(
        model=names[0],
        other=names[1],
        settings=tuple(_differences(models[0].config, models[1].config)) if known else (),
        tokens=None if mine is None else len(mine),
        other_tokens=None if theirs is None else len(theirs),
        only=len(found["only"]),
        lost=len(found["lost"]),
        moved=len(found["moved"]),
        examples={kind: tuple(islice(tokens, _EXAMPLES)) for kind, tokens in found.items() if tokens},
        chat_template=template,
        notes=(note,) if note else (),
    )


def _differences(
    mine: Mapping[str, Any], theirs: Mapping[str, Any], above: str = ""
) -> list[SettingDifference]:
    found: list[SettingDifference] = []
    for key in dict.fromkeys([*mine, *theirs]):
        own, other = mine.get(key), theirs.get(key)
        if key in _NO_MATTER or own == other:
            continue
        if isinstance(own, Mapping) and isinstance(other, Mapping):
            found += _differences(own, other, f"{above}{key}.")
        else:
            kind = next((k for k, words in _KINDS.items() if any(w in above + key for w in words)), "other")
            found.append(SettingDifference(kind, above + key, own, other))
    return found


def _templates(names: tuple[str, str], models: tuple[Checkpoint, Checkpoint]) -> tuple[str, str]:
    try:
        mine, theirs = (read_chat_template(model.path) for model in models)
    except MergelabError as error:
        return "none", f"chat templates are not compared: {error}"
    if mine is None and theirs is None:
        return "none", ""
    if mine is None or theirs is None:
        return f"only in {names[0] if theirs is None else names[1]}", ""
    return ("equal" if mine.strip() == theirs.strip() else "differs"), ""
