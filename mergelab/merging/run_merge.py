"""The one call: a recipe in, a complete model folder out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergelab.checkpoints.output_target import MARKER, recorded_identity
from mergelab.checkpoints.publish import WorkFolder, publish_file
from mergelab.checkpoints.writer import check_digests
from mergelab.merging.engine.output_folder import SHA256SUMS, sha256_sums, write_model
from mergelab.merging.plan.planner import Plan, make_plan
from mergelab.merging.provenance import model_card, provenance
from mergelab.merging.recipe.recipe_file import load_recipe
from mergelab.merging.recipe.schema import Recipe

__all__ = ["Merged", "merge"]


@dataclass(frozen=True)
class Merged:
    """What a merge has written.

    Attributes:
        out: the model folder.
        plan: the plan of its last (or only) recipe.
        seconds_streaming: time spent reading, computing and writing tensors, all recipes together.
        sha256: digests of the weight files by name, if asked for.
    """

    out: Path
    plan: Plan
    seconds_streaming: float
    sha256: Mapping[str, str] = field(default_factory=dict)


def merge(
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    seed: int = 0,
    dtype: str | None = None,
    shard_bytes: int = 5 * 10**9,
    memory: int = 10**9,
    threads: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    truncate_embeddings: bool = False,
    allow_mixed_architectures: bool = False,
    sha256: bool = False,
    base_dir: str | Path | None = None,
    progress: Callable[[int], None] = lambda count: None,
    plan: Plan | None = None,
) -> Merged:
    """Merges checkpoints as a recipe says and writes a complete Hugging Face folder.

    Everything that can be known from headers and configs, of all recipes of a graph, is checked before any
    weight is read. Recipes that the last one builds on are run to a folder beside `out`, removed at the end.

    Args:
        recipe: a recipe, or the path of one.
        out: the folder to write; it appears only when complete.
        seed: seeds the random draws; the same seed gives the same bytes.
        dtype: overrides the recipe's stored dtype.
        shard_bytes: the size at which a new weight file is begun.
        memory: bytes of tensors held at once.
        threads: how many threads read, compute and write; by default one per core. The bytes do not depend
            on it.
        resume: go on with an interrupted run of the same plan.
        overwrite: replace a non-empty `out` that mergelab wrote.
        allow_nonfinite: accept NaN and infinity in the inputs.
        truncate_embeddings: cut embeddings of different length to the shortest.
        allow_mixed_architectures: merge models of different `model_type`, and make tensors that some models
            lack from the others alone.
        sha256: also write `SHA256SUMS` of the weight files.
        base_dir: where relative model paths are looked up after the working directory; by default the
            recipe file's folder.
        progress: called with the number of bytes just written, from several threads.
        plan: the recipe's plan, if it was already made with the same options.

    Raises:
        RecipeError: the recipe cannot be run; every reason at once.
        CheckpointError: an input cannot be read (`NonFiniteError`: holds NaN or infinity).
        OutputError: `out` is not empty, could cost an input, is being written by another run, or the disk is
            full.

    Example:
        >>> merge("ties.yaml", "merged", seed=1)                                    # doctest: +SKIP
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    planning: dict[str, Any] = {
        "base_dir": None if base_dir is None else Path(base_dir),
        "seed": seed,
        "shard_bytes": shard_bytes,
        "truncate_embeddings": truncate_embeddings,
        "allow_mixed_architectures": allow_mixed_architectures,
    }
    running: dict[str, Any] = {
        "memory": memory,
        "threads": threads,
        "allow_nonfinite": allow_nonfinite,
        "progress": progress,
        "resume": resume,
    }
    plan = plan or make_plan(recipe, dtype=dtype, **planning)
    with WorkFolder(out, inputs=plan.inputs, overwrite=overwrite) as work:
        seconds = 0.0
        if _is_done(plan, work.out, resume) or work.finished(plan.identity):
            work.abandon()
        else:
            work.prepare()
            seconds = _write_all(recipe, plan, work, planning, running, dtype=dtype, sha256=sha256)
        digests, sums = sha256_sums(work.out) if sha256 else ({}, b"")
        if sha256 and not (work.out / SHA256SUMS).is_file():
            publish_file(work.out / SHA256SUMS, sums)
    return Merged(Path(out), plan, seconds, digests)


def _is_done(plan: Plan, out: Path, resume: bool) -> bool:
    """Whether `out` is the result of this plan, to the bit."""
    if not resume or recorded_identity(out) != plan.identity:
        return False
    check_digests(out)
    return True


def _write_all(
    recipe: Recipe,
    plan: Plan,
    work: WorkFolder,
    planning: Mapping[str, Any],
    running: Mapping[str, Any],
    *,
    dtype: str | None,
    sha256: bool,
) -> float:
    """Runs the recipes of a graph in turn, each on the results of those before; returns seconds streaming."""
    folders: dict[str, Path] = {}
    stages: list[Plan] = []
    seconds = 0.0
    if not running["resume"]:
        work.clear_stages()
    for number, stage in enumerate(recipe.merges):
        staged = make_plan(stage, stages=folders, **planning)
        folder = work.stages / str(number)
        if not _is_done(staged, folder, running["resume"]):
            with WorkFolder(folder, overwrite=True) as inner:
                if not inner.finished(staged.identity):
                    seconds += _write(staged, inner, (), **running)
        folders[str(stage.name)] = folder
        stages.append(staged)
    if folders:
        plan = make_plan(recipe, dtype=dtype, stages=folders, **planning)
    return seconds + _write(plan, work, stages, sha256=sha256, **running)


def _write(
    plan: Plan,
    work: WorkFolder,
    stages: Sequence[Plan],
    *,
    memory: int,
    threads: int | None,
    resume: bool,
    allow_nonfinite: bool,
    progress: Callable[[int], None],
    sha256: bool = False,
) -> float:
    """Runs one plan into a folder; returns the seconds spent streaming."""

    def files(digests: Mapping[str, str]) -> dict[str, bytes]:
        card = model_card(plan, work.out.name, digests, stages=stages)
        return {**plan.files, MARKER: provenance(plan, digests), "README.md": card.encode()}

    written = write_model(
        work,
        plan.jobs,
        plan.config,
        plan.identities,
        files,
        seed=plan.seed,
        shard_bytes=plan.shard_bytes,
        memory=memory,
        threads=threads,
        resume=resume,
        allow_nonfinite=allow_nonfinite,
        sha256=sha256,
        progress=progress,
    )
    return written.report.seconds
