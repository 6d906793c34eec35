"""Budget forcing: a model thinks for at least, and at most, so many tokens (Muennighoff et al., 2501.19393).

A text is thought until the text that ends thinking, such as `</think>`, is in it. Before the least number of
tokens that text is taken back, and other text (" Wait") put in its place; at the greatest number it is put
in. It is looked for in the text, because one text has many tokenizations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

from mergelab.activations.batches import bucket_size, pad_prompts
from mergelab.decoding.completion import Completion, at_stop_string, encoded, measured, new_text
from mergelab.decoding.generation import begin_samples
from mergelab.decoding.generation_state import on_device
from mergelab.decoding.monitors import Monitor
from mergelab.decoding.passes import check_one_rotation, check_takes_back
from mergelab.decoding.samplers import Sampler, greedy
from mergelab.decoding.spread import on_host
from mergelab.decoding.steps import Steps
from mergelab.decoding.stop import stop_at
from mergelab.decoding.transforms import History, require, transform
from mergelab.errors import DecodingError
from mergelab.models.model import Model, Params
from mergelab.models.sites import Edit, as_partials
from mergelab.text.tokenizer import Tokenizer

__all__ = ["Thinking", "complete_thinking"]


@dataclass(frozen=True)
class Thinking:
    """How long a model thinks; thinking begins with the first new token.

    Attributes:
        end: text that ends thinking.
        least: number of thought tokens before which the end is suppressed: the text that ends thinking, and
            tokens that end the whole text.
        most: number of thought tokens at which the end is put in; None for no limit.
        more: text that is put in the place of a suppressed end; with an empty one the token that began the
            end is not chosen there, and the next likely one is.
    """

    end: str
    least: int = 0
    most: int | None = None
    more: str = ""

    def __post_init__(self) -> None:
        require("Thinking(end)", self.end, bool(self.end), "the text that ends thinking")
        require("Thinking(least)", self.least, self.least >= 0, "a number of tokens, 0 or more")
        require("Thinking(most)", self.most, self.most is None or self.most >= 1, "at least 1 token")
        most = self.least if self.most is None else self.most
        require("Thinking(most)", self.most, most >= self.least, f"at least the least, {self.least}")
        other = self.end not in self.more
        require("Thinking(more)", self.more, other, f"a text without {self.end!r}, which ends thinking")


@transform
class Forced:
    """A sampler whose choice is given for some rows, and restricted for others.

    Attributes:
        sampler: chooses where nothing is given.
        tokens: int32 `[batch]`, the given ones; negative where the row is free.
        banned: int32 `[batch, bans]`, tokens that are not chosen; those beyond the vocabulary mean nothing.
    """

    sampler: Sampler
    tokens: ArrayLike
    banned: ArrayLike

    def __call__(
        self, logits: Float[Array, "batch vocab"], history: History, keys: Key[Array, " batch"]
    ) -> Int[Array, " batch"]:
        """The chosen tokens, int32."""
        rows = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
        allowed = logits.at[rows, self.banned].set(-jnp.inf, mode="drop")
        given = jnp.asarray(self.tokens, jnp.int32)
        return jnp.where(given >= 0, given, self.sampler(allowed, history, keys))


@dataclass
class _Row:
    """What is known of one row of text while it grows.

    Attributes:
        prompt: its prompt.
        end: tokens before the text that ended thinking, and through it; None while it thinks.
        queue: tokens to put in next.
        held: tokens that are not taken back: through the last that was put in.
        bare: number of tokens behind which nothing can be put in.
        banned: tokens not to choose at the place `banned_at`.
    """

    prompt: list[int]
    end: tuple[int, int] | None = None
    queue: list[int] = field(default_factory=list)
    held: int = 0
    bare: int = -1
    banned: list[int] = field(default_factory=list)
    banned_at: int = -1


def complete_thinking(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str | Sequence[int]],
    thinking: Thinking,
    *,
    max_new_tokens: int,
    sampler: Sampler | None = None,
    key: Key[Array, "*batch"] | int = 0,
    stop_strings: str | Sequence[str] = (),
    end_ids: Sequence[int] | None = None,
    edit: Mapping[str, Edit] | None = None,
    add_special_tokens: bool = True,
    samples: int = 1,
    log_probs: bool = False,
    capture: str | Sequence[str] = (),
    monitor: Monitor | None = None,
) -> list[Completion]:
    """Continues texts as `complete` does, thinking for as long as `thinking` says.

    Token ids and text hold what was put in; `max_new_tokens` counts all of it. The text that ends thinking is
    part of the text, also where it is a special token.

    Args:
        model: a decoder.
        params: its parameters.
        tokenizer: its tokenizer.
        prompts: texts, or token ids; a single text is one prompt.
        thinking: how long, and what ends it.
        max_new_tokens: largest number of tokens generated per prompt.
        sampler: choice of tokens that are not put in; `greedy()` by default.
        key: a seed or a key, folded with the row's number; or one key per row of the result.
        stop_strings: strings that end a text.
        end_ids: tokens that end a text; by default `tokenizer.end_ids`.
        edit: same as in `generate`.
        add_special_tokens: same as in `Tokenizer.encode`; False for rendered chat templates.
        samples: number of continuations of each prompt, which is read once.
        log_probs: whether log-probabilities are kept; those of tokens that were put in are the model's too.
        capture: sites that the monitor reads.
        monitor: what to read in every step, and when to end a row by it.

    Raises:
        DecodingError: as `complete`; or the end does not fit behind the most tokens of thinking.
    """
    check_takes_back(model, "complete_thinking")
    prompts = [prompts] if isinstance(prompts, str) else prompts
    stop_strings = [stop_strings] if isinstance(stop_strings, str) else stop_strings
    asked = encoded(tokenizer, prompts, add_special_tokens=add_special_tokens)
    closing = tokenizer.encode(thinking.end, add_special_tokens=False)
    more = tokenizer.encode(thinking.more, add_special_tokens=False) if thinking.more else []
    _check_room(thinking, closing, max_new_tokens)
    ends = tokenizer.end_ids if end_ids is None else end_ids
    stop, sampler = stop_at(ends, monitor=monitor), sampler or greedy()
    tokens, mask = pad_prompts(asked)
    check_one_rotation(model, tokens, mask, max_new_tokens)  # what is taken back was rotated in another way
    progress, keys, _ = begin_samples(
        model, params, tokens, mask, samples=samples, key=key, max_new_tokens=max_new_tokens, stop=stop,
        edit=edit, log_probs=log_probs, capture=capture,
    )  # fmt: skip
    rows = [_Row(prompt) for prompt in asked for _ in range(samples)]
    batch, vocab = progress.last.shape[0], model.config.vocab_size
    if batch > 1:  # rows will be of different lengths: one program from the beginning
        progress = replace(progress, cache=replace(progress.cache, even=False))
    steps = Steps(model, params, sampler=sampler, keys=keys, stop=stop, edit=as_partials(edit))
    found: dict[int, Completion] = {}
    lengths = np.zeros(batch, np.int32)
    while len(found) < len(rows):
        forced = _forced(sampler, rows, lengths, batch, vocab)
        progress = replace(progress, steps=jax.device_put(np.int32(0)))
        progress = steps.advance(progress, 1, sampler=forced)
        generated, finished = on_host(progress.tokens), on_host(progress.finished)
        lengths = on_host(progress.lengths).copy()
        cut = lengths.copy()
        for number, row in enumerate(rows):
            if number in found:
                continue
            new = generated[number, : lengths[number]].tolist()
            ended = bool(finished[number])
            if row.end is None and not row.queue:
                cut[number] = _think(row, new, ended, thinking, tokenizer, closing, more)
            if cut[number] < lengths[number]:
                continue
            completion = at_stop_string(tokenizer, row.prompt, new, stop_strings)
            if completion is None and (ended or len(new) >= max_new_tokens):
                text = _text(tokenizer, row, new, thinking.end)
                completion = Completion(tuple(new), text, "token" if ended else "length")
            if completion is not None:
                found[number] = measured(completion, progress, number, monitor)
        if (cut < lengths).any():
            progress, lengths = progress.rewind(cut), cut
        done = np.array([number in found or number >= len(rows) for number in range(batch)])
        if (done & ~on_host(progress.finished)).any() and not done.all():
            progress = replace(progress, finished=on_device(done | on_host(progress.finished)))
    return [found[number] for number in range(len(rows))]


def _check_room(thinking: Thinking, closing: Sequence[int], max_new_tokens: int) -> None:
    least = thinking.least if thinking.most is None else thinking.most
    taken = least + (0 if thinking.most is None else len(closing))
    if taken > max_new_tokens:
        what = f"{least} tokens of thinking"
        what += "" if thinking.most is None else f" and the {len(closing)} of {thinking.end!r} that end it"
        raise DecodingError(
            f"{what} are {taken}, more than the {max_new_tokens} new tokens there may be; ask for more "
            "(max_new_tokens, --max-new-tokens), or for less thinking."
        )


def _forced(sampler: Sampler, rows: Sequence[_Row], lengths: np.ndarray, batch: int, vocab: int) -> Forced:
    """The sampler of the next step; what it gives is taken from the rows' queues."""
    tokens = np.full(batch, -1, np.int32)
    bans = [row.banned if row.banned_at == lengths[n] else [] for n, row in enumerate(rows)]
    banned = np.full((batch, bucket_size(max(map(len, bans)))), vocab, np.int32)
    for number, row in enumerate(rows):
        banned[number, : len(bans[number])] = bans[number]
        if row.queue:
            tokens[number] = row.queue.pop(0)
    return Forced(sampler, tokens, banned)


def _think(
    row: _Row,
    new: list[int],
    ended: bool,
    thinking: Thinking,
    tokenizer: Tokenizer,
    closing: Sequence[int],
    more: Sequence[int],
) -> int:
    """What a thinking row does next: how many of its tokens stay, and in `row` what is put behind them."""
    before, through = _end_of(tokenizer, row.prompt, new, thinking.end)
    if before is None and ended:
        before, through = len(new) - 1, len(new)
        if before >= thinking.least:
            return len(new)  # the whole text ends, and with it thinking
    if before is not None and before >= thinking.least:
        row.end = (before, through)
        return len(new)
    if (
        before is not None and through <= row.held
    ):  # what was put in says the end itself, with what precedes it
        row.held = row.bare = row.held - len(more)
        return row.held
    kept = len(new) if before is None else max(before, row.held)
    if before is not None and more and before >= row.held and before != row.bare:
        row.queue, row.held = list(more), before + len(more)
    elif before is not None:  # nothing to put in its place, or what was put in began the end
        row.banned = [*(row.banned if row.banned_at == kept else ()), new[kept]]
        row.banned_at = kept
    if thinking.most is not None:
        row.queue = row.queue[: thinking.most - kept]
        if kept >= thinking.most:
            kept = thinking.most
            row.queue, row.end = list(closing), (kept, kept + len(closing))
    return kept


def _end_of(
    tokenizer: Tokenizer, prompt: Sequence[int], new: list[int], end: str
) -> tuple[int, int] | tuple[None, int]:
    """How many tokens stand before the first `end` in the text, and how many through it."""
    raw = tokenizer.decode(prompt, skip_special_tokens=False)

    def text(count: int) -> str:
        whole = tokenizer.decode([*prompt, *new[:count]], skip_special_tokens=False)
        if whole.startswith(raw):
            return whole[len(raw) :]
        return tokenizer.decode(new[:count], skip_special_tokens=False)

    place = text(len(new)).find(end)
    if place < 0:
        return None, 0
    through = next(count for count in range(1, len(new) + 1) if end in text(count))
    before = max(count for count in range(through) if len(text(count)) <= place)
    return before, through


def _text(tokenizer: Tokenizer, row: _Row, new: list[int], end: str) -> str:
    """The text of a row; the one that ends thinking is part of it, also where it is a special token."""
    text = new_text(tokenizer, row.prompt, new)
    if row.end is None or end in text or len(new) < row.end[1]:
        return text
    before, through = row.end
    thought = new_text(tokenizer, row.prompt, new[:before])
    return thought + end + new_text(tokenizer, [*row.prompt, *new[:through]], new[through:])
