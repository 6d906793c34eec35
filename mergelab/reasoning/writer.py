"""Who writes traces: a model and its tokenizer, how tokens are chosen, what ends a text, what is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from mergelab.decoding.completion import new_text
from mergelab.decoding.samplers import Sampler, sample
from mergelab.decoding.stop import cut_at_strings
from mergelab.errors import DecodingError
from mergelab.models.model import Model, Params
from mergelab.models.sites import Edit
from mergelab.models.token_checks import learned_positions
from mergelab.reasoning.readings import Reading
from mergelab.text.chat import chat_ids, turn_end_ids
from mergelab.text.tokenizer import Tokenizer

__all__ = ["Trace", "Writer"]


@dataclass(frozen=True)
class Trace:
    """What was written to one prompt.

    Attributes:
        token_ids: the new tokens, those that ended the text among them.
        text: their text, without the stop string.
        stop: what ended it: `token`, `string`, `length` (the budget), or `monitor` (a trigger).
        log_probs: log-probability of each token by the model itself, float32 `[tokens]`, in nats.
        readings: what each reading read in the pass that chose each token, float32 `[tokens, readings]`.
        scores: what each reading makes of the trace, by name.
    """

    token_ids: tuple[int, ...]
    text: str
    stop: str
    log_probs: np.ndarray
    readings: np.ndarray
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Writer:
    """A model that writes traces.

    Attributes:
        model: a decoder.
        params: its parameters.
        tokenizer: its tokenizer.
        budget: most new tokens of a trace.
        sampler: choice of tokens; draws from the model's own distribution by default.
        readings: what is read while a trace is written, in every step; the first one judges.
        stops: strings that end a trace, and are not part of it.
        step: text that ends a step of a search, such as a new line.
        edit: edits by site, as in `Model.apply`.
        chat: whether prompts are put as the model's chat template has them; as it has one if None.
        system: instruction before each prompt of a chat.
        more_ends: tokens that end a trace, beside those of the tokenizer.
    """

    model: Model
    params: Params
    tokenizer: Tokenizer
    budget: int
    sampler: Sampler = field(default_factory=sample)
    readings: tuple[Reading, ...] = ()
    stops: tuple[str, ...] = ()
    step: str = "\n"
    edit: Mapping[str, Edit] = field(default_factory=dict)
    chat: bool | None = None
    system: str | None = None
    more_ends: tuple[int, ...] = ()

    @property
    def is_chat(self) -> bool:
        """Whether prompts are put as the model's chat template has them."""
        return "default" in self.tokenizer.chat_templates if self.chat is None else self.chat

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end a trace."""
        own = turn_end_ids(self.tokenizer) if self.is_chat else self.tokenizer.end_ids
        return (*own, *self.more_ends)

    @cached_property
    def step_ids(self) -> frozenset[int]:
        """Tokens in whose text the one that ends a step stands."""
        wanted = self.step.encode()
        count = min(self.tokenizer.vocab_size, self.model.config.vocab_size)
        found = frozenset(n for n in range(count) if wanted in self.tokenizer.piece_bytes(n))
        if not found:
            raise DecodingError(
                f"no token of the model's holds {self.step!r}, the text that ends a step; give a text that "
                "one token holds, such as a new line (--step)"
            )
        return found

    def prompt_ids(self, prompt: str) -> list[int]:
        """Token ids of a prompt.

        Raises:
            ChatTemplateError: the chat template refuses it, or there is none.
            DecodingError: it has no tokens, or leaves less than the budget of the model's positions.
        """
        if self.is_chat:
            system: Any = [] if self.system is None else [{"role": "system", "content": self.system}]
            ids = list(chat_ids(self.tokenizer, [*system, {"role": "user", "content": prompt}]))
        else:
            ids = self.tokenizer.encode(prompt)
        if not ids:
            raise DecodingError(f"the prompt {prompt[:40]!r} has no tokens to continue; give a text")
        room = learned_positions(self.model) or self.model.config.max_length
        if len(ids) + self.budget - 1 > room:
            raise DecodingError(
                f"the prompt {prompt[:40]!r} has {len(ids)} tokens, and with a budget of {self.budget} the "
                f"context of {room} tokens runs out; give at most {max(room - len(ids) + 1, 0)} (--budget), "
                "or a shorter prompt"
            )
        return ids

    def text(self, prompt: Sequence[int], new: Sequence[int]) -> tuple[str, bool]:
        """The text that tokens add to a prompt, up to a stop string; and whether there is one."""
        text, string = cut_at_strings(new_text(self.tokenizer, prompt, new), self.stops)
        return text, string is not None

    def scored(self, trace: Trace) -> dict[str, float]:
        """What each reading makes of a trace, by name."""
        by_step = any(one.how in ("min", "product") for one in self.readings)
        ends = [n for n, token in enumerate(trace.token_ids) if by_step and token in self.step_ids]
        columns = iter(trace.readings.T)
        return {
            one.name: one.worth(trace.log_probs if one.read is None else next(columns), ends)
            for one in self.readings
        }
