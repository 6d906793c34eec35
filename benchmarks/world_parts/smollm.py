"""SmolLM2-135M-Instruct: a pass over a text and a generation beside transformers, in one run.

Needs the extras `oracle` and `smollm`. The two libraries take turns in one process, so that a machine whose
speed drifts slows both.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mergelab as ml
from benchmarks.world_parts.section import Place, Section
from mergelab.decoding import generate, greedy
from tests.smollm import smollm_file

__all__ = ["measure"]

TOKENS, PROMPT, NEW = 256, 32, 32


def measure(place: Place) -> Section:
    """Rows of one pass over 256 tokens and of 32 tokens generated greedily, in float32 and bfloat16."""
    rows = []
    for dtype in ("float32", "bfloat16"):
        ours, theirs = _ours(dtype), _theirs(dtype)
        for what, mine, other in zip(
            (f"a pass over {TOKENS} tokens", f"{NEW} new tokens"), ours, theirs, strict=True
        ):
            rows.append((f"{what}, {dtype}", *_paired(mine, other, place.turns)))
    head = ("what", "mergelab", "transformers", "mergelab / transformers")
    return Section(
        f"Seconds, medians of {place.turns} turns in one process; batch 1, compiled before.", head, rows
    )


def _ids(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1000, 40_000, (1, count)).astype(np.int32)


def _ours(dtype: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    model, params = ml.load_model(smollm_file(), dtype=jnp.dtype(dtype))
    forward = jax.jit(lambda params, tokens: model.apply(params, tokens).logits)
    tokens, prompt = jnp.asarray(_ids(TOKENS)), jnp.asarray(_ids(PROMPT))
    return (
        lambda: jax.block_until_ready(forward(params, tokens)),
        lambda: jax.block_until_ready(
            generate(model, params, prompt, max_new_tokens=NEW, sampler=greedy()).tokens
        ),
    )


def _theirs(dtype: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    path = smollm_file()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=getattr(torch, dtype)
    ).eval()
    tokens, prompt = (torch.tensor(_ids(count), dtype=torch.int64) for count in (TOKENS, PROMPT))

    def forward() -> object:
        with torch.no_grad():
            return model(tokens).logits

    def generate() -> object:
        with torch.no_grad():
            return model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                min_new_tokens=NEW,
                max_new_tokens=NEW,
            )

    return forward, generate


def _paired(mine: Callable[[], Any], other: Callable[[], Any], turns: int) -> tuple[str, str, str]:
    """Median seconds of both, and the median of their ratios turn by turn."""
    for warm_up in (mine, other):
        warm_up()
    pairs = [(_seconds(mine), _seconds(other)) for _ in range(turns)]
    a, b = (statistics.median(times) for times in zip(*pairs, strict=True))
    return f"{a:.2f}", f"{b:.2f}", f"{statistics.median(x / y for x, y in pairs):.2f}"


def _seconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started
