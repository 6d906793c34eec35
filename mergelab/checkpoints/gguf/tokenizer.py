"""The tokenizer files of a Hugging Face folder from the metadata of a GGUF file.

Two kinds of vocabularies are read: `gpt2` (byte-level merges) and `llama` (SentencePiece's merges by score,
with single bytes to fall back on). A file that carries its whole `tokenizer.json`
(`tokenizer.huggingface.json`) is taken at its word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergelab.checkpoints.gguf.pre_tokenizers import (
    PRE_TOKENIZERS,
    WHOLE_WORDS_FIRST,
    pre_tokenizer,
)
from mergelab.checkpoints.json_data import parse_json_object
from mergelab.errors import CheckpointError, quoted

__all__ = ["end_ids_from", "has_tokenizer", "tokenizer_config_from", "tokenizer_from"]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""llama.cpp's types of tokens."""
HF_JSON = "tokenizer.huggingface.json"
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator", "mask": "mask"}
_GEMMA = ("gemma", "gemma2", "gemma3")
_SPACE = "▁"
_LONGEST = 256  # signs of a token that merges make; SentencePiece makes none above 16
_USUAL_PRE = {"gpt2": "gpt-2", "gptneox": "gpt-2", "qwen2": "qwen2", "qwen3": "qwen2"}


def has_tokenizer(metadata: Mapping[str, Any]) -> bool:
    """Whether the metadata describe a tokenizer."""
    return HF_JSON in metadata or bool(metadata.get("tokenizer.ggml.tokens"))


def tokenizer_from(metadata: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The content of `tokenizer.json`.

    Raises:
        CheckpointError: the vocabulary is of a kind that is not read, or damaged.
    """
    if isinstance(whole := metadata.get(HF_JSON), str):
        return parse_json_object(whole.encode(), f"{place}: {HF_JSON}")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise CheckpointError(
            f"{place} has no tokenizer.ggml.tokens: it holds no tokenizer; convert it again"
        )
    types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if not isinstance(types, list) or len(types) != len(tokens):
        raise CheckpointError(
            f"{place} has a tokenizer.ggml.token_type that is not one number for each token"
        )
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        return _byte_level(metadata, tokens, types, place)
    if kind == "llama":
        return _sentencepiece(metadata, tokens, types, place)
    raise CheckpointError(
        f"{place} has a vocabulary of the kind {quoted(kind)} (tokenizer.ggml.model), but only 'gpt2' and "
        "'llama' are read; copy the tokenizer files of the original model into the output folder"
    )


def _byte_level(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], place: str
) -> dict[str, Any]:
    name = metadata.get("tokenizer.ggml.pre") or _USUAL_PRE.get(str(metadata.get("general.architecture")), "")
    pre = pre_tokenizer(name) if isinstance(name, str) else None
    if pre is None:
        said = f"names {quoted(name)}" if name else "does not say"
        raise CheckpointError(
            f"{place} {said} how text is cut before the merges (tokenizer.ggml.pre), but only "
            f"{', '.join(PRE_TOKENIZERS)} are known; copy the tokenizer files of the original model into "
            "the output folder"
        )
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list) or not all(isinstance(m, str) and " " in m[1:] for m in merges):
        raise CheckpointError(f"{place} has no tokenizer.ggml.merges of two parts each; convert it again")
    model = {
        "type": "BPE",
        "unk_token": None,
        "ignore_merges": name in WHOLE_WORDS_FIRST,
        "byte_fallback": False,
    }
    begins = metadata.get("tokenizer.ggml.add_bos_token", name in WHOLE_WORDS_FIRST)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(tokens, types),
        "normalizer": None,
        "pre_tokenizer": pre,
        "post_processor": _post_processor(metadata, tokens, bool(begins))
        or {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {**_USUAL_BPE, **model, "vocab": _numbered(tokens, place), "merges": _pairs(merges)},
    }


_USUAL_BPE = {
    "dropout": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
}


def _pairs(merges: Sequence[str]) -> list[list[str]]:
    """Merges as pairs; a part may itself begin with a space."""
    cut = [merge.index(" ", 1) for merge in merges]
    return [[merge[:at], merge[at + 1 :]] for merge, at in zip(merges, cut, strict=True)]


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], place: str
) -> dict[str, Any]:
    """Merges in the order of the scores; spaces are `▁`, as SentencePiece writes them."""
    architecture = str(metadata.get("general.architecture"))
    gemma = architecture in _GEMMA
    if gemma:  # llama.cpp stores runs of spaces as they are in text
        tokens = [_SPACE * len(token) if token and not token.strip(" ") else token for token in tokens]
        types = [
            NORMAL if kind == USER_DEFINED and token and not token.strip(_SPACE) else kind
            for token, kind in zip(tokens, types, strict=True)
        ]
    scores = metadata.get("tokenizer.ggml.scores")
    merges = metadata.get("tokenizer.ggml.merges")
    if merges is None and not gemma and (not isinstance(scores, list) or len(scores) != len(tokens)):
        raise CheckpointError(
            f"{place} has no tokenizer.ggml.scores of one number for each token; convert it again"
        )
    vocabulary = _numbered(tokens, place)
    if isinstance(merges, list):
        pairs = _pairs([merge for merge in merges if isinstance(merge, str) and " " in merge[1:]])
    else:
        # Gemma's scores do not follow its merges; the order of its tokens does.
        best = [-float(i) for i in range(len(tokens))] if gemma or scores is None else scores
        pairs = _merges_of(vocabulary, best, types)
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", not gemma))
    normalizers = [{"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        normalizers = [{"type": "Prepend", "prepend": _SPACE}, *normalizers]
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    unknown = _named(metadata, tokens, "unk") or unknown
    model = {
        "type": "BPE",
        "unk_token": unknown,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": pairs,
    }
    begins = bool(metadata.get("tokenizer.ggml.add_bos_token", True))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(tokens, types, unknown),
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": _post_processor(metadata, tokens, begins),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {**_USUAL_BPE, **model},
    }


def _merges_of(
    vocabulary: Mapping[str, int], scores: Sequence[float], types: Sequence[int]
) -> list[list[str]]:
    """All ways to make a token of two others, the best scores first, as SentencePiece tries them."""
    found: list[tuple[float, int, int, int, str, str]] = []
    for token, number in vocabulary.items():
        if types[number] not in (NORMAL, USER_DEFINED, UNUSED) or len(token) > _LONGEST:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((-scores[number], number, vocabulary[left], vocabulary[right], left, right))
    return [[left, right] for *_, left, right in sorted(found)]


def _numbered(tokens: Sequence[str], place: str) -> dict[str, int]:
    numbered = {token: number for number, token in enumerate(tokens)}
    if len(numbered) != len(tokens):
        seen: set[str] = set()
        twice = next(token for token in tokens if token in seen or seen.add(token))
        raise CheckpointError(f"{place} has the token {quoted(twice)} twice; convert the model again")
    return numbered


def _added(tokens: Sequence[str], types: Sequence[int], unknown: str | None = None) -> list[dict[str, Any]]:
    """Tokens that are found whole in a text: those that control, and those a user defined."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": number, "content": token, **flags, "special": kind != USER_DEFINED}
        for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if token and (kind in (CONTROL, USER_DEFINED) or token == unknown)
    ]


def _named(metadata: Mapping[str, Any], tokens: Sequence[str], role: str) -> str | None:
    number = metadata.get(f"tokenizer.ggml.{ROLES[role]}_token_id")
    return tokens[number] if type(number) is int and 0 <= number < len(tokens) else None


def _post_processor(
    metadata: Mapping[str, Any], tokens: Sequence[str], begins: bool
) -> dict[str, Any] | None:
    """Puts the tokens that begin and end a text around it."""
    ends = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
    first = _named(metadata, tokens, "bos") if begins else None
    last = _named(metadata, tokens, "eos") if ends else None
    if first is None and last is None:
        return None

    def around(name: str, part: int) -> list[dict[str, Any]]:
        text = [{"Sequence": {"id": name, "type_id": part}}]
        before = [{"SpecialToken": {"id": first, "type_id": part}}] if first is not None else []
        after = [{"SpecialToken": {"id": last, "type_id": part}}] if last is not None else []
        return [*before, *text, *after]

    special = {
        token: {"id": token, "ids": [tokens.index(token)], "tokens": [token]}
        for token in (first, last)
        if token is not None
    }
    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": special,
    }


def tokenizer_config_from(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `tokenizer_config.json`: special tokens and chat templates."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    found: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    if isinstance(tokens, list):
        for role in ROLES:
            if isinstance(token := _named(metadata, tokens, role), str):
                found[f"{role}_token"] = token
    length = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    if type(length) is int:
        found["model_max_length"] = length
    template = metadata.get("tokenizer.chat_template")
    named = {
        key.removeprefix("tokenizer.chat_template."): text
        for key, text in metadata.items()
        if key.startswith("tokenizer.chat_template.") and isinstance(text, str)
    }
    if isinstance(template, str):
        found["chat_template"] = template
        if named:
            every = {"default": template, **named}
            found["chat_template"] = [{"name": name, "template": text} for name, text in every.items()]
    return found


def end_ids_from(metadata: Mapping[str, Any]) -> list[int]:
    """The tokens that end a text or a turn."""
    keys = (f"tokenizer.ggml.{role}_token_id" for role in ("eos", "eot", "eom"))
    found = [metadata[key] for key in keys if type(metadata.get(key)) is int]
    return list(dict.fromkeys(found))
