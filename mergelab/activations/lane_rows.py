"""Rows of a text that processes share: a source for each lane, and batches of which each lane has a piece."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from mergelab.activations.first_rows import FirstRows, gathered_first_rows, one_after_other, owned_places
from mergelab.activations.kept import DEFAULT_RULE, KeptRows, TokenRule
from mergelab.activations.model_activations import DEFAULT_CONTEXT, ModelActivations
from mergelab.activations.stream import ActivationSource, ActivationStream, Batch
from mergelab.checkpoints.folder import open_checkpoint
from mergelab.checkpoints.locations import local_path
from mergelab.errors import SAEError
from mergelab.models.load import load_model
from mergelab.models.token_checks import check_tokens, window_length
from mergelab.processes.agreement import together
from mergelab.processes.exchange import gathered_facts, gathered_rows
from mergelab.text.corpus import TextOptions
from mergelab.text.corpus_files import corpus_files
from mergelab.text.kept_contexts import Share, lane_contexts
from mergelab.text.tokenizer import load_tokenizer

__all__ = ["LaneRows", "LaneStream", "TextShare", "open_lane_activations"]

_STRIDE = 2**65
"""Between the seeds of two lanes: more than any seed that is given."""


@dataclass(frozen=True)
class TextShare(Share):
    """The lanes of a text that one process reads.

    Attributes:
        chosen: their numbers, ascending: those that the process's part of a batch touches.
    """

    chosen: tuple[int, ...] = ()

    @property
    def mine(self) -> Sequence[int]:
        """The lanes of this process."""
        return self.chosen


@runtime_checkable
class SitesOfLane(Protocol):
    """What `ModelActivations` is to a lane: sources by site."""

    def at(self, site: str) -> ActivationSource:
        """One of the sites."""
        ...


@dataclass(frozen=True)
class LaneRows:
    """One site of a model on the lanes that this process reads of a text.

    Attributes:
        count: lanes in all.
        lanes: activations by lane.
        site: name of the site.
        kept: which rows count, by lane, with the limits of norms of lane 0 in all.
        rows: rows of all lanes, those of other processes too.
        kept_rows: how many of them count by their place.
    """

    count: int
    lanes: Mapping[int, SitesOfLane]
    site: str
    kept: Mapping[int, KeptRows]
    rows: int
    kept_rows: int

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return next(iter(self.lanes.values())).at(self.site).d_in

    def read(self, start: int, stop: int) -> np.ndarray:
        """Nothing: rows are read lane by lane (`LaneStream`)."""
        raise SAEError("rows of a text that processes share are read lane by lane.")

    def at(self, lane: int) -> ActivationSource:
        """The rows of one lane."""
        return self.lanes[lane].at(self.site)


def open_lane_activations(
    model: str | Path,
    sites: Sequence[str],
    texts: Sequence[str],
    share: TextShare,
    *,
    length: int | None = None,
    dtype: Any = None,
    mesh: Any = None,
    rule: TokenRule = DEFAULT_RULE,
    text: TextOptions | None = None,
) -> list[LaneRows]:
    """Activations of a model on this process's lanes of a corpus, one `LaneRows` for each site.

    Every process of the run must make the call. Where there are many documents, only those of its lanes are
    tokenized; what a lane holds does not depend on the number of processes.

    Args:
        model: a Hugging Face folder with its tokenizer, a model on the hub, or a URL.
        sites: names, of a transcoder two.
        texts: what `mergelab.text.corpus.documents` takes.
        share: the lanes.
        length: tokens per context; if None 64, or as many as the model has positions.
        dtype: dtype of the weights; the stored one if None.
        mesh: devices of this process to spread the model over.
        rule: which tokens count.
        text: how the texts become contexts; `tokens` is what all lanes together read.

    Raises:
        SAEError: a text cannot be read, or the texts are too short.
        CheckpointError: the model cannot be read.
        MeshError: that happened in another process.
    """
    text = text or TextOptions()
    found: dict[int, ModelActivations] = {}
    limits: list[float] = []
    with together("opening the data", distributed=jax.process_count() > 1):
        folder = local_path(model)
        files = [file for one in texts for file in corpus_files(one)]
        loaded, params = load_model(open_checkpoint(folder), mesh=mesh, dtype=dtype)
        tokenizer = load_tokenizer(folder)
        contexts = lane_contexts(
            tokenizer,
            files,
            window_length(loaded, length, DEFAULT_CONTEXT),
            text,
            share=share,
            check=partial(check_tokens, loaded, place=str(folder / "tokenizer.json")),
        )
        for lane, one in contexts.items():
            found[lane] = ModelActivations(
                loaded,
                params,
                one.tokens,
                tuple(sites),
                framed=one.framed,
                rule=rule,
                special_ids=tokenizer.special_ids,
                counted=one.counted,
                text=replace(text, bos=one.bos is not None),
            )
        if 0 in found:
            limits = list(found[0].norm_limits)
    mine = {str(lane): [one.rows, int(one.by_place.sum())] for lane, one in found.items()}
    told = gathered_facts([mine, [one if math.isfinite(one) else None for one in limits]])
    sizes = {lane: size for lanes, _ in told for lane, size in lanes.items()}
    limits = [math.inf if one is None else one for one in next(one for _, one in told if one)]
    rows, kept_rows = (sum(size[place] for size in sizes.values()) for place in (0, 1))
    target = len(sites) > 1

    def kept(one: ModelActivations) -> KeptRows:
        by_place = one.by_place.reshape(-1)
        return KeptRows(
            None if by_place.all() else lambda start, stop: by_place[start:stop],
            limits[0],
            limits[1] if target else math.inf,
            rule,
            one.tokens.shape[1],
        )

    counted = {lane: kept(one) for lane, one in found.items()}
    return [LaneRows(share.lanes, found, site, counted, rows, kept_rows) for site in sites]


class LaneStream:
    """An endless iterator of batches in which each lane of a text has a piece, shuffled within itself.

    Batches depend on the number of lanes, not on that of the processes that read them.

    Args:
        source: the activations.
        batch_size: rows of a batch, over all processes; a multiple of the lanes.
        seed: seed of the order.
        target: what to reconstruct, for a transcoder.
        buffer_rows: rows that are shuffled together, of all lanes.
        part: places in the batch whose rows this process reads, ascending.

    Attributes:
        rows: rows of an epoch: those that count by their place.
        kept: the limits of norms, and the rule.

    Raises:
        SAEError: a lane has fewer rows than it gives a batch.
    """

    def __init__(
        self,
        source: LaneRows,
        batch_size: int,
        *,
        seed: int = 0,
        target: LaneRows | None = None,
        buffer_rows: int = 65_536,
        part: np.ndarray,
    ) -> None:
        self.source, self.target = source, target
        self.batch_size, self.seed, self.part = batch_size, seed, part
        self.rows, self.lanes, self.position = source.kept_rows, source.count, 0
        self.kept = replace(next(iter(source.kept.values())), by_place=None)
        at_once = batch_size // self.lanes
        touched, inverse = np.unique(part // at_once, return_inverse=True)
        self._taken = inverse * at_once + part % at_once
        self._streams = {}
        for lane in touched.tolist():
            self._streams[lane] = self._stream(lane, at_once, seed, buffer_rows, source.kept[lane])

    def _stream(self, lane: int, rows: int, seed: int, buffer_rows: int, kept: KeptRows) -> ActivationStream:
        there = int(kept.counts(self.source.at(lane).rows, 1024).sum())
        if there < rows:
            raise SAEError(
                f"lane {lane} of the text has {there} rows that count, fewer than the {rows} it gives each "
                "batch; give more text, or lower train.batch_size."
            )
        return ActivationStream(
            self.source.at(lane),
            rows,
            seed=seed + lane * _STRIDE,
            target=None if self.target is None else self.target.at(lane),
            buffer_rows=max(buffer_rows // self.lanes, 1),
            kept=kept,
        )

    def state(self) -> dict[str, Any]:
        """The place of the next batch and what it depends on: plain JSON."""
        one = next(iter(self._streams.values())).state()
        own = {"position": self.position, "seed": self.seed, "rows": self.source.rows}
        return {**one, **own, "kept_rows": self.rows, "text_lanes": self.lanes}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to a place that `state` named, with the limits of norms that were found then.

        Raises:
            SAEError: the state is of another text, seed or buffer, whose batches would be others.
        """
        for name, value in self.state().items():
            if name not in ("position", "limits") and state.get(name) != value:
                raise SAEError(
                    f"the data stood at {name}={state.get(name)}, but now {name} is {value}: its batches "
                    "would be others; resume with the data and settings the run began with."
                )
        self.position = int(state["position"])
        for stream in self._streams.values():
            stream.go_to(self.position // self.lanes, state["limits"])
        self.kept = replace(next(iter(self._streams.values())).kept, by_place=None)

    def __iter__(self) -> LaneStream:
        return self

    def __next__(self) -> Batch:
        found = [next(stream) for stream in self._streams.values()]
        self.position += self.batch_size
        x = np.concatenate([one.input for one in found])[self._taken]
        y = x if self.target is None else np.concatenate([one.target for one in found])[self._taken]
        return Batch(x, y, np.concatenate([one.rows for one in found])[self._taken])

    def draw(self, count: int) -> FirstRows:
        """The first rows of all lanes, the same in every process (`ActivationStream.draw`).

        Every process must make the call.

        Args:
            count: rows to draw, at most.
        """
        lanes = list(self._streams)
        owned = [lanes[place] for place in owned_places(lanes)]
        per_lane = max(count // self.lanes, 1)
        with together("reading the start sample", distributed=jax.process_count() > 1):
            found = [self._streams[lane].first_rows(per_lane) for lane in owned]
        x = np.empty((0, self.source.d_in), np.float32)
        y = x if self.target is None else np.empty((0, self.target.d_in), np.float32)
        nothing = FirstRows(x, y, np.empty(0, np.int64), 0, np.empty(0, np.int64))
        of_lanes = np.repeat(np.array(owned, np.int64), [len(one.rows) for one in found])
        drawn = gathered_first_rows(one_after_other([nothing, *found]))
        return drawn.chosen(np.argsort(gathered_rows(of_lanes), kind="stable"))
