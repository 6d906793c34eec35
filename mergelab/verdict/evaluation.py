"""Models measured on the same text, tasks and prompts, one by one; all that is at fault is said first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergelab.checkpoints.locations import location_text
from mergelab.checkpoints.source import Checkpoint
from mergelab.errors import EvaluationError, MergelabError
from mergelab.merging.any_model import open_model
from mergelab.models.load import load_model, parameter_shapes
from mergelab.models.model import Model, Params
from mergelab.models.streamed import Streaming, stream_model
from mergelab.models.token_checks import check_ids, window_length
from mergelab.text.corpus_files import corpus_files
from mergelab.text.prompt_file import read_prompts
from mergelab.text.tokenizer import Tokenizer, load_tokenizer
from mergelab.verdict.answers import THINK_END, AnswerScores, prompt_ids, score_answers
from mergelab.verdict.bootstrap import estimate, resampled_sums
from mergelab.verdict.choice_tasks import ChoiceTask, TaskScores, check_tasks, read_tasks, score_tasks
from mergelab.verdict.held_out_text import HeldOutText, TextScores, read_held_out, score_text

if TYPE_CHECKING:
    from mergelab.merging.recipe.schema import Recipe

__all__ = [
    "CONTEXT",
    "Evaluation",
    "Material",
    "OpenedModel",
    "evaluate_model",
    "gather",
    "measure",
    "model_name",
    "subjects_of",
]

CONTEXT = 512
"""Tokens of a window, where nothing says how many and the model has so many positions."""

NEW_TOKENS = 256
"""Most tokens of an answer, where nothing says how many."""

Texts = str | Path | Sequence[str | Path]
_LOOKED_AT = 10_000
"""Characters of the text by which a tokenizer that is not the model's is told before its weights are read."""

Prompts = Path | Sequence[str]
Tasks = str | Path | Sequence[ChoiceTask | Mapping[str, Any]]


@dataclass(frozen=True)
class Material:
    """What models are measured on, and how.

    Attributes:
        text: held-out text; None measures no loss.
        tasks: multiple choice; None measures none.
        prompts: what is answered; None lets nobody answer.
        context: tokens of a window of text; if None 512, or the model's positions if they are fewer.
        batch: windows, choices or prompts in one pass.
        max_new_tokens: most tokens of an answer.
        chat: whether prompts are put as a model's chat template has them; as it has one if None.
        think_end: text that ends thinking.
    """

    text: HeldOutText | None = None
    tasks: tuple[ChoiceTask, ...] | None = None
    prompts: tuple[str, ...] | None = None
    context: int | None = None
    batch: int = 8
    max_new_tokens: int = NEW_TOKENS
    chat: bool | None = None
    think_end: str = THINK_END


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one model: scores by unit, which comparisons pair.

    Attributes:
        name: the model, as it was named.
        text: scores of each unit of the text.
        tasks: scores of each task.
        answers: scores of each prompt.
        by: what a unit of the text is: `document` or `passage`.
    """

    name: str
    text: TextScores | None = None
    tasks: TaskScores | None = None
    answers: AnswerScores | None = None
    by: str = field(default="document", compare=False)

    def columns(self) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
        """Numerator and denominator of every figure, by unit, under the kind of the units."""
        found: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
        if (text := self.text) is not None:
            found["text"] = {
                "bits_per_byte": (text.bits, text.bytes),
                "accuracy": (text.hits, text.tokens),
            }
        if (tasks := self.tasks) is not None:
            one = np.ones_like(tasks.right)
            found["tasks"] = {
                "accuracy": (tasks.right, one),
                "accuracy_per_byte": (tasks.right_per_byte, one),
            }
        if (answers := self.answers) is not None:
            one = np.ones_like(answers.ended)
            found["answers"] = {
                name: (getattr(answers, name), one) for name in ("new_tokens", "ended", "thinking_closed")
            }
        return found

    def to_dict(self) -> dict[str, Any]:
        """The figures with their intervals, as plain data.

        `bits_per_byte` and `accuracy` (of next tokens) are of the text; `tasks` and `answers` hold their own.
        """
        kinds: dict[str, dict[str, Any]] = {}
        for kind, figures in self.columns().items():
            sums = resampled_sums(np.stack([c for pair in figures.values() for c in pair], axis=1))
            units = len(next(iter(figures.values()))[0])
            kinds[kind] = {
                name: estimate(sums[:, 2 * i], sums[:, 2 * i + 1], units).to_dict()
                for i, name in enumerate(figures)
            }
        found: dict[str, Any] = {"model": self.name, **kinds.pop("text", {})}
        if (text := self.text) is not None:
            found |= {"tokens": int(text.tokens.sum()), "bytes": round(float(text.bytes.sum()))}
            found |= {"context": text.context, "units": {"kind": self.by, "count": len(text.nats)}}
        if (tasks := self.tasks) is not None:
            counted = {"count": len(tasks.right), "chance": float(tasks.chance.mean())}
            found["tasks"] = {**counted, **kinds["tasks"]}
        if (answers := self.answers) is not None:
            counted = {"count": len(answers.ended), "max_new_tokens": answers.limit}
            found["answers"] = {**counted, **kinds["answers"]}
        return found


@dataclass(frozen=True)
class OpenedModel:
    """A model that is to be measured, opened as far as can be told what is at fault.

    Attributes:
        name: name that was given.
        model: the model.
        tokenizer: its tokenizer.
        load: function that gives its parameters.
        notes: sentences that its user should know: warnings of a merge's plan, or of an adapter.
    """

    name: str
    model: Model
    tokenizer: Tokenizer
    load: Callable[[], Params]
    notes: tuple[str, ...] = ()


def evaluate_model(
    model: str | Path | Checkpoint | Recipe | Model,
    params: Params | None = None,
    tokenizer: Tokenizer | None = None,
    *,
    text: Texts | None = None,
    tasks: Tasks | None = None,
    prompts: Prompts | None = None,
    adapter: str | Path | None = None,
    dtype: Any = None,
    streamed: Streaming | None = None,
    field: str | None = None,
    most: int | None = None,
    **settings: Any,
) -> Evaluation:
    """Measures a model on held-out text, on multiple choice, and by what it answers.

        evaluate_model("path/to/model", text=Path("held-out.txt")).to_dict()["bits_per_byte"]
        evaluate_model("ties.yaml", text=Path("held-out.txt"), tasks="tasks.jsonl")   # merged as it is loaded
        evaluate_model(model, params, tokenizer, text="A text, or a list of them.")

    Args:
        model: what `mergelab.load_model` takes: a folder, a GGUF file, a hub id, an adapter, a recipe; or a
            loaded model, with `params` and `tokenizer`.
        params: parameters of a loaded or streamed model.
        tokenizer: tokenizer of a loaded model.
        text: texts the model was not trained on: strings, and `Path`s of files.
        tasks: multiple choice: a file as `read_tasks` reads it, or tasks or their records.
        prompts: questions, or the `Path` of a file of them (one a line, or `.jsonl`), which are answered in
            the model's chat format where it has one.
        adapter: LoRA adapter that is added to the model.
        dtype: dtype of the computation; the stored one if None.
        streamed: how activations wait, where the weights stay in their files (`mergelab.models.Streaming`);
            None to load them.
        field: field of a text's records that is read.
        most: bytes of text after which no document is begun.
        settings: further fields of `Material`: `context`, `batch`, `max_new_tokens`, `chat`, `think_end`.

    Raises:
        EvaluationError: text, tasks or prompts are missing, empty or faulty, or the model predicts nothing;
            with all that is wrong with the model, every reason at once.
        MergelabError: a weight or a token that is met while it is computed.
    """
    given, faults = gather(text, tasks, prompts, field=field, most=most, **settings)
    if isinstance(model, Model):
        if params is None or tokenizer is None:
            faults.append("the model was given without params or tokenizer; give all three, or its folder")
            raise EvaluationError(faults)
        subjects = [OpenedModel(model.family.model_type, model, tokenizer, lambda: params)]
        _check_subject(subjects[0], given, faults)
    else:
        named = [(model_name(model, adapter), model, adapter)]
        subjects = subjects_of(named, given, faults, dtype=dtype, streamed=streamed)
    if faults:
        raise EvaluationError(faults)
    return measure(subjects[0], given)


def gather(
    text: Texts | None,
    tasks: Tasks | None,
    prompts: Prompts | None,
    *,
    field: str | None = None,
    most: int | None = None,
    **settings: Any,
) -> tuple[Material, list[str]]:
    """What models are measured on, and a sentence for all that is wrong with it."""
    faults: list[str] = []
    found: dict[str, Any] = {}
    if text is None and tasks is None and prompts is None:
        faults.append("there is nothing to evaluate on; give a text, tasks or prompts")
    if text is not None:
        places = [text] if isinstance(text, str | Path) else list(text)
        for place in (one for one in places if isinstance(one, Path)):
            _try(faults, lambda place=place: corpus_files(place))
        if not faults:
            _try(faults, lambda: found.update(text=read_held_out(text, field=field, most=most)))
    if tasks is not None:
        _try(faults, lambda: found.update(tasks=_tasks(tasks)))
    if prompts is not None:
        _try(faults, lambda: found.update(prompts=_prompts(prompts)))
    return Material(**found, **settings), faults


def _tasks(tasks: Tasks) -> tuple[ChoiceTask, ...]:
    return tuple(read_tasks(tasks) if isinstance(tasks, str | Path) else check_tasks(tasks))


def _prompts(prompts: Prompts) -> tuple[str, ...]:
    found = tuple(read_prompts(prompts)) if isinstance(prompts, Path) else tuple(prompts)
    if not found:
        raise EvaluationError("no prompts were given; give at least one")
    return found


def subjects_of(
    named: Sequence[tuple[str, Any, str | Path | None]],
    material: Material,
    faults: list[str],
    *,
    dtype: Any = None,
    streamed: Streaming | None = None,
) -> list[OpenedModel]:
    """Models opened, without a weight read; what is wrong with them is added to `faults`.

    Args:
        named: name, place and adapter of each.
        material: what they are to be measured on.
        faults: sentences so far.
        dtype: dtype of the computation.
        streamed: how activations wait, where the weights stay in their files; None to load them.
    """
    found: list[OpenedModel] = []
    if streamed is not None and material.prompts is not None:
        faults.append(
            "prompts are answered by loaded models alone: each token would read the weights of a streamed "
            "one; evaluate it on text and tasks"
        )
    for name, place, adapter in named:

        def opened(name: str = name, place: Any = place, adapter: Any = adapter) -> None:
            checkpoint = open_model(place, adapter)
            model, _ = parameter_shapes(checkpoint, dtype=dtype)
            tokenizer = load_tokenizer(checkpoint.path)
            plan = getattr(checkpoint, "plan", None)
            notes = getattr(checkpoint if plan is None else plan, "warnings", ())

            def load() -> Params:
                if streamed is None:
                    return load_model(checkpoint, dtype=dtype)[1]
                return stream_model(checkpoint, dtype=dtype, **streamed._asdict())[1]

            subject = OpenedModel(name, model, tokenizer, load, notes)
            _check_subject(subject, material, faults)
            found.append(subject)

        _try(faults, opened)
    return found


def _check_subject(subject: OpenedModel, material: Material, faults: list[str]) -> None:
    """Adds what keeps a model from being measured."""
    model, name = subject.model, subject.name
    if not model.predicts:
        faults.append(
            f"{name} is a {model.family.model_type!r} model, which predicts no next token; evaluate a decoder"
        )
        return
    if material.text is not None:
        ids = subject.tokenizer.encode(material.text.texts[0][:_LOOKED_AT])
        place = str(subject.tokenizer.folder / "tokenizer.json")
        _try(
            faults, lambda: check_ids(np.array(ids), model.config.vocab_size, "the model's vocabulary", place)
        )
    _try(faults, lambda: _context(model, material, name))
    if material.prompts is not None:

        def prompts() -> None:
            ids = prompt_ids(subject.tokenizer, material.prompts or (), chat=material.chat)
            needed, room = max(map(len, ids)) + material.max_new_tokens, model.config.max_length
            if needed > room:
                raise EvaluationError(
                    f"{name}: the longest prompt and its answer are {needed:,} tokens, more than the "
                    f"{room:,} positions; ask for fewer new tokens"
                )

        _try(faults, prompts)


def _context(model: Model, material: Material, name: str) -> int:
    found = window_length(model, material.context, CONTEXT, place=f"{name}, context")
    if found < 2:
        raise EvaluationError(f"contexts of {found} tokens predict nothing; give at least 2")
    return found


def measure(subject: OpenedModel, material: Material) -> Evaluation:
    """A model's scores; its parameters are loaded for it, and forgotten.

    Raises:
        MergelabError: a weight or a token that is met while it is computed.
    """
    model, tokenizer, params = subject.model, subject.tokenizer, subject.load()
    text = tasks = answers = None
    if material.text is not None:
        context = _context(model, material, subject.name)
        text = score_text(model, params, tokenizer, material.text, context=context, batch=material.batch)
        if not np.isfinite(text.nats).all():
            raise EvaluationError(
                f"{subject.name}: the loss is not finite; the weights overflow, try another dtype"
            )
    if material.tasks is not None:
        tasks = score_tasks(model, params, tokenizer, material.tasks, batch=material.batch)
    if material.prompts is not None:
        answers = score_answers(
            model,
            params,
            tokenizer,
            material.prompts,
            max_new_tokens=material.max_new_tokens,
            batch=material.batch,
            chat=material.chat,
            think_end=material.think_end,
        )
    by = "document" if material.text is None else material.text.by
    return Evaluation(subject.name, text, tasks, answers, by)


def _try(faults: list[str], act: Callable[[], object]) -> None:
    try:
        act()
    except MergelabError as error:
        faults += error.faults


def model_name(place: Any, adapter: str | Path | None = None) -> str:
    """How a model is called in results."""
    if isinstance(place, str | Path):
        name = location_text(place)
    elif isinstance(place, Checkpoint):
        name = str(place.path)
    else:
        name = getattr(place, "name", None) or str(getattr(place, "origin", None) and place.origin.source)
        name = "recipe" if name == "None" else name
    return name if adapter is None else f"{name}+{location_text(adapter)}"
