"""Chooses the direction whose removal ends refusals at the least cost elsewhere, and keeps every figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from mergelab.abliteration.ablation import Ablation
from mergelab.abliteration.behavior import FirstTokenPrompts, check_refusal_ids, scores_of_jobs
from mergelab.abliteration.directions import Directions
from mergelab.abliteration.prompts import Prompts
from mergelab.abliteration.removal import ablate, induce
from mergelab.errors import CheckpointError, MergelabError, SearchError
from mergelab.models.model import Model, Params

__all__ = ["Candidate", "DirectionSelection", "Filters", "select_direction", "selection_from_json"]


@dataclass(frozen=True)
class Filters:
    """What a direction must satisfy to be chosen.

    Attributes:
        max_kl: the most its removal may change the first token of harmless answers, in nats on average.
        min_induced: the least refusal score, in log-odds, of harmless prompts to which it is added.
        max_depth: only layers below this share of all; later ones lie too near to the output tokens.
        layers: the first and the last layer to look at, both counted, in place of `max_depth`; None for no
            such bounds.
    """

    max_kl: float = 0.1
    min_induced: float = 0.0
    max_depth: float = 0.8
    layers: tuple[int, int] | None = None

    def candidates(self, layers: int) -> range:
        """The layers of a model of so many whose directions may be chosen.

        Raises:
            MergelabError: the range of layers does not lie within the model.
        """
        if self.layers is None:
            return range(sum(layer < self.max_depth * layers for layer in range(layers)))
        first, last = self.layers
        if not 0 <= first <= last < layers:
            raise MergelabError(
                f"layers {first}-{last} were asked for, but the model has layers 0-{layers - 1}; give a "
                "first and a last one among these."
            )
        return range(first, last + 1)


@dataclass(frozen=True)
class Candidate:
    """One direction and what it does, on prompts that were not used to find it.

    Attributes:
        position: place counted from the prompt's end, -1 being its last token.
        layer: the block before which it was found.
        refusal: mean refusal score of harmful prompts when it is removed everywhere; less is better.
        induced: mean refusal score of harmless prompts when it is added at its layer.
        kl: mean divergence of the first token of harmless answers when it is removed, in nats.
        rejected: why it cannot be chosen, or None.
        borderline: mean refusal score, when it is removed everywhere, of harmless prompts that tend to be
            refused; None without any.
    """

    position: int
    layer: int
    refusal: float
    induced: float
    kl: float
    rejected: str | None
    borderline: float | None = None

    @property
    def score(self) -> float:
        """What is to be small: the refusal score, or its mean with that of borderline prompts."""
        return self.refusal if self.borderline is None else (self.refusal + self.borderline) / 2


@dataclass(frozen=True)
class DirectionSelection:
    """The chosen direction, and all that were tried.

    Attributes:
        chosen: its figures.
        direction: float32 `[width]`, of length 1.
        raw: the difference of means it comes from, `[width]`.
        refusal_before: mean refusal score of the harmful prompts without any edit.
        harmless_before: the same of the harmless prompts.
        trace: every candidate, in order of position and layer.
        borderline_before: the same of the borderline prompts; None without any.
    """

    chosen: Candidate
    direction: np.ndarray
    raw: np.ndarray
    refusal_before: float
    harmless_before: float
    trace: tuple[Candidate, ...]
    borderline_before: float | None = None

    def to_json(self) -> dict[str, Any]:
        """All figures, without the vectors."""
        return {
            "chosen": asdict(self.chosen),
            "refusal_before": self.refusal_before,
            "harmless_before": self.harmless_before,
            "borderline_before": self.borderline_before,
            "trace": [asdict(candidate) for candidate in self.trace],
        }


def select_direction(
    model: Model,
    params: Params,
    directions: Directions,
    harmful: Prompts,
    harmless: Prompts,
    refusal_ids: Sequence[int] | np.ndarray,
    *,
    borderline: Prompts | None = None,
    filters: Filters | None = None,
    batch: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> DirectionSelection:
    """The direction with the least refusal score among those that pass the filters.

    Three passes for each candidate, all of one compiled program: removed on harmful prompts, removed
    on harmless ones, and added on harmless ones; a fourth where there are borderline prompts, whose score
    counts as much as that of the harmful ones. Nothing is computed for layers that the filters exclude.

    Args:
        model: a decoder.
        params: its parameters.
        directions: the candidates.
        harmful: prompts that were not used to find them.
        harmless: the same.
        refusal_ids: tokens that begin a refusal.
        borderline: harmless prompts that tend to be refused, or None.
        filters: what is required; Arditi et al.'s thresholds by default.
        batch: prompts in one forward pass.
        progress: called with the number of candidates done and of all.

    Raises:
        SearchError: no candidate passes; the message says how many failed what, and `trace` holds them all.
        MergelabError: the directions are not of this model, it lacks the layers, or there are no such tokens.

    Reference: Arditi et al. 2024, arXiv:2406.11717, section 2.3 and appendix C.
    """
    filters = filters or Filters()
    ids = check_refusal_ids(model, refusal_ids)
    positions, layers, width = directions.raw.shape
    if (layers, width) != (model.config.n_layers, model.config.d_model):
        raise MergelabError(
            f"the directions are for {layers} layers of width {width}, but the model has "
            f"{model.config.n_layers} of width {model.config.d_model}; find them with this model."
        )
    job, looked = partial(_job, model, params), filters.candidates(layers)
    run = partial(scores_of_jobs, model, params, ids=ids, batch=batch)
    sets = [harmful, harmless, *([] if borderline is None else [borderline])]
    (refused, _, _), (answered, _, before), *doubt = run([job(prompts) for prompts in sets])
    doubted = float(doubt[0][0].mean()) if doubt else None
    unit, raw, valid = directions.unit, directions.raw, directions.valid
    tried = [(p, layer) for p in range(positions) for layer in looked if valid[p, layer]]
    jobs = []
    for p, layer in tried:
        jobs.append(job(harmful, removed=unit[p, layer]))
        jobs.append(job(harmless, removed=unit[p, layer], before=before))
        jobs.append(job(harmless, added=raw[p, layer], layer=layer))
        if borderline is not None:
            jobs.append(job(borderline, removed=unit[p, layer]))
    trace = []
    scores = run(jobs)
    for done, (p, layer) in enumerate(tried, 1):
        refusal, (_, kl, _), induced = next(scores)[0], next(scores), next(scores)[0]
        figures = (float(refusal.mean()), float(induced.mean()), float(kl.mean()))
        edge = None if borderline is None else float(next(scores)[0].mean())
        trace.append(Candidate(p - positions, layer, *figures, _rejected(*figures, filters), edge))
        if progress is not None:
            progress(done, len(tried))
    passing = [candidate for candidate in trace if candidate.rejected is None]
    if not passing:
        raise SearchError(
            _none_passes(trace, filters),
            {
                "refusal_before": float(refused.mean()),
                "harmless_before": float(answered.mean()),
                "borderline_before": doubted,
                "filters": asdict(filters),
                "failed": _failed(trace, filters),
                "trace": [asdict(candidate) for candidate in trace],
            },
        )
    chosen = min(passing, key=lambda candidate: candidate.score)
    return _selected(
        directions, chosen, (float(refused.mean()), float(answered.mean())), tuple(trace), doubted
    )


def _selected(
    directions: Directions,
    chosen: Candidate,
    before: tuple[float, float],
    trace: tuple[Candidate, ...],
    borderline_before: float | None,
) -> DirectionSelection:
    place = chosen.position + len(directions.raw), chosen.layer
    return DirectionSelection(
        chosen, directions.unit[place], directions.raw[place], *before, trace, borderline_before
    )


def selection_from_json(found: Mapping[str, Any], directions: Directions) -> DirectionSelection:
    """The selection that `DirectionSelection.to_json` told of, among the same directions.

    Raises:
        CheckpointError: a figure is missing, or the chosen direction is not among these.
    """
    try:
        trace = tuple(Candidate(**candidate) for candidate in found["trace"])
        chosen = Candidate(**found["chosen"])
        before = float(found["refusal_before"]), float(found["harmless_before"])
        return _selected(directions, chosen, before, trace, found.get("borderline_before"))
    except (KeyError, TypeError, ValueError, IndexError):
        raise CheckpointError(
            "the recorded choice of a direction is damaged; delete the journal to search anew"
        ) from None


def _job(
    model: Model,
    params: Params,
    prompts: Prompts,
    *,
    removed: np.ndarray | None = None,
    added: np.ndarray | None = None,
    layer: int = 0,
    before: np.ndarray | None = None,
) -> FirstTokenPrompts:
    """Prompts with one direction removed everywhere, or one added at a layer: the same program for both."""
    layers, nothing = model.config.n_layers, np.zeros(model.config.d_model, np.float32)
    vectors = np.zeros((layers, model.config.d_model), np.float32)
    vectors[layer] = nothing if added is None else added
    ablation = Ablation.everywhere(jnp.asarray(nothing if removed is None else removed), layers)
    edit = ablate(model, params, ablation) | induce(jnp.asarray(vectors))
    return FirstTokenPrompts(prompts, edit, before)


def _rejected(refusal: float, induced: float, kl: float, filters: Filters) -> str | None:
    if not np.isfinite([refusal, induced, kl]).all():
        return "a figure is not finite"
    if kl > filters.max_kl:
        return f"KL {kl:.3g} is above {filters.max_kl:g}"
    if induced < filters.min_induced:
        return f"induced refusal {induced:.3g} is below {filters.min_induced:g}"
    return None


def _none_passes(trace: Sequence[Candidate], filters: Filters) -> str:
    if not trace:
        where = f"before {filters.max_depth:g} of the layers"
        if filters.layers is not None:
            where = f"in layers {filters.layers[0]}-{filters.layers[1]}"
        return (
            f"no direction lies {where} with two different means; give other prompts, more positions, or "
            "more layers."
        )
    # What destroys a model ends its refusals too: the one to name is the one that a filter nearly let by.
    gentle = [candidate for candidate in trace if candidate.kl <= filters.max_kl]
    if gentle:
        best = max(gentle, key=lambda candidate: np.nan_to_num(candidate.induced, nan=-np.inf))
    else:
        best = min(trace, key=lambda candidate: np.nan_to_num(candidate.kl, nan=np.inf))
    failed = _failed(trace, filters)
    counts = [f"{count} have {what}" for what, count in failed.items() if count]
    several = "; some for more than one reason" if sum(failed.values()) > len(trace) else ""
    return (
        f"none of {len(trace)} directions passes the filters ({', '.join(counts)}{several}); "
        f"the nearest (position {best.position}, layer {best.layer}, refusal score {best.refusal:.3g}, KL "
        f"{best.kl:.3g}) was rejected: {best.rejected}; give more or purer prompts, or other filters."
    )


def _failed(trace: Sequence[Candidate], filters: Filters) -> dict[str, int]:
    """How many candidates fail each filter; one may fail several."""
    figures = np.array([(c.refusal, c.induced, c.kl) for c in trace]).reshape(-1, 3)
    return {
        f"a KL above {filters.max_kl:g}": int((figures[:, 2] > filters.max_kl).sum()),
        f"an induced refusal below {filters.min_induced:g}": int((figures[:, 1] < filters.min_induced).sum()),
        "a figure that is not finite": int((~np.isfinite(figures).all(axis=1)).sum()),
    }
