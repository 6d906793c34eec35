"""The one call: a recipe in, a complete model folder out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergelab.checkpoints import CheckpointWriter, TensorSpec, plan_shards
from mergelab.merging.model_card import model_card
from mergelab.merging.plan import Plan, make_plan
from mergelab.merging.provenance import PROVENANCE, provenance, recorded_identity, write_sha256
from mergelab.merging.recipe import Recipe
from mergelab.merging.streaming import stream_jobs

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
        overwrite: replace a non-empty `out`.
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
        OutputError: `out` is not empty, or the disk is full.

    Example:
        >>> merge("ties.yaml", "merged", seed=1)                                    # doctest: +SKIP
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    out = Path(out)
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
    }
    plan = plan or make_plan(recipe, dtype=dtype, **planning)
    workshop = out.parent / f".{out.name}.stages"
    folders: dict[str, Path] = {}
    stages: list[Plan] = []
    seconds = 0.0
    finished = resume and recorded_identity(out) == plan.identity
    for number, stage in enumerate(() if finished else recipe.merges):
        staged = make_plan(stage, stages=folders, **planning)
        folder = workshop / str(number)
        seconds += _write(staged, folder, (), resume=resume, overwrite=True, **running)
        folders[str(stage.name)] = folder
        stages.append(staged)
    if folders:
        plan = make_plan(recipe, dtype=dtype, stages=folders, **planning)
    seconds += _write(plan, out, stages, resume=resume, overwrite=overwrite, **running)
    shutil.rmtree(workshop, ignore_errors=True)
    return Merged(out, plan, seconds, write_sha256(out) if sha256 else {})


def _write(
    plan: Plan,
    out: Path,
    stages: Sequence[Plan],
    *,
    memory: int,
    threads: int | None,
    resume: bool,
    overwrite: bool,
    allow_nonfinite: bool,
    progress: Callable[[int], None],
) -> float:
    """Runs one plan into a folder; returns the seconds spent streaming."""
    if resume and recorded_identity(out) == plan.identity:
        return 0.0
    specs = [TensorSpec(job.name, job.dtype, job.shape) for job in plan.jobs]
    layout = plan_shards(specs, plan.shard_bytes)
    with CheckpointWriter(out, layout, plan.identities, resume=resume, overwrite=overwrite) as writer:
        report = stream_jobs(
            plan.jobs,
            writer,
            seed=plan.seed,
            memory=memory,
            threads=threads,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
        )
        digests = writer.digests()
        for name, content in plan.files.items():
            writer.add_file(name, content)
        if plan.config:
            writer.add_file("config.json", (json.dumps(plan.config, indent=2) + "\n").encode())
        writer.add_file(PROVENANCE, provenance(plan, digests))
        writer.add_file("README.md", model_card(plan, out.name, digests, stages=stages).encode())
        writer.commit()
    return report.seconds
