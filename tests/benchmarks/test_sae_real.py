"""The benchmark on a real model's activations: its table, its page, and whose scores they are."""

from __future__ import annotations

from dataclasses import asdict

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.real_scores import Judge, RememberedActivations
from benchmarks.sae_real import FULL, page, render
from mergelab.activations.model_activations import ModelActivations
from mergelab.sae.evaluation.downstream import evaluate_downstream
from mergelab.sae.sae import SAE, SAEConfig
from tests.sae.planted_sink import SITE, WIDTH, planted_sink, sink_tokens


def _cell(fvu: float, rate: float = 1e-3) -> dict[str, float]:
    return {"learning_rate": rate, "fvu": fvu, "alive": 1.0, "cpu_seconds": 20.0}


def test_the_best_rate_is_that_of_the_first_seed_and_every_column_says_who_leads() -> None:
    cells = {
        "mergelab-1-0": _cell(0.20),
        "mergelab-1-0-scores": {"delta_ce": 0.3},
        "mergelab-1-1": _cell(0.22),
        "mergelab-1-1-scores": {"delta_ce": 0.5},
        "mergelab-2-0": _cell(0.23),
        "SAELens-1-0": _cell(0.40, 3e-4),
        "SAELens-1-0-scores": {"delta_ce": 0.9},
        "SAELens-4-0": _cell(0.25, 1.2e-3),
        "SAELens-4-0-scores": {"delta_ce": 0.2},
        "SAELens-4-1": _cell(0.35, 1.2e-3),  # trained, and not scored yet
    }
    rows = render({"cells": cells}).splitlines()[2:]
    assert [row.split(" | ")[:4] for row in rows] == [
        ["| mergelab", "0.001, default, best of 2", "**0.2100** ± 0.0141", "0.400 ± 0.141"],
        ["| SAELens", "0.0003, default", "0.4000", "0.900"],
        ["| SAELens", "0.0012, best of 2", "0.2500", "**0.200**"],
    ]
    assert rows[0].endswith("| 2 |") and rows[2].endswith("| 1 |")


def test_the_page_says_how_the_table_was_made() -> None:
    cells = {"model": {"ce": 2.5}, "mergelab-1-0": _cell(0.2), "mergelab-1-0-scores": {"delta_ce": 0.3}}
    results = {"cells": cells, "size": asdict(FULL), "site": "blocks.0.mlp.out", "machine": {"cores": "2"}}
    text = page(results)
    assert render(results) in text and "| mergelab | 0.001: 0.2000 |" in text
    assert f"{FULL.rows:,} tokens that count" in text and "over the model's own\n2.500," in text
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 110


@pytest.mark.slow
def test_scores_are_those_of_the_library_and_rows_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    directions = np.linalg.qr(np.random.default_rng(0).standard_normal((WIDTH, WIDTH)))[0].astype(np.float32)
    weights = jnp.asarray(directions)
    sae = SAE(weights.T, jnp.zeros(WIDTH), weights, jnp.zeros(WIDTH), SAEConfig("topk", k=3)).checked()
    source = RememberedActivations(*planted_sink(), sink_tokens(32), (SITE,), batch=8)
    judge = Judge(source, {}, mask_token=0, spliced=8, explained=2, examples=2)
    wanted = evaluate_downstream(sae, judge.evidence.judge, contexts=8)
    assert wanted.ce_spliced != pytest.approx(wanted.ce, rel=1e-3)
    assert judge.spliced_loss(None) == pytest.approx(wanted.ce, rel=1e-5)
    assert judge.spliced_loss(sae) == pytest.approx(wanted.ce_spliced, rel=1e-5)
    first = judge.reconstruction(sae)
    monkeypatch.setattr(ModelActivations, "_compute", lambda *_: pytest.fail("these rows are known"))
    assert judge.reconstruction(sae) == first and 0.1 < first["fvu"] < 1  # of the sinks it would be near 0
