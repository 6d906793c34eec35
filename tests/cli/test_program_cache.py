"""The folder of compiled programs belongs to one kind of machine, and does not grow without end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mergelab.cli import program_cache
from mergelab.platform import cpu_kind


def test_programs_are_kept_by_jax_and_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = program_cache.program_cache("0.10.2")
    assert here == tmp_path / "mergelab" / "xla" / f"jax-0.10.2-{cpu_kind()}" and not here.exists()
    assert program_cache.program_cache("0.12.0") != here
    monkeypatch.setattr(program_cache, "cpu_kind", lambda: "another")
    assert program_cache.program_cache("0.10.2") != here


def test_the_least_recently_used_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(program_cache, "MOST_BYTES", 1000)
    other = tmp_path / "mergelab" / "xla" / "jax-0.9.0-another"
    here = program_cache.program_cache("0.10.2")
    for folder in (other, here):
        folder.mkdir(parents=True)
        for n in range(5):
            (folder / f"{n}-cache").write_bytes(bytes(100))
            os.utime(folder / f"{n}-cache", (n + 10 * (folder == here),) * 2)
    program_cache.program_cache("0.10.2")
    assert len([*other.iterdir(), *here.iterdir()]) == 10, "1,000 bytes are allowed"
    (here / "new-cache").write_bytes(b"1")
    program_cache.program_cache("0.10.2")
    assert sorted(path.name for path in other.iterdir()) == ["3-cache", "4-cache"]
    assert len([*here.iterdir()]) == 6
