"""A checkpoint written as a GGUF file, tensor by tensor, in the names, layouts and keys of llama.cpp."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from mergelab.checkpoints.companions import companion_json, has_companion, read_companion
from mergelab.checkpoints.file_tensor import read_runs
from mergelab.checkpoints.gguf.architectures import (
    ARCHITECTURES,
    GgufArchitecture,
    Tensor,
    by_name,
    fused_heads_order,
    pattern_of,
    rotary_order,
)
from mergelab.checkpoints.gguf.config_keys import folded_from, metadata_from
from mergelab.checkpoints.gguf.header import ALIGNMENT, Typed, header_bytes
from mergelab.checkpoints.gguf.tensors import KINDS, arithmetic
from mergelab.checkpoints.gguf.tokenizer_keys import templates_of, tokenizer_metadata
from mergelab.checkpoints.new_files import NewFiles
from mergelab.checkpoints.publish import publish_file
from mergelab.checkpoints.source import Checkpoint, TensorSource
from mergelab.checkpoints.text_file import MAX_TABLE
from mergelab.errors import CheckpointError, NonFiniteError, quoted

__all__ = ["GgufDtype", "write_gguf"]

GgufDtype = Literal["float32", "float16", "bfloat16", "q8_0"]

_F32, _F16, _BF16, _Q8_0 = 0, 1, 30, 8
_OF_NAME = {"float32": _F32, "float16": _F16, "bfloat16": _BF16, "q8_0": _Q8_0}
_FILE_TYPE = {_F32: 0, _F16: 1, _BF16: 32, _Q8_0: 7}  # llama.cpp's `LLAMA_FTYPE`
_DTYPES = {_F32: np.dtype(np.float32), _F16: np.dtype(np.float16), _BF16: np.dtype(ml_dtypes.bfloat16)}
_CHUNK = 2**21
_BUFFERS = (
    ".rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
)
_ALWAYS_FLOAT32 = ("ffn_gate_inp", "position_embd")  # llama.cpp computes with these as they are


@dataclass(frozen=True)
class _Output:
    """One tensor of the file.

    Attributes:
        name: llama.cpp's name.
        shape: stored shape, rows first.
        kind: type of its elements.
        parts: the tensors that it is made of, several for experts.
        change: how they lie in it.
        heads: heads that share its rows, where the change needs them.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    parts: tuple[TensorSource, ...]
    change: str = ""
    heads: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) // KINDS[self.kind].elements * KINDS[self.kind].nbytes

    def chunks(self) -> Iterator[np.ndarray]:
        """Its elements in stored order, in pieces of whole rows `[rows, width]`."""
        for part in self.parts:
            if self.change == "transposed" and len(part.shape) == 2:
                whole = np.empty(math.prod(part.shape), part.dtype)
                part.read_into(0, whole)
                yield np.ascontiguousarray(whole.reshape(part.shape).T)
                continue
            width = part.shape[-1] if len(part.shape) > 1 else 1
            rows = math.prod(part.shape) // width
            order = self._order(rows)
            step = max(1, _CHUNK // width)
            for row in range(0, rows, step):
                piece = np.empty((min(step, rows - row), width), part.dtype)
                if order is None:
                    part.read_into(row * width, piece.reshape(-1))
                else:
                    read_runs(part, order[row : row + len(piece)] * width, piece)
                yield piece

    def _order(self, rows: int) -> np.ndarray | None:
        """The row of the Hugging Face tensor that is each stored row."""
        if self.change in ("rotary", "rotary_kv"):
            return np.argsort(rotary_order(self.heads, rows))
        return np.argsort(fused_heads_order(self.heads, rows)) if self.change == "fused_heads" else None


def write_gguf(
    checkpoint: Checkpoint, out: Path | str, *, dtype: GgufDtype | None = None, overwrite: bool = False
) -> int:
    """Writes a model with its config and tokenizer as one GGUF file.

    Vectors are float32, as llama.cpp needs them; a matrix whose rows are not whole blocks of 32 is float16
    where q8_0 is asked for.

    Args:
        checkpoint: the model.
        out: the file.
        dtype: type of the matrices; the stored one if None.
        overwrite: replace the file if it is there.

    Returns:
        Bytes of all tensors.

    Raises:
        CheckpointError: the family, the tokenizer or a tensor has no place in the format.
        NonFiniteError: a weight leaves the range of `dtype`.
        OutputError: the file is there, or the disk is full.
    """
    architecture, kind = _architecture(checkpoint)
    outputs = _outputs(checkpoint, kind, None if dtype is None else _OF_NAME[dtype])
    place = str(checkpoint.path / "config.json")
    folded = folded_from(checkpoint.config)
    most = max(outputs, key=lambda output: output.nbytes).kind
    metadata: dict[str, Any] = {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": checkpoint.path.stem,
        "general.file_type": Typed("I", _FILE_TYPE[most]),
        "general.quantization_version": Typed("I", 2),
        **metadata_from(checkpoint.config, architecture, place),
        **_tokenizer(checkpoint),
    }
    listed = [(name, (len(values),), _F32, 4 * len(values)) for name, values in folded.items()]
    listed += [(output.name, output.shape, output.kind, output.nbytes) for output in outputs]
    header, offsets = header_bytes(metadata, listed)

    def write(path: Path) -> None:
        with path.open("wb") as file:
            file.write(header)
            for offset, values in zip(offsets, folded.values(), strict=False):
                file.write(bytes(offset - file.tell()) + np.asarray(values, np.float32).tobytes())
            for offset, output in zip(offsets[len(folded) :], outputs, strict=True):
                file.write(bytes(offset - file.tell()))
                for chunk in output.chunks():
                    file.write(_stored(output, chunk))
            file.write(bytes(-file.tell() % ALIGNMENT))

    target = Path(out)
    if overwrite:
        publish_file(target, write, inputs=[checkpoint.path])
    else:
        with NewFiles([target], inputs=[checkpoint.path]) as files:
            files.publish({target: write})
    return sum(output.nbytes for output in outputs)


def _stored(output: _Output, chunk: np.ndarray) -> bytes:
    """A chunk in the type of the file."""
    if output.change == "minus_one":
        chunk = chunk.astype(np.float32) + np.float32(1)
    if output.kind == _Q8_0:
        quants = arithmetic()
        values = chunk.astype(np.float32)
        _check_finite(output, values, values)
        return quants.quantize(values, quants.GGMLQuantizationType(_Q8_0)).tobytes()
    with np.errstate(over="ignore"):
        values = chunk.astype(_DTYPES[output.kind])
    if values.dtype != chunk.dtype:
        _check_finite(output, chunk, values)
    return values.tobytes()


def _check_finite(output: _Output, chunk: np.ndarray, values: np.ndarray) -> None:
    if not np.isfinite(values.astype(np.float32)).all():
        name = output.parts[0].name
        raise NonFiniteError(
            f"tensor {name!r} has values that {KINDS[output.kind].name} cannot hold (up to "
            f"{np.abs(chunk.astype(np.float32)).max():.4g}); choose bfloat16 or float32"
        )


def _architecture(checkpoint: Checkpoint) -> tuple[str, GgufArchitecture]:
    wanted = checkpoint.config.get("model_type")
    for name, choices in ARCHITECTURES.items():
        for choice in choices:
            if choice.model_type == wanted:
                return name, choice
    known = ", ".join(choice.model_type for choices in ARCHITECTURES.values() for choice in choices)
    raise CheckpointError(
        f"{checkpoint.path} has model_type {quoted(wanted)}, but GGUF files are written of {known}; keep the "
        "model as a Hugging Face folder"
    )


def _outputs(checkpoint: Checkpoint, architecture: GgufArchitecture, dtype: int | None) -> list[_Output]:
    """The tensors of the file, in the order of the checkpoint; every tensor that has no place is named."""
    kinds, tied = by_name(architecture.tensors), bool(checkpoint.config.get("tie_word_embeddings"))
    heads = checkpoint.config.get("num_attention_heads", checkpoint.config.get("n_head", 0))
    of_change = {"rotary_kv": checkpoint.config.get("num_key_value_heads") or heads}
    found: dict[str, list[tuple[int, TensorSource]]] = {}
    changes: dict[str, Tensor] = {}
    strangers = []
    for name, source in checkpoint.tensors.items():
        pattern, numbers, ending = pattern_of(name)
        kind = kinds.get(pattern)
        if name.endswith(_BUFFERS) or (tied and kind is not None and kind.stored == "output"):
            continue  # buffers; the copy of the embedding
        if kind is None:
            strangers.append(name)
            continue
        stored = kind.stored.replace("{i}", str(numbers[0]) if numbers else "") + ending
        changes[stored] = kind
        found.setdefault(stored, []).append((numbers[1] if len(numbers) > 1 else 0, source))
    if strangers:
        raise CheckpointError(
            f"{checkpoint.path} has the tensor {quoted(name)}, for which a GGUF file of a "
            f"{architecture.model_type} model has no place; remove it, or keep the Hugging Face folder"
            for name in strangers
        )
    outputs = []
    for stored, numbered in found.items():
        change = changes[stored].change
        parts = tuple(source for _, source in sorted(numbered, key=lambda item: item[0]))
        shape = parts[0].shape
        if change == "transposed":
            shape = shape[::-1]
        if change == "experts":
            shape = (len(parts), *shape)
        kind = _kind(stored, shape, parts[0], dtype)
        outputs.append(_Output(stored, shape, kind, parts, change, of_change.get(change, heads)))
    return outputs


def _kind(name: str, shape: Sequence[int], source: TensorSource, dtype: int | None) -> int:
    if len(shape) < 2 or name.startswith(_ALWAYS_FLOAT32) or name.split(".")[-2] in _ALWAYS_FLOAT32:
        return _F32
    if dtype is None:
        return next((kind for kind, known in _DTYPES.items() if known == source.dtype), _F32)
    return _F16 if dtype == _Q8_0 and shape[-1] % KINDS[_Q8_0].elements else dtype


def _tokenizer(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The keys of the tokenizer, if the model has one."""
    folder = checkpoint.path
    if not has_companion(folder, "tokenizer.json"):
        return {}
    data = companion_json(folder, "tokenizer.json", MAX_TABLE)
    config = companion_json(folder, "special_tokens_map.json")
    config |= companion_json(folder, "tokenizer_config.json")
    own = "chat_template.jinja"
    template = read_companion(folder, own).decode() if has_companion(folder, own) else None
    declared = companion_json(folder, "generation_config.json").get("eos_token_id")
    ends = declared if isinstance(declared, list) else [declared]
    return tokenizer_metadata(
        data,
        config,
        templates_of(config, template),
        [end for end in ends if type(end) is int],
        int(checkpoint.config["vocab_size"]),
        str(folder / "tokenizer.json"),
    )
