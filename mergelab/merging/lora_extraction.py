"""The difference of two checkpoints as a LoRA adapter: truncated SVDs, module by module, as a PEFT folder."""

from __future__ import annotations

import hashlib
import json
import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mergelab.checkpoints import (
    Checkpoint,
    FolderCheckpoint,
    TensorSource,
    dtype_from_name,
    is_float,
    open_checkpoint,
    read_whole,
)
from mergelab.checkpoints.folder import bounded_digest
from mergelab.checkpoints.hub import hub_origin
from mergelab.checkpoints.json_data import read_json_object
from mergelab.checkpoints.model_card import card_facts, portable_name, short_card
from mergelab.checkpoints.output_target import MARKER, disk_errors, recorded_identity
from mergelab.checkpoints.peft import adapter_config
from mergelab.checkpoints.publish import WorkFolder
from mergelab.checkpoints.remote_output import writes_anywhere
from mergelab.checkpoints.tied_head import conv1d_layers, find_tied_head, is_token_matrix
from mergelab.checkpoints.writer import check_digests, identity_digest
from mergelab.errors import CheckpointError, NonFiniteError, OperatorError, did_you_mean
from mergelab.merging.engine.job import Job
from mergelab.merging.engine.output_folder import write_model
from mergelab.merging.head_extraction import (
    changed_head,
    class_names,
    head_tensors,
    paired_pieces,
    repeated_embeddings,
    unsplittable,
)
from mergelab.merging.lora_factors import ChangeFactors, FactorSetting, tensor_bytes
from mergelab.version import __version__

__all__ = ["ExtractedLora", "extract_lora"]

_PREFIX = "base_model.model."
_STEM = "adapter_model"
_VLLM_RANK = 512
"""The largest value of vLLM's --max-lora-rank."""
# The excepted ones are linear layers.
_EMBEDDING = re.compile(r"(?!embed_out$|embedding_hidden_mapping_in$)(embed\w*|\w*_embed\w*|w[tp]e|shared)")


@dataclass(frozen=True)
class ExtractedLora:
    """What an extraction wrote.

    Attributes:
        out: the adapter's folder.
        ranks: the rank of every module that has factors.
        errors: relative error of each module, the norm of what the factors miss over the norm of the whole
            change.
        whole: modules stored whole, because their change has no low-rank form (norms, embeddings).
        skipped: modules that changed but are not in the adapter.
        nbytes: size of the weight file.
        lost: losses, for each module of `skipped`, its fraction of the squared norm of the whole change.
    """

    out: Path
    ranks: Mapping[str, int]
    errors: Mapping[str, float]
    whole: tuple[str, ...]
    skipped: tuple[str, ...]
    nbytes: int
    lost: Mapping[str, float] = field(default_factory=dict)


@writes_anywhere()
def extract_lora(
    finetuned: Path | str,
    base: Path | str,
    out: Path | str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    randomized: bool = False,
    targets: str | Sequence[str] = ("*",),
    embeddings: Literal["whole", "low_rank", "skip"] = "whole",
    dtype: str = "float32",
    runtime: Literal["peft", "vllm"] = "peft",
    seed: int = 0,
    overwrite: bool = False,
    resume: bool = False,
    progress: Callable[[int], object] = lambda count: None,
) -> ExtractedLora:
    """Writes the PEFT adapter that brings `base` nearest to `finetuned`.

    Every changed matrix `W' - W` is replaced by its best approximation `B @ A`; changed norms, biases and (by
    default) embeddings are stored as they are. What did not change is omitted. One matrix is in memory at a
    time; an `energy`, which decides ranks, keeps all factors in memory until they are written.

    Args:
        finetuned: Folder or weight file of the fine-tuned model.
        base: Folder or weight file of the model it was tuned from.
        out: Folder to write.
        rank: Largest number of columns that a module's factors may have.
        energy: Fraction of each matrix's squared norm to keep, by the least rank that does.
        randomized: Whether `randomized_svd` (fast for large matrices) replaces the exact one.
        targets: Globs over module names (`*.self_attn.*`), or one: only these may enter the adapter.
        embeddings: Whether changed embeddings are stored whole, as `lora_embedding` factors, or omitted.
        dtype: Stored dtype of the factors.
        runtime: Program that is to apply the adapter. vLLM takes factors of linear layers alone, all of one
            rank of at most 512: other changes (norms, biases, embeddings, heads) are omitted, and `lost` says
            how much they are; smaller factors are filled up with zeros.
        seed: Seed of the randomized SVD.
        overwrite: Whether a non-empty `out` that mergelab wrote may be replaced.
        resume: Whether to go on with an interrupted run of the same models and settings.
        progress: Function called with the bytes of the base that were dealt with.

    Raises:
        CheckpointError: the models' tensors differ in names, shapes or kind, or there is nothing to extract.
        NonFiniteError: a difference is NaN or infinite.
        OperatorError: `rank` or `energy` is missing or out of its range, or the runtime does not take what is
            asked for.
        OutputError: the folder cannot be written.
    """
    setting = FactorSetting(rank, energy, randomized, seed, dtype_from_name(dtype))
    setting.check()
    if runtime == "vllm":
        if embeddings == "low_rank":
            raise OperatorError("vLLM takes no factors of embeddings: omit embeddings='low_rank'.")
        _check_vllm_rank(rank or 1)
        embeddings = "skip"
    targets = [targets] if isinstance(targets, str) else targets
    models = open_checkpoint(finetuned), open_checkpoint(base)
    identity = {
        "settings": f"{setting} {tuple(targets)} {embeddings}" + (" vllm" if runtime == "vllm" else ""),
        "models": _digest(*models),
    }
    with WorkFolder(out, inputs=[finetuned, base], overwrite=overwrite) as work:
        if work.finished(identity_digest(identity)):
            return _recorded(Path(out))
        if resume and recorded_identity(work.out) == identity_digest(identity):
            check_digests(work.out)
            work.abandon()
            return _recorded(Path(out))
        work.prepare()
        return _extract(
            *models,
            finetuned,
            base,
            work,
            identity,
            setting,
            targets,
            embeddings,
            resume,
            progress,
            linear_only=runtime == "vllm",
        )


def _recorded(out: Path) -> ExtractedLora:
    """What an extraction that was killed after it had published has written about itself."""
    facts = read_json_object(out / MARKER)["extracted"]
    facts |= {"whole": tuple(facts["whole"]), "skipped": tuple(facts["skipped"])}
    return ExtractedLora(out=out, **facts)


def _digest(*models: FolderCheckpoint) -> str:
    """SHA-256 over configs, headers, and values from all over every weight file; the same for any copy."""
    total = hashlib.sha256()
    for model in models:
        total.update(model.fingerprint().encode())
        for file in model.files:
            with disk_errors(file.file.path):
                total.update(bounded_digest(file.file.path, 1 << 24).encode())
    return total.hexdigest()


def _extract(
    tuned_model: FolderCheckpoint,
    base_model: FolderCheckpoint,
    finetuned: Path | str,
    base: Path | str,
    work: WorkFolder,
    identity: Mapping[str, str],
    setting: FactorSetting,
    targets: Sequence[str],
    embeddings: str,
    resume: bool,
    progress: Callable[[int], object],
    *,
    linear_only: bool = False,
) -> ExtractedLora:
    modules = _modules(tuned_model, base_model)
    conv1d = conv1d_layers(base_model.config)
    head = changed_head(tuned_model, base_model)
    full = class_names([*modules, *(() if head is None else (head.module,))], base_model)
    shared = unsplittable(base_model)

    jobs: list[Job] = []
    factors: dict[str, ChangeFactors] = {}
    alone = threading.Lock()
    whole: list[str] = []
    skipped: list[str] = []
    biases = False
    norms: dict[str, float] = {}  # squared, of what changed
    for module, parts in modules.items():
        changes = {part: _change(tuned, old) for part, (tuned, old) in parts.items()}
        changed = {part for part, square in changes.items() if square}
        norms[module] = sum(changes.values())
        last = module.rpartition(".")[2]
        embedding = _EMBEDDING.fullmatch(last) is not None
        split = (
            "weight" in changed
            and len(parts["weight"][1].shape) == 2
            and (not embedding or embeddings == "low_rank")
        )
        chosen = any(fnmatchcase(module, glob) for glob in targets) and not (
            embedding and embeddings == "skip"
        )
        if linear_only:
            chosen = chosen and split and not is_token_matrix(f"{module}.weight")
        later = {"weight"} if chosen and split else set()  # told when its factors are found
        progress(sum(tensor_bytes(old) for part, (_, old) in parts.items() if part not in later))
        if not changed:
            continue
        if not chosen:
            skipped.append(module)
            continue
        if f"{module}.weight" == shared and embeddings == "whole":
            raise CheckpointError(
                f"{finetuned}: {shared!r}, which has several uses, changed, and PEFT replaces one "
                "use of a module that is stored whole; store it as factors (embeddings='low_rank', "
                "--embeddings low_rank) or omit it (skip)"
            )
        stem = f"{_PREFIX}{full[module]}"
        if split:
            tuned, old = parts["weight"]
            found = ChangeFactors(module, tuned, old, embedding or last in conv1d, setting, alone, progress)
            factors[module] = found
            if linear_only:
                if "bias" in changed:
                    norms[f"{module}.bias"] = changes["bias"]
                    norms[module] -= changes["bias"]
                    skipped.append(f"{module}.bias")
                continue
            names = (
                ("lora_embedding_B", "lora_embedding_A") if embedding else ("lora_B.weight", "lora_A.weight")
            )
            jobs += found.jobs(stem, names)
            if "bias" in changed:
                biases = True
                jobs.append(_copy(f"{stem}.base_layer.bias", parts["bias"][0]))
        else:
            whole.append(_whole_module(module, parts))
            jobs += [_copy(f"{stem}.{part}", tuned) for part, (tuned, _) in parts.items()]
    keeps_tie = False
    if head is not None:
        embedding = head.tied.modules[0]
        parts = head.tensors(
            whole=embedding in whole, factors=embedding in factors, skipped=embedding in skipped
        )
        if parts and (linear_only or not any(fnmatchcase(head.module, glob) for glob in targets)):
            skipped.append(head.module)
            norms[head.module] = _change(head.weight, head.base_weight)
        elif parts:
            whole.append(head.module)
            stem = f"{_PREFIX}{full[head.module]}"
            jobs += [_copy(f"{stem}.{part}", tensor) for part, tensor in parts.items()]
            keeps_tie = head.is_tied and embedding in whole
    if not factors:
        raise CheckpointError(
            f"{finetuned} differs from {base} in no matrix of the chosen modules ({', '.join(targets)}); "
            "there is no adapter to extract"
        )
    ranks = {module: int(found.rank or 0) for module, found in factors.items()}
    origin = hub_origin(base_model.path)
    if linear_only:
        widest = max(ranks.values())
        _check_vllm_rank(widest)
        ranks = dict.fromkeys(ranks, widest)
        for module, found in factors.items():
            jobs += found.jobs(f"{_PREFIX}{full[module]}", ("lora_B.weight", "lora_A.weight"), widest)
    total = math.fsum(norms.values()) or 1.0
    lost = {module: norms.get(module, 0.0) / total for module in skipped}
    config = adapter_config(
        {full[name]: rank for name, rank in ranks.items()},
        [full[name] for name in whole],
        [full[name] for name in modules],
        base=str(base) if origin is None else origin.repo,
        model_config=base_model.config,
        fan_in_fan_out=bool(conv1d),
        with_biases=biases,
        keeps_tie=keeps_tie,
    )
    if origin is not None:
        config["revision"] = origin.revision
    extracted: dict[str, Any] = {}

    def files(digests: Mapping[str, str]) -> dict[str, bytes]:
        weights = work.path / f"{_STEM}.safetensors"
        stored = open_checkpoint(weights).tensors
        for found in factors.values():
            if found.error is None:  # an interrupted run wrote its factors
                found.check(*(read_whole(stored[name]) for name in found.names))
        extracted.update(
            ranks=ranks,
            errors={module: found.error for module, found in factors.items()},
            whole=tuple(whole),
            skipped=tuple(skipped),
            nbytes=weights.stat().st_size,
            lost=lost,
        )
        facts = {"mergelab": __version__, "identity": identity_digest(identity), "tensors": dict(digests)}
        return {
            "adapter_config.json": _text(config),
            MARKER: _text({**facts, "extracted": extracted}),
            "README.md": _card(finetuned, base, base_model, ranks),
        }

    whole_file = 1 + sum(job.bytes_out for job in jobs)  # PEFT reads adapters of one file
    write_model(work, jobs, {}, identity, files, shard_bytes=whole_file, stem=_STEM, resume=resume)
    return ExtractedLora(out=work.out, **extracted)


def _card(
    finetuned: Path | str, base: Path | str, model: FolderCheckpoint, ranks: Mapping[str, int]
) -> bytes:
    """The content of the adapter's `README.md`; it does not depend on the folder's name."""
    span = " to ".join(str(rank) for rank in sorted({min(ranks.values()), max(ranks.values())}))
    name = portable_name(base)
    said = (
        f"LoRA adapter of rank {span} for {len(ranks)} modules of `{name}`, extracted with mergelab "
        f"{__version__} from `{portable_name(finetuned)}` by truncated singular value decomposition of the "
        "difference of the weights."
    )
    return short_card(
        f"LoRA adapter for {name}", "peft", ["mergelab", "lora"], card_facts([model.path]), [said]
    )


def _check_vllm_rank(rank: int) -> None:
    if rank > _VLLM_RANK:
        raise OperatorError(
            f"the rank is {rank}, and vLLM takes at most {_VLLM_RANK}: give a rank, or a lower energy."
        )


def _copy(name: str, tensor: TensorSource) -> Job:
    """The job that stores a tensor as it is."""
    return Job(name, tensor.shape, tensor.dtype, (tensor,))


def _text(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _modules(tuned: Checkpoint, base: Checkpoint) -> dict[str, dict[str, tuple[TensorSource, TensorSource]]]:
    """Module -> its own tensors (`weight`, `bias`) in both models; headers only."""
    # A tied output embedding may be stored or not; it is the input embedding either way.
    apart = head_tensors(base) | repeated_embeddings(base)
    tensors = dict(tuned.tensors)
    own = find_tied_head(tensors, tuned.config)
    if own is not None and own.head in base.tensors:
        tensors.setdefault(own.head, tensors[own.embedding])
    for name in (tensors.keys() ^ base.tensors.keys()) - apart:
        lacking, other = (base, tuned) if name in tensors else (tuned, base)
        raise CheckpointError(
            f"{lacking.path} lacks the tensor {name!r}{did_you_mean(name, lacking.tensors)}, which "
            f"{other.path} has; name a model and the base it was tuned from"
        )
    modules: dict[str, dict[str, tuple[TensorSource, TensorSource]]] = {}
    for name, old in base.tensors.items():
        if name in apart:
            continue
        new = tensors[name]
        if new.shape != old.shape:
            raise CheckpointError(
                f"{tuned.path}: tensor {name!r} has shape {list(new.shape)} but {list(old.shape)} in "
                f"{base.path}; an adapter cannot change a shape: cut or extend the vocabulary first"
            )
        module, _, part = name.rpartition(".")
        modules.setdefault(module, {})[part] = (new, old)
    return modules


def _change(tuned: TensorSource, base: TensorSource) -> float:
    """The squared norm of a change, as seen in float32; reads both tensors, some megabytes at a time."""
    numbers = is_float(base.dtype) and is_float(tuned.dtype)
    differ, odd, square = False, 0, 0.0
    for new, old in paired_pieces(tuned, base):
        if not numbers:
            differ |= not np.array_equal(new, old)
            continue
        delta = new.astype(np.float32) - old.astype(np.float32)
        odd += int(np.count_nonzero(~np.isfinite(delta)))
        differ |= bool(delta.any())
        square += float(np.sum(np.square(delta, dtype=np.float64)))
    if differ and not numbers:
        raise CheckpointError(
            f"tensor {base.name!r} is {base.dtype} and differs between the models; an adapter changes "
            "floating-point weights only: dequantize the model first"
        )
    if odd:
        raise NonFiniteError(
            f"tensor {base.name!r}: {odd} of {math.prod(base.shape)} differences are NaN or infinite; repair "
            "the model"
        )
    return square


def _whole_module(module: str, parts: Mapping[str, object]) -> str:
    """Returns `module`, which PEFT must be able to replace: its tensors are a `weight` and a `bias`."""
    if strange := sorted(parts.keys() - {"weight", "bias"}):
        raise CheckpointError(
            f"tensor '{module}.{strange[0]}' changed, but PEFT adapters hold only modules of a weight and a "
            "bias; leave it out with targets that do not match it"
        )
    return module
