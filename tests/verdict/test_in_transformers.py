"""Bits per byte, hits and choices beside those of transformers, on tiny models and on a merge of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mergelab as ml
from mergelab.verdict import read_tasks

CONTEXT = 8


@pytest.mark.oracle
def test_figures_are_those_of_transformers(here: Path, tmp_path: Path) -> None:
    import torch
    import transformers

    ml.merge("r.yaml", tmp_path / "merged")
    found = ml.evaluate_model("r.yaml", text=here / "docs.jsonl", tasks=here / "tasks.jsonl", context=CONTEXT)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32
    ).eval()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "merged" / "tokenizer.json")
    )

    def log_p(ids: Any) -> np.ndarray:
        with torch.no_grad():
            return theirs(torch.tensor([list(ids)])).logits[0].double().log_softmax(-1).numpy()

    nats = hits = tokens = size = 0.0
    for line in (here / "docs.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        encoded = tokenizer(text, return_offsets_mapping=True)
        ids = encoded["input_ids"]
        size += len(text.encode()) - encoded["offset_mapping"][0][1]
        for start in range(1, len(ids), CONTEXT):
            window = ids[start - 1 : start + CONTEXT]
            p = log_p(window[:-1])
            nats -= sum(p[i, target] for i, target in enumerate(window[1:]))
            hits += sum(p[i].argmax() == target for i, target in enumerate(window[1:]))
            tokens += len(window) - 1
    data = found.to_dict()
    assert data["bits_per_byte"]["value"] == pytest.approx(nats / math.log(2) / size, abs=1e-5)
    assert data["accuracy"]["value"] == hits / tokens and data["tokens"] == tokens and data["bytes"] == size
    assert found.tasks is not None
    for task, scores in zip(read_tasks(here / "tasks.jsonl"), found.tasks.log_likelihoods, strict=True):
        for choice, score in zip(task.choices, scores, strict=True):
            ids = tokenizer(f"{task.question} {choice}")["input_ids"]
            p, first = log_p(ids[:-1]), len(ids) - len(choice.split())
            assert score == pytest.approx(sum(p[i - 1, ids[i]] for i in range(first, len(ids))), abs=1e-4)
