"""Tasks solved by a method with more compute at test time: every trace logged, and what they came to."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import xxhash

from mergelab.checkpoints.output_target import OutputLock, check_target
from mergelab.checkpoints.publish import publish_file
from mergelab.checkpoints.source import Checkpoint
from mergelab.decoding.budget_forcing import Thinking
from mergelab.decoding.cost import Prices
from mergelab.decoding.samplers import Sampler, sample
from mergelab.errors import DecodingError, EvaluationError
from mergelab.merging.any_model import load_tokenizer, open_model
from mergelab.models.load import load_model
from mergelab.models.model import Model, Params
from mergelab.models.sites import Edit
from mergelab.processes.agreement import span_processes
from mergelab.reasoning.answers import Extract, check_extractor, extract_answer, reference_answer
from mergelab.reasoning.flops import PassCosts, pass_costs
from mergelab.reasoning.methods import MethodOptions, attempt, decide, with_judge
from mergelab.reasoning.outcomes import results_of
from mergelab.reasoning.readings import How, Reading
from mergelab.reasoning.solved_files import solved_files, solved_table
from mergelab.reasoning.tasks import Task, check_tasks
from mergelab.reasoning.trace_log import TraceLog
from mergelab.reasoning.verifier_names import FitOn, check_verifiers, named_readings
from mergelab.reasoning.writer import Trace, Writer
from mergelab.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from mergelab.merging.recipe.schema import Recipe

__all__ = ["Solved", "solve"]

Tasks = Sequence[Task | Mapping[str, Any]] | str | Path


@dataclass(frozen=True)
class Solved:
    """What solving tasks came to.

    Attributes:
        results: the figures, as plain data; what `results.json` holds.
        traces: traces of each task, as they are logged.
    """

    results: Mapping[str, Any]
    traces: tuple[tuple[Mapping[str, Any], ...], ...] = field(repr=False)

    @property
    def accuracy(self) -> float:
        """Fraction of the tasks whose answer is right."""
        return float(self.results["accuracy"]["value"])

    def table(self) -> str:
        """The figures as lines for a reader."""
        return solved_table(self.results)


def solve(
    model: str | Path | Checkpoint | Recipe | Model,
    params: Params | None = None,
    tokenizer: Tokenizer | None = None,
    *,
    tasks: Tasks,
    out: str | Path | None = None,
    method: str = "vote",
    samples: int = 8,
    budget: int = 256,
    answer: str | Extract = "auto",
    verifiers: Sequence[str | Reading] = (),
    verify: Callable[[Trace], float] | None = None,
    fit_on: Tasks | None = None,
    fit_samples: int = 4,
    worth: How = "last",
    thinking: Thinking | None = None,
    sampler: Sampler | None = None,
    stops: str | Sequence[str] = (),
    step: str = "\n",
    branch: int = 4,
    keep: float = 0.9,
    batch: int = 64,
    chat: bool | None = None,
    system: str | None = None,
    edit: Mapping[str, Edit] | None = None,
    adapter: str | Path | None = None,
    prices: Prices | None = None,
    seed: int = 0,
    dtype: Any = None,
    mesh: Mesh | None = None,
    overwrite: bool = False,
    settings: Mapping[str, Any] | None = None,
    note: Callable[[str], object] = lambda sentence: None,
    progress: Callable[[str, int, int], object] = lambda what, done, total: None,
) -> Solved:
    """Solves tasks by sampling, voting, searching or thinking for a given time, and says what it cost.

        solve("path/to/model", tasks="tasks.jsonl", out="solved", method="vote", samples=16)
        solve(model, params, tokenizer, tasks=[{"prompt": "2 + 2 =", "answer": 4}], method="best-of-n")

    With `out`, every task is logged as soon as it is done, and the same call goes on with what is there:
    it ends in the same results as one that was not interrupted.

    Args:
        model: what `mergelab.load_model` takes: a folder, a GGUF file, a hub id, an adapter, a recipe; or a
            loaded model, with `params` and `tokenizer`.
        params: parameters of a loaded model.
        tokenizer: tokenizer of a loaded model.
        tasks: a file as `read_tasks` reads it, or tasks or their records.
        out: folder for `traces.jsonl`, `results.json`, `table.txt`, `accuracy.svg` and `traces.html`.
        method: how a task is attempted; see `MethodOptions`.
        samples: number of traces of each task.
        budget: most new tokens of one trace.
        answer: how an answer is found in a text; see `extract_answer`.
        verifiers: what is read inside while traces are written (`VERIFIERS`, or readings): the first one
            judges where the method needs a judge, the others are compared with it on the same traces.
        verify: worth of a trace, at least 0, in place of the first reading.
        fit_on: tasks, none of those to be solved, on whose traces probes are fitted.
        fit_samples: number of traces of each of them.
        worth: what a fitted verifier makes of a trace: what it reads last, or of its steps the least or the
            product.
        thinking: how long traces of `force` think; half of the budget and `</think>` by default.
        sampler: choice of tokens; draws from the model's own distribution by default.
        stops: strings that end a trace.
        step: text that ends a step of a search.
        branch: number of ways in which a search extends each state.
        keep: fraction of the first traces of `deepconf` that its bound lets pass.
        batch: most traces in one pass.
        chat: whether prompts are put as the model's chat template has them; as it has one if None.
        system: instruction before each prompt of a chat.
        edit: edits by site, as in `Model.apply`.
        adapter: LoRA adapter that is added to the model.
        prices: dollars per million tokens.
        seed: seed of every draw.
        dtype: dtype of the computation; the stored one if None.
        mesh: devices that a model which is read here is spread over, as in `mergelab.load_model`; one of this
            process. A loaded model stays where it lies.
        overwrite: whether the results of other settings in `out` are replaced.
        settings: more that decides the results, as plain data, where `answer`, `verify`, `sampler` or `edit`
            are functions that a later run cannot compare.
        note: function called with each sentence that the user should know.
        progress: function that is told what is done, and how many of how many.

    Raises:
        EvaluationError: tasks, an extractor or a verifier are faulty, every reason at once.
        DecodingError: a method or a number is; or a prompt and the budget exceed the model's context.
        OutputError: the folder holds something else, or the results of other settings.
        CheckpointError: the model cannot be read.
    """
    given, fitted = check_tasks(tasks), None if fit_on is None else check_tasks(fit_on)
    check_extractor(answer)
    check_verifiers(verifiers, fits=fitted is not None)
    if mesh is not None and span_processes(mesh.devices.flat):
        raise EvaluationError(
            "tasks are solved by one process, and the mesh spans several; give each process tasks of its own"
        )
    if budget < 1:
        raise DecodingError(f"the budget is {budget} tokens; give 1 or more")
    if method == "force" and thinking is None:
        thinking = Thinking("</think>", budget // 2, None, " Wait")
    options = MethodOptions(method, samples, verify, branch, thinking, keep, batch)
    strings = (stops,) if isinstance(stops, str) else tuple(stops)
    place = model if isinstance(model, str | Path) else None
    inputs = [
        one for one in (place, tasks, fit_on, adapter) if isinstance(one, str | Path) and os.path.exists(one)
    ]
    folder = None if out is None else Path(os.path.abspath(out))
    if folder is not None:
        check_target(folder, inputs)
    with contextlib.nullcontext() if folder is None else OutputLock(folder):
        loaded = _loaded(model, params, tokenizer, adapter, dtype, mesh)
        writer = Writer(
            *loaded, budget, sampler or sample(), (), strings, step, dict(edit or {}), chat, system
        )
        prompts = _prompts(writer, given)
        recorded = {
            "model": _digest(loaded[1]),
            "tasks": _sha256([[one.prompt, one.answer, one.choices] for one in given]),
            "method": method,
            "samples": samples,
            "budget": budget,
            "answer": answer if isinstance(answer, str) else "a function",
            "verifiers": [one if isinstance(one, str) else one.name for one in verifiers],
            "fit": None
            if fitted is None
            else [_sha256([[one.prompt, one.answer] for one in fitted]), fit_samples, worth],
            "thinking": None
            if thinking is None
            else [thinking.end, thinking.least, thinking.most, thinking.more],
            "sampler": _sampler_digest(writer.sampler),
            "prompts": _sha256(prompts),
            "edits": _digest(dict(writer.edit)) if writer.edit else None,
            "stops": list(strings),
            "step": step,
            "search": [branch, keep],
            "batch": batch,
            "seed": seed,
            "prices": None if prices is None else [prices.prompt, prices.completion],
            **(settings or {}),
        }
        log = TraceLog(folder, recorded, overwrite=overwrite)
        fit = None if fitted is None else FitOn(fitted, fit_samples, answer, seed, worth)
        missing = [number for number in range(len(given)) if number not in log.tasks]
        if missing:
            path = Path(place) if place is not None else None
            writer = replace(
                writer,
                readings=named_readings(
                    verifiers,
                    writer,
                    model_path=path,
                    fit=fit,
                    keep=folder,
                    begin=log.begin,
                    progress=lambda done, total: progress("fitting verifiers", done, total),
                ),
            )
            writer = with_judge(writer, options)
        costs: dict[int, PassCosts] = {}
        for number in missing:
            progress("solving tasks", number, len(given))
            _solve_one(writer, given[number], number, prompts[number], options, answer, seed, costs, log)
        progress("solving tasks", len(given), len(given))
        results = results_of(log.tasks, method, prices)
        if results["answered"] == 0:
            note(
                "no trace gave an answer that was found, so the accuracy is 0; see traces.jsonl, and say how "
                "answers are written (--answer)"
            )
        results = {"method": method, "samples": samples, "budget": budget, **results}
        ordered = tuple(tuple(log.tasks[number][0]) for number in range(len(given)))
        if folder is not None:
            for name, content in solved_files(results, given, log.tasks).items():
                publish_file(folder / name, content)
    return Solved(results, ordered)


def _loaded(
    model: Any,
    params: Params | None,
    tokenizer: Tokenizer | None,
    adapter: Any,
    dtype: Any,
    mesh: Mesh | None,
) -> tuple[Model, Params, Tokenizer]:
    if isinstance(model, Model):
        if params is None or tokenizer is None:
            raise EvaluationError(
                "the model was given without params or tokenizer; give all three, or its folder"
            )
        return model, params, tokenizer
    tokenizer = load_tokenizer(model)
    return *load_model(open_model(model, adapter), dtype=dtype, mesh=mesh), tokenizer


def _prompts(writer: Writer, tasks: Sequence[Task]) -> list[list[int]]:
    """Token ids of every prompt; what is wrong with any is said at once."""
    found, faults = [], []
    for number, task in enumerate(tasks, 1):
        try:
            found.append(writer.prompt_ids(task.question))
        except DecodingError as error:
            faults += [f"task {number}: {fault}" for fault in error.faults]
    if faults:
        raise DecodingError(faults)
    return found


def _solve_one(
    writer: Writer,
    task: Task,
    number: int,
    prompt: Sequence[int],
    options: MethodOptions,
    answer: str | Extract,
    seed: int,
    costs: dict[int, PassCosts],
    log: TraceLog,
) -> None:
    from mergelab.activations.batches import bucket_size

    key = jax.random.fold_in(jax.random.key(seed), number)
    done = attempt(writer, prompt, options, key)
    size = bucket_size(len(prompt))
    if size not in costs:
        rows = min(options.samples, options.batch)
        costs[size] = pass_costs(writer.model, writer.params, len(prompt), writer.budget, rows=rows)
    reference = reference_answer(task, answer)
    answers = [extract_answer(trace.text, task, answer) for trace in done.traces]
    chosen = decide(options.method, answers, done.worths)
    traces = [
        {
            "trace": place,
            "answer": _plain(found),
            "correct": found is not None and found == reference,
            "worth": worth,
            "scores": dict(trace.scores),
            "log_probability": float(trace.log_probs.astype(np.float64).sum()),
            "tokens": len(trace.token_ids),
            "stop": trace.stop,
            "text": trace.text,
            "token_ids": list(trace.token_ids),
        }
        for place, (trace, found, worth) in enumerate(zip(done.traces, answers, done.worths, strict=True))
    ]
    outcome = {
        "answer": _plain(chosen),
        "reference": _plain(reference),
        "correct": chosen is not None and chosen == reference,
        "prompt_tokens": len(prompt),
        "generated": done.generated,
        "flops": {"prompt": costs[size].prompt, "token": costs[size].token},
    }
    log.add(number, traces, outcome)


def _plain(answer: Any) -> Any:
    """An answer as JSON holds it."""
    return answer if answer is None or isinstance(answer, str | int | float | bool) else repr(answer)


def _sha256(data: Any) -> str:
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


def _digest(tree: Any) -> str:
    """Digest of the names and values of a pytree."""
    total = xxhash.xxh3_128()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, jax.Array | np.ndarray | np.generic | float | int):
            array = np.asarray(leaf)
            total.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
            total.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        else:
            total.update(f"{jax.tree_util.keystr(path)} {type(leaf).__name__}".encode())
    return total.hexdigest()


def _sampler_digest(sampler: Sampler) -> str:
    names = [type(one).__name__ for one in getattr(sampler.transforms, "transforms", ())]
    return _sha256([names, sampler.random, _digest(sampler)])
