"""Torch files read without torch: recorded ones exactly, hostile ones refused by name, none of them run."""

from __future__ import annotations

import builtins
import io
import json
import os
import pickle
import pickletools
import runpy
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergelab.checkpoints import torch_pickle as pickle_data
from mergelab.checkpoints import torch_reader as pickled_file
from mergelab.checkpoints.file_tensor import StridedTensor, WeightFile
from mergelab.checkpoints.lora_tensor import read_whole
from mergelab.checkpoints.torch_reader import open_pickled
from mergelab.errors import CheckpointError

DATA = Path(__file__).parent / "data"
EXPECTED: dict[str, dict[str, Any]] = json.loads((DATA / "torch_expected.json").read_text())


@pytest.mark.parametrize("prefix", ["", "legacy_"])
@pytest.mark.parametrize("file", EXPECTED)
def test_recorded_files_read_as_torch_reads_them(file: str, prefix: str) -> None:
    """In today's format, and in that of torch before 1.6."""
    tensors = open_pickled(DATA / f"{prefix}{file}").tensors
    assert tensors.keys() == EXPECTED[file].keys()
    for name, expected in EXPECTED[file].items():
        assert tensors[name].name == name
        assert list(tensors[name].shape) == expected["shape"]
        assert read_whole(tensors[name]).tobytes().hex() == expected["hex"]


def test_strided_tensors_are_gathered_in_any_pieces() -> None:
    tensors = open_pickled(DATA / "state_dict.pt").tensors
    strided = {name: t for name, t in tensors.items() if isinstance(t, StridedTensor)}
    assert strided.keys() == {"transposed", "columns", "expanded", "half_3d"}
    for source in strided.values():
        whole = read_whole(source).ravel()
        for size in (1, 5, whole.size):
            for start in range(0, whole.size, size):
                out = np.empty(min(size, whole.size - start), source.dtype)
                source.read_into(start, out)
                assert np.array_equal(out, whole[start : start + size])


@pytest.mark.oracle
def test_torch_reads_the_same(tmp_path: Path) -> None:
    import torch

    record = runpy.run_path(str(Path(__file__).parent / "record.py"))
    cases = [(*each, zipped) for each in record["torch_cases"]().items() for zipped in (True, False)]
    for name, case, zipped in cases:
        if not zipped:  # torch writes these in the old format, and cannot read them back
            case = {key: value for key, value in case.items() if key not in ("fp8", "fp8_wide", "uint16")}
        torch.save(case, tmp_path / name, _use_new_zipfile_serialization=zipped)
        loaded = torch.load(tmp_path / name, weights_only=True)
        loaded = loaded.get("state_dict", loaded)
        tensors = open_pickled(tmp_path / name).tensors
        assert tensors.keys() == loaded.keys()
        for key, source in tensors.items():
            value = loaded[key].detach().contiguous()
            assert str(source.dtype) == str(value.dtype).removeprefix("torch.")
            assert source.shape == tuple(value.shape)
            raw = value.view(torch.uint8) if value.ndim and value.numel() else value
            assert read_whole(source).tobytes() == raw.numpy().tobytes()


def archive(path: Path, pickled: bytes, **entries: bytes) -> Path:
    """A torch-shaped zip around any pickle; `data_0` stands for `archive/data/0`."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        file.writestr("archive/data.pkl", pickled)
        for name, content in entries.items():
            file.writestr(f"archive/{name.replace('_', '/')}", content)
    return path


def torch_pickle(
    *,
    function: bytes = b"torch._utils\n_rebuild_tensor_v2\n",
    storage: bytes = b"ctorch\nFloatStorage\n",
    key: bytes = b"0",
    count: int = 4,
    offset: int = 0,
    shape: int = 4,
    stride: int = 1,
) -> bytes:
    """A state dict {"w": 1-D tensor} written opcode by opcode, each part of it replaceable."""

    def text(value: bytes) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value

    def number(value: int) -> bytes:
        return b"\x8a" + bytes([8]) + value.to_bytes(8, "little", signed=True)

    return (
        b"\x80\x02}" + text(b"w") + b"c" + function + b"(("
        + text(b"storage") + storage + text(key) + text(b"cpu") + number(count) + b"tQ"
        + number(offset) + number(shape) + b"\x85" + number(stride) + b"\x85" + b"\x89"
        + b"ccollections\nOrderedDict\n)RtRs."
    )  # fmt: skip


FOUR = np.arange(4, dtype=np.float32).tobytes()


def test_the_handmade_pickle_is_sound(tmp_path: Path) -> None:
    source = open_pickled(archive(tmp_path / "x.pt", torch_pickle(), data_0=FOUR)).tensors["w"]
    assert np.array_equal(read_whole(source), np.arange(4, dtype=np.float32))


class Evil:
    """Pickles to a call of any function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def touch(tmp_path: Path) -> str:
    return f"touch {tmp_path / 'owned'}"


def hostile(tmp_path: Path) -> dict[str, tuple[bytes, str]]:
    """Pickles that run something when Python's unpickler reads them, and the name our error must give."""
    command = touch(tmp_path)
    system = f"{os.system.__module__}.system"
    nested = OrderedDict(w=[{"deep": (Evil(os.system, command),)}])
    return {
        "os.system": (pickle.dumps(Evil(os.system, command), 2), system),
        "stack global": (pickle.dumps(Evil(os.system, command), 4), system),
        "eval": (
            pickle.dumps(Evil(builtins.eval, f"__import__('os').system({command!r})"), 4),
            "builtins.eval",
        ),
        "exec, protocol 0": (pickle.dumps(Evil(builtins.exec, "1"), 0), "__builtin__.exec|builtins.exec"),
        "getattr": (pickle.dumps(Evil(getattr, "", "join"), 2), "getattr"),
        "nested": (pickle.dumps(nested, 2), system),
        "after a tensor": (torch_pickle()[:-1] + b"cos\nsystem\n(X\x02\x00\x00\x00idtR0.", "os.system"),
        "torch code": (b"\x80\x02ctorch.hub\nload\n)R.", "torch.hub.load"),
        "dotted name": (
            b"\x80\x04\x8c\x0ctorch._utils\x8c\x20_rebuild_tensor_v2.__globals__.x\x93.",
            "torch._utils._rebuild_tensor_v2.__globals__.x",
        ),
        "build on a function": (b"\x80\x02ccollections\nOrderedDict\n}b.", "BUILD"),
        "instance": (b"(S'id'\nios\nsystem\n.", "INST|pickle opcode"),
        "obj": (b"(cos\nsystem\nS'id'\no.", "os.system"),
        "new object": (b"\x80\x02ccollections\nOrderedDict\n)\x81cposix\nsystem\n)\x81.", "posix.system"),
        "extension": (b"\x80\x02\x82\x01.", "EXT1"),
        "text persistent id": (b"\x80\x02Pposix.system\n.", "PERSID"),
        "calls a value": (b"\x80\x02ctorch\nfloat32\n)R.", "calls a"),
        "calls data": (b"\x80\x02X\x01\x00\x00\x00a)R.", "calls a str"),
    }


@pytest.mark.parametrize("case", hostile(Path("/nowhere")))
def test_hostile_pickles_run_nothing_and_are_named(case: str, tmp_path: Path) -> None:
    pickled, name = hostile(tmp_path)[case]
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")) as caught:
        open_pickled(archive(tmp_path / "x.pt", pickled, data_0=FOUR))
    assert "x.pt" in str(caught.value)
    assert not (tmp_path / "owned").exists()


def test_the_hostile_pickle_does_run_in_pythons_unpickler(tmp_path: Path) -> None:
    pickle.loads(hostile(tmp_path)["stack global"][0])
    assert (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"storage": b"X\x01\x00\x00\x00a"}, "names no storage"),
        ({"storage": b"ctorch\nfloat32\n"}, "names no storage"),
        ({"storage": b"ctorch\nQInt8Storage\n"}, "torch.QInt8Storage"),
        ({"storage": b"ctorch.storage\nUntypedStorage\n", "count": 16}, "without a typed storage"),
        ({"key": b"7"}, "storage '7', which is not in the file"),
        ({"key": b"../data.pkl"}, "not in the file"),
        ({"key": b"/etc/passwd"}, "not in the file"),
        ({"count": 5}, "has 16 bytes where 20 were expected"),
        ({"count": -1}, "has 16 bytes where -4"),
        ({"shape": 5}, "reaches beyond its storage"),
        ({"offset": 1}, "reaches beyond its storage"),
        ({"stride": 2}, "reaches beyond its storage"),
        ({"offset": -1}, "save it again"),
        ({"stride": -1}, "save it again"),
        ({"shape": 2**62, "stride": 0}, "too large to be genuine"),
        ({"shape": 2**40, "stride": 0}, "its storage holds 16, which it repeats"),
        ({"shape": 2**20, "stride": 0}, None),
        ({"function": b"torch._utils\n_rebuild_sparse_tensor\n"}, "_rebuild_sparse_tensor"),
    ],
)
def test_tensors_stay_inside_their_storage(
    change: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    path = archive(tmp_path / "x.pt", torch_pickle(**change), data_0=FOUR)
    if message is None:  # an honest, if useless, expanded tensor
        assert (read_whole(open_pickled(path).tensors["w"]) == np.zeros(2**20)).all()
        return
    with pytest.raises(CheckpointError, match=message):
        open_pickled(path)


def test_zip_tricks_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    for name in ("../evil", "/etc/evil", "a/../../evil", "C:\\evil"):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("archive/data.pkl", torch_pickle())
            file.writestr("archive/data/0", FOUR)
            file.writestr(zipfile.ZipInfo(name), b"")
        with pytest.raises(CheckpointError, match="leaving the archive"):
            open_pickled(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", torch_pickle())
        file.writestr("archive/data/0", bytes(10**6))
    with pytest.raises(CheckpointError, match="compressed"):
        open_pickled(path)
    archive(path, torch_pickle(), data_0=FOUR)
    whole = path.read_bytes()
    directory = whole.rindex(b"PK\x01\x02")
    at = directory + 42  # the second entry's offset: point it at the first entry
    path.write_bytes(whole[:at] + struct.pack("<I", 0) + whole[at + 4 :])
    with pytest.raises(CheckpointError, match="overlaps"):
        open_pickled(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="not a torch zip file"):
        open_pickled(path)
    path.write_bytes(b"hello")
    with pytest.raises(CheckpointError, match="not a torch zip file"):
        open_pickled(path)


def test_other_programs_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with pytest.raises(CheckpointError, match="TorchScript"):
        open_pickled(archive(path, torch_pickle(), **{"data_0": FOUR, "constants.pkl": b""}))
    with pytest.raises(CheckpointError, match="byte order b'big'"):
        open_pickled(archive(path, torch_pickle(), data_0=FOUR, byteorder=b"big"))
    with pytest.raises(CheckpointError, match="holds a list, not a state dict"):
        open_pickled(archive(path, pickle.dumps([1, 2], 2)))
    with pytest.raises(CheckpointError, match="holds a dict with keys 'epoch'"):
        open_pickled(archive(path, pickle.dumps({"epoch": 1}, 2)))
    mixed = torch_pickle()[:-1] + b"X\x01\x00\x00\x00eK\x03s."
    with pytest.raises(CheckpointError, match="entry 'e' of the state dict is a int"):
        open_pickled(archive(path, mixed, data_0=FOUR))


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=3))
def test_a_corrupted_pickle_is_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    with zipfile.ZipFile(DATA / "state_dict.pt") as original:
        entries = {info.filename: original.read(info) for info in original.infolist()}
    name = next(n for n in entries if n.endswith("data.pkl"))
    pickled = bytearray(entries[name])
    for position, byte in changes:
        pickled[position % len(pickled)] = byte
    path = tmp_path_factory.getbasetemp() / "fuzz.pt"
    with zipfile.ZipFile(path, "w") as file:
        for entry, content in entries.items():
            file.writestr(entry, bytes(pickled) if entry == name else content)
    try:
        tensors = open_pickled(path).tensors
    except CheckpointError:
        return
    for source in tensors.values():
        if np.prod(source.shape) < 1000:
            read_whole(source)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=3))
def test_a_corrupted_zip_is_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    data = bytearray((DATA / "lightning.pt").read_bytes())
    for position, byte in changes:
        data[-(position % 900) - 1] = byte  # the central directory lies at the end
    path = tmp_path_factory.getbasetemp() / "fuzz_zip.pt"
    path.write_bytes(bytes(data))
    try:
        tensors = open_pickled(path).tensors
    except CheckpointError:
        return
    assert tensors.keys() == {"w"}


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (b"}", b"K\x01s.", "tuple is used as a key"),
        (b"", b"\x8c\x01a\x93.", "something else than text"),
        (b"", b"Q.", "names no storage"),
        (b"", b".", "holds a tuple"),
        (torch_pickle()[: torch_pickle().index(b"tQ") + 2] + b"K\x00", b"h\x00\x89NtRs.", "not sizes"),
    ],
)
def test_values_of_exponential_size_are_never_walked(
    before: bytes, after: bytes, message: str, tmp_path: Path
) -> None:
    bomb = before.removeprefix(b"\x80\x02") + b")" + b"q\x00h\x00\x86" * 60
    with pytest.raises(CheckpointError, match=message):
        open_pickled(archive(tmp_path / "x.pt", b"\x80\x04" + bomb + after, data_0=FOUR))


def test_plain_values_of_exponential_size_are_never_walked(tmp_path: Path) -> None:
    bomb: dict[str, Any] = {}
    for _ in range(40):
        bomb = {"a": bomb, "b": bomb}
    wide = {str(n): 1 for n in range(100)}
    for _ in range(6):
        wide = dict.fromkeys(wide, wide)  # type: ignore[arg-type]
    for value in (bomb, wide):
        pickled = torch_pickle()[:-1] + b"X\x01\x00\x00\x00e" + pickle.dumps(value, 2)[2:-1] + b"s."
        path = archive(tmp_path / "x.pt", pickled, data_0=FOUR)
        with pytest.raises(CheckpointError, match="entry 'e' of the state dict is a dict"):
            open_pickled(path, values=True)
    small = torch_pickle()[:-1] + b"X\x01\x00\x00\x00e" + pickle.dumps({"k": {"n": 2}}, 2)[2:-1] + b"s."
    assert open_pickled(archive(path, small, data_0=FOUR), values=True).values == {"e": {"k": {"n": 2}}}


def test_opcodes_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_data, "_MAX_OPCODES", 1_000)
    assert open_pickled(DATA / "state_dict.pt").tensors
    with pytest.raises(CheckpointError, match="more than 1000 opcodes"):
        open_pickled(archive(tmp_path / "x.pt", b"}" * 1_001 + b".", data_0=FOUR))


def test_tensors_that_repeat_their_storage_are_counted_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = archive(tmp_path / "x.pt", torch_pickle(shape=100, stride=0), data_0=FOUR)
    monkeypatch.setattr(pickled_file, "_MAX_EXPANDED", 384)
    assert read_whole(open_pickled(path).tensors["w"]).shape == (100,)
    monkeypatch.setattr(pickled_file, "_MAX_EXPANDED", 383)
    with pytest.raises(CheckpointError, match=r"x\.pt: tensor 'w' of shape \(100,\) would take 400 bytes"):
        open_pickled(path)


def test_a_stride_as_large_as_the_file_does_not_read_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.write(np.float32(3).tobytes())
        file.seek(2**36)
        file.write(np.float32(4).tobytes())
    tensor = StridedTensor("x", (2,), np.dtype(np.float32), WeightFile.open(path), 0, (2**34,))
    assert read_whole(tensor).tolist() == [3, 4]


def test_the_allow_list_covers_what_torch_writes() -> None:
    names = {"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3", "collections.OrderedDict"}
    with zipfile.ZipFile(DATA / "state_dict.pt") as file:
        pickled = file.read(next(n for n in file.namelist() if n.endswith("data.pkl")))
    used = {
        str(a).replace(" ", ".") for o, a, _ in pickletools.genops(io.BytesIO(pickled)) if o.name == "GLOBAL"
    }
    assert names < used
