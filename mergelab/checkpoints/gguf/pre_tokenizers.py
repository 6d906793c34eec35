"""How a byte-level vocabulary cuts text before its merges: the names of llama.cpp, as `tokenizers` spells
them.

Facts: the table of `llm_tokenizer_bpe` in llama.cpp's `src/llama-vocab.cpp`, which notes the expressions of
the original `tokenizer.json` files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["PRE_TOKENIZERS", "pre_tokenizer", "pre_tokenizer_name"]

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_TEKKEN = rf"{_UPPER}*{_LOWER}+|{_UPPER}+{_LOWER}*|\p{{N}}{_REST}"
_GPT4O = rf"{_UPPER}*{_LOWER}+{_SHORT}|{_UPPER}+{_LOWER}*{_SHORT}|\p{{N}}{{1,3}}{_REST}"

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_GPT2: dict[str, Any] = {**_BYTES, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}


def _sequence(*parts: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(parts)}


def _split(expression: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    return _sequence(split, _BYTES)


_KINDS: dict[tuple[str, ...], dict[str, Any]] = {
    ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling"): _GPT2,
    (
        "smollm",
        "starcoder",
        "refact",
        "command-r",
        "codeshell",
        "exaone",
        "minerva-7b",
    ): _sequence(_DIGITS, _GPT2),
    (
        "llama-bpe",
        "llama3",
        "llama-v3",
        "falcon3",
        "falcon-h1",
        "pixtral",
        "midm-2.0",
        "lfm2",
        "dbrx",
        "smaug-bpe",
    ): _split(_LLAMA3),
    ("qwen2", "deepseek-r1-qwen", "stablelm2", "kormo", "f2llmv2", "megrez"): _split(_QWEN2),
    ("qwen35",): _split(_QWEN35),
    ("tekken",): _split(_TEKKEN),
    ("gpt-4o", "llama4", "kanana2"): _split(_GPT4O),
}

PRE_TOKENIZERS: dict[str, dict[str, Any]] = {name: kind for names, kind in _KINDS.items() for name in names}
"""The `pre_tokenizer` of `tokenizer.json` by the name in `tokenizer.ggml.pre`."""

WHOLE_WORDS_FIRST = frozenset(
    ["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken"]
)
"""Vocabularies whose words are taken whole before any merge (`ignore_merges`); texts of theirs begin with the
token that begins texts where a file does not say (`add_bos`)."""


def pre_tokenizer(name: str) -> dict[str, Any] | None:
    """The pre-tokenizer of this name, or None."""
    return PRE_TOKENIZERS.get(name)


def pre_tokenizer_name(data: Any, ignore_merges: bool) -> str | None:
    """llama.cpp's name for the `pre_tokenizer` of a `tokenizer.json`, or None where it has none."""
    wanted = _plain(data)
    names = [name for name, known in PRE_TOKENIZERS.items() if _plain(known) == wanted]
    suited = [name for name in names if (name in WHOLE_WORDS_FIRST) == ignore_merges]
    return next(iter(suited or names), None)


def _plain(data: Any) -> Any:
    """A pre-tokenizer without what has no effect on where text is cut."""
    if not isinstance(data, dict):
        return data
    parts = data.get("pretokenizers")
    if data.get("type") == "Sequence" and isinstance(parts, list):
        plain = [_plain(part) for part in parts]
        return plain[0] if len(plain) == 1 else plain
    return {key: value for key, value in data.items() if key not in ("trim_offsets", "invert")}
