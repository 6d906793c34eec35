"""The loading benchmark runs on a tiny model, measures what it says, and its published table is its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.convert import main, render
from benchmarks.table import replace_section


@pytest.mark.slow
def test_a_quick_run_loads_every_byte_each_way(tmp_path: Path) -> None:
    ours = ["read", "read into new memory", "mergelab, 8 devices"]
    results = main(["--quick", "--work", str(tmp_path), "--repeats", "1", "--only", *ours])
    found = results["programs"]
    size = (tmp_path / "tiny" / "model.safetensors").stat().st_size
    assert list(found) == ours
    assert found["mergelab, 8 devices"]["loaded"] >= results["bytes"] > size * 0.9
    assert found["read into new memory"]["loaded"] == size
    assert all(0 < program["seconds"] < 60 for program in found.values())
    with pytest.raises(SystemExit):
        main(["--work", str(tmp_path), "--only", "mergelab, 1 device"])


def test_figures_that_miss_their_aim_are_bold() -> None:
    programs = {
        "read": {"seconds": 1.0, "beyond": 0.0},
        "mergelab, 1 device": {"seconds": 1.4, "beyond": 5e6},
        "mergelab, 8 devices": {"seconds": 1.6, "beyond": 2e8},
        "transformers": {"seconds": 9.0, "beyond": 9e9},
    }
    table = render({"machine": {}, "load": 0.0, "repeats": 1, "bytes": 1_000_000_000, "programs": programs})
    assert "| mergelab, 1 device | 1.400 | 1.40 | 5 |" in table
    assert "| mergelab, 8 devices | 1.600 | **1.60** | **200** |" in table
    assert "| transformers | 9.000 | 9.00 | 9000 |" in table


def test_the_published_table_is_that_of_the_recorded_run(repository: Path) -> None:
    recorded = repository / "benchmarks" / "results" / "convert.json"
    page = (repository / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert replace_section(page, "convert table", render(json.loads(recorded.read_text()))) == page
