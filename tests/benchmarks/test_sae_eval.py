"""The scorecard benchmark's table has a row for each shape and program, with means and spread over seeds."""

from __future__ import annotations

from benchmarks.sae_eval import render


def test_rows_are_means_over_seeds() -> None:
    def run(nmse: float) -> dict[str, object]:
        return {
            "scores": {"reconstruction.nmse": nmse},
            "seconds": {"reconstruction": 2.0},
            "train_seconds": 1,
        }

    runs = {"64/4/mergelab/0": run(0.1), "64/4/mergelab/1": run(0.3), "64/4/SAELens/0": run(0.5)}
    text = render({"machine": {"cores": "2"}, "host": {"5": 6.0}, "runs": runs})
    ours, theirs = (line for line in text.splitlines() if line.startswith("| 64"))
    assert "| mergelab | 0.200 ± 0.141 |" in ours and ours.endswith("| 2 |")
    assert "| SAELens | 0.500 |" in theirs and theirs.endswith("| 1 |")
    assert "6.000 at step 5" in text and "reconstruction 2.0 s" in text and "cores 2" in text
