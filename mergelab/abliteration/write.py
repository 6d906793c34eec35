"""Writes the edited copy of a Hugging Face folder: streamed, resumable, renamed when it is whole."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mergelab.abliteration.ablation import Ablation
from mergelab.abliteration.removal import BLOCK, KeepNorms, check_ablation, edited_blocks, writer_terms
from mergelab.checkpoints import (
    CheckpointWriter,
    FolderCheckpoint,
    TensorSource,
    TensorSpec,
    is_float,
    open_checkpoint,
    plan_shards,
    read_whole,
)
from mergelab.checkpoints.model_files import donor_files
from mergelab.checkpoints.publish import WorkFolder
from mergelab.checkpoints.text_file import read_bytes
from mergelab.errors import CheckpointError, did_you_mean
from mergelab.models.families import model_from_config
from mergelab.models.model import Model
from mergelab.models.residual_stream import ResidualWriter, writers
from mergelab.models.save import SHARD_BYTES

__all__ = ["write_abliterated"]

_THREADS = 4


@dataclass(frozen=True)
class _StoredEdit:
    direction: np.ndarray
    weight: float
    axis: int


def write_abliterated(
    source: str | Path,
    out: str | Path | WorkFolder,
    ablation: Ablation,
    *,
    keep_norms: KeepNorms = None,
    files: Mapping[str, bytes] | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    resume: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Copies a model folder with the directions taken out of all tensors that write to the residual stream.

    Other tensors, the configuration and the tokenizer are copied to the byte; edited tensors keep their
    dtype. Memory is bounded by a few blocks of a tensor, not by a tensor or the model.

    Args:
        source: a Hugging Face folder of a decoder.
        out: the folder to write; or its work folder, entered by the caller.
        ablation: what is removed, and where.
        keep_norms: norms that the matrices keep.
        files: further files by name, such as a card; they replace the source's.
        shard_bytes: weights go into several files if they are larger.
        overwrite: replace a folder that mergelab wrote.
        resume: go on with an output of the same source and ablation that was interrupted.
        progress: called with the bytes written since the last call; never twice at a time.

    Returns:
        The folder.

    Raises:
        CheckpointError: a tensor is missing, of another shape, or quantized.
        NonFiniteError: a tensor that is edited holds NaN or infinity.
        MergelabError: the model is an encoder, or the ablation does not fit it.
        OutputError: the folder cannot be written.
    """
    checkpoint = open_checkpoint(source)
    model = model_from_config(checkpoint.config, str(checkpoint.path / "config.json"))
    model = model.for_tensors(checkpoint.tensors)
    check_ablation(model, ablation)
    edits = _stored_edits(model, checkpoint, ablation)
    specs = [TensorSpec(name, tensor.dtype, tensor.shape) for name, tensor in checkpoint.tensors.items()]
    content = {"config.json": read_bytes(checkpoint.path / "config.json")}
    content |= donor_files(checkpoint.path, None) | dict(files or {})
    identity = {
        "the model": checkpoint.fingerprint(),
        "the directions or their weights": _digest(ablation),
        "the norms that are kept": str(keep_norms),
    }
    plan = plan_shards(specs, shard_bytes)
    inputs = [checkpoint.path]
    with CheckpointWriter(out, plan, identity, resume=resume, overwrite=overwrite, inputs=inputs) as writer:
        failed, telling = threading.Event(), threading.Lock()

        def write(name: str) -> None:
            try:
                for start, piece in _pieces(checkpoint.tensors[name], edits.get(name), keep_norms):
                    if failed.is_set():  # in another thread, which says why
                        return
                    writer.write(name, start, piece)
                    if progress is not None:
                        with telling:
                            progress(piece.nbytes)
            except BaseException:
                failed.set()
                raise

        with ThreadPoolExecutor(_THREADS) as pool:
            remaining = [name for name in checkpoint.tensors if name not in writer.done]
            try:
                for result in [pool.submit(write, name) for name in remaining]:
                    result.result()
            except BaseException:
                failed.set()
                raise
        for name, text in content.items():
            writer.add_file(name, text)
        return writer.commit()


def _stored_edits(model: Model, checkpoint: FolderCheckpoint, ablation: Ablation) -> dict[str, _StoredEdit]:
    """What happens to each tensor that is edited, by name."""
    tensors = checkpoint.tensors
    edits: dict[str, _StoredEdit] = {}
    for writer in writers(model):
        gain = None
        if writer.gain is not None:
            gain = read_whole(_tensor(checkpoint, writer.gain.hf_name, writer.gain.hf_shape))
        direction, weight = writer_terms(model, writer, ablation, gain)
        edit = _StoredEdit(np.asarray(direction), float(weight), _stream_axis(writer))
        for name in writer.leaf.hf_names:
            _tensor(checkpoint, name, writer.leaf.hf_shape)
            edits[name] = edit
        if writer.leaf.path == ("embed", "embedding") and model.config.tied:
            # A stored copy of the tied embedding must not disagree with it.
            copies = [n for n, t in tensors.items() if n not in edits and t.shape == writer.leaf.hf_shape]
            edits |= {name: edit for name in copies if model.is_unused(name)}
    return edits


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


def _pieces(
    tensor: TensorSource, edit: _StoredEdit | None, keep_norms: KeepNorms
) -> Iterator[tuple[int, np.ndarray]]:
    if edit is not None and edit.weight != 0:
        yield from edited_blocks(tensor, edit.direction, edit.weight, axis=edit.axis, keep_norms=keep_norms)
        return
    size = int(np.prod(tensor.shape, dtype=np.int64))
    for start in range(0, size, BLOCK):
        piece = np.empty(min(BLOCK, size - start), tensor.dtype)
        tensor.read_into(start, piece)
        yield start, piece


def _digest(ablation: Ablation) -> str:
    found = hashlib.sha256()
    for array in (ablation.directions, ablation.embeddings, ablation.attention, ablation.mlp):
        found.update(np.ascontiguousarray(array, np.float32).tobytes())
    return found.hexdigest()
