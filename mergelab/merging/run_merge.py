"""The one call: a recipe in, a complete model folder out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from mergelab.checkpoints.output_target import MARKER, recorded_identity
from mergelab.checkpoints.publish import WorkFolder, publish_file
from mergelab.checkpoints.remote_output import writes_anywhere
from mergelab.checkpoints.writer import check_digests
from mergelab.errors import RecipeError
from mergelab.merging.engine.output_folder import SHA256SUMS, sha256_sums, write_model
from mergelab.merging.plan.planner import Plan, plan_merge
from mergelab.merging.provenance import model_card, provenance
from mergelab.merging.recipe.schema import Recipe

__all__ = ["MergeOptions", "Merged", "merge", "settled_plan"]

_logger = logging.getLogger(__name__)


def _silent(count: int) -> None:
    """Tells nobody."""


@dataclass(frozen=True)
class MergeOptions:
    """How a merge is planned and run. All have defaults; a plan that is given has settled the first six.

    Attributes:
        seed: Seed of every random draw; the same seed gives the same bytes.
        dtype: Stored dtype, in place of the recipe's.
        shard_bytes: Size at which a new weight file is begun.
        truncate_embeddings: Whether embeddings of different length are cut to the shortest.
        allow_mixed_architectures: Whether models of different `model_type` are merged, and tensors that some
            models lack are made from the others alone.
        base_dir: Folder where relative model paths are looked up after the working directory; the recipe
            file's own if None.
        memory: Bytes of tensors held at once.
        threads: Number of threads that read, compute and write; one per core if None. The bytes do not
            depend on it.
        resume: Whether to go on with an interrupted run of the same plan.
        overwrite: Whether a non-empty output that mergelab wrote may be replaced.
        allow_nonfinite: Whether NaN and infinity are accepted in the inputs.
        sha256: Whether `SHA256SUMS` of the weight files is written too.
        progress: Function called with the number of bytes just written; never twice at a time.
    """

    seed: int = 0
    dtype: str | None = None
    shard_bytes: int = 5 * 10**9
    truncate_embeddings: bool = False
    allow_mixed_architectures: bool = False
    base_dir: str | Path | None = None
    memory: int = 10**9
    threads: int | None = None
    resume: bool = False
    overwrite: bool = False
    allow_nonfinite: bool = False
    sha256: bool = False
    progress: Callable[[int], None] = _silent

    def planning(self) -> dict[str, Any]:
        """The keyword arguments of `plan_merge`."""
        return {name: getattr(self, name) for name in _PLANNING}

    def running(self) -> dict[str, Any]:
        """The keyword arguments that `write_model` takes of them, for any plan."""
        names = ("memory", "threads", "resume", "allow_nonfinite", "progress")
        return {name: getattr(self, name) for name in names}


_PLANNING = ("seed", "dtype", "shard_bytes", "truncate_embeddings", "allow_mixed_architectures", "base_dir")
_DEFAULTS = {field.name: field.default for field in fields(MergeOptions)}


@dataclass(frozen=True)
class Merged:
    """What a merge has written.

    Attributes:
        out: Model folder.
        plan: Plan of its last (or only) recipe.
        seconds_streaming: Time spent reading, computing and writing tensors, all recipes together.
        sha256: Digests of the weight files by name, if they were asked for.
    """

    out: Path
    plan: Plan
    seconds_streaming: float
    sha256: Mapping[str, str] = field(default_factory=dict)


@writes_anywhere()
def merge(
    recipe: Recipe | Plan | str | Path,
    out: str | Path,
    options: MergeOptions | None = None,
    **changes: Any,
) -> Merged:
    """Merges checkpoints as a recipe says and writes a complete Hugging Face folder.

    Everything that can be known from headers and configs, of all recipes of a graph, is checked before any
    weight is read. Recipes that the last one builds on are run to a folder beside `out`, removed at the end.

    Args:
        recipe: Recipe, path of one, or plan of one (`plan_merge`).
        out: Folder to write; it appears only when complete.
        options: How the merge is planned and run; the defaults if None.
        changes: Fields of `MergeOptions` by keyword, in place of those of `options`.

    Raises:
        RecipeError: the recipe cannot be run (every reason at once), or an option of planning was given
            beside a finished plan.
        CheckpointError: an input cannot be read (`NonFiniteError`: holds NaN or infinity).
        OutputError: `out` is not empty, could cost an input, is being written by another run, or the disk is
            full.

    Example:
        >>> merge("ties.yaml", "merged", seed=1)                                    # doctest: +SKIP
        >>> merge(plan_merge("ties.yaml", seed=1), "merged", resume=True)           # doctest: +SKIP
    """
    options = replace(options or MergeOptions(), **changes)
    plan = settled_plan(recipe, options)
    with WorkFolder(out, inputs=plan.inputs, overwrite=options.overwrite) as work:
        seconds, digests = 0.0, {}
        if _is_done(plan, work.out, options.resume) or work.finished(plan.identity):
            work.abandon()
            if options.sha256:
                digests, sums = sha256_sums(work.out)
                if not (work.out / SHA256SUMS).is_file():
                    publish_file(work.out / SHA256SUMS, sums)
        else:
            work.prepare()
            seconds, digests = _write_all(plan, work, options)
    return Merged(Path(out), plan, seconds, digests)


def settled_plan(recipe: Recipe | Plan | str | Path, options: MergeOptions) -> Plan:
    """The plan of a recipe as the options say; or the plan that is given.

    Raises:
        RecipeError: the recipe cannot be run, or an option of planning was given beside a finished plan.
        CheckpointError: an input cannot be read.
    """
    if not isinstance(recipe, Plan):
        return plan_merge(recipe, **options.planning())
    if late := [name for name, value in options.planning().items() if value != _DEFAULTS[name]]:
        raise RecipeError(
            f"the plan was made before {' and '.join(late)} could be heeded: give "
            f"{'it' if len(late) == 1 else 'them'} to plan_merge in place of merge"
        )
    return recipe


def _is_done(plan: Plan, out: Path, resume: bool) -> bool:
    """Whether `out` is the result of this plan, to the bit."""
    if not resume or recorded_identity(out) != plan.identity:
        return False
    check_digests(out)
    return True


def _write_all(plan: Plan, work: WorkFolder, options: MergeOptions) -> tuple[float, Mapping[str, str]]:
    """Runs a plan's stages in turn, each on the results of those before, then the plan itself.

    Returns:
        The seconds spent streaming, and digests of the weight files if they are asked for.
    """
    folders: dict[str, Path] = {}
    seconds = 0.0
    running = options.running()
    if not options.resume:
        work.clear_stages()
    for number, (name, stage) in enumerate(plan.stages.items()):
        folder = work.stages / str(number)
        if not _is_done(stage, folder, options.resume):
            with WorkFolder(folder, overwrite=True) as inner:
                if not inner.finished(stage.identity):
                    seconds += _write(stage.reading(folders), inner, (), **running)[0]
        folders[name] = folder
    last, digests = _write(
        plan.reading(folders), work, plan.stages.values(), sha256=options.sha256, **running
    )
    return seconds + last, digests


def _write(
    plan: Plan, work: WorkFolder, stages: Iterable[Plan], **running: Any
) -> tuple[float, Mapping[str, str]]:
    """Runs one plan, whose stages have run, into a folder."""

    def files(digests: Mapping[str, str]) -> dict[str, bytes]:
        card = model_card(plan, work.out.name, digests, stages=tuple(stages))
        return {**plan.files, MARKER: provenance(plan, digests), "README.md": card.encode()}

    _logger.info("%s: %d tensors of %d models to write", work.out, len(plan.jobs), len(plan.models))
    written = write_model(
        work,
        plan.jobs,
        plan.config,
        plan.identities,
        files,
        seed=plan.seed,
        shard_bytes=plan.shard_bytes,
        **running,
    )
    return written.report.seconds, written.sha256
