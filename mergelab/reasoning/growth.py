"""Traces of one prompt that grow side by side, and are forked where they stand: the prompt is read once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from mergelab.decoding.completion import at_stop_string
from mergelab.decoding.generation import begin_samples
from mergelab.decoding.generation_state import GenerationState, on_device
from mergelab.decoding.passes import check_one_rotation, check_takes_back
from mergelab.decoding.spread import on_host
from mergelab.decoding.steps import Steps
from mergelab.decoding.stop import stop_at
from mergelab.errors import DecodingError
from mergelab.models.sites import as_partials
from mergelab.reasoning.readings import monitor_of
from mergelab.reasoning.writer import Trace, Writer

__all__ = ["Growth"]

_LOOK = 32
"""Tokens between two looks at the text, where strings end it."""


class Growth:
    """Rows that go on from one prompt.

    Each row is at an end (`ended`), or goes on when `grow` is called: to the end of its step, or of the text.
    A row's `n`-th token is drawn with the key of its number folded with `n`, so that rows that are forked go
    on in different ways, and a run is the same every time.

    Attributes:
        rows: number of rows.
        grown: number of tokens that were generated in all, those of dropped rows among them.
    """

    def __init__(self, writer: Writer, prompt: Sequence[int], rows: int, key: Any, *, by_step: bool) -> None:
        """Reads the prompt.

        Args:
            writer: who writes.
            prompt: its token ids.
            rows: number of rows.
            key: a seed or a key, folded with the row's number.
            by_step: whether rows stop at the end of each step.
        """
        if rows > 1:  # those that wait for others are taken back
            check_takes_back(writer.model, "traces side by side")
            check_one_rotation(writer.model, np.asarray([prompt]), None, writer.budget)
        self.writer, self.prompt, self.rows, self.grown = writer, list(prompt), rows, 0
        self._monitor, sites = monitor_of(writer.readings)
        ends = {*writer.ends, *(writer.step_ids if by_step else ())}
        self._stop = stop_at(sorted(ends), monitor=self._monitor)
        state, keys, spread = begin_samples(
            writer.model,
            writer.params,
            np.asarray([prompt], np.int32),
            samples=rows,
            key=key,
            max_new_tokens=writer.budget,
            stop=self._stop,
            edit=writer.edit,
            log_probs=True,
            capture=sites,
        )
        if spread is not None and state.last.shape[0] != rows:
            raise DecodingError(
                f"{rows} traces cannot be split evenly over the mesh on which the parameters lie; ask for a "
                "multiple of its parts (--samples, --batch)"
            )
        if rows > 1:  # they will be of different lengths: one program from the beginning
            state = replace(state, cache=replace(state.cache, even=False))
        self.state: GenerationState = state
        self.ended = np.zeros(rows, bool)
        self._keys = keys
        self._steps = self._new_steps()
        self._cut: dict[int, Trace] = {}

    def _new_steps(self) -> dict[bool, Steps]:
        """Steps with the bounds of the readings (True) and without them (False), of one shape."""
        free = self._stop
        if (monitor := free.monitor) is not None:
            unbounded = replace(monitor, above=np.full(monitor.readings, np.inf, np.float32))
            free = replace(free, monitor=unbounded)
        return {
            bounded: Steps(
                self.writer.model,
                self.writer.params,
                sampler=self.writer.sampler,
                keys=self._keys,
                stop=stop,
                edit=as_partials(self.writer.edit),
            )
            for bounded, stop in ((True, self._stop), (False, free))
        }

    def go_on(self, writer: Writer) -> None:
        """Lets another writer go on where traces ended by what ends no trace of its own.

        Args:
            writer: the same model with other edits, stop strings or ends; its readings are the same.
        """
        lengths = self.lengths
        for row, trace in self._cut.items():
            lengths[row] = len(trace.token_ids)
        for row in range(self.rows):
            last = int(on_host(self.state.tokens)[row, lengths[row] - 1])
            self.ended[row] = lengths[row] >= writer.budget or last in writer.ends
            if row in self._cut and any(self._cut[row].text.find(one) >= 0 for one in writer.stops):
                self.ended[row] = True
        self.state = self.state.rewind(lengths)
        self.writer, self._cut = writer, {}
        self._stop = stop_at(sorted(writer.ends), monitor=self._monitor)
        self._steps = self._new_steps()

    def fork(self, rows: Sequence[int]) -> None:
        """Makes the first rows copies of those named; the rows behind them are at an end.

        Args:
            rows: numbers of rows, at most as many as there are.
        """
        taken = [*rows, *[0] * (self.rows - len(rows))]
        self.state, self.ended = self.state.take(np.asarray(taken, np.int32)), self.ended[taken]
        self._cut = {n: self._cut[row] for n, row in enumerate(rows) if row in self._cut}
        self.ended[len(rows) :] = True

    def grow(
        self,
        most: int | None = None,
        look: Callable[[Growth], object] | None = None,
        *,
        bounded: bool = True,
    ) -> None:
        """Lets rows that are not at an end go on, until each is at the end of its step or of its text.

        Args:
            most: most new tokens of a row.
            look: function called after every piece of at most 32 tokens, which may end rows (`end`).
            bounded: whether readings beyond their bounds end rows.
        """
        writer, before = self.writer, self.lengths
        limit = np.minimum(writer.budget, before + (writer.budget if most is None else most))
        if self.rows > 1:
            # While a row waited for others, the cache went on with them: what it holds of that is taken back.
            self.state = self.state.rewind(before)
        paused = self.ended.copy()
        piece = _LOOK if writer.stops or look is not None else writer.budget
        while not paused.all():
            lengths = self.lengths
            room = int((limit - lengths)[~paused].min())
            state = replace(self.state, finished=on_device(paused), steps=jax.device_put(np.int32(0)))
            self.state = self._steps[bounded].advance(state, min(piece, room))
            finished, lengths = on_host(self.state.finished), self.lengths
            tokens = on_host(self.state.tokens)
            for row in np.flatnonzero(~paused).tolist():
                new = tokens[row, : lengths[row]].tolist()
                if writer.stops and self._at_string(row, new):
                    paused[row] = self.ended[row] = True
                elif finished[row]:
                    paused[row] = True
                    self.ended[row] = (
                        new[-1] in writer.ends or lengths[row] >= writer.budget or self._stopped(row)
                    )
                elif lengths[row] >= limit[row]:
                    paused[row] = True
                    self.ended[row] = lengths[row] >= writer.budget
            if look is not None:
                look(self)
                paused |= self.ended
        self.grown += int((self.lengths - before).sum())

    def end(self, row: int) -> None:
        """Ends a row where it stands."""
        self.ended[row] = True

    @property
    def lengths(self) -> np.ndarray:
        """Number of new tokens of each row."""
        return on_host(self.state.lengths).copy()

    def trace(self, row: int) -> Trace:
        """What a row holds so far."""
        if row in self._cut:
            return self._cut[row]
        length = int(self.lengths[row])
        new = on_host(self.state.tokens)[row, :length].tolist()
        text, _ = self.writer.text(self.prompt, new)
        stop = "monitor"
        if new and new[-1] in self.writer.ends:
            stop = "token"
        elif length >= self.writer.budget:
            stop = "length"
        return self._read(row, tuple(new), text, stop)

    def _at_string(self, row: int, new: list[int]) -> bool:
        found = at_stop_string(self.writer.tokenizer, self.prompt, new, self.writer.stops)
        if found is not None:
            self._cut[row] = self._read(row, found.token_ids, found.text, "string")
        return found is not None

    def _stopped(self, row: int) -> bool:
        """Whether a reading went beyond its bound in the last pass of a row."""
        if self._monitor is None or self.state.readings is None:
            return False
        last = on_host(self.state.readings)[row, int(self.lengths[row]) - 1]
        return bool((last > np.asarray(self._monitor.above)).any())

    def _read(self, row: int, new: tuple[int, ...], text: str, stop: str) -> Trace:
        count = len(new)
        assert self.state.log_probs is not None
        log_probs = on_host(self.state.log_probs)[row, :count].copy()
        inside = np.zeros((count, 0), np.float32)
        if self.state.readings is not None:
            inside = on_host(self.state.readings)[row, :count].copy()
        trace = Trace(new, text, stop, log_probs, inside)
        return replace(trace, scores=self.writer.scored(trace)) if count else trace
