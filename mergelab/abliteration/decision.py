"""What is removed: a direction found, chosen, and searched around; or one that a file gives."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import jax.numpy as jnp
import numpy as np

from mergelab.abliteration.ablation import Ablation, Space
from mergelab.abliteration.behavior import first_token_scores
from mergelab.abliteration.direction_file import SavedDirection
from mergelab.abliteration.direction_selection import (
    DirectionSelection,
    select_direction,
    selection_from_json,
)
from mergelab.abliteration.directions import Directions, find_directions
from mergelab.abliteration.preparation import Subject
from mergelab.abliteration.search_journal import SearchJournal
from mergelab.abliteration.settings import AbliterationSettings, Progress
from mergelab.abliteration.trial_search import search_ablation
from mergelab.abliteration.trials import SearchResult, Trial
from mergelab.errors import OutputError, SearchError
from mergelab.interp.steering import SteeringVector
from mergelab.models.model import Params

__all__ = ["RemovalDecision", "decide", "search_settings"]


@dataclass(frozen=True)
class RemovalDecision:
    """What is removed, and how it came to that.

    Attributes:
        ablation: directions that are removed, and where.
        vector: the direction at its site, its `norm` being the length of the difference of means.
        selection: the chosen direction and every candidate's figures; None of a direction from a file.
        search: the trials of a search, or None.
        trial: the trial that is taken, or None.
    """

    ablation: Ablation
    vector: SteeringVector
    selection: DirectionSelection | None = None
    search: SearchResult | None = None
    trial: Trial | None = None

    @classmethod
    def given(cls, direction: SavedDirection, subject: Subject) -> RemovalDecision:
        """The one that a file gives.

        Raises:
            MergelabError: it is of a model of another shape.
        """
        return cls(direction.for_model(subject.model), direction.vector)


def search_settings(settings: AbliterationSettings, dtype: object) -> str:
    """All settings that decide the figures of a search, as text that two runs can compare."""
    names = (
        "positions",
        "winsorize",
        "orthogonal",
        "keep_norms",
        "trials",
        "rounds",
        "seed",
        "response_prefix",
    )
    found = {name: getattr(settings, name) for name in names}
    return json.dumps({**found, "filters": asdict(settings.filters), "dtype": str(dtype)})


def decide(
    subject: Subject,
    params: Params,
    settings: AbliterationSettings,
    journal: Callable[[], SearchJournal],
    tell: Progress,
) -> RemovalDecision:
    """Finds the directions, chooses one, and searches around it where trials are asked for.

    Args:
        subject: the model and its prompts.
        params: its parameters.
        settings: how directions are found, chosen and removed.
        journal: opens the journal of the search; called only where there is one.
        tell: function told what is being done.

    Raises:
        SearchError: no direction or no trial passes the filters; `trace` holds what was tried.
    """
    harmful, harmless = subject.harmful, subject.harmless
    assert harmful.find is not None and harmless.find is not None
    kept = journal() if settings.trials else None
    directions = find_directions(
        subject.model,
        params,
        harmful.find,
        harmless.find,
        positions=subject.positions,
        batch=settings.batch,
        winsorize=settings.winsorize,
        orthogonal=settings.orthogonal,
    )
    tell("finding directions", 1, 1)
    if kept is not None and kept.selection is not None:
        selection = selection_from_json(kept.selection, directions)
        _check_same_weights(subject, params, selection, kept, settings.batch)
    else:
        selection = select_direction(
            subject.model,
            params,
            directions,
            harmful.choose,
            harmless.choose,
            subject.ids,
            borderline=None if subject.borderline is None else subject.borderline.choose,
            filters=settings.filters,
            batch=settings.batch,
            progress=lambda done, total: tell("choosing a direction", done, total),
        )
        if kept is not None:
            kept.record_selection(selection.to_json())
    if kept is None:
        ablation = Ablation.everywhere(jnp.asarray(selection.direction), subject.model.config.n_layers)
        return RemovalDecision(
            ablation, _vector(subject, directions, ablation, selection, selection.chosen.layer), selection
        )
    return _searched(subject, params, settings, directions, selection, kept, tell)


def _check_same_weights(
    subject: Subject, params: Params, selection: DirectionSelection, journal: SearchJournal, batch: int
) -> None:
    """Refuses the journal of a model whose files look alike, such as another fine-tune of the same base."""
    scores, _, _ = first_token_scores(subject.model, params, subject.harmful.choose, subject.ids, batch=batch)
    now, then = float(scores.mean()), selection.refusal_before
    if not math.isclose(now, then, rel_tol=0.01, abs_tol=0.01):
        raise OutputError(
            f"{journal.path} is the journal of a model with other weights: the refusal score of its harmful "
            f"prompts is {then:.4g} there and {now:.4g} here; name another journal."
        )


def _searched(
    subject: Subject,
    params: Params,
    settings: AbliterationSettings,
    directions: Directions,
    selection: DirectionSelection,
    journal: SearchJournal,
    tell: Progress,
) -> RemovalDecision:
    space = Space.of(directions, selection.chosen.position)
    if settings.filters.layers is not None:
        space = _within_layers(space, *settings.filters.layers)
    search = search_ablation(
        subject.model,
        params,
        space,
        subject.harmful.choose,
        subject.harmless.choose,
        subject.ids,
        trials=settings.trials,
        rounds=settings.rounds,
        start=space.plain(selection.chosen.layer),
        keep_norms=settings.keep_norms,
        windows=subject.windows,
        borderline=None if subject.borderline is None else subject.borderline.choose,
        batch=settings.batch,
        seed=settings.seed,
        journal=journal,
        progress=lambda done, total: tell("searching", done, total),
    )
    try:
        trial = search.choose(settings.choose, settings.filters.max_kl)
    except SearchError as error:
        error.trace["selection"] = selection.to_json()
        raise
    ablation = space.ablation(jnp.asarray(list(trial.parameters.values()), jnp.float32))
    vector = _vector(subject, directions, ablation, selection, round(trial.parameters["source"]))
    return RemovalDecision(ablation, vector, selection, search, trial)


def _vector(
    subject: Subject, directions: Directions, ablation: Ablation, selection: DirectionSelection, layer: int
) -> SteeringVector:
    """The direction shared by all blocks, at the layer where it was found."""
    length = np.linalg.norm(directions.raw[selection.chosen.position, layer])
    return SteeringVector(
        ablation.directions[0],
        jnp.float32(length),
        f"blocks.{layer}.resid_pre",
        subject.model.family.model_type,
    )


def _within_layers(space: Space, first: int, last: int) -> Space:
    """The space whose direction comes from the given layers, and not from each block's own."""
    low, high = space.low.copy(), space.high.copy()
    source, own = space.names.index("source"), space.names.index("own")
    low[source], high[source], high[own] = max(low[source], first), last, 0.0
    return replace(space, low=low, high=high)
