"""Files of torch before 1.6: hostile and damaged ones are refused in a sentence, and nothing in them runs."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergelab.checkpoints.folder import open_checkpoint
from mergelab.checkpoints.lora_tensor import read_whole
from mergelab.checkpoints.torch_reader import open_pickled
from mergelab.errors import CheckpointError
from tests.checkpoints.test_pickled import FOUR, Evil, torch_pickle

MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
MACHINE = pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}, 2)


def legacy(
    *,
    magic: bytes = MAGIC,
    protocol: bytes = pickle.dumps(1001, 2),
    machine: bytes = MACHINE,
    described: bytes | None = None,
    view: bytes = b"N",
    keys: bytes = pickle.dumps(["0"], 2),
    count: int = 4,
    data: bytes = FOUR,
) -> bytes:
    """A state dict {"w": four numbers} as torch 1.5 wrote it, each part of it replaceable."""
    if described is None:
        described = torch_pickle().replace(b"tQ", view + b"tQ")
    return magic + protocol + machine + described + keys + struct.pack("<q", count) + data


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_the_handmade_file_is_sound_and_a_model(tmp_path: Path) -> None:
    write(tmp_path / "pytorch_model.bin", legacy())
    source = open_checkpoint(tmp_path).tensors["w"]
    assert read_whole(source).tolist() == [0, 1, 2, 3]
    assert os.path.getsize(tmp_path / "pytorch_model.bin") == len(legacy())


def test_a_view_is_a_part_of_its_storage(tmp_path: Path) -> None:
    view = pickle.dumps(("x", 2, 4), 2)[2:-1]
    eight = np.arange(8, dtype=np.float32).tobytes()
    described = torch_pickle(count=8).replace(b"tQ", view + b"tQ")
    path = write(tmp_path / "x.pt", legacy(described=described, count=8, data=eight))
    assert read_whole(open_pickled(path).tensors["w"]).tolist() == [2, 3, 4, 5]


DAMAGED = {
    "another protocol": (
        legacy(protocol=pickle.dumps(1002, 2)),
        "not a little-endian file of torch's protocol 1001",
    ),
    "big-endian": (legacy(machine=pickle.dumps({"little_endian": False}, 2)), "not a little-endian file"),
    "no description of the machine": (legacy(machine=pickle.dumps(None, 2)), "not a little-endian file"),
    "a key that no tensor has": (
        legacy(keys=pickle.dumps(["1"], 2)),
        "lists storages that no tensor of it has",
    ),
    "a key that is no text": (legacy(keys=pickle.dumps([0], 2)), "lists storages that no tensor"),
    "a storage that is not there": (
        legacy(keys=pickle.dumps([], 2)),
        "refers to the storage '0', which is not in",
    ),
    "a key twice": (legacy(keys=pickle.dumps(["0", "0"], 2), data=FOUR + legacy()[-24:]), "there twice"),
    "too short": (legacy()[:-1], "reaches beyond the end of the file"),
    "a length beyond all files": (legacy(count=2**62), "reaches beyond the end"),
    "a negative length": (legacy(count=-1), "reaches beyond the end"),
    "another length than described": (legacy(count=3, data=FOUR[:12]), "has 12 bytes where 16 were expected"),
    "a view beyond its storage": (
        legacy(view=pickle.dumps(("x", 2, 4), 2)[2:-1]),
        "is no part of another one",
    ),
    "a view of strange kind": (legacy(view=b"\x88"), "is no part of another one"),
    "no further pickles": (MAGIC, "is not a readable pickle"),
    "a storage in the description of the machine": (
        legacy(machine=torch_pickle().replace(b"tQ", b"NtQ")),
        "global 'torch._utils._rebuild_tensor_v2'",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused_in_a_sentence(case: str, tmp_path: Path) -> None:
    content, message = DAMAGED[case]
    with pytest.raises(CheckpointError, match=message):
        open_pickled(write(tmp_path / "x.pt", content))


@pytest.mark.parametrize("part", ["protocol", "machine", "described", "keys"])
def test_no_part_of_a_hostile_file_runs(part: str, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    evil = pickle.dumps(Evil(Path.touch, trace), 2)
    with pytest.raises(CheckpointError, match="could run code and is never called here"):
        open_pickled(write(tmp_path / "x.pt", legacy(**{part: evil})))
    assert not trace.exists()
    pickle.loads(evil)  # the control: Python's own unpickler does run it
    assert trace.exists()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_corrupted_file_is_refused_or_read(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(legacy())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(len(MAGIC), len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(len(MAGIC), len(content)))]
    path = write(tmp_path_factory.getbasetemp() / "corrupted.pt", bytes(content))
    try:
        for source in open_pickled(path).tensors.values():
            read_whole(source)
    except CheckpointError as error:
        assert len(str(error)) < 2000
