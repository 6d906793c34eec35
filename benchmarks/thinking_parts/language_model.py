"""The same methods on a language model that was not made for them: mechanics, and what they come to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import mergelab as ml
from mergelab.decoding import Temperature, Thinking, sample

__all__ = ["language_model", "questions"]


def questions(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Sums of two numbers below 50, in words."""
    rng = np.random.default_rng(seed)
    pairs = rng.integers(2, 50, (count, 2)).tolist()
    return [{"prompt": f"What is {a} + {b}? Answer with the number.", "answer": a + b} for a, b in pairs]


def language_model(place: Path, count: int = 10, samples: int = 4, budget: int = 24) -> dict[str, Any]:
    """Accuracy, tokens and operations of every method.

    Args:
        place: a model in any form that `mergelab.load_model` takes.
        count: number of questions.
        samples: number of traces.
        budget: most new tokens.
    """
    model, params = ml.load_model(place)
    tokenizer = ml.load_tokenizer(place)
    found = {}
    for method in ml.reasoning.METHODS:
        solved = ml.solve(
            model, params, tokenizer, tasks=questions(count), method=method, samples=samples, budget=budget,
            branch=2, sampler=sample(Temperature(0.7)),
            thinking=Thinking("<|im_end|>", budget // 2, None, " Wait"),
        )  # fmt: skip
        results = solved.results
        found[method] = {
            "accuracy": results["accuracy"],
            "answered": results["answered"],
            "tokens": results["tokens"]["per_task"],
            "flops": results["flops"]["per_task"],
        }
        print(f"{method}: {results['accuracy']['value']:.3f}", flush=True)
    return {"model": place.name, "questions": count, "samples": samples, "budget": budget, "methods": found}
