"""The benchmark of comparisons runs on a tiny pair, and its floor reads every byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.diff import build_pair, main, read, render
from benchmarks.family import TINY
from mergelab.merging import diff_models


def test_the_pair_differs_by_a_hundredth_and_is_read_whole(tmp_path: Path) -> None:
    folders = build_pair(tmp_path, TINY)
    first = diff_models(folders[1], folders[0]).total.first
    assert first.relative_change == pytest.approx(0.01, rel=0.1)
    files = [folder / "model.safetensors" for folder in folders]
    assert read(files, 2) == sum(file.stat().st_size for file in files)
    programs = {
        name: {"seconds": s, "processor": s, "memory": 1e8} for name, s in (("read", 2.0), ("x", 3.0))
    }
    table = render({"machine": {}, "load": 0.0, "repeats": 1, "bytes": 6e9, "programs": programs})
    assert "| x | 3.00 | 1.50 | 2.00 | 3.00 | 100 |" in table


@pytest.mark.slow
def test_a_quick_run_measures_both(tmp_path: Path) -> None:
    results = main(["--quick", "--work", str(tmp_path), "--repeats", "1"])
    assert set(results["programs"]) == {"read", "mergelab diff"}
    assert all(np.isfinite(list(each.values())).all() for each in results["programs"].values())
