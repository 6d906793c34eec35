"""Chats on the command line: one question and its answer, or turns until the input ends."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mergelab.decoding import Completion, Memory
    from mergelab.models.model import Model
    from mergelab.text.chat import Message
    from mergelab.text.tokenizer import Tokenizer

__all__ = ["ANSWER_TOKENS", "Chat", "hint"]

ANSWER_TOKENS = 1024
"""Tokens of an answer at most, where the command does not say."""


class Chat:
    """A model that answers, and what was said so far.

    Args:
        model: a decoder.
        params: its parameters.
        tokenizer: its tokenizer, with a chat template.
        system: instruction at the beginning, or None.
        max_new_tokens: tokens of an answer at most; `ANSWER_TOKENS`, as far as positions go, if None.
        end_ids: tokens that end an answer.
        stops: texts that end an answer.
        settings: sampler and key, as `complete` takes them.
    """

    def __init__(
        self,
        model: Model,
        params: Any,
        tokenizer: Tokenizer,
        *,
        system: str | None,
        max_new_tokens: int | None,
        end_ids: Sequence[int],
        stops: Sequence[str],
        settings: Mapping[str, Any],
    ) -> None:
        self._model, self._params, self._tokenizer = model, params, tokenizer
        self._most, self._ends, self._stops = max_new_tokens, end_ids, stops
        self._settings = settings
        self._memory: Memory | None = None
        self._messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]

    def answer(self, question: str, *, as_json: bool) -> None:
        """Puts one question, and prints the answer while it is made, or as a line of JSON."""
        from mergelab.text.chat import chat_ids

        self._messages.append({"role": "user", "content": question})
        ids = chat_ids(self._tokenizer, self._messages)
        found = self._complete(ids, show=not as_json)
        self._messages.append({"role": "assistant", "content": found.text})
        if as_json:
            told = {"token_ids": list(found.token_ids), "text": found.text, "stop": found.stop}
            click.echo(json.dumps({**told, "prompt_token_ids": ids}))
        else:
            click.echo()

    def converse(self, *, as_json: bool) -> None:
        """Answers one line of standard input after the other, until it ends."""
        from mergelab.decoding import Memory

        self._memory = Memory()  # a turn reads what is new in it
        for question in _questions():
            self.answer(question, as_json=as_json)

    def _complete(self, ids: Sequence[int], *, show: bool) -> Completion:
        from mergelab.decoding import complete
        from mergelab.errors import DecodingError

        room = self._model.config.max_length - len(ids)
        if room < 1:
            raise DecodingError(
                f"the conversation has {len(ids)} tokens, which leaves no room for an answer within the "
                f"model's {self._model.config.max_length} positions; begin a new one."
            )
        (found,) = complete(
            self._model,
            self._params,
            self._tokenizer,
            [ids],
            max_new_tokens=min(self._most or ANSWER_TOKENS, room),
            stop_strings=self._stops,
            end_ids=self._ends,
            on_text=_print if show else None,
            memory=self._memory,
            **self._settings,
        )
        return found


def _print(piece: str) -> None:
    click.echo(piece, nl=False)
    sys.stdout.flush()


def _questions() -> Iterator[str]:
    """The lines of standard input that hold something; a terminal is asked for each."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives `input` its editing and history
    click.echo("Ask something; an empty line or Ctrl-D ends the conversation.", err=True)
    with contextlib.suppress(EOFError):
        while question := input("> ").strip():
            yield question


def hint(tokenizer: Tokenizer, prompt: str) -> str | None:
    """What to say to a prompt that is put to a chat model as plain text; None if it is not one."""
    written = any(token in prompt for token in tokenizer.special.values())
    if "default" not in tokenizer.chat_templates or written:
        return None
    return "hint: this model has a chat template; --chat puts the prompt as a question and prints the answer."
