"""The rows that a configuration names, opened; and what an SAE says of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from mergelab.activations import (
    ActivationFiles,
    ActivationSource,
    find_activation_files,
    open_activation_files,
)
from mergelab.activations.kept import KeptRows, TokenRule
from mergelab.activations.lane_rows import TextShare, open_lane_activations
from mergelab.activations.model_activations import DEFAULT_CONTEXT, open_model_activations
from mergelab.activations.stored_tokens import kept_of_files, store_facts_of
from mergelab.checkpoints.companions import has_companion
from mergelab.checkpoints.folder import open_checkpoint, weights_sha256
from mergelab.checkpoints.json_data import read_json_object
from mergelab.checkpoints.locations import local_path
from mergelab.checkpoints.model_card import portable_name
from mergelab.errors import CheckpointError, MeshError, SAEError, did_you_mean, shortened
from mergelab.models.families import model_from_config
from mergelab.models.model import Model
from mergelab.models.streamed import Streaming
from mergelab.processes.agreement import together
from mergelab.processes.exchange import gathered_facts
from mergelab.sae.toy import ToyGroundTruth
from mergelab.sae.training.config import DataSection, TrainConfig
from mergelab.sae.training.memory import machine_memory, readable_bytes
from mergelab.sae.variants.options import checked_options
from mergelab.sharding import MODEL_AXES, make_mesh
from mergelab.text.corpus_tokens import bos_of
from mergelab.text.tokenizer import load_tokenizer

__all__ = [
    "TrainingRows",
    "host_metadata",
    "model_mesh",
    "open_data",
    "portable_data",
    "sae_metadata",
    "store_facts",
    "told_of_tokens",
    "written_rule",
]


def told_of_tokens(kept: KeptRows) -> dict[str, Any]:
    """What an SAE keeps of the rule by which its training took tokens, `token_rule`; nothing without one."""
    return {} if kept.rule is None else {"token_rule": kept.rule.facts()}


class TrainingRows(NamedTuple):
    """The rows of a training.

    Attributes:
        source: the activations.
        target: the targets, where they are others.
        kept: which rows count.
    """

    source: ActivationSource
    target: ActivationSource | None
    kept: KeptRows


def host_metadata(data: DataSection) -> dict[str, Any]:
    """`site`, `model`, `model_hash` and `context` of the activations, as far as the data says it.

    With targets also their site, `target_site`. A model is asked for the digest of its weights; files of
    `mergelab activations` carry it beside them.

    Args:
        data: section of a training's configuration.

    Raises:
        CheckpointError: the model's folder holds no weights, or the file beside a store's is damaged.
    """
    if data.kind == "model" and data.model is not None:
        target = {} if data.target_site is None else {"target_site": data.target_site}
        name, digest = portable_name(data.model), weights_sha256(data.model)
        found = {"site": data.site, **target, "model": name, "model_hash": digest}
        found |= _text_metadata(data)
        # A default context beyond the model's positions is cut where the data is opened.
        return found | {"context": min(data.context, _read_model(data.model).config.max_length)}
    if data.kind == "files" and data.path is not None:
        found = store_facts(data.path)
        target = {} if data.target_path is None else store_facts(data.target_path)
        if "site" in target:
            found["target_site"] = target["site"]
        return found
    return {}


def _text_metadata(data: DataSection) -> dict[str, Any]:
    """How the text becomes contexts, as `mergelab.sae.subject_model.trained_text` reads it."""
    other = {"packing": data.packing, "roles": data.roles}
    found: dict[str, Any] = {name: value for name, value in other.items() if value not in ("packed", "all")}
    folder = local_path(data.model or "")
    if has_companion(folder, "tokenizer.json"):
        found["prepend_bos"] = bos_of(load_tokenizer(folder), data.bos) is not None
    return found


def store_facts(patterns: str | Sequence[str]) -> dict[str, Any]:
    """`site`, `model` and `model_hash` of files of `mergelab activations`; nothing of other files.

    Args:
        patterns: a path or glob, or several, all of one site.

    Raises:
        CheckpointError: the file beside a store's is damaged.
    """
    files = find_activation_files(patterns)
    sites = {file.name.rpartition("-")[0] for file in files}
    stores = {file.parent / "store.json" for file in files}
    if len(sites) != 1 or len(stores) != 1 or not (store := stores.pop()).is_file():
        return {}
    facts = read_json_object(store)
    site, widths = sites.pop(), facts.get("sites")
    if not str(facts.get("format")).startswith("mergelab-activations"):
        return {}
    model, digest = facts.get("model"), facts.get("model_sha256")
    if not isinstance(widths, dict) or not isinstance(model, str) or not isinstance(digest, str):
        raise CheckpointError(
            f"{store} does not map sites to widths and name a model and its model_sha256, as `mergelab "
            "activations` writes it; collect the activations again."
        )
    found = {"site": site, "model": portable_name(Path(model).absolute()), "model_hash": digest}
    if isinstance(facts.get("context"), int):
        found["context"] = facts["context"]
    found |= {name: facts[name] for name in ("prepend_bos", "packing", "roles") if name in facts}
    return found if site in widths else {}


def portable_data(section: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's section `data` for the files of an SAE, which others read: names, no places here."""
    found = {name: value for name, value in section.items() if name != "spill"}
    if isinstance(found.get("model"), str):
        found["model"] = portable_name(found["model"])
    for key in ("text", "path", "target_path"):
        given = found.get(key)
        if isinstance(given, str):
            found[key] = _last_part(given)
        elif isinstance(given, list):
            found[key] = [_last_part(one) for one in given]
    return found


def sae_metadata(
    settings: TrainConfig,
    variant: str,
    known: Mapping[str, Any],
    metrics: Mapping[str, float],
    rows: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What an SAE of a run says of itself besides how it is used.

    Args:
        settings: configuration of the run.
        variant: name of its variant.
        known: what is known of the activations (`host_metadata`), and what the configuration adds.
        metrics: figures of the last step, and what else is to be told of the training.
        rows: what the rows looked like before the training, where that was measured.
    """
    names = ("nmse", "l0", "dead_fraction", "tokens", "step", "steps")
    told = settings.model_dump(mode="json", include={"sae", "data", "train"}, exclude_defaults=True)
    told = {**told, "data": portable_data(told.get("data", {}))}
    if settings.start_from is not None:
        told["start_from"] = portable_name(settings.start_from)
    training = {name: metrics[name] for name in names if name in metrics}
    seen = {} if rows is None else {"rows": rows}
    return {**known, "variant": variant, "training": training, **seen, "settings": told}


def _last_part(place: str) -> str:
    return Path(place).name if Path(place).is_absolute() else place


def _read_model(folder: str) -> Model:
    checkpoint = open_checkpoint(folder)
    return model_from_config(checkpoint.config, str(checkpoint.path / "config.json"))


def written_rule(files: ActivationFiles) -> TokenRule | None:
    """The strictest of the rules with which the stores of files were written; None where none is known."""
    found = [TokenRule.of_facts(store_facts_of(Path(shard.path)).get("rule")) for shard in files.shards]
    known = [rule for rule in found if rule is not None]
    return known[0].strictest(*known) if known else None


def model_mesh(section: DataSection) -> Mesh | None:
    """The mesh of a data section's model, over devices of this process alone; None for its first device.

    Raises:
        MeshError: the sizes do not multiply to the number of the process's devices, or an axis is unknown.
    """
    if section.model_mesh is None:
        return None
    for axis in section.model_mesh:
        if axis not in MODEL_AXES:
            raise MeshError(
                f"data.model_mesh has an axis {shortened(axis)!r}{did_you_mean(axis, MODEL_AXES)}; a model "
                "is spread over data, fsdp and tensor."
            )
    return make_mesh(section.model_mesh, jax.local_devices())


def open_data(
    section: DataSection,
    tokens: int,
    share: TextShare | None = None,
    kept: Path | None = None,
    reading: Callable[[int], object] = lambda tokens: None,
) -> TrainingRows:
    """The activations, the targets where they are others, and which rows count.

    Generated rows all count.

    Args:
        section: section of a training's configuration.
        tokens: number of rows of a generated source, if the section does not say; of a text, the number of
            tokens after which no more is read.
        share: the lanes of a text that this process reads, where processes share it; then every process must
            make the call.
        kept: folder in which the tokens of a text are kept, for a run that goes on after a kill.
        reading: function that is called with the tokens of a text read so far.

    Raises:
        CheckpointError: files are missing or malformed.
        SAEError: the section lacks what its kind needs.
    """
    if section.kind == "toy":
        known = [option.name for option in fields(ToyGroundTruth)]
        for name in section.toy:
            if name not in known:
                raise SAEError(f"data.toy.{shortened(name)} is not a known key{did_you_mean(name, known)}.")
        options = checked_options(ToyGroundTruth, section.toy, "data.toy.", most=2**53)
        toy = ToyGroundTruth(**{"rows": tokens, **options})
        # Its features, and the order of its blocks of rows.
        needed = 12 * toy.n_features * toy.d_in + toy.rows // 64
        if needed > machine_memory():
            raise SAEError(
                f"data.toy of {toy.n_features:,} features, {toy.d_in:,} wide, and {toy.rows:,} rows "
                f"takes {readable_bytes(needed)}, more than this machine has; lower n_features, d_in or rows."
            )
        return TrainingRows(toy, None, KeptRows())
    if section.kind == "model":
        for name in ("model", "site", "text"):
            if getattr(section, name) is None:
                raise SAEError(f"data.{name} is missing: data of kind 'model' needs model, site and text.")
        assert section.model is not None and section.site is not None and section.text is not None
        sites = [section.site, *([section.target_site] if section.target_site else [])]
        # A file that repeats the default asks for no more than one that leaves it out.
        length = None if section.context == DEFAULT_CONTEXT else section.context
        # No more text than the training reads, of which some rows are left out, but enough to shuffle.
        text = section.text_options(max(tokens + tokens // 4, section.buffer_rows))
        mesh = model_mesh(section)
        streaming = Streaming(section.spill, machine_memory() // 2) if section.stream_layers else None
        if share is not None:
            if streaming is not None:
                raise SAEError(
                    "data.stream_layers is for a run of one process; collect the activations first "
                    "(`mergelab activations --stream-layers`) and train on those."
                )
            lanes = open_lane_activations(
                section.model,
                sites,
                section.texts,
                share,
                length=length,
                dtype=section.dtype,
                mesh=mesh,
                rule=section.rule(),
                text=text,
            )
            of_lanes = replace(next(iter(lanes[0].kept.values())), by_place=None)
            return TrainingRows(lanes[0], lanes[1] if section.target_site else None, of_lanes)
        found = open_model_activations(
            section.model,
            sites,
            section.texts,
            length=length,
            dtype=section.dtype,
            mesh=mesh,
            rule=section.rule(),
            text=text,
            kept=kept,
            reading=reading,
            streamed=streaming,
        )
        if streaming is not None and section.spill is None:
            needed = found.rows * (4 * sum(found.widths) + 4 * found.model.config.d_model)
            if needed > streaming.memory:
                raise SAEError(
                    f"data.stream_layers: activations of {found.rows:,} tokens take "
                    f"{readable_bytes(needed)}, more than half of this machine's memory; name a folder on "
                    "disk in data.spill."
                )
        target = found.at(section.target_site) if section.target_site else None
        return TrainingRows(
            found.at(section.site), target, found.kept_rows(section.site, section.target_site)
        )
    if section.path is None:
        raise SAEError("data.path is missing: data of kind 'files' needs the files' path or glob.")
    with together("opening the data", distributed=jax.process_count() > 1):
        target = None if section.target_path is None else open_activation_files(section.target_path)
        source = open_activation_files(section.path)
        if target is not None and target.rows != source.rows:
            return TrainingRows(source, target, KeptRows())  # which the stream refuses
        rule = section.rule(written_rule(source))
        # A limit takes reading a sample of rows, which one process does for all.
        sampled = rule if jax.process_index() == 0 else replace(rule, max_norm_multiple=None)
        found = kept_of_files(source, sampled, target)
    limits = [one if math.isfinite(one) else None for one in (found.limit, found.target_limit)]
    known = [math.inf if one is None else one for one in gathered_facts(limits)[0]]
    return TrainingRows(source, target, replace(found, limit=known[0], target_limit=known[1], rule=rule))
