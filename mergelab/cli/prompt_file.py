"""`mergelab generate --prompts FILE`: every prompt of a file continued, a batch at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mergelab.models.model import Model
    from mergelab.text.tokenizer import Tokenizer

__all__ = ["continuations", "encoded_prompts"]


def encoded_prompts(
    file: Path, tokenizer: Tokenizer, *, chat: bool, system: str | None
) -> list[tuple[str, list[int]]]:
    """The prompts of a file and their tokens.

    Args:
        file: one prompt a line; JSON lines where it is called `.jsonl`.
        tokenizer: the model's.
        chat: whether a prompt is a question in the model's chat format.
        system: instruction before each question.

    Raises:
        MergelabError: the file cannot be read, holds no prompts, or a line is none.
        ChatTemplateError: the template refuses a message.
    """
    from mergelab.text.chat import chat_ids
    from mergelab.text.prompt_file import read_prompts

    first = [] if system is None else [{"role": "system", "content": system}]
    found = []
    for number, prompt in enumerate(read_prompts(file), 1):
        asked = [*first, {"role": "user", "content": prompt}]
        ids = list(chat_ids(tokenizer, asked) if chat else tokenizer.encode(prompt))
        if not ids:
            raise click.UsageError(f"{file}: prompt {number} has no tokens to continue; give it a text")
        found.append((prompt, ids))
    return found


def continuations(
    model: Model,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[tuple[str, Sequence[int]]],
    *,
    batch: int,
    stops: Sequence[str],
    ends: Sequence[int],
    settings: Mapping[str, Any],
) -> Iterator[str]:
    """One line of JSON for each prompt, in their order; a prompt's draws do not depend on `batch`.

    Args:
        model: a decoder.
        params: its parameters, on one device or a mesh, which splits a batch.
        tokenizer: its tokenizer.
        prompts: texts and their tokens.
        batch: number of prompts at a time.
        stops: texts to stop before.
        ends: tokens that end a text.
        settings: `max_new_tokens`, `sampler` and `key` of `complete`.
    """
    from mergelab.decoding import complete, row_keys

    keys = row_keys(settings["key"], len(prompts))
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        options = {**settings, "key": keys[start : start + batch]}
        ids = [list(tokens) for _, tokens in part]
        found = complete(model, params, tokenizer, ids, stop_strings=stops, end_ids=ends, **options)
        for (prompt, _), one in zip(part, found, strict=True):
            line = {"prompt": prompt, "text": one.text, "token_ids": list(one.token_ids), "stop": one.stop}
            yield json.dumps(line, ensure_ascii=False)
