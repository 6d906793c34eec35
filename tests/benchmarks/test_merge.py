"""The merge benchmark runs on a tiny model, measures what it says, and the published tables are its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from benchmarks.cases import CASES
from benchmarks.family import QWEN2_0_5B, TINY, build_family
from benchmarks.floor import stream
from benchmarks.merge import main
from benchmarks.process import measure
from benchmarks.table import render, render_summary, replace_section
from mergelab.operators import OPERATORS


def test_the_family_is_a_base_and_small_steps_away_from_it(tmp_path: Path) -> None:
    folders = build_family(tmp_path, TINY)
    base, first, second = (
        load_file(folders[name] / "model.safetensors") for name in ("base", "first", "second")
    )
    assert {name: value.shape for name, value in base.items()} == dict(TINY.tensors())
    name = "model.layers.1.mlp.up_proj.weight"
    steps = [model[name].astype(np.float32) - base[name].astype(np.float32) for model in (first, second)]
    assert all(5e-4 < step.std() < 2e-3 for step in steps)
    assert abs(np.corrcoef(steps[0].ravel(), steps[1].ravel())[0, 1]) < 0.1
    assert 0.49e9 < QWEN2_0_5B.parameters < 0.50e9


def test_the_family_in_shards_holds_the_same_tensors(tmp_path: Path) -> None:
    whole = load_file(build_family(tmp_path / "one", TINY)["third"] / "model.safetensors")
    folder = build_family(tmp_path / "three", TINY, shards=3)["third"]
    where = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(where.values())) == 3
    for name, value in whole.items():
        assert np.array_equal(load_file(folder / where[name])[name], value)


def test_the_floor_writes_as_many_bytes_as_one_input(tmp_path: Path) -> None:
    size = (9 << 20) + 17
    inputs = [tmp_path / "a", tmp_path / "b"]
    for path in inputs:
        path.write_bytes(np.random.default_rng(0).bytes(size))
    assert stream(inputs, tmp_path / "out") > 0
    assert (tmp_path / "out").read_bytes() == inputs[0].read_bytes()
    inputs[1].write_bytes(b"short")
    with pytest.raises(ValueError, match="different sizes"):
        stream(inputs, tmp_path / "out")


def test_a_process_is_measured_with_its_children(tmp_path: Path) -> None:
    hold = "import time; b = bytearray(120_000_000); time.sleep(.3)"
    alone = measure([sys.executable, "-c", "import time; time.sleep(.3)"], cwd=tmp_path)
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
    assert 0.3 <= alone.seconds < 10
    assert measure([sys.executable, "-c", child], cwd=tmp_path).peak_anonymous > alone.peak_anonymous + 1e8
    with pytest.raises(RuntimeError, match="out of luck"):
        measure([sys.executable, "-c", "raise SystemExit('out of luck')"], cwd=tmp_path)


def test_every_case_names_an_operator_with_its_required_parameters() -> None:
    for case in CASES.values():
        declared = OPERATORS[case.method].parameters
        given = {*case.per_model, *case.shared}
        assert given <= {p.name for p in declared}
        assert {p.name for p in declared if p.required} <= given


@pytest.mark.slow
def test_a_quick_run_measures_floor_and_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.merge.ROUNDS", 1)
    results = main(["--quick", "--work", str(tmp_path), "--only", "linear", "ties", "--repeats", "1"])
    for name in ("linear", "ties"):
        median = results["cases"][name]["median"]
        assert 0 < median["mergelab_streaming_seconds"] < median["mergelab_seconds"]
        assert median["mergelab_anonymous_bytes"] > 10e6
        assert median["floor_seconds"] > 0
    assert not list(tmp_path.glob("*.out")), "outputs are left behind"


def test_the_published_tables_are_those_of_the_recorded_run(repository: Path) -> None:
    recorded = repository / "benchmarks" / "results" / "merge.json"
    results = json.loads(recorded.read_text())
    for path, text in (("benchmarks/README.md", render(results)), ("README.md", render_summary(results))):
        page = (repository / path).read_text(encoding="utf-8")
        assert replace_section(page, "merge table", text) == page, f"{path} is not the recorded run's table"
    with pytest.raises(ValueError, match="no section"):
        replace_section("a page without it", "merge table", "text")
