"""Recipe and checkpoints to a plan: jobs, files and sizes, before a weight is read."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mergelab.checkpoints import Checkpoint, LoraCheckpoint, dtype_from_name, open_checkpoint
from mergelab.checkpoints.companion_files import companion_warnings, donor_files, license_differences
from mergelab.checkpoints.source import TensorSource
from mergelab.checkpoints.writer import identity_digest
from mergelab.merging.engine.job import Job
from mergelab.merging.plan.compatibility import absent, incomplete, mixed
from mergelab.merging.plan.found_statistics import FoundStatistics, find_statistics
from mergelab.merging.plan.input_models import (
    FoundModel,
    PlannedCheckpoint,
    find_models,
    is_planned,
    with_results,
)
from mergelab.merging.plan.job_builder import JobBuilder
from mergelab.merging.plan.output_config import config_differences, output_config, tied_heads
from mergelab.merging.plan.output_tensors import OutputLayout, OutputPlace, lay_out
from mergelab.merging.plan.spellings import one_spelling
from mergelab.merging.plan.suspicions import odd_relations
from mergelab.merging.recipe.faults import raise_faults
from mergelab.merging.recipe.recipe_file import load_recipe, recipe_yaml
from mergelab.merging.recipe.schema import Recipe
from mergelab.merging.recipe.scopes import recipe_faults, recipe_warnings, scoped_parts
from mergelab.merging.structure.architecture import Structure, infer_architecture
from mergelab.merging.structure.layer_parts import MovedLayers
from mergelab.merging.structure.towers import align_towers, called, widest
from mergelab.merging.vocabulary import (
    VocabularyPlan,
    chat_template_files,
    plan_vocabulary,
    vocabulary_differences,
)
from mergelab.operators import OPERATORS
from mergelab.version import __version__

__all__ = ["Plan", "absences", "plan_merge", "shortened", "strangers"]


MAX_FAULTS = 20


def strangers(models: Mapping[str, Structure], donor: str) -> list[str]:
    """One sentence per model that has not one tensor, block or other, in common with the donor."""
    kinds = {name: _kinds(architecture) for name, architecture in models.items()}
    return [
        f"model {name!r} has no tensor name in common with {donor!r} (such as {min(found)!r} against "
        f"{min(kinds[donor])!r}): models of different architectures cannot be merged"
        for name, found in kinds.items()
        if found and kinds[donor] and not found & kinds[donor]
    ]


def _kinds(architecture: Structure) -> set[str]:
    """The names of a model's tensors without block numbers and their prefixes."""
    found: set[str] = set()
    for module in architecture.modules.values():
        found.update(module.pre, module.post)
        if module.stack is not None:
            found.update(suffix for suffixes in module.stack.suffixes for suffix in suffixes)
    return found


def absences(
    lacking: Mapping[tuple[str, ...], Sequence[OutputPlace]],
    skipped: Sequence[str],
    buffers: Sequence[str] = (),
) -> list[str]:
    """One sentence per group of models that lack the same tensors, and one for those not made at all."""
    found = []
    for models, places in lacking.items():
        names = [place.name for place in places if place.name not in skipped]
        if not names:
            continue
        first = repr(names[0])
        many = f"tensor {first} is" if len(names) == 1 else f"{len(names)} tensors ({first}, ...) are"
        found.append(
            f"{many} missing from {', '.join(map(repr, models))} and made from the other models alone"
        )
    if skipped:
        found.append(
            f"{len(skipped)} tensor(s) are left out because the base model lacks them: "
            + ", ".join([*skipped[:5], *(["..."] if len(skipped) > 5 else [])])
        )
    if buffers:
        found.append(
            f"{len(buffers)} buffer(s) that some models lack are left out, since they are made from "
            f"config.json: {', '.join([*buffers[:5], *(['...'] if len(buffers) > 5 else [])])}"
        )
    return found


def shortened(faults: Sequence[str], rejected: Mapping[str, Sequence[str]]) -> list[str]:
    """One sentence per reason an operator gave, then the first faults, and how many more there are."""
    groups = [
        f"tensor {names[0]!r}" + (f" and {len(names) - 1} more" if len(names) > 1 else "") + f": {reason}"
        for reason, names in rejected.items()
    ]
    unique = [*groups, *dict.fromkeys(faults)]
    rest = len(unique) - MAX_FAULTS
    return unique if rest <= 0 else [*unique[:MAX_FAULTS], f"and {rest} more tensors like these"]


RUNTIME_BYTES = 350 * 10**6
"""What the interpreter, jax and its compiled programs take before any tensor is read (measured)."""


@dataclass(frozen=True)
class Plan:
    """A merge that is ready to run; holds no weights.

    Attributes:
        recipe: Recipe it was made from.
        jobs: Jobs, one per output tensor, in the order they are stored.
        config: Content of the output's `config.json`; empty if the donor has none.
        files: Other files to write, by name.
        models: Input models, in recipe order.
        warnings: Sentences that the user should know, one each.
        seed: Seed of every random draw.
        shard_bytes: Size at which a new weight file is begun.
        identities: SHA-256 of each thing that determines the output's bytes (recipe, jobs, models, ...).
        stages: Plans of the recipes this one builds on, by name, in the order they run.
        inputs: Files and folders that are read, which no output may replace.
        summed_weights: Largest sum of the weights of models that are added up as they are, and the parameter
            that says so; 0 where none are.
    """

    recipe: Recipe
    jobs: tuple[Job, ...]
    config: Mapping[str, Any]
    files: Mapping[str, bytes]
    models: tuple[FoundModel, ...]
    warnings: tuple[str, ...]
    seed: int
    shard_bytes: int
    identities: Mapping[str, str]
    stages: Mapping[str, Plan] = field(default_factory=dict)
    inputs: tuple[Path, ...] = ()
    summed_weights: tuple[float, str] = (0.0, "")

    @property
    def identity(self) -> str:
        """SHA-256 over all that determines the output's bytes: only an equal plan may resume a run."""
        return identity_digest(self.identities)

    @property
    def bytes_in(self) -> int:
        """Bytes to be read, each source once."""
        return sum(job.bytes_in for job in self.jobs)

    @property
    def bytes_out(self) -> int:
        """Bytes of weights to be written."""
        return sum(job.bytes_out for job in self.jobs)

    @property
    def operations(self) -> dict[str, int]:
        """How many tensors are merged by which method, and how many are copied."""
        kinds = Counter("copy" if job.merge is None else self.recipe.merge_method for job in self.jobs)
        return dict(sorted(kinds.items()))

    def memory_estimate(self, budget: int) -> int:
        """Peak memory in bytes: the runtime, and what the largest job needs.

        A job in blocks keeps within the budget; one that needs its whole tensor at once, or a decomposition
        of it, takes what it takes.
        """
        whole = max((job.bytes_whole for job in self.jobs), default=0)
        largest = max((job.bytes_in + job.bytes_out + 8 * job.size for job in self.jobs), default=0)
        decomposed = max((job.bytes_decomposed for job in self.jobs), default=0)
        return RUNTIME_BYTES + max(min(budget, 2 * largest), whole) + decomposed

    def reading(self, folders: Mapping[str, Path]) -> Plan:
        """The same plan, reading the results of stages that have run; nothing is planned again.

        Args:
            folders: Result of each stage that has run, by the stage's name.

        Raises:
            CheckpointError: a result cannot be read.
        """
        return self.taking({name: open_checkpoint(folder).tensors for name, folder in folders.items()})

    def taking(self, results: Mapping[str, Mapping[str, TensorSource]]) -> Plan:
        """The same plan, taking the tensors of its stages from elsewhere; nothing is planned again.

        Args:
            results: Tensors by name, by the name of the stage that makes them.
        """
        jobs = [
            replace(
                job,
                sources=tuple(with_results(source, results) for source in job.sources),
                base=None if job.base is None else with_results(job.base, results),
            )
            for job in self.jobs
        ]
        return replace(self, jobs=tuple(jobs)) if results else self

    def summary(self, memory: int = 10**9, out: str | Path = ".") -> dict[str, Any]:
        """The plan as plain data: what `mergelab merge --dry-run --json` prints.

        Args:
            memory: Bytes of tensors that may be held at once, for the estimate of `peak_memory`.
            out: Folder to be written, for `disk_free`.
        """
        target = Path(out).absolute()
        existing = next(folder for folder in (target, *target.parents) if folder.is_dir())
        stages = {name: stage.summary(memory, out) for name, stage in self.stages.items()}
        return {
            "merge_method": self.recipe.merge_method,
            "tensors": len(self.jobs),
            "operations": self.operations,
            "models": [model.name for model in self.models],
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "disk_needed": self.bytes_out + sum(stage["bytes_out"] for stage in stages.values()),
            "disk_free": shutil.disk_usage(existing).free,
            "peak_memory": max(
                [self.memory_estimate(memory), *(stage["peak_memory"] for stage in stages.values())]
            ),
            "seed": self.seed,
            "identity": self.identity,
            "warnings": list(self.warnings),
            "stages": stages,
        }


def plan_merge(
    recipe: Recipe | str | Path,
    *,
    base_dir: str | Path | None = None,
    dtype: str | None = None,
    seed: int = 0,
    shard_bytes: int = 5 * 10**9,
    truncate_embeddings: bool = False,
    allow_mixed_architectures: bool = False,
) -> Plan:
    """Plans a merge; reads headers, configs, tokenizers, and a few values per tensor to tell models apart.

    Args:
        recipe: Recipe, or the path of one; the recipes it builds on are planned too, each once.
        base_dir: Folder where relative model paths are looked up after the working directory; the recipe
            file's own if None.
        dtype: Stored dtype, in place of the recipe's.
        seed: Seed of every random draw.
        shard_bytes: Size at which a new weight file is begun.
        truncate_embeddings: Whether embeddings of different length are cut to the shortest.
        allow_mixed_architectures: Whether models of different `model_type` are merged, and tensors that some
            models lack are made from the others alone.

    Raises:
        RecipeError: what cannot be merged, one sentence per reason.
        CheckpointError: a model file that cannot be read.

    Example:
        >>> plan_merge("ties.yaml").summary()["bytes_out"]                          # doctest: +SKIP
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    origin = recipe.origin
    raise_faults(origin.sentence(*fault) for fault in recipe_faults(recipe))
    options: dict[str, Any] = {
        "base_dir": None if base_dir is None else Path(base_dir),
        "seed": seed,
        "shard_bytes": shard_bytes,
        "truncate_embeddings": truncate_embeddings,
        "allow_mixed_architectures": allow_mixed_architectures,
    }
    with tempfile.TemporaryDirectory(prefix="mergelab-plan-") as scratch:
        known: dict[str, Checkpoint] = {}
        planned: dict[str, Plan] = {}
        for stage in recipe.merges:
            if stage.name is not None and stage.name not in known:
                plan = planned[stage.name] = _plan(stage, known, dtype=None, **options)
                known[stage.name] = PlannedCheckpoint.of(
                    Path(scratch) / str(len(known)),
                    stage.name,
                    config=plan.config,
                    files=plan.files,
                    jobs=plan.jobs,
                    identity=plan.identity,
                )
        return _plan(recipe, known, dtype=dtype, planned=planned, **options)


def _plan(
    recipe: Recipe,
    stages: Mapping[str, Checkpoint],
    *,
    base_dir: Path | None,
    dtype: str | None,
    seed: int,
    shard_bytes: int,
    truncate_embeddings: bool,
    allow_mixed_architectures: bool,
    planned: Mapping[str, Plan] | None = None,
) -> Plan:
    origin, operator = recipe.origin, OPERATORS[recipe.merge_method]
    found = find_models(recipe.referenced(), origin, base_dir, stages)
    merged = {name: found[name] for name in recipe.model_texts()}
    checkpoints, respelled = one_spelling({name: model.checkpoint for name, model in merged.items()})
    donor = recipe.base_model if recipe.base_model is not None else next(iter(merged))
    wanted = [name for _, name, _ in recipe.parts() if name is not None]
    shapes = {name: infer_architecture(c.tensors, c.config) for name, c in checkpoints.items()}
    shapes, matched = align_towers({n: called(shape, wanted) for n, shape in shapes.items()}, donor)
    donor = widest(shapes, donor)
    configs = {name: checkpoint.config for name, checkpoint in checkpoints.items()}
    raise_faults(
        [
            *incomplete(checkpoints),
            *([] if allow_mixed_architectures else mixed(configs, donor)),
            *strangers(shapes, donor),
        ]
    )
    layout = lay_out(scoped_parts(recipe, operator), shapes, donor)
    raise_faults(origin.sentence(*fault) for fault in layout.faults)

    statistics = find_statistics(recipe.statistics(), operator, checkpoints, origin, base_dir)
    vocabulary, warnings = _vocabulary(recipe, found, checkpoints)
    stored = dtype or recipe.out_dtype or recipe.dtype
    builder = JobBuilder(
        operator,
        checkpoints,
        vocabulary,
        None if stored is None else dtype_from_name(stored),
        truncate_embeddings and vocabulary is None,
        _moved_layers(layout, shapes, donor),
        statistics,
    )
    shared_heads = tied_heads(layout.places, checkpoints)
    places = [place for place in layout.places if place.name not in shared_heads]
    jobs = tuple(job for job in map(builder.build, places) if job is not None)
    lacking = [] if allow_mixed_architectures else absent(builder.lacking, shapes, configs, donor)
    raise_faults([*lacking, *shortened(builder.faults, builder.rejected)])
    # A model that is a weight file alone says nothing of itself; another one of its architecture does.
    described = donor if configs[donor] else next((name for name, own in configs.items() if own), donor)
    config, notes = output_config(
        {**configs, donor: configs[described]},
        donor,
        shapes[donor],
        layout.layers,
        jobs,
        {} if vocabulary is None else vocabulary.config_updates,
        sources=layout.sources,
        architectures=shapes,
    )
    if described != donor:
        notes.append(f"model {donor!r} has no config.json: the output's is made of that of {described!r}")
    # A look at a few values is not worth a decomposition of every matrix.
    unread = [n for n, c in checkpoints.items() if is_planned(c) or getattr(c, "decomposes", False)]
    warnings = [
        *origin.notes,
        *(origin.sentence(*warning) for warning in recipe_warnings(recipe)),
        *respelled,
        *matched,
        *builder.factors.sentences(),
        *odd_relations(jobs, recipe.base_model, unread),
        *layout.warnings,
        *absences(builder.lacking, builder.skipped, builder.buffers),
        *config_differences(configs, donor),
        *(note for c in checkpoints.values() if isinstance(c, LoraCheckpoint) for note in c.warnings),
        *warnings,
        *notes,
    ]
    keeper = checkpoints[described] if vocabulary is None else found[vocabulary.donor].checkpoint
    files = donor_files(keeper.path, None if vocabulary is None else vocabulary.files)
    warnings += companion_warnings(keeper.path, files)
    if vocabulary is None:
        warnings += license_differences({name: c.path for name, c in checkpoints.items()}, donor)
    if recipe.chat_template is not None:
        files |= chat_template_files(recipe.chat_template, checkpoints, recipe.base_model, files)
    beside = {" with statistics ".join(owner): each for owner, each in statistics.items()}
    read: dict[str, FoundModel | FoundStatistics] = {**merged, **beside}
    return Plan(
        recipe=recipe,
        jobs=jobs,
        config=config,
        files=files,
        models=tuple(merged.values()),
        warnings=tuple(dict.fromkeys(warnings)),
        seed=seed,
        shard_bytes=shard_bytes,
        identities=_identities(recipe, jobs, builder.settings, read, config, files, seed, shard_bytes),
        stages=dict(planned or {}),
        inputs=_inputs(recipe, {**found, **beside}, planned or {}),
        summed_weights=builder.factors.most,
    )


def _inputs(
    recipe: Recipe, found: Mapping[str, FoundModel | FoundStatistics], stages: Mapping[str, Plan]
) -> tuple[Path, ...]:
    paths = [path for model in found.values() for path in model.paths]
    paths += [path for stage in stages.values() for path in stage.inputs]
    if recipe.origin.path is not None:
        paths.append(recipe.origin.path)
    return tuple(dict.fromkeys(paths))


def _moved_layers(layout: OutputLayout, models: Mapping[str, Structure], donor: str) -> list[MovedLayers]:
    found = []
    for module, sources in layout.sources.items():
        stacks = {name: each.modules[module].stack for name, each in models.items() if module in each.modules}
        counts = {name: stack.count for name, stack in stacks.items() if stack is not None}
        stack = stacks.get(donor) or next((stack for stack in stacks.values() if stack is not None), None)
        if stack is not None:
            found.append(MovedLayers(stack.prefix, sources, counts))
    return found


def _vocabulary(
    recipe: Recipe, found: Mapping[str, FoundModel], merged: Mapping[str, Checkpoint]
) -> tuple[VocabularyPlan | None, list[str]]:
    spec = recipe.vocabulary
    if spec is None:
        return None, list(vocabulary_differences(merged, recipe.base_model))
    everyone = {name: model.checkpoint for name, model in found.items()}
    vocabulary = plan_vocabulary(spec, everyone, recipe.base_model, inputs=list(merged))
    return vocabulary, list(vocabulary.warnings)


def _identities(
    recipe: Recipe,
    jobs: tuple[Job, ...],
    settings: list[str],
    models: Mapping[str, FoundModel | FoundStatistics],
    config: Mapping[str, Any],
    files: Mapping[str, bytes],
    seed: int,
    shard_bytes: int,
) -> dict[str, str]:
    """SHA-256 of the version, the recipe, every resolved job, the inputs' fingerprints, and the options."""
    content = {
        "version": __version__,
        "recipe": recipe_yaml(recipe),
        "jobs": [
            [job.name, job.shape, str(job.dtype), [s.name for s in job.sources], job.model_names, setting]
            for job, setting in zip(jobs, settings, strict=True)
        ],
        "models": {name: model.fingerprint for name, model in models.items()},
        "config": config,
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        "seed": seed,
        "shard_bytes": shard_bytes,
    }
    return {
        name: hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
        for name, value in content.items()
    }
