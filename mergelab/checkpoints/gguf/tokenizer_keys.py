"""The keys of a GGUF file for the tokenizer of a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mergelab.checkpoints.gguf.header import Typed
from mergelab.checkpoints.gguf.pre_tokenizers import pre_tokenizer_name
from mergelab.checkpoints.gguf.tokenizer import (
    BYTE,
    CONTROL,
    HF_JSON,
    NORMAL,
    ROLES,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)
from mergelab.errors import CheckpointError

__all__ = ["templates_of", "tokenizer_metadata"]


def templates_of(config: Mapping[str, Any], own_file: str | None) -> dict[str, str]:
    """Chat templates by name, from `tokenizer_config.json` and the content of `chat_template.jinja`."""
    declared, found = config.get("chat_template"), dict[str, str]()
    if isinstance(declared, str):
        found["default"] = declared
    for entry in declared if isinstance(declared, list) else ():
        if isinstance(entry, Mapping) and isinstance(entry.get("template"), str):
            found[str(entry.get("name"))] = entry["template"]
    return found | ({} if own_file is None else {"default": own_file})


def tokenizer_metadata(
    data: Mapping[str, Any],
    config: Mapping[str, Any],
    templates: Mapping[str, str],
    end_ids: Sequence[int],
    vocab_size: int,
    place: str,
) -> dict[str, Any]:
    """The keys for a tokenizer; the inverse of `tokenizer_from` and `tokenizer_config_from`.

    Args:
        data: the content of `tokenizer.json`.
        config: that of `tokenizer_config.json` and `special_tokens_map.json`.
        templates: chat templates by name.
        end_ids: tokens that end a text or a turn.
        vocab_size: rows of the embedding, which the list of tokens is filled up to.
        place: the path of `tokenizer.json`, for messages.

    Raises:
        CheckpointError: the tokenizer is of a kind that llama.cpp has no name for.
    """
    model = data.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if not isinstance(model, Mapping) or not isinstance(vocabulary, Mapping) or model.get("type") != "BPE":
        raise _no_kind(place, "its model is not one of merges (BPE)")
    added = {entry["content"]: entry for entry in data.get("added_tokens") or ()}
    ids = {**vocabulary, **{content: entry["id"] for content, entry in added.items()}}
    size = max([vocab_size, *(number + 1 for number in ids.values())])
    tokens, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    fallback = bool(model.get("byte_fallback"))
    for token, number in ids.items():
        entry = added.get(token)
        tokens[number] = token
        types[number] = NORMAL if entry is None else CONTROL if entry.get("special") else USER_DEFINED
        if fallback and entry is None and _is_byte(token):
            types[number] = BYTE
    merges = [" ".join(m) if isinstance(m, list) else m for m in model.get("merges") or ()]
    found: dict[str, Any] = {}
    if fallback:
        unknown = model.get("unk_token")
        if unknown in ids:
            types[ids[unknown]] = UNKNOWN
        found |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
        found["tokenizer.ggml.scores"] = Typed("f", _scores(tokens, merges))
        found["tokenizer.ggml.add_space_prefix"] = "Prepend" in json.dumps(data.get("normalizer"))
    else:
        name = pre_tokenizer_name(data.get("pre_tokenizer"), bool(model.get("ignore_merges")))
        if name is None or data.get("normalizer") not in (None, {"type": "NFC"}):
            raise _no_kind(place, "it cuts text before the merges in a way that llama.cpp has no name for")
        found |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name}
    found |= {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": Typed("i", types),
        "tokenizer.ggml.merges": merges,
    }
    framed = _frame(data.get("post_processor"))
    for role, key in ROLES.items():
        token = config.get(f"{role}_token")
        token = token.get("content") if isinstance(token, Mapping) else token
        if token in ids:
            found[f"tokenizer.ggml.{key}_token_id"] = Typed("I", ids[token])
            if role in ("bos", "eos"):
                found[f"tokenizer.ggml.add_{role}_token"] = token in framed
    end = found.get("tokenizer.ggml.eos_token_id")
    turns = [number for number in end_ids if end is None or number != end.value]
    found |= {
        f"tokenizer.ggml.{role}_token_id": Typed("I", n)
        for role, n in zip(("eot", "eom"), turns, strict=False)
    }
    for name, text in templates.items():
        key = "tokenizer.chat_template" if name == "default" else f"tokenizer.chat_template.{name}"
        found[key] = text
    return found | {HF_JSON: json.dumps(data, ensure_ascii=False)}


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _scores(tokens: Sequence[str], merges: Sequence[str]) -> list[float]:
    """Scores in which the merges come in their order: minus the place of the merge that makes a token."""
    made: dict[str, int] = {}
    for place, merge in enumerate(merges):
        made.setdefault(merge.replace(" ", ""), place)
    return [-float(made.get(token, len(merges))) for token in tokens]


def _frame(processor: Any) -> frozenset[str]:
    """The special tokens that a post-processor puts around one text."""
    if not isinstance(processor, Mapping):
        return frozenset()
    parts = processor.get("processors") or [processor]
    pieces = [piece for part in parts for piece in part.get("single") or () if isinstance(piece, Mapping)]
    return frozenset(str(piece["SpecialToken"]["id"]) for piece in pieces if "SpecialToken" in piece)


def _no_kind(place: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{place} cannot be stored in a GGUF file: {why}; keep the model as a Hugging Face folder"
    )
