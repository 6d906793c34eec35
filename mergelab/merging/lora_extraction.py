"""The difference of two checkpoints as a LoRA adapter: truncated SVDs, module by module, as a PEFT folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from mergelab.checkpoints import (
    Checkpoint,
    TensorSource,
    dtype_from_name,
    is_float,
    open_checkpoint,
    read_whole,
)
from mergelab.checkpoints.folder import stat_sha256
from mergelab.checkpoints.json_data import read_json_object
from mergelab.checkpoints.output_target import MARKER
from mergelab.checkpoints.peft import adapter_config, write_adapter
from mergelab.checkpoints.publish import WorkFolder
from mergelab.checkpoints.tied_head import conv1d_layers, find_tied_head
from mergelab.checkpoints.writer import identity_digest
from mergelab.errors import CheckpointError, NonFiniteError, OperatorError, did_you_mean
from mergelab.merging.head_extraction import (
    changed_head,
    class_names,
    head_tensors,
    repeated_embeddings,
    unsplittable,
)
from mergelab.operators.low_rank import (
    LowRank,
    balanced_factors,
    randomized_svd,
    rank_for_energy,
    truncated_svd,
)
from mergelab.operators.region import tensor_key

__all__ = ["ExtractedLora", "extract_lora"]

_PREFIX = "base_model.model."
# The excepted ones are linear layers.
_EMBEDDING = re.compile(r"(?!embed_out$|embedding_hidden_mapping_in$)(embed\w*|\w*_embed\w*|w[tp]e|shared)")


@dataclass(frozen=True)
class ExtractedLora:
    """What an extraction wrote.

    Attributes:
        out: the adapter's folder.
        ranks: the rank of every module that has factors.
        errors: by module, the norm of what the factors miss over the norm of the whole change.
        whole: modules stored whole, because their change has no low-rank form (norms, embeddings).
        skipped: modules that changed but are not in the adapter.
        nbytes: size of the weight file.
    """

    out: Path
    ranks: Mapping[str, int]
    errors: Mapping[str, float]
    whole: tuple[str, ...]
    skipped: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True)
class _Setting:
    """How one matrix is approximated."""

    rank: int | None
    energy: float | None
    randomized: bool
    seed: int
    dtype: np.dtype

    def check(self) -> None:
        if self.rank is None and self.energy is None:
            raise OperatorError("neither a rank nor an energy was given: say how large the adapter may be.")
        if self.rank is not None and self.rank < 1:
            raise OperatorError(f"the rank is {self.rank} where at least 1 was expected.")
        if self.energy is not None:
            rank_for_energy(np.ones(1, np.float32), self.energy, 1.0)
        if self.randomized and self.rank is None:
            raise OperatorError("the randomized SVD needs a rank, which an energy may then undercut.")

    def approximate(self, name: str, delta: np.ndarray) -> LowRank:
        if self.randomized and self.rank is not None:
            key = jax.random.wrap_key_data(jnp.asarray(tensor_key(self.seed, name)))
            svd = randomized_svd(jnp.asarray(delta), min(self.rank, *delta.shape), key)
        else:
            svd = truncated_svd(jnp.asarray(delta))
        rank = svd.singular.size if self.rank is None else self.rank
        if self.energy is not None:
            total = float(np.sum(np.square(delta, dtype=np.float64)))
            rank = min(rank, rank_for_energy(np.asarray(svd.singular), self.energy, total))
        return svd.cut(rank)

    def factors(self, name: str, delta: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """`B` `[rows, rank]`, `A` `[rank, columns]` as stored, and the relative error they leave."""
        with jax.default_matmul_precision("highest"):
            b, a = (np.asarray(f).astype(self.dtype) for f in balanced_factors(self.approximate(name, delta)))
        missed = delta - b.astype(np.float32) @ a.astype(np.float32)
        return b, a, float(np.linalg.norm(missed) / np.linalg.norm(delta))


def extract_lora(
    finetuned: Path | str,
    base: Path | str,
    out: Path | str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    randomized: bool = False,
    targets: Sequence[str] = ("*",),
    embeddings: Literal["whole", "low_rank", "skip"] = "whole",
    dtype: str = "float32",
    seed: int = 0,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> ExtractedLora:
    """Writes the PEFT adapter that brings `base` nearest to `finetuned`.

    Every changed matrix `W' - W` is replaced by its best approximation `B @ A`; changed norms, biases and (by
    default) embeddings are stored as they are. What did not change is left out. One matrix is in memory at a
    time, beside the factors found so far.

    Args:
        finetuned: folder or weight file of the fine-tuned model.
        base: the same of the model it was tuned from.
        out: the folder to write.
        rank: the most columns a module's factors may have.
        energy: the fraction of each matrix's squared norm to keep, by the least rank that does.
        randomized: use `randomized_svd` (fast for large matrices) in place of the exact one.
        targets: globs over module names (`*.self_attn.*`): only these may enter the adapter.
        embeddings: whether changed embeddings are stored whole, as `lora_embedding` factors, or left out.
        dtype: the stored dtype of the factors.
        seed: for the randomized SVD.
        overwrite: replace a non-empty `out` that mergelab wrote.
        progress: called with the bytes of the base dealt with.

    Raises:
        CheckpointError: the models' tensors differ in names, shapes or kind, or there is nothing to extract.
        NonFiniteError: a difference is NaN or infinite.
        OperatorError: `rank` or `energy` is missing or out of its range.
        OutputError: the folder cannot be written.
    """
    setting = _Setting(rank, energy, randomized, seed, dtype_from_name(dtype))
    setting.check()
    identity = {
        "settings": f"{setting} {tuple(targets)} {embeddings}",
        "models": stat_sha256(finetuned, base),
    }
    with WorkFolder(out, inputs=[finetuned, base], overwrite=overwrite) as work:
        if work.finished(identity_digest(identity)):
            return _recorded(Path(out))
        work.prepare()
        return _extract(finetuned, base, work, identity, setting, targets, embeddings, progress)


def _recorded(out: Path) -> ExtractedLora:
    """What an extraction that was killed after it had published has written about itself."""
    facts = read_json_object(out / MARKER)["extracted"]
    facts |= {"whole": tuple(facts["whole"]), "skipped": tuple(facts["skipped"])}
    return ExtractedLora(out=out, **facts)


def _extract(
    finetuned: Path | str,
    base: Path | str,
    work: WorkFolder,
    identity: Mapping[str, str],
    setting: _Setting,
    targets: Sequence[str],
    embeddings: str,
    progress: Callable[[int], None] | None,
) -> ExtractedLora:
    tuned_model, base_model = open_checkpoint(finetuned), open_checkpoint(base)
    modules = _modules(tuned_model, base_model)
    conv1d = conv1d_layers(base_model.config)
    head = changed_head(tuned_model, base_model)
    full = class_names([*modules, *(() if head is None else (head.module,))], base_model)
    shared = unsplittable(base_model)

    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    errors: dict[str, float] = {}
    whole: list[str] = []
    skipped: list[str] = []
    biases = False
    for module, parts in modules.items():
        deltas = {part: _difference(tuned, old) for part, (tuned, old) in parts.items()}
        if progress is not None:
            progress(sum(_nbytes(old) for _, old in parts.values()))
        if all(delta is None for delta in deltas.values()):
            continue
        last = module.rpartition(".")[2]
        embedding = _EMBEDDING.fullmatch(last) is not None
        if not any(fnmatchcase(module, glob) for glob in targets) or (embedding and embeddings == "skip"):
            skipped.append(module)
            continue
        if f"{module}.weight" == shared and embeddings == "whole":
            raise CheckpointError(
                f"{finetuned}: {shared!r}, which has several uses, changed, and PEFT replaces one "
                "use of a module that is stored whole; store it as factors (embeddings='low_rank', "
                "--embeddings low_rank) or omit it (skip)"
            )
        delta = deltas.get("weight")
        if delta is not None and delta.ndim == 2 and (not embedding or embeddings == "low_rank"):
            transposed = embedding or last in conv1d
            b, a, errors[module] = setting.factors(module, delta.T if transposed else delta)
            ranks[module] = b.shape[1]
            keys = (
                ("lora_embedding_B", "lora_embedding_A") if embedding else ("lora_B.weight", "lora_A.weight")
            )
            stem = f"{_PREFIX}{full[module]}"
            tensors |= {f"{stem}.{key}": array for key, array in zip(keys, (b, a), strict=True)}
            if deltas.get("bias") is not None:
                biases = True
                tensors[f"{stem}.base_layer.bias"] = read_whole(parts["bias"][0])
        else:
            whole.append(_whole_module(module, parts))
            stem = f"{_PREFIX}{full[module]}"
            tensors |= {f"{stem}.{part}": read_whole(tuned) for part, (tuned, _) in parts.items()}
    keeps_tie = False
    if head is not None:
        embedding = head.tied.modules[0]
        parts = head.tensors(
            whole=embedding in whole, factors=embedding in ranks, skipped=embedding in skipped
        )
        if parts and not any(fnmatchcase(head.module, glob) for glob in targets):
            skipped.append(head.module)
        elif parts:
            whole.append(head.module)
            tensors |= {
                f"{_PREFIX}{full[head.module]}.{part}": read_whole(tensor) for part, tensor in parts.items()
            }
            keeps_tie = head.is_tied and embedding in whole
    if not ranks:
        raise CheckpointError(
            f"{finetuned} differs from {base} in no matrix of the chosen modules ({', '.join(targets)}); "
            "there is no adapter to extract"
        )
    config = adapter_config(
        {full[name]: rank for name, rank in ranks.items()},
        [full[name] for name in whole],
        [full[name] for name in modules],
        base=str(base),
        model_config=base_model.config,
        fan_in_fan_out=bool(conv1d),
        with_biases=biases,
        keeps_tie=keeps_tie,
    )
    extracted = {"ranks": ranks, "errors": errors, "whole": tuple(whole), "skipped": tuple(skipped)}
    nbytes = write_adapter(work, tensors, config, identity, extracted)
    return ExtractedLora(out=work.out, **extracted, nbytes=nbytes)


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


def _difference(tuned: TensorSource, base: TensorSource) -> np.ndarray | None:
    """`tuned - base` in float32, or None where they are equal."""
    new, old = read_whole(tuned), read_whole(base)
    if not is_float(base.dtype) or not is_float(tuned.dtype):
        if np.array_equal(new, old):
            return None
        raise CheckpointError(
            f"tensor {base.name!r} is {base.dtype} and differs between the models; an adapter changes "
            "floating-point weights only: dequantize the model first"
        )
    delta = new.astype(np.float32) - old.astype(np.float32)
    if not np.isfinite(delta).all():
        count = int(np.count_nonzero(~np.isfinite(delta)))
        raise NonFiniteError(
            f"tensor {base.name!r}: {count} of {delta.size} differences are NaN or infinite; repair the model"
        )
    return delta if delta.any() else None


def _whole_module(module: str, parts: Mapping[str, object]) -> str:
    """Returns `module`, which PEFT must be able to replace: its tensors are a `weight` and a `bias`."""
    if strange := sorted(parts.keys() - {"weight", "bias"}):
        raise CheckpointError(
            f"tensor '{module}.{strange[0]}' changed, but PEFT adapters hold only modules of a weight and a "
            "bias; leave it out with targets that do not match it"
        )
    return module


def _nbytes(tensor: TensorSource) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64)) * tensor.dtype.itemsize
