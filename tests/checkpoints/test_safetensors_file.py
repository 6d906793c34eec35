"""The strict header parser: reads what the reference library wrote, refuses what is damaged."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from mergelab.checkpoints.dtypes import SAFETENSORS
from mergelab.checkpoints.file_tensor import FileTensor
from mergelab.checkpoints.lora_tensor import read_whole
from mergelab.checkpoints.safetensors_file import open_safetensors
from mergelab.errors import CheckpointError


def raw_file(header: Any, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def sample(dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    count = int(np.prod(shape))
    return (
        (np.arange(count) % 2).astype(dtype).reshape(shape)
        if dtype == np.bool_
        else (np.arange(count, dtype=np.float32).astype(dtype).reshape(shape))
    )


@pytest.mark.parametrize("name", SAFETENSORS)
def test_every_dtype_reads_as_the_reference_wrote_it(name: str, tmp_path: Path) -> None:
    dtype = SAFETENSORS[name]
    arrays = {"a": sample(dtype, (3, 5)), "scalar": sample(dtype, ()), "empty": sample(dtype, (0, 4))}
    spec = {k: {"dtype": name, "shape": list(v.shape)} for k, v in arrays.items()}
    position, data = 0, b""
    for key, array in arrays.items():
        spec[key]["data_offsets"] = [position, position + array.nbytes]
        position += array.nbytes
        data += array.tobytes()
    path = tmp_path / "t.safetensors"
    path.write_bytes(raw_file(spec, data))
    file = open_safetensors(path)
    with safetensors.safe_open(path, "numpy") as reference:
        assert set(reference.keys()) == file.tensors.keys()
    for key, array in arrays.items():
        source = file.tensors[key]
        assert (source.dtype, source.shape) == (dtype, array.shape)
        assert read_whole(source).tobytes() == array.tobytes()


def test_metadata_order_and_pieces(tmp_path: Path) -> None:
    arrays = {"b": np.arange(100, dtype=np.float32), "a": np.arange(7, dtype=np.int64)}
    path = tmp_path / "t.safetensors"
    safetensors.numpy.save_file(arrays, path, metadata={"format": "np"})
    file = open_safetensors(path)
    assert file.metadata == {"format": "np"}
    assert [t.offset for t in file.tensors.values()] == sorted(t.offset for t in file.tensors.values())
    piece = np.empty(9, np.float32)
    file.tensors["b"].read_into(41, piece)
    assert np.array_equal(piece, arrays["b"][41:50])


@pytest.mark.parametrize(
    "model", ["llama-base", "llama-base-bf16", "gpt2-base", "qwen2-base", "mistral-base"]
)
def test_golden_models_equal_the_reference_reader(model: str, goldens: Path) -> None:
    path = goldens / "models" / model / "model.safetensors"
    ours = open_safetensors(path).tensors
    reference = safetensors.deserialize(path.read_bytes())
    assert {name for name, _ in reference} == ours.keys()
    for name, expected in reference:
        assert ours[name].shape == tuple(expected["shape"])
        assert ours[name].dtype == SAFETENSORS[expected["dtype"]]
        assert read_whole(ours[name]).tobytes() == bytes(expected["data"])


def test_threads_read_the_same_file(tmp_path: Path) -> None:
    array = np.arange(1 << 16, dtype=np.float32)
    path = tmp_path / "t.safetensors"
    safetensors.numpy.save_file({"x": array}, path)
    source = open_safetensors(path).tensors["x"]
    out = np.zeros_like(array)
    threads = [
        threading.Thread(target=lambda k=k: source.read_into(k << 12, out[k << 12 : (k + 1) << 12]))
        for k in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(out, array)


GOOD = entry("F32", [2], 0, 8)
BROKEN = {
    "empty": (b"", "0 bytes long"),
    "header beyond file": (raw_file({"x": GOOD}, b"", 999), "inside its header of 999"),
    "header too large": ((10**9).to_bytes(8, "little") + b"{}", "more than the 100000000"),
    "not an object": (raw_file(b"[1]", b""), "does not start with"),
    "not json": (raw_file(b"{nonsense}", b""), "not valid JSON: .* line 1, column 2"),
    "not utf-8": (raw_file(b'{"\xff":1}', b""), "not UTF-8"),
    "duplicate key": (raw_file(b'{"x":1,"x":2}', b""), "key 'x' twice"),
    "nan": (raw_file(b'{"x":NaN}', b""), "NaN is not JSON"),
    "nested": (raw_file(b'{"x":' + b"[" * 100000 + b"]" * 100000 + b"}", b""), "nested too deeply"),
    "metadata": (raw_file({"__metadata__": {"a": 1}}, b""), "__metadata__"),
    "surrogate": (raw_file(b'{"\\ud800":1}', b""), "lone surrogate"),
    "missing field": (raw_file({"x": {"dtype": "F32"}}, b""), "tensor 'x' must have exactly"),
    "unknown dtype": (
        raw_file({"x": entry("Q9", [2], 0, 8)}, bytes(8)),
        "tensor 'x' has the unknown dtype 'Q9'",
    ),
    "sub-byte": (raw_file({"x": entry("F4", [2], 0, 1)}, bytes(1)), "dequantize"),
    "bad shape": (raw_file({"x": entry("F32", [2.0], 0, 8)}, bytes(8)), "tensor 'x' has shape"),  # type: ignore[list-item]
    "boolean shape": (raw_file({"x": entry("F32", [True], 0, 4)}, bytes(4)), "tensor 'x' has shape"),
    "negative": (raw_file({"x": entry("F32", [-2], 0, 8)}, bytes(8)), "-2 is negative"),
    "minus zero": (raw_file(b'{"x":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', b""), "negative"),
    "huge and empty": (raw_file({"x": entry("F32", [2**62, 0], 0, 0)}, b""), "too large"),
    "endless list": (raw_file(b'{"x":[1' + b",1" * 4_000_000 + b"]}", b""), "lists more than any"),
    "huge shape": (raw_file({"x": entry("F32", [2**40, 2**40], 0, 8)}, bytes(8)), "too large"),
    "size mismatch": (
        raw_file({"x": entry("F32", [3], 0, 8)}, bytes(8)),
        "holds 8 bytes but F32 .* needs 12",
    ),
    "overlap": (raw_file({"x": GOOD, "y": entry("F32", [2], 4, 12)}, bytes(12)), "'y' .* overlaps"),
    "gap": (raw_file({"x": GOOD, "y": entry("F32", [2], 12, 20)}, bytes(20)), "'y' .* leaves a gap"),
    "truncated": (raw_file({"x": GOOD}, bytes(7)), "tensor 'x' reaches to byte .* truncated"),
    "trailing": (raw_file({"x": GOOD}, bytes(9)), "1 bytes after its last tensor"),
}


@pytest.mark.parametrize(("data", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_damaged_files_are_refused_by_name(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_safetensors(path)
    assert "damaged.safetensors" in str(caught.value)


def test_the_undamaged_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    path.write_bytes(raw_file({"x": GOOD}, bytes(8)))
    assert open_safetensors(path).tensors["x"].shape == (2,)


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(raw_file({"x": GOOD}, bytes(8)))
    source = open_safetensors(path).tensors["x"]
    path.write_bytes(raw_file({"x": GOOD}, bytes(4)))
    with pytest.raises(CheckpointError, match="the file changed while tensor 'x' was read"):
        source.read_into(0, np.empty(2, np.float32))
    path.unlink()
    with pytest.raises(CheckpointError, match="reading tensor 'x' failed"):
        source.read_into(0, np.empty(2, np.float32))


def test_pieces_outside_or_of_the_wrong_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(raw_file({"x": GOOD}, bytes(8)))
    source = open_safetensors(path).tensors["x"]
    for start, out in (
        (1, np.empty(2, np.float32)),
        (-1, np.empty(1, np.float32)),
        (0, np.empty(2, np.int32)),
    ):
        with pytest.raises(ValueError, match="tensor 'x'"):
            source.read_into(start, out)
    with pytest.raises(ValueError, match="contiguous"):
        source.read_into(0, np.empty(4, np.float32)[::2])


def reference_parse(data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    try:
        found = safetensors.deserialize(data)
    except safetensors.SafetensorError:
        return None
    return {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in found}


VALID = safetensors.numpy.save(
    {
        "w": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(3).astype(np.float16),
        "n": np.array(3, np.int64),
        "e": np.zeros((0, 2), np.uint8),
    },
    metadata={"format": "pt"},
)
HEADER_END = 8 + int.from_bytes(VALID[:8], "little")


def assert_agrees(path: Path, data: bytes) -> None:
    """Ours accepts only what the reference accepts, and then reads the same; any other outcome fails."""
    path.write_bytes(data)
    try:
        tensors = open_safetensors(path).tensors
    except CheckpointError:
        return
    names = {v: k for k, v in SAFETENSORS.items()}
    ours = {k: (names[t.dtype], t.shape, read_whole(t).tobytes()) for k, t in tensors.items()}
    assert ours == reference_parse(data)


@settings(max_examples=400)
@given(st.lists(st.tuples(st.integers(0, HEADER_END - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_corruption_of_the_header_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(VALID)
    for position, byte in changes:
        data[position] = byte
    assert_agrees(tmp_path_factory.getbasetemp() / "fuzz.safetensors", bytes(data))


@settings(max_examples=200)
@given(st.integers(8, HEADER_END), st.integers(0, 12), st.text('{}[]",:0123456789-.eE xF32BUI', max_size=6))
def test_any_splice_of_the_header_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, at: int, cut: int, text: str
) -> None:
    header = VALID[8:at] + text.encode() + VALID[min(at + cut, HEADER_END) : HEADER_END]
    data = len(header).to_bytes(8, "little") + header + VALID[HEADER_END:]
    assert_agrees(tmp_path_factory.getbasetemp() / "splice.safetensors", data)


def test_the_fuzz_oracle_can_disagree(tmp_path: Path) -> None:
    data = VALID[:-1] + bytes([VALID[-1] ^ 1])
    path = tmp_path / "t.safetensors"
    path.write_bytes(data)
    tensors = open_safetensors(path).tensors
    assert isinstance(tensors["w"], FileTensor)
    assert {k: read_whole(t).tobytes() for k, t in tensors.items()} != {
        k: v[2] for k, v in (reference_parse(VALID) or {}).items()
    }


def test_bfloat16_is_the_type_of_ml_dtypes() -> None:
    assert SAFETENSORS["BF16"] == ml_dtypes.bfloat16
