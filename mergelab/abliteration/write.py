"""The edited copy of a Hugging Face folder: one job per tensor, run by the merge engine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from mergelab.abliteration.ablation import Ablation
from mergelab.abliteration.removal import KeepNorms, Removed, check_ablation, writer_terms
from mergelab.checkpoints import FolderCheckpoint, TensorSource, is_float, read_whole
from mergelab.checkpoints.companion_files import donor_files
from mergelab.checkpoints.companions import read_companion
from mergelab.checkpoints.publish import WorkFolder
from mergelab.errors import CheckpointError, did_you_mean
from mergelab.merging.engine.job import Job
from mergelab.merging.engine.output_folder import write_model
from mergelab.merging.plan.output_config import set_dtype
from mergelab.models.model import Model
from mergelab.models.residual_stream import ResidualWriter, writers
from mergelab.models.save import SHARD_BYTES

__all__ = ["write_abliterated"]


def write_abliterated(
    model: Model,
    checkpoint: FolderCheckpoint,
    out: str | Path | WorkFolder,
    ablation: Ablation,
    *,
    keep_norms: KeepNorms = None,
    files: Mapping[str, bytes] | None = None,
    shard_bytes: int = SHARD_BYTES,
    memory: int = 10**9,
    threads: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    sha256: bool = False,
    progress: Callable[[int], None] = lambda count: None,
) -> Path:
    """Copies a model folder with the directions taken out of all tensors that write to the residual stream.

    Other tensors, the configuration and the tokenizer are copied to the byte; edited tensors keep their
    dtype. Of a quantized model, quantized tensors are written in float32, and the configuration says nothing
    of a quantization. A run of the merge engine: memory is bounded by a few blocks of a tensor, not by a
    tensor or the model.

    Args:
        model: Decoder, as `load_model` describes the checkpoint.
        checkpoint: Folder it was loaded from, opened.
        out: Folder to write; or its work folder, entered by the caller.
        ablation: Directions that are removed, and where.
        keep_norms: Norms that the matrices keep.
        files: Further files by name, such as a card; they replace the source's.
        shard_bytes: Size at which a new weight file is begun.
        memory: Bytes of tensors held at once.
        threads: Number of threads that read, edit and write; one per core if None.
        overwrite: Whether a folder that mergelab wrote may be replaced.
        resume: Whether to go on with an interrupted output of the same checkpoint and ablation.
        sha256: Whether `SHA256SUMS` of the weight files is written too.
        progress: Function called with the bytes written since the last call; never twice at a time.

    Returns:
        The folder.

    Raises:
        CheckpointError: a tensor is missing, or of another shape.
        NonFiniteError: a tensor that is edited holds NaN or infinity.
        MergelabError: the model is an encoder, or the ablation does not fit it.
        OutputError: the folder cannot be written.
    """
    check_ablation(model, ablation)
    removed = _removals(model, checkpoint, ablation, keep_norms)
    jobs = [
        Job(name, tensor.shape, tensor.dtype, (removed.get(name, tensor),))
        for name, tensor in checkpoint.tensors.items()
    ]
    content = {"config.json": _config(checkpoint, jobs)}
    content |= donor_files(checkpoint.path, None) | dict(files or {})
    identities = {
        "the model": checkpoint.fingerprint(),
        "the directions or their weights": _digest(ablation),
        "the norms that are kept": str(keep_norms),
    }
    written = write_model(
        out,
        jobs,
        {},  # the source's own file is copied to the byte
        identities,
        lambda digests: content,
        shard_bytes=shard_bytes,
        memory=memory,
        threads=threads,
        overwrite=overwrite,
        resume=resume,
        inputs=[checkpoint.path],
        sha256=sha256,
        progress=progress,
    )
    return written.out


def _config(checkpoint: FolderCheckpoint, jobs: Iterable[Job]) -> bytes:
    if not checkpoint.is_quantized:
        return read_companion(checkpoint.path, "config.json")
    config = dict(checkpoint.config)
    set_dtype(config, jobs)
    return (json.dumps(config, indent=2) + "\n").encode()


def _removals(
    model: Model, checkpoint: FolderCheckpoint, ablation: Ablation, keep_norms: KeepNorms
) -> dict[str, Removed]:
    """What replaces each tensor that is edited, by name."""
    tensors = checkpoint.tensors
    edited: dict[str, Removed] = {}
    for writer in writers(model):
        gain = None
        if writer.gain is not None:
            gain = read_whole(_tensor(checkpoint, writer.gain.hf_name, writer.gain.hf_shape))
        terms = writer_terms(model, writer, ablation, gain)
        direction, weight, axis = np.asarray(terms[0]), float(terms[1]), _stream_axis(writer)
        for name in writer.leaf.hf_names:
            _tensor(checkpoint, name, writer.leaf.hf_shape)
        names = [*writer.leaf.hf_names]
        if writer.leaf.path == ("embed", "embedding") and model.config.tied:
            # A stored copy of the tied embedding must not disagree with it.
            copies = [n for n, t in tensors.items() if n not in edited and t.shape == writer.leaf.hf_shape]
            names += [name for name in copies if name not in names and model.is_unused(name)]
        if weight != 0:
            edited |= {name: Removed(tensors[name], direction, weight, axis, keep_norms) for name in names}
    return edited


def _stream_axis(writer: ResidualWriter) -> int:
    """The axis of the stored tensor that runs over the residual stream."""
    layout = writer.leaf.layout
    if layout.view != layout.stored_shape or len(layout.axes[-1]) != 1:
        raise ValueError(f"{writer.leaf.hf_name!r} shares its tensor with others, or is cut into heads")
    return layout.axes[-1][0]


def _tensor(checkpoint: FolderCheckpoint, name: str, shape: tuple[int, ...]) -> TensorSource:
    found = checkpoint.tensors.get(name)
    if found is None:
        raise CheckpointError(
            f"{checkpoint.path} lacks the tensor {name!r}{did_you_mean(name, checkpoint.tensors)}, which its "
            "config.json calls for; the download may be incomplete."
        )
    if found.shape != shape or not is_float(found.dtype):
        raise CheckpointError(
            f"{checkpoint.path}: tensor {name!r} is {found.dtype} {list(found.shape)}, but floating-point "
            f"{list(shape)} was expected; dequantize the model, or correct its config.json."
        )
    return found


def _digest(ablation: Ablation) -> str:
    found = hashlib.sha256()
    for array in (ablation.directions, ablation.embeddings, ablation.attention, ablation.mlp):
        found.update(np.ascontiguousarray(array, np.float32).tobytes())
    return found.hexdigest()
