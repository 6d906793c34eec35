"""A model folder and two sets of prompts turned into an edited folder with a report: all of `abliterate`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from mergelab.abliteration.behavior import measure_behavior
from mergelab.abliteration.bundled_prompts import built_in_prompts
from mergelab.abliteration.decision import RemovalDecision, decide, search_settings
from mergelab.abliteration.direction_file import SavedDirection
from mergelab.abliteration.preparation import Subject, check_counts, prepare
from mergelab.abliteration.removal import abliterate_params
from mergelab.abliteration.report import Report
from mergelab.abliteration.search_journal import SearchJournal
from mergelab.abliteration.settings import AbliterationSettings, Progress
from mergelab.abliteration.trials import check_choice
from mergelab.abliteration.write import write_abliterated
from mergelab.checkpoints import FolderCheckpoint, open_checkpoint
from mergelab.checkpoints.model_card import card_facts
from mergelab.checkpoints.output_target import recorded_identity
from mergelab.checkpoints.publish import WorkFolder, publish_file
from mergelab.checkpoints.remote_output import writes_anywhere
from mergelab.errors import MergelabError, OutputError, SearchError
from mergelab.models.model import Model
from mergelab.models.streamed import Streaming

__all__ = ["abliterate"]


@writes_anywhere()
def abliterate(
    source: str | Path,
    out: str | Path,
    harmful: str | Sequence[str] | None = None,
    harmless: str | Sequence[str] | None = None,
    *,
    borderline: str | Sequence[str] | None = None,
    direction: SavedDirection | None = None,
    settings: AbliterationSettings | None = None,
    text: str | None = None,
    journal: str | Path | None = None,
    mesh: Any = None,
    dtype: Any = None,
    streamed: Streaming | None = None,
    overwrite: bool = False,
    resume: bool = False,
    inputs: Iterable[str | Path] = (),
    progress: Progress | None = None,
) -> Report:
    """Finds the direction of refusals, chooses it, takes it out of a copy of the weights, and measures both.

    Three fifths of the prompts find directions, one fifth chooses, one fifth measures. The model is in memory
    once (not at all with `streamed`), and what is edited of it a second time while the edited model is
    measured; the output is streamed from the source's files.

    A search keeps a journal: run again with equal arguments it goes on where it ended, and with another
    `choose` it writes another of its trials without searching.

    Args:
        source: Hugging Face folder of a decoder, with its tokenizer; a model on the hub, or a URL.
        out: Folder to write; `abliteration.json` and `README.md` in it hold the report, and
            `abliteration/direction.safetensors` what was removed.
        harmful: Instructions that the model refuses, at least 5; built-in ones if neither these nor harmless
            ones are given.
        harmless: Instructions that it answers, as alike as possible otherwise.
        borderline: Harmless instructions that tend to be refused: half of them judge directions and trials,
            half measure, none finds a direction. Built-in ones, where the others are, if None.
        direction: Direction to remove in place of one that is found (`load_direction`); the prompts only
            measure.
        settings: How directions are found, chosen and removed; as in the paper if None.
        text: Text whose loss is measured before and after, or None.
        journal: File of the search's trials; `OUT.trials.jsonl` beside the output if None.
        mesh: Mesh that the weights are spread over, or None.
        dtype: Dtype to measure in; the stored one if None. Weights are written as stored.
        streamed: How activations wait, where the weights stay in their files (`mergelab.models.Streaming`);
            None to load them. No answers are generated then: behavior is measured by first tokens and text.
        overwrite: Whether a folder that mergelab wrote may be replaced, and the journal of another search.
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
        CheckpointError: the model or the journal cannot be read.
        OutputError: the folder cannot be written, or the journal is of another search.
    """
    settings = settings or AbliterationSettings()
    if streamed is not None and settings.trials:
        raise MergelabError(
            "a search would read the weights of a streamed model anew for every trial; give no trials, or "
            "load the model."
        )
    settings = replace(settings, choose=check_choice(settings.choose))
    texts, built_in = _texts(harmful, harmless, borderline)
    if direction is not None and settings.trials:
        raise MergelabError("a direction was given, and a search for one asked for; omit one of the two.")
    with WorkFolder(out, inputs=[source, *inputs], overwrite=overwrite) as work:
        # What a killed run has published may be the result of this very work, as the writer will find.
        if not work.published and not (resume and recorded_identity(work.out)):
            work.prepare()
        checkpoint = open_checkpoint(source)
        trials = work.out.with_name(f"{work.out.name}.trials.jsonl") if journal is None else Path(journal)
        try:
            model, report = _measure(
                checkpoint,
                source,
                texts,
                settings,
                direction,
                text=text,
                mesh=mesh,
                dtype=dtype,
                streamed=streamed,
                journal=(trials, overwrite),
                built_in=built_in,
                tell=progress or _silent,
            )
        except SearchError as error:
            raise _with_trace(error, work.out, [source, *inputs]) from None
        _write(model, checkpoint, work, report, resume, progress or _silent)
    return report


def _texts(
    harmful: str | Sequence[str] | None,
    harmless: str | Sequence[str] | None,
    borderline: str | Sequence[str] | None,
) -> tuple[dict[str, list[str]], bool]:
    """The prompts by kind, and whether they are the built-in ones."""
    built_in = harmful is None and harmless is None
    if built_in:
        harmful, harmless = built_in_prompts("harmful"), built_in_prompts("harmless")
        borderline = built_in_prompts("borderline") if borderline is None else borderline
    if harmful is None or harmless is None:
        one, other = ("harmful", "harmless") if harmless is None else ("harmless", "harmful")
        raise MergelabError(
            f"{one} prompts were given without {other} ones; give both, as alike as possible in all else, or "
            "neither for the built-in sets."
        )
    given = {"harmful": harmful, "harmless": harmless, "borderline": borderline or []}
    one_or_more = {kind: [texts] if isinstance(texts, str) else texts for kind, texts in given.items()}
    return check_counts(one_or_more), built_in


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
    texts: Mapping[str, Sequence[str]],
    settings: AbliterationSettings,
    direction: SavedDirection | None,
    *,
    text: str | None,
    mesh: Any,
    dtype: Any,
    streamed: Streaming | None,
    journal: tuple[Path, bool],
    built_in: bool,
    tell: Progress,
) -> tuple[Model, Report]:
    """Everything but writing: the directions, the choice, and behavior before and after."""
    tell("finding directions", 0, 1)
    subject, params = prepare(
        checkpoint,
        source,
        texts,
        settings,
        text=text,
        mesh=mesh,
        dtype=dtype,
        look=not settings.anyway and direction is None,
        streamed=streamed,
    )

    def opened() -> SearchJournal:
        identity = {
            "the model": checkpoint.fingerprint(),
            **subject.digests(),
            "the settings": search_settings(settings, dtype),
        }
        return SearchJournal(journal[0], identity, overwrite=journal[1])

    if direction is None:
        decision = decide(subject, params, settings, opened, tell)
        keep_norms = settings.keep_norms
    else:
        decision = RemovalDecision.given(direction, subject)
        keep_norms = settings.keep_norms or direction.keep_norms

    borderline = subject.borderline
    sets = (subject.harmful.measure, subject.harmless.measure, subject.ids)
    options: dict[str, Any] = {
        "borderline": None if borderline is None else borderline.measure,
        "tokenizer": subject.tokenizer if streamed is None else None,
        "phrases": settings.phrases,
        "max_new_tokens": settings.max_new_tokens,
        "windows": subject.windows,
        "batch": settings.batch,
    }
    tell("measuring", 0, 2)
    before, logits = measure_behavior(subject.model, params, *sets, **options)
    tell("measuring", 1, 2)
    edited = abliterate_params(subject.model, params, decision.ablation, keep_norms=keep_norms)
    del params
    after, _ = measure_behavior(subject.model, edited, *sets, before=logits, **options)
    del edited
    tell("measuring", 2, 2)
    report = Report(
        model=str(source),
        prompts=_counts(subject, decided=direction is None),
        decision=replace(
            decision, **jax.device_get({"ablation": decision.ablation, "vector": decision.vector})
        ),
        keep_norms=keep_norms,
        phrases=settings.phrases,
        before=before,
        after=after,
        facts=card_facts([checkpoint.path]),
        response_prefix=subject.response_prefix,
        prefix_found=subject.prefix_found,
        answer_tokens=settings.max_new_tokens,
        built_in_prompts=built_in,
        choose=settings.choose,
        given=direction,
    )
    return subject.model, report


def _counts(subject: Subject, *, decided: bool) -> dict[str, list[int]]:
    """Numbers of harmful, harmless and borderline prompts, by what they were used for.

    Those kept aside for a decision are used for nothing where a direction was given.
    """
    parts = [subject.harmful, subject.harmless, *([] if subject.borderline is None else [subject.borderline])]
    return {
        "found": [len(part.find) if decided and part.find is not None else 0 for part in parts],
        "chosen": [len(part.choose) if decided else 0 for part in parts],
        "measured": [len(part.measure) for part in parts],
    }


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
        report.decision.ablation,
        keep_norms=report.keep_norms,
        files=report.files(work.out.name),
        resume=resume,
        progress=advance,
    )
