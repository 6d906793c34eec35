"""A model folder and two sets of prompts turned into an edited folder with a report: all of `abliterate`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mergelab.abliteration.ablation import Ablation, Space
from mergelab.abliteration.behavior import (
    REFUSAL_PHRASES,
    check_refusal_ids,
    first_token_scores,
    measure_behavior,
    refusal_tokens,
    text_windows,
)
from mergelab.abliteration.direction_selection import DirectionSelection, Filters, select_direction
from mergelab.abliteration.directions import Directions, find_directions
from mergelab.abliteration.prompts import Prompts, encode_prompts, post_instruction_tokens
from mergelab.abliteration.removal import KeepNorms, abliterate_params
from mergelab.abliteration.report import Report
from mergelab.abliteration.trial_search import SearchResult, Trial, search_ablation
from mergelab.abliteration.write import write_abliterated
from mergelab.checkpoints import FolderCheckpoint, open_checkpoint
from mergelab.checkpoints.model_card import card_facts
from mergelab.checkpoints.output_target import recorded_identity
from mergelab.checkpoints.publish import WorkFolder, publish_file
from mergelab.checkpoints.remote_output import writes_anywhere
from mergelab.errors import EvaluationError, MergelabError, OutputError, SearchError
from mergelab.models.load import load_model
from mergelab.models.model import Model, Params
from mergelab.models.residual_stream import require_decoder
from mergelab.models.token_checks import check_tokens, window_length
from mergelab.text.packing import EvaluationWindows
from mergelab.text.tokenizer import Tokenizer, load_tokenizer

__all__ = ["AbliterationSettings", "Progress", "abliterate"]

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""
_FEWEST = 5
"""Prompts of each kind: at least one to choose with and one to measure on, and a few to average."""


@dataclass(frozen=True)
class AbliterationSettings:
    """How directions are found, chosen and removed.

    Attributes:
        phrases: Beginnings of answers that count as refusals; their first tokens begin refusals.
        system: System turn before every prompt, or None.
        positions: Number of last tokens to look at; those that the chat template puts after the instruction
            if None.
        winsorize: Quantile of magnitudes to clip activations to, as in `find_directions`; None clips nothing.
        orthogonal: Whether directions are first made orthogonal to the mean of the harmless prompts, so that
            the model keeps this component.
        filters: Conditions that a direction must satisfy; `max_kl` holds for the trial of a search too.
        keep_norms: Norms that the matrices keep.
        trials: Trials of a search (`search_ablation`); with 0 the direction is removed everywhere.
        rounds: Rounds of that search.
        max_new_tokens: Length of each answer that is looked through for phrases.
        batch: Prompts in one forward pass.
        text_length: Tokens in a window of the text whose loss is measured; 256, or as many as the model has
            positions, if None.
        seed: Seed of the prompts' order and the trials.
        response_prefix: Text that every answer begins with, such as `<think>` of a reasoning model; scores
            and answers are of what follows it.
        anyway: Whether directions are searched for although harmful prompts score no higher than harmless
            ones, so that the model does not seem to refuse.
    """

    phrases: str | Sequence[str] = REFUSAL_PHRASES
    system: str | None = None
    positions: int | None = None
    winsorize: float | None = None
    orthogonal: bool = False
    filters: Filters = field(default_factory=Filters)
    keep_norms: KeepNorms = None
    trials: int = 0
    rounds: int = 4
    max_new_tokens: int = 32
    batch: int = 16
    text_length: int | None = None
    seed: int = 0
    response_prefix: str = ""
    anyway: bool = False


@writes_anywhere()
def abliterate(
    source: str | Path,
    out: str | Path,
    harmful: str | Sequence[str],
    harmless: str | Sequence[str],
    *,
    settings: AbliterationSettings | None = None,
    text: str | None = None,
    mesh: Any = None,
    dtype: Any = None,
    overwrite: bool = False,
    resume: bool = False,
    inputs: Iterable[str | Path] = (),
    progress: Progress | None = None,
) -> Report:
    """Finds the direction of refusals, chooses it, takes it out of a copy of the weights, and measures both.

    Three fifths of the prompts find directions, one fifth chooses, one fifth measures. The model is in memory
    once, and what is edited of it a second time while the edited model is measured; the output is streamed
    from the source's files.

    Args:
        source: Hugging Face folder of a decoder, with its tokenizer; a model on the hub, or a URL.
        out: Folder to write; `abliteration.json` and `README.md` in it hold the report.
        harmful: Instructions that the model refuses, at least 5.
        harmless: Instructions that it answers, as alike as possible otherwise.
        settings: How directions are found, chosen and removed; as in the paper if None.
        text: Text whose loss is measured before and after, or None.
        mesh: Mesh that the weights are spread over, or None.
        dtype: Dtype to measure in; the stored one if None. Weights are written as stored.
        overwrite: Whether a folder that mergelab wrote may be replaced.
        resume: Whether to go on with an interrupted output. What was measured is measured again, what was
            written is kept; the result is the same.
        inputs: Files that the prompts and the text were read from, which the output must not replace.
        progress: Function told what is being done.

    Returns:
        The report.

    Raises:
        MergelabError: prompts are too few, the model is an encoder, or a setting has no meaning.
        EvaluationError: harmful prompts score no higher than harmless ones: the model does not refuse them.
        SearchError: no direction or no trial passes the filters. No model is written; what was tried is, as
            JSON beside `out`, in the file that the message names.
        CheckpointError: the model cannot be read.
        OutputError: the folder cannot be written.
    """
    settings = settings or AbliterationSettings()
    harmful, harmless = ([one] if isinstance(one, str) else one for one in (harmful, harmless))
    for name, prompts in (("harmful", harmful), ("harmless", harmless)):
        if len(prompts) < _FEWEST:
            raise MergelabError(
                f"there are {len(prompts)} {name} prompts; give at least {_FEWEST}, better some hundreds."
            )
    with WorkFolder(out, inputs=[source, *inputs], overwrite=overwrite) as work:
        # What a killed run has published may be the result of this very work, as the writer will find.
        if not work.published and not (resume and recorded_identity(work.out)):
            work.prepare()
        checkpoint = open_checkpoint(source)
        try:
            model, report = _measure(
                checkpoint, source, harmful, harmless, settings, text, mesh, dtype, progress
            )
        except SearchError as error:
            raise _with_trace(error, work.out, [source, *inputs]) from None
        _write(model, checkpoint, work, report, resume, progress or _silent)
    return report


def _with_trace(error: SearchError, out: Path, inputs: Iterable[str | Path]) -> SearchError:
    """The error, naming the file beside the output that now holds all that was tried."""
    path = out.with_name(f"{out.name}.trace.json")
    content = json.dumps({"error": str(error), **error.trace}, indent=2) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        publish_file(path, content.encode(), inputs=inputs)
    except (OSError, OutputError):  # the search's own failure is what must be told
        return error
    return SearchError(f"{str(error).removesuffix('.')}; all that was tried is in {path}.", error.trace)


def _silent(what: str, done: int, total: int) -> None:
    """Tells nobody."""


def _measure(
    checkpoint: FolderCheckpoint,
    source: str | Path,
    harmful: Sequence[str],
    harmless: Sequence[str],
    settings: AbliterationSettings,
    text: str | None,
    mesh: Any,
    dtype: Any,
    progress: Progress | None,
) -> tuple[Model, Report]:
    """Everything but writing: the directions, the choice, and behavior before and after."""
    tokenizer = load_tokenizer(source)
    model, params = load_model(checkpoint, mesh=mesh, dtype=dtype)
    require_decoder(model)
    settings.filters.candidates(model.config.n_layers)
    ids = check_refusal_ids(model, refusal_tokens(tokenizer, settings.phrases))
    sets = [
        _within(
            model,
            encode_prompts(
                tokenizer, texts, system=settings.system, response_prefix=settings.response_prefix
            ),
            f"{source}, {name} prompts",
        )
        for name, texts in (("harmful", harmful), ("harmless", harmless))
    ]
    positions = settings.positions or post_instruction_tokens(
        tokenizer, *sets, response_prefix=settings.response_prefix
    )
    bad, good = (_Parts.of(prompts.shuffled(settings.seed)) for prompts in sets)
    windows = None if text is None else _windows(model, tokenizer, text, settings.text_length)
    tell = progress or _silent

    tell("finding directions", 0, 1)
    if not settings.anyway:
        _check_refusing(model, params, tokenizer, bad.find, good.find, ids, settings.batch)
    directions = find_directions(
        model,
        params,
        bad.find,
        good.find,
        positions=positions,
        batch=settings.batch,
        winsorize=settings.winsorize,
        orthogonal=settings.orthogonal,
    )
    tell("finding directions", 1, 1)
    selection = select_direction(
        model,
        params,
        directions,
        bad.choose,
        good.choose,
        ids,
        filters=settings.filters,
        batch=settings.batch,
        progress=lambda done, total: tell("choosing a direction", done, total),
    )
    ablation = Ablation.everywhere(jnp.asarray(selection.direction), model.config.n_layers)
    search, trial = None, None
    if settings.trials:
        search, trial, ablation = _search(
            model, params, directions, selection, bad.choose, good.choose, ids, windows, settings, tell
        )

    options: dict[str, Any] = {
        "tokenizer": tokenizer,
        "phrases": settings.phrases,
        "max_new_tokens": settings.max_new_tokens,
        "windows": windows,
        "batch": settings.batch,
    }
    tell("measuring", 0, 2)
    before, logits = measure_behavior(model, params, bad.measure, good.measure, ids, **options)
    tell("measuring", 1, 2)
    edited = abliterate_params(model, params, ablation, keep_norms=settings.keep_norms)
    del params
    after, _ = measure_behavior(model, edited, bad.measure, good.measure, ids, before=logits, **options)
    del edited
    tell("measuring", 2, 2)
    report = Report(
        model=str(source),
        prompts={
            "found": (len(bad.find), len(good.find)),
            "chosen": (len(bad.choose), len(good.choose)),
            "measured": (len(bad.measure), len(good.measure)),
        },
        selection=selection,
        search=search,
        trial=trial,
        ablation=jax.device_get(ablation),
        keep_norms=settings.keep_norms,
        phrases=settings.phrases,
        before=before,
        after=after,
        facts=card_facts([checkpoint.path]),
        response_prefix=settings.response_prefix,
    )
    return model, report


@dataclass(frozen=True)
class _Parts:
    """Prompts of one kind: to find directions, to choose one, and to measure what it does."""

    find: Prompts
    choose: Prompts
    measure: Prompts

    @classmethod
    def of(cls, prompts: Prompts) -> _Parts:
        find, rest = prompts.split(0.6)
        return cls(find, *rest.split(0.5))


def _within(model: Model, prompts: Prompts, place: str) -> Prompts:
    """The prompts, if the model has embeddings for them; what pads them may be a token it lacks."""
    prompts = Prompts(np.where(prompts.mask, prompts.tokens, 0), prompts.mask)
    check_tokens(model, prompts.tokens, prompts.mask, place=place)
    return prompts


def _windows(model: Model, tokenizer: Tokenizer, text: str, length: int | None) -> EvaluationWindows:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    if not tokens:
        raise MergelabError("the text to measure the loss on is empty; give another, or none.")
    begin = tokenizer.id_of("bos")
    separator = begin if begin is not None else tokenizer.pad_id
    check_tokens(model, np.asarray([*tokens, separator])[:, None], place=f"{tokenizer.folder}, the text")
    return text_windows(tokens, separator, window_length(model, length, 256, place="text_length"))


def _check_refusing(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    harmful: Prompts,
    harmless: Prompts,
    ids: np.ndarray,
    batch: int,
) -> None:
    """Two passes that spare the hundreds of a search for what is not there.

    Raises:
        EvaluationError: harmful prompts score no higher than harmless ones.
    """
    (refused, _, first), (answered, _, other) = (
        first_token_scores(model, params, prompts, ids, batch=batch) for prompts in (harmful, harmless)
    )
    if refused.mean() > answered.mean():
        return
    begins = np.unique(np.concatenate([logits.argmax(axis=-1) for logits in (first, other)]))
    shared = ""
    if len(begins) == 1:
        piece = tokenizer.shown_piece(int(begins[0]))
        shared = f" (all answers begin with {piece!r}, which --response-prefix looks past)"
    raise EvaluationError(
        f"the model does not seem to refuse: the mean refusal score of {len(harmful)} harmful prompts is "
        f"{refused.mean():.3g}, no higher than {answered.mean():.3g} of {len(harmless)} harmless ones, and "
        f"{(refused > 0).sum()} and {(answered > 0).sum()} of them begin with a refusal{shared}; give "
        "prompts that it refuses or the phrases its refusals begin with, or search all the same (--anyway)."
    )


def _search(
    model: Model,
    params: Params,
    directions: Directions,
    selection: DirectionSelection,
    harmful: Prompts,
    harmless: Prompts,
    ids: np.ndarray,
    windows: EvaluationWindows | None,
    settings: AbliterationSettings,
    tell: Progress,
) -> tuple[SearchResult, Trial, Ablation]:
    space = Space.of(directions, selection.chosen.position)
    if settings.filters.layers is not None:
        space = _within_layers(space, *settings.filters.layers)
    search = search_ablation(
        model,
        params,
        space,
        harmful,
        harmless,
        ids,
        trials=settings.trials,
        rounds=settings.rounds,
        start=space.plain(selection.chosen.layer),
        keep_norms=settings.keep_norms,
        windows=windows,
        batch=settings.batch,
        seed=settings.seed,
        progress=lambda done, total: tell("searching", done, total),
    )
    try:
        trial = search.best(settings.filters.max_kl)
    except SearchError as error:
        error.trace["selection"] = selection.to_json()
        raise
    return search, trial, space.ablation(jnp.asarray(list(trial.parameters.values()), jnp.float32))


def _within_layers(space: Space, first: int, last: int) -> Space:
    """The space whose direction comes from the given layers, and not from each block's own."""
    low, high = space.low.copy(), space.high.copy()
    source, own = space.names.index("source"), space.names.index("own")
    low[source], high[source], high[own] = max(low[source], first), last, 0.0
    return replace(space, low=low, high=high)


def _write(
    model: Model,
    checkpoint: FolderCheckpoint,
    work: WorkFolder,
    report: Report,
    resume: bool,
    tell: Progress,
) -> None:
    total = checkpoint.model_bytes
    written = 0

    def advance(count: int) -> None:
        nonlocal written
        written += count
        tell("writing", written, total)

    write_abliterated(
        model,
        checkpoint,
        work,
        report.ablation,
        keep_norms=report.keep_norms,
        files=report.files(work.out.name),
        resume=resume,
        progress=advance,
    )
