"""A model and its prompts made ready: encoded, checked, cut into sets, and looked at for refusals."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.abliteration.answers import reasoning_begun, refusal_tokens, shared_opening
from mergelab.abliteration.behavior import check_refusal_ids, first_token_scores, text_windows
from mergelab.abliteration.prompts import Prompts, encode_prompts, post_instruction_tokens
from mergelab.abliteration.settings import AbliterationSettings
from mergelab.checkpoints import FolderCheckpoint
from mergelab.errors import EvaluationError, MergelabError
from mergelab.models.load import load_model
from mergelab.models.model import Model, Params
from mergelab.models.residual_stream import require_decoder
from mergelab.models.streamed import Streaming, stream_model
from mergelab.models.token_checks import check_tokens, window_length
from mergelab.text.packing import EvaluationWindows
from mergelab.text.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Parts", "Subject", "check_counts", "prepare"]

_FEWEST = {"harmful": 5, "harmless": 5, "borderline": 2}
"""Prompts of each kind: at least one to choose with and one to measure on, and a few to average."""
_OPENINGS = 8
"""Prompts of a kind whose answers are looked at for an opening that all share."""


@dataclass(frozen=True)
class Parts:
    """Prompts of one kind, cut into sets that share none.

    Attributes:
        find: those whose activations give directions; None of borderline prompts, which give none.
        choose: those by which directions and trials are judged.
        measure: those that decide nothing.
    """

    find: Prompts | None
    choose: Prompts
    measure: Prompts

    @classmethod
    def of(cls, prompts: Prompts) -> Parts:
        """Three fifths, one fifth and one fifth."""
        find, rest = prompts.split(0.6)
        return cls(find, *rest.split(0.5))


@dataclass(frozen=True)
class Subject:
    """What is abliterated, without its parameters, and what it is judged on.

    Attributes:
        model: a decoder.
        tokenizer: its tokenizer.
        ids: tokens that begin a refusal.
        harmful: prompts that it refuses.
        harmless: prompts that it answers.
        borderline: harmless prompts that it tends to refuse, or None.
        positions: number of last tokens at which directions are looked for.
        windows: a text to predict, or None.
        response_prefix: text that stands behind every prompt, as answers begin.
        prefix_found: whether that text was found in the model's answers.
    """

    model: Model
    tokenizer: Tokenizer
    ids: np.ndarray
    harmful: Parts
    harmless: Parts
    borderline: Parts | None
    positions: int
    windows: EvaluationWindows | None
    response_prefix: str
    prefix_found: bool

    def digests(self) -> dict[str, str]:
        """Digests of what directions and trials are judged on, by what it is called in messages."""
        parts = [self.harmful, self.harmless, *([] if self.borderline is None else [self.borderline])]
        sets = [prompts for part in parts for prompts in (part.find, part.choose) if prompts is not None]
        arrays = [array for prompts in sets for array in (prompts.tokens, prompts.mask)]
        windows = [] if self.windows is None else [self.windows.tokens, self.windows.is_target]
        return {
            "the prompts": _digest([*arrays, self.ids]),
            "the text": _digest(windows) if windows else "none",
        }


def _digest(arrays: Sequence[np.ndarray]) -> str:
    found = hashlib.sha256()
    for array in arrays:
        found.update(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def check_counts(texts: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The prompts of each kind, each prompt once: one that stood in two sets would be found and measured on.

    Raises:
        MergelabError: there are too few of a kind.
    """
    unique = {kind: list(dict.fromkeys(prompts)) for kind, prompts in texts.items()}
    faults = []
    for kind, prompts in unique.items():
        if (kind != "borderline" or prompts) and len(prompts) < _FEWEST[kind]:
            repeated = len(texts[kind]) - len(prompts)
            but = f" ({repeated} repeat others)" if repeated else ""
            faults.append(
                f"there are {len(prompts)} {kind} prompts{but}; give at least {_FEWEST[kind]}, better some "
                "hundreds."
            )
    if faults:
        raise MergelabError(faults)
    return unique


def prepare(
    checkpoint: FolderCheckpoint,
    source: str | Path,
    texts: Mapping[str, Sequence[str]],
    settings: AbliterationSettings,
    *,
    text: str | None,
    mesh: Any,
    dtype: Any,
    look: bool,
    streamed: Streaming | None = None,
) -> tuple[Subject, Params]:
    """The subject and its parameters.

    Args:
        checkpoint: the model's files, opened.
        source: the folder, for messages and the tokenizer.
        texts: prompts by kind: `harmful`, `harmless` and, where there are some, `borderline`.
        settings: how they are encoded and cut.
        text: a text to predict, or None.
        mesh: mesh that the weights are spread over, or None.
        dtype: dtype to measure in; the stored one if None.
        look: whether a model that does not refuse is an error.
        streamed: how activations wait, where the weights stay in their files; None to load them.

    Raises:
        MergelabError: the model is an encoder, or a setting has no meaning.
        EvaluationError: harmful prompts score no higher than harmless ones.
        CheckpointError: the model cannot be read.
    """
    tokenizer = load_tokenizer(source)
    if streamed is None:
        model, params = load_model(checkpoint, mesh=mesh, dtype=dtype)
    else:
        model, params = stream_model(checkpoint, mesh=mesh, dtype=dtype, **streamed._asdict())
    require_decoder(model)
    settings.filters.candidates(model.config.n_layers)
    ids = check_refusal_ids(model, refusal_tokens(tokenizer, settings.phrases))

    def encoded(prefix: str) -> dict[str, Prompts]:
        return {
            kind: _within(
                model,
                encode_prompts(tokenizer, prompts, system=settings.system, response_prefix=prefix),
                f"{source}, {kind} prompts",
            ).shuffled(settings.seed)
            for kind, prompts in texts.items()
            if prompts
        }

    prefix, found = settings.response_prefix or "", ""
    sets = encoded(prefix)
    seen = _look(model, params, sets, ids, settings.batch)
    if settings.response_prefix is None:
        few = _some(sets["harmful"], sets["harmless"])
        if len(seen.begins) == 1 or reasoning_begun(tokenizer, few):
            found = shared_opening(model, params, tokenizer, few, ids, batch=settings.batch)
    if found:
        prefix, sets = found, encoded(found)
        seen = _look(model, params, sets, ids, settings.batch)
    if look:
        seen.check_refusing(tokenizer)
    windows = None if text is None else _windows(model, tokenizer, text, settings.text_length)
    subject = Subject(
        model,
        tokenizer,
        ids,
        Parts.of(sets["harmful"]),
        Parts.of(sets["harmless"]),
        Parts(None, *sets["borderline"].split(0.5)) if "borderline" in sets else None,
        settings.positions or post_instruction_tokens(tokenizer, *sets.values(), response_prefix=prefix),
        windows,
        prefix,
        bool(found),
    )
    return subject, params


@dataclass(frozen=True)
class _Seen:
    """First tokens of answers to the prompts that find directions.

    Attributes:
        harmful: refusal score of each harmful prompt.
        harmless: the same of harmless ones.
        begins: the most probable first tokens, each once.
    """

    harmful: np.ndarray
    harmless: np.ndarray
    begins: np.ndarray

    def check_refusing(self, tokenizer: Tokenizer) -> None:
        """Two passes that spare the hundreds of a search for what is not there.

        Raises:
            EvaluationError: harmful prompts score no higher than harmless ones.
        """
        refused, answered = self.harmful, self.harmless
        if refused.mean() > answered.mean():
            return
        shared = ""
        if len(self.begins) == 1:
            piece = tokenizer.shown_piece(int(self.begins[0]))
            shared = f" (all answers begin with {piece!r}, which --response-prefix looks past)"
        raise EvaluationError(
            f"the model does not seem to refuse: the mean refusal score of {len(refused)} harmful prompts is "
            f"{refused.mean():.3g}, no higher than {answered.mean():.3g} of {len(answered)} harmless ones, "
            f"and {(refused > 0).sum()} and {(answered > 0).sum()} of them begin with a refusal{shared}; "
            "give prompts that it refuses or the phrases its refusals begin with, or go on (--anyway)."
        )


def _look(model: Model, params: Params, sets: Mapping[str, Prompts], ids: np.ndarray, batch: int) -> _Seen:
    found = [Parts.of(sets[kind]).find for kind in ("harmful", "harmless")]
    (refused, _, first), (answered, _, other) = (
        first_token_scores(model, params, prompts, ids, batch=batch)
        for prompts in found
        if prompts is not None
    )
    begins = np.unique(np.concatenate([logits.argmax(axis=-1) for logits in (first, other)]))
    return _Seen(refused, answered, begins)


def _some(*sets: Prompts) -> Prompts:
    """The first prompts of each set, padded alike."""
    return Prompts.of([row for prompts in sets for row in prompts.rows()[:_OPENINGS]])


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
