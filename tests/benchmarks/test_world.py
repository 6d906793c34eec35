"""The program of benchmarks/world.md: its page is its own; its sections count and compare what they say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks.world import PAGE, RESULTS, SECTIONS, render
from benchmarks.world_parts.environments import interpreter, make, versions
from benchmarks.world_parts.merges import NOISE, compare, make_siblings
from benchmarks.world_parts.runtimes import RUNTIMES, Counts, read_counts
from benchmarks.world_parts.section import Section


def test_the_published_page_is_the_programs_own() -> None:
    kept = json.loads(RESULTS.read_text())
    sections = {name: Section(**fields) for name, fields in kept["sections"].items()}
    assert sections.keys() <= SECTIONS.keys()
    assert render(sections, kept["machine"]) == PAGE.read_text(encoding="utf-8")


def test_reports_of_pytest_are_counted(tmp_path: Path) -> None:
    report = tmp_path / "r.xml"
    suite = '<testsuites><testsuite tests="12" failures="2" errors="1" skipped="3"/></testsuites>'
    report.write_text(suite)
    assert read_counts(report) == Counts(passed=6, failed=3, skipped=3)


def test_pins_of_runtimes_are_files_of_the_repository(repository: Path) -> None:
    pins = {runtime.pins for runtime in RUNTIMES if runtime.pins}
    assert pins == {".ci/colab.txt", ".ci/kaggle.txt"}
    for file in pins:
        assert "jax==0.7.2" in (repository / file).read_text().splitlines()


def test_siblings_are_small_steps_of_known_size_away(tmp_path: Path) -> None:
    base = {
        "a": np.random.default_rng(0).normal(0, 3, (200, 50)).astype(np.float32),
        "b": np.ones(9, np.float32),
    }
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    make_siblings(tmp_path / "base", [tmp_path / "x", tmp_path / "y"])
    x, y = (load_file(tmp_path / name / "model.safetensors") for name in "xy")
    assert (tmp_path / "x" / "config.json").read_text() == "{}"
    steps = [(model["a"] - base["a"]).ravel() for model in (x, y)]
    assert all(step.std() == pytest.approx(NOISE * 3, rel=0.05) for step in steps)
    assert abs(np.corrcoef(*steps)[0, 1]) < 0.05
    assert compare(x, x, base)[0] == 0
    difference, change = compare(x, y, base)
    assert change == pytest.approx(max(np.abs(y[n] - base[n]).max() for n in base)) and difference > 0
    with pytest.raises(RuntimeError, match=r"only one of the two merges holds \['b'\]"):
        compare({"a": x["a"]}, y, base)


def test_an_environment_is_found_again_by_what_is_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    (folder / "bin").mkdir(parents=True)
    (folder / "installed.json").write_text('[["x==1"]]')
    assert make(folder, "no such python", [["x==1"]]) == folder / "bin"
    with pytest.raises(FileNotFoundError):
        make(folder, "no such python", [["x==2"]])
    assert interpreter("{}.{}".format(*sys.version_info[:2])) == sys.executable
    with pytest.raises(RuntimeError, match=r"no Python 2\.1 here: set PYTHON21"):
        interpreter("2.1")
    found = versions(Path(sys.executable).parent, ["numpy"])
    assert found["numpy"] == np.__version__ and found["python"].startswith("3.")
