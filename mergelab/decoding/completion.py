"""Generation from text to text: a tokenizer around the compiled loop, and stop strings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Array, Key

from mergelab.activations.batches import pad_prompts
from mergelab.decoding.generation import begin_samples
from mergelab.decoding.generation_state import GenerationState
from mergelab.decoding.memory import Memory
from mergelab.decoding.monitors import Monitor
from mergelab.decoding.samplers import Sampler, greedy, row_keys
from mergelab.decoding.spread import on_host
from mergelab.decoding.steps import Steps
from mergelab.decoding.stop import cut_at_strings, stop_at
from mergelab.decoding.transforms import require
from mergelab.errors import DecodingError
from mergelab.models.model import Model, Params
from mergelab.models.sites import Edit, as_partials
from mergelab.text.tokenizer import Tokenizer

__all__ = ["Completion", "Stopped", "at_stop_string", "complete", "encoded", "measured", "new_text"]

Stopped = Literal["token", "string", "length", "monitor"]

_CHUNK = 32  # tokens between two looks at the text


@dataclass(frozen=True)
class Completion:
    """How a prompt goes on.

    Attributes:
        token_ids: the generated tokens, those that ended it among them.
        text: their text, without special tokens and without the stop string.
        stop: why it ended: `token` (one that ends a text, or a stop sequence), `string`, `length`, or
            `monitor` (a reading exceeded its bound).
        log_probability: sum of what the model's own logits give the tokens, in nats; None unless asked for.
        readings: what the monitor read in the pass that chose each token; empty without one.
    """

    token_ids: tuple[int, ...]
    text: str
    stop: Stopped
    log_probability: float | None = None
    readings: tuple[tuple[float, ...], ...] = ()


def complete(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int,
    sampler: Sampler | None = None,
    key: Key[Array, "*batch"] | int = 0,
    stop_strings: str | Sequence[str] = (),
    end_ids: Sequence[int] | None = None,
    edit: Mapping[str, Edit] | None = None,
    add_special_tokens: bool = True,
    on_text: Callable[[str], None] | None = None,
    memory: Memory | None = None,
    samples: int = 1,
    log_probs: bool = False,
    capture: str | Sequence[str] = (),
    monitor: Monitor | None = None,
) -> list[Completion]:
    """Continues texts.

    Stop strings are looked for in the text, between pieces of the compiled loop, because one text has many
    tokenizations: a row may compute up to 31 tokens beyond its stop string, and none of them is returned.

    Args:
        model: a decoder.
        params: its parameters.
        tokenizer: its tokenizer.
        prompts: texts, or token ids; a single text is one prompt.
        max_new_tokens: largest number of tokens generated per prompt.
        sampler: choice of tokens; `greedy()` by default.
        key: a seed or a key, folded with the prompt's index; or one key per prompt.
        stop_strings: strings that end a text.
        end_ids: tokens that end a text; by default `tokenizer.end_ids`.
        edit: same as in `generate`.
        add_special_tokens: same as in `Tokenizer.encode`; False for rendered chat templates.
        on_text: function that is called with each piece of the text as soon as it is certain; for one prompt.
        memory: what was read of the conversation that the prompt goes on with, and where it is kept for the
            next turn; for one prompt, without edits.
        samples: number of continuations of each prompt, which is read once; those of one prompt follow one
            another in the result.
        log_probs: whether log-probabilities are kept.
        capture: sites that the monitor reads.
        monitor: what to read in every step, and when to end a row by it (`mergelab.decoding.monitor`).

    Raises:
        DecodingError: as `generate`; for an empty stop string; and for `on_text` or `memory` with several
            prompts or samples.
    """
    prompts = [prompts] if isinstance(prompts, str) else prompts
    stop_strings = [stop_strings] if isinstance(stop_strings, str) else stop_strings
    one = len(prompts) == 1 and samples == 1
    asked = f"{len(prompts)} prompts" if samples == 1 else f"{len(prompts)} prompts and {samples} samples"
    require("complete(on_text)", asked, on_text is None or one, "one prompt")
    plain = not edit and not log_probs and monitor is None
    require(
        "complete(memory)", asked, memory is None or (one and plain), "one prompt, and no edits or readings"
    )
    asked_ids = encoded(tokenizer, prompts, add_special_tokens=add_special_tokens)
    for string in stop_strings:
        cut_at_strings("", [string])  # refused before anything is computed
    ends = tokenizer.end_ids if end_ids is None else end_ids
    stop, edits = stop_at(ends, monitor=monitor), as_partials(edit)
    sampler = sampler or greedy()
    if memory is None:
        tokens, mask = pad_prompts(asked_ids)
        progress, keys, _ = begin_samples(
            model,
            params,
            tokens,
            mask,
            samples=samples,
            key=key,
            max_new_tokens=max_new_tokens,
            stop=stop,
            edit=edit,
            log_probs=log_probs,
            capture=capture,
        )
    else:
        progress = memory.begin(model, params, asked_ids[0], max_new_tokens=max_new_tokens, stop=stop)
        keys = row_keys(key, 1)
    ids = [prompt for prompt in asked_ids for _ in range(samples)]
    steps = Steps(model, params, sampler=sampler, keys=keys, stop=stop, edit=edits)
    found: dict[int, Completion] = {}
    shown = _Shown(on_text, stop_strings)
    until = 0
    while len(found) < len(ids):
        piece = 1 if on_text is not None else _CHUNK if stop_strings else max_new_tokens
        until = min(until + piece, max_new_tokens)
        progress = steps.advance(progress, until)
        generated, finished = on_host(progress.tokens), on_host(progress.finished)
        for row, length in enumerate(on_host(progress.lengths)[: len(ids)].tolist()):
            if row in found:
                continue
            new = generated[row, :length].tolist()
            completion = at_stop_string(tokenizer, ids[row], new, stop_strings)
            if completion is None and (finished[row] or until == max_new_tokens):
                text = new_text(tokenizer, ids[row], new)
                completion = Completion(tuple(new), text, "token" if finished[row] else "length")
            if completion is not None:
                found[row] = measured(completion, progress, row, monitor)
            if on_text is not None:
                text = new_text(tokenizer, ids[row], new) if completion is None else completion.text
                shown.show(text, whole=completion is not None)
    if memory is not None:
        memory.keep(ids[0], progress)
    return [found[row] for row in range(len(ids))]


def encoded(
    tokenizer: Tokenizer, prompts: Sequence[str | Sequence[int]], *, add_special_tokens: bool
) -> list[list[int]]:
    """The token ids of each prompt.

    Raises:
        DecodingError: a prompt has none.
    """
    ids = [
        tokenizer.encode(p, add_special_tokens=add_special_tokens) if isinstance(p, str) else list(p)
        for p in prompts
    ]
    empty = next((n for n, row in enumerate(ids) if not row), None)
    if empty is not None:
        which = "the prompt" if len(ids) == 1 else f"prompt {empty}"
        raise DecodingError(
            f"{which} is empty: {prompts[empty]!r} has no tokens to continue; give a text, or the id of the "
            "token that begins one."
        )
    return ids


def measured(
    completion: Completion, progress: GenerationState, row: int, monitor: Monitor | None
) -> Completion:
    """The completion of a row with its log-probability and readings, as far as they were kept."""
    count = len(completion.token_ids)
    if progress.log_probs is not None:
        total = on_host(progress.log_probs)[row, :count].astype(np.float64).sum()
        completion = replace(completion, log_probability=float(total))
    if progress.readings is None or monitor is None:
        return completion
    read = on_host(progress.readings)[row, :count]
    stopped = completion.stop
    if stopped == "token" and bool((read[-1] > np.asarray(monitor.above)).any()):
        stopped = "monitor"
    return replace(completion, readings=tuple(tuple(map(float, step)) for step in read), stop=stopped)


class _Shown:
    """What has been shown of a text that grows.

    Args:
        show: takes the pieces.
        strings: strings that end the text, and are not shown.
    """

    def __init__(self, show: Callable[[str], None] | None, strings: Sequence[str]) -> None:
        self._show, self._strings, self._shown = show, strings, ""

    def show(self, text: str, *, whole: bool) -> None:
        """Shows what is new in `text`, as far as further tokens cannot change it."""
        if not whole:
            text = text.rstrip("\ufffd")  # characters of which some bytes are still to come
            parts = {string[:n] for string in self._strings for n in range(1, len(string))}
            text = text[: len(text) - max((len(part) for part in parts if text.endswith(part)), default=0)]
        if self._show is not None and len(text) > len(self._shown) and text.startswith(self._shown):
            self._show(text[len(self._shown) :])
            self._shown = text


def new_text(tokenizer: Tokenizer, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text that `new` adds to `prompt`: what joins words, and half characters, depend on both."""
    before, after = tokenizer.decode(prompt), tokenizer.decode([*prompt, *new])
    return after[len(before) :] if after.startswith(before) else tokenizer.decode(new)


def at_stop_string(
    tokenizer: Tokenizer, prompt: Sequence[int], new: list[int], strings: Sequence[str]
) -> Completion | None:
    """The completion that ends with the first stop string, with no token after the one that completes it."""
    if not strings:
        return None
    text, string = cut_at_strings(new_text(tokenizer, prompt, new), strings)
    if string is None:
        return None
    low, high = 1, len(new)  # the fewest tokens whose text holds a stop string
    while low < high:
        middle = (low + high) // 2
        held = cut_at_strings(new_text(tokenizer, prompt, new[:middle]), strings)[1]
        low, high = (low, middle) if held is not None else (middle + 1, high)
    return Completion(tuple(new[:low]), text, "string")
