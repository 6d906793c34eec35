"""numpy's files are read as numpy reads them; what is not sound is refused before it costs anything."""

from __future__ import annotations

import random
import struct
import time
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergelab.checkpoints.npy_files import open_npy, open_npz, parse_npy_header
from mergelab.errors import CheckpointError, MergelabError


def _header(text: str, version: int = 1) -> bytes:
    raw = text.encode() + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(raw)) + raw


def _npy(array: np.ndarray, shape: Any = None, descr: Any = None, fortran: Any = False) -> bytes:
    said = {
        "descr": array.dtype.str if descr is None else descr,
        "fortran_order": fortran,
        "shape": array.shape if shape is None else shape,
    }
    return _header(repr(said)) + array.tobytes()


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2", "<f8", ">f8", "<i4", "|u1", "|b1"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_files_are_read_as_numpy_reads_them(tmp_path: Path, dtype: str, order: Any) -> None:
    array = np.asarray(np.arange(35).reshape(7, 5) % 2, dtype=dtype, order=order)
    np.save(tmp_path / "x.npy", array)
    found = open_npy(tmp_path / "x.npy")
    assert found.header.shape == (7, 5) and found.header.dtype == array.dtype
    for start, stop in ((0, 7), (2, 5), (6, 7), (3, 3)):
        np.testing.assert_array_equal(found.rows(start, stop), array[start:stop])
    save = np.savez if order == "C" else np.savez_compressed
    save(tmp_path / "x.npz", x=array, empty=np.zeros((0, 3), dtype), scalar=np.array(1, dtype))
    arrays = open_npz(tmp_path / "x.npz", ["x", "scalar", "empty"])
    np.testing.assert_array_equal(arrays["x"].read(), array)
    assert arrays["scalar"].read() == 1 and arrays["empty"].read().shape == (0, 3)


def test_old_headers_are_understood(tmp_path: Path) -> None:
    text = "{'descr': '<f4', 'fortran_order': False, 'shape': (3L, 2L), }"
    assert parse_npy_header(_header(text), "x").shape == (3, 2)
    assert parse_npy_header(_header(text, 2), "x").length == 12 + len(text) + 1
    (tmp_path / "x.npy").write_bytes(_npy(np.ones((2, 2), np.float32), (1, 2)))  # more than the header says
    assert open_npy(tmp_path / "x.npy").rows(0, 1).tolist() == [[1, 1]]


FOUR = np.ones((2, 2), np.float32)
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not a .npy file"),
    "another kind": (b"PK\x03\x04" + bytes(30), "is not a .npy file"),
    "version": (b"\x93NUMPY\x09\x00" + bytes(30), "version 9.0"),
    "brace": (_npy(FOUR).replace(b"}", b"{"), "damaged header"),
    "quote": (_npy(FOUR).replace(b"'descr", b"descr"), "damaged header"),
    "call": (_header("{'descr': open('x'), 'fortran_order': False, 'shape': ()}"), "damaged header"),
    "brackets": (_header("(" * 5_000), "damaged header"),
    "minus": (_header("-" * 9_000 + "1"), "damaged header"),
    "digits": (_header("{'shape': (" + "9" * 6_000 + ",)}"), "damaged header"),
    "long": (_header(" " * 20_000), "longer than the file or than the 10000"),
    "keys": (_header("{'descr': '<f4', 'shape': (1,)}"), "damaged header"),
    "negative": (_npy(FOUR, (-1, 2)), "not a tuple of sizes"),
    "fractional": (_npy(FOUR, (2.0, 2)), "not a tuple of sizes"),
    "truth": (_npy(FOUR, (True, 2)), "not a tuple of sizes"),
    "list": (_npy(FOUR, [2, 2]), "not a tuple of sizes"),
    "order": (_npy(FOUR, fortran=1), "no truth value"),
    "huge": (_npy(FOUR, (2**62, 2**62)), "too large to be genuine"),
    "huge and empty": (_npy(FOUR, (2**62, 0)), "too large to be genuine"),
    "larger": (_npy(FOUR, (3, 2)), "reaches to byte"),
    "much larger": (_npy(FOUR, (2**40, 2)), "reaches to byte"),
    "axes": (_npy(FOUR, (1,) * 65), "not a tuple of sizes"),
    "objects": (_npy(FOUR, descr="|O"), "Python objects, which are never unpickled"),
    "records": (_npy(FOUR, descr=[("a", "<f4")]), "not plain numbers"),
    "void": (_npy(FOUR, descr="<V2"), "not plain numbers"),
    "dtype": (_npy(FOUR, descr="f4,f4"), "not plain numbers"),
    "no dtype": (_npy(FOUR, descr=[]), "not plain numbers"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_unsound_npy_files_are_refused_in_our_words(tmp_path: Path, name: str) -> None:
    raw, words = BROKEN[name]
    (tmp_path / "x.npy").write_bytes(raw)
    with pytest.raises(CheckpointError, match=words) as caught:
        open_npy(tmp_path / "x.npy")
    assert "x.npy" in str(caught.value) and "allow_pickle" not in str(caught.value)
    if raw:
        np.savez(tmp_path / "x.npz", ok=FOUR)
        with zipfile.ZipFile(tmp_path / "x.npz", "a", zipfile.ZIP_DEFLATED) as file:
            file.writestr("bad.npy", raw)
        words = words if "reaches" not in words else "but the zip declares"
        with pytest.raises(CheckpointError, match=words):
            open_npz(tmp_path / "x.npz", ["ok", "bad"])


def _bomb(path: Path, size: int) -> None:
    """An array of `size` zero bytes in a thousandth of the space."""
    head = _header(repr({"descr": "<f4", "fortran_order": False, "shape": (size // 4,)}))
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file,
        file.open("x.npy", "w") as member,
    ):
        member.write(head)
        for _ in range(size // 2**20):
            member.write(bytes(2**20))


def test_nothing_is_inflated_far_beyond_what_is_stored(tmp_path: Path) -> None:
    import resource

    _bomb(tmp_path / "x.npz", 2**27)
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(CheckpointError, match="would inflate to 134217"):
        open_npz(tmp_path / "x.npz", ["x"])
    # A directory that declares less than what comes is not believed either.
    raw = (tmp_path / "x.npz").read_bytes()
    place = raw.rindex(b"PK\x01\x02") + 24
    (tmp_path / "x.npz").write_bytes(raw[:place] + struct.pack("<I", 2**20 + 128) + raw[place + 4 :])
    with pytest.raises(CheckpointError, match="the zip declares"):
        open_npz(tmp_path / "x.npz", ["x"])["x"].read()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB
    assert time.monotonic() - begun < 5


def test_damaged_zips_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    rng = np.random.default_rng(0)
    for save in (np.savez, np.savez_compressed):
        save(path, x=rng.standard_normal((8, 8)), y=np.zeros(3))
        raw = bytearray(path.read_bytes())
        raw[raw.index(b"x.npy") + 300] ^= 1
        path.write_bytes(raw)
        with pytest.raises(CheckpointError, match=r"x.npz: array 'x.npy'.* is damaged"):
            open_npz(path, ["x"])["x"].read()
        assert open_npz(path, ["y"])["y"].read().tolist() == [0, 0, 0]
    with pytest.raises(CheckpointError, match="has no array 'z', only x, y"):
        open_npz(path, ["z"])
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(path, "w", method) as file:
            file.writestr("x.npy", _npy(FOUR))
        with pytest.raises(CheckpointError, match="a method that numpy does not write"):
            open_npz(path, ["x"])
    path.write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"is not a \.npz file"):
        open_npz(path, ["x"])
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_npz(tmp_path / "none.npz", ["x"])
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_npy(tmp_path / "null\0.npy")
    with zipfile.ZipFile(path, "w") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("x.npy", _npy(FOUR))
        file.writestr("x.npy", _npy(FOUR))
    with pytest.raises(CheckpointError, match="'x' twice"):
        open_npz(path, ["x"])


@pytest.mark.parametrize("kind", ["npy", "npz", "deflated"])
def test_any_damage_is_refused_or_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "npy":
        np.save(tmp_path / "x.npy", FOUR)
        path = tmp_path / "x.npy"
    else:
        save = np.savez if kind == "npz" else np.savez_compressed
        save(tmp_path / "x.npz", x=FOUR, y=np.arange(50.0))
        path = tmp_path / "x.npz"
    sound, rng, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(400):
        raw = bytearray(sound)
        if rng.random() < 0.2:
            del raw[rng.randrange(len(raw)) :]
        for _ in range(rng.randint(1, 3)):
            if raw:
                raw[rng.randrange(len(raw))] = rng.randrange(256)
        path.write_bytes(raw)
        try:
            if kind == "npy":
                open_npy(path).rows(0, 1)
            else:
                for array in open_npz(path, ["x", "y"]).values():
                    array.read()
        except MergelabError as error:
            refused += 1
            assert len(str(error)) < 2_000
        except ValueError:  # an array of other axes has no rows of that width
            assert kind == "npy" and len(open_npy(path).header.shape) != 2
    assert refused > 100


def test_the_checksum_is_zips_own(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=FOUR)
    with zipfile.ZipFile(tmp_path / "x.npz") as file:
        assert zlib.crc32(file.read("x.npy")) == file.getinfo("x.npy").CRC
