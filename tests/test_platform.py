"""What differs between operating systems, and what is done where a system lacks it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mergelab import platform
from mergelab.platform import exchange, try_lock, usable_cores


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
    if not exchange(a, b):
        pytest.skip("no exchange in one step on this system or file system")
    assert [p.name for p in a.iterdir()] == ["b ü"]
    assert [p.name for p in b.iterdir()] == ["a"]


def test_a_folder_and_a_file_are_exchanged(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir()
    b.write_text("b")
    if not exchange(a, b):
        pytest.skip("no exchange in one step on this system or file system")
    assert a.read_text() == "b"
    assert b.is_dir()


def test_an_exchange_with_nothing_fails_and_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    if platform._rename_with_flags() is None:
        pytest.skip("no exchange in one step on this system")
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
