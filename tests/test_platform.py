"""What differs between operating systems, and what is done where a system lacks it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mergelab import platform
from mergelab.checkpoints.output_target import check_target
from mergelab.errors import OutputError
from mergelab.platform import exchange, read_at, reserve, try_lock, usable_cores, write_at


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT)


def test_cores_are_those_of_the_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 4, 5}, raising=False)
    assert usable_cores() == 3


def test_cores_without_an_affinity_are_those_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert usable_cores() == 7
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores() == 1


def test_a_lock_is_held_until_its_file_is_closed(tmp_path: Path) -> None:
    first, second = _open(tmp_path / "lock"), _open(tmp_path / "lock")
    assert try_lock(first)
    assert not try_lock(second)
    os.close(first)
    assert try_lock(second)
    os.close(second)


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from mergelab.platform import try_lock\n"
        "assert try_lock(os.open(sys.argv[1], os.O_RDWR)); print('held', flush=True); sys.stdin.read()"
    )
    own = _open(tmp_path / "lock")
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        assert not try_lock(own)
        other.kill()
    assert try_lock(own)
    os.close(own)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_disk_without_locks_locks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    import fcntl

    def refuse(fd: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    file = _open(tmp_path / "lock")
    monkeypatch.setattr(fcntl, "flock", refuse)
    assert try_lock(file)
    os.close(file)


def test_a_system_without_locks_locks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    file = _open(tmp_path / "lock")
    assert try_lock(file)
    os.close(file)


def test_a_closed_file_cannot_be_locked(tmp_path: Path) -> None:
    file = _open(tmp_path / "lock")
    os.close(file)
    with pytest.raises(OSError, match="Bad file descriptor"):
        try_lock(file)


def test_folders_are_exchanged(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b ü"
    for path in (a, b):
        path.mkdir()
        (path / path.name).touch()
    exchanged = exchange(a, b)  # no file system must be able to; one that is not changes nothing
    assert [p.name for p in a.iterdir()] == ["b ü" if exchanged else "a"]
    assert [p.name for p in b.iterdir()] == ["a" if exchanged else "b ü"]


def test_a_folder_and_a_file_are_exchanged(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir()
    b.write_text("b")
    file, folder = (a, b) if exchange(a, b) else (b, a)
    assert file.read_text() == "b"
    assert folder.is_dir()


@pytest.mark.skipif(
    sys.platform not in ("linux", "darwin"), reason="only Linux and macOS exchange in one step"
)
def test_an_exchange_with_nothing_fails_and_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(FileNotFoundError, match=r"a' -> .*b'"):
        exchange(tmp_path / "a", tmp_path / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS])
def test_a_disk_without_exchange_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    import ctypes

    def refuse(*arguments: object) -> int:
        ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(platform, "_rename_with_flags", lambda: refuse)
    assert not exchange(tmp_path / "a", tmp_path / "b")


def test_a_system_without_exchange_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "_rename_with_flags", lambda: None)
    assert not exchange(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("missing", [(), ("preadv",), ("preadv", "pread")], ids=["all", "macOS", "Windows"])
def test_bytes_are_read_at_a_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...]
) -> None:
    (tmp_path / "file").write_bytes(bytes(range(100)))
    file = _open(tmp_path / "file")
    for name in missing:
        monkeypatch.delattr(os, name)
    found = bytearray(8)
    assert read_at(file, memoryview(found), 90) == 8 and found == bytes(range(90, 98))
    assert read_at(file, memoryview(found), 96) == 4 and found[:4] == bytes(range(96, 100))
    assert read_at(file, memoryview(found), 100) == 0
    os.close(file)


def test_no_call_reads_or_writes_more_than_macos_takes_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "_MOST_AT_ONCE", 3)
    file = _open(tmp_path / "file")
    reserve(file, 12)
    counts: list[int] = []
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda *call: counts.append(pwrite(*call)) or counts[-1])
    write_at(file, b"12345678", 2)
    assert counts == [3, 3, 2] and (tmp_path / "file").read_bytes() == b"\0\x0012345678\0\0"
    assert read_at(file, memoryview(bytearray(8)), 2) == 3
    os.close(file)


def test_space_is_reserved_where_the_system_can_and_the_size_set_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    file = _open(tmp_path / "file")
    reserve(file, 5000)
    assert os.fstat(file).st_size == 5000
    os.close(file)


def test_what_cannot_write_says_so_before_it_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_target(tmp_path / "out")
    monkeypatch.delattr(os, "pwrite")
    with pytest.raises(OutputError, match=r"out: .* has no os.pwrite; run mergelab under WSL"):
        check_target(tmp_path / "out")


_ELSEWHERE = """
import importlib, json, os, pkgutil, sys
from pathlib import Path

del os.sched_getaffinity, os.posix_fallocate, os.posix_fadvise, os.preadv, os.pwritev
sys.modules["fcntl"] = None
import mergelab

for module in pkgutil.walk_packages(mergelab.__path__, "mergelab."):
    if module.name != "mergelab.__main__":
        importlib.import_module(module.name)

import numpy as np
from mergelab.models.families import model_from_config
from mergelab.models.load import load_model
from mergelab.models.save import save_model

folder = Path(sys.argv[1])
config = {
    "model_type": "llama", "vocab_size": 24, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 64,
}
model = model_from_config(config)
for seed, name in enumerate("ab"):
    save_model(model, model.init(seed), folder / name)
entries = [{"model": str(folder / name), "parameters": {"weight": 0.5}} for name in "ab"]
recipe = json.dumps({"merge_method": "linear", "dtype": "float32", "models": entries})
mergelab.merge(mergelab.merging.parse_recipe(recipe), folder / "merged")
embedding = [np.asarray(load_model(folder / name)[1]["embed"]["embedding"]) for name in ("a", "b", "merged")]
np.testing.assert_allclose(embedding[2], (embedding[0] + embedding[1]) / 2, rtol=1e-6)
print("merged", os.environ["JAX_PLATFORMS"])
"""


@pytest.mark.slow
def test_models_load_and_merge_without_affinities_locks_and_preallocation(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _ELSEWHERE, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert run.stdout == "merged cpu\n", run.stderr


_ON_WINDOWS = """
import importlib, os, pkgutil, sys
from pathlib import Path

import numpy as np
import safetensors.numpy

missing = ("sched_getaffinity", "posix_fallocate", "posix_fadvise", "pread", "preadv", "pwrite", "pwritev")
missing += ("register_at_fork", "fork", "getuid", "geteuid", "sysconf", "statvfs", "O_NONBLOCK", "O_NOFOLLOW")
for name in missing:
    delattr(os, name)
sys.modules["fcntl"] = sys.modules["resource"] = sys.modules["termios"] = None
import mergelab as ml

for module in pkgutil.walk_packages(ml.__path__, "mergelab."):
    if module.name != "mergelab.__main__":
        importlib.import_module(module.name)

folder = Path(sys.argv[1])
safetensors.numpy.save_file({"w": np.arange(6, dtype=np.float32)}, folder / "a.safetensors")
tensor = ml.checkpoints.open_checkpoint(folder / "a.safetensors").tensors["w"]
assert ml.checkpoints.read_whole(tensor).tolist() == [0, 1, 2, 3, 4, 5]
ones, zeros = np.ones(2, np.float32), np.zeros(2, np.float32)
merged = ml.operators.linear(weight=[1.0, 1.0])([{"w": ones}, {"w": zeros}])
assert merged["w"].tolist() == [0.5, 0.5]
recipe = "merge_method: linear\\nmodels: [{model: a.safetensors, parameters: {weight: 1}}]"
try:
    ml.merge(ml.merging.parse_recipe(recipe), folder / "out")
except ml.errors.OutputError as error:
    print(error)
print(sorted(path.name for path in folder.iterdir()))
"""


@pytest.mark.slow
def test_what_windows_lacks_is_said_and_the_rest_works(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _ON_WINDOWS, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    said, left = run.stdout.splitlines() or [run.stderr, ""]
    assert "no os.pwrite; run mergelab under WSL" in said, run.stderr
    assert left == "['a.safetensors']"


def test_only_one_file_asks_the_operating_system(repository: Path) -> None:
    asked = {"fcntl", "msvcrt", "sched_getaffinity", "renameat2", "posix_", "os.pread", "os.pwrite"}
    found = {
        path.relative_to(repository).as_posix()
        for path in (repository / "mergelab").rglob("*.py")
        if any(word in path.read_text(encoding="utf-8") for word in asked)
    }
    assert found == {"mergelab/platform.py"}
