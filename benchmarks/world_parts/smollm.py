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
from benchmarks.world_parts import first_token
from benchmarks.world_parts.section import Place, Section
from mergelab.checkpoints import open_checkpoint
from mergelab.decoding import generate, greedy
from mergelab.models.load import parameter_shapes
from tests.smollm import smollm_file

__all__ = ["measure"]

TOKENS, PROMPT, NEW = 256, 32, 32
_HELD = (
    "Checked apart from this run: of the 420 MB that a process holds after its first token in bfloat16, with "
    "programs kept, 273 MB are weights, 108 MB imported modules and XLA's backend, 24 MB what JAX keeps of "
    "traced and compiled programs, 8 MB the tokenizer, and 7 MB the GGUF file's lists of tokens; reading "
    "adds some 15 MB for a moment, compiling 50 MB. The first two alone are 1.42 times the weights of so "
    "small a model; a single arena of the heap (MALLOC_ARENA_MAX=1) would save less than 10 MB."
)


def measure(place: Place) -> Section:
    """Rows of processes up to their first token, of a pass over 256 tokens and of 32 generated greedily."""
    path = smollm_file()
    parameters = sum(leaf.size for leaf in parameter_shapes(open_checkpoint(path))[0].table())
    sizes = {"float32": 4 * parameters, "bfloat16": 2 * parameters}
    rows = first_token.rows(path, place.work, sizes, place.turns)
    for dtype in ("float32", "bfloat16"):
        ours, theirs = _ours(dtype), _theirs(dtype)
        for what, mine, other in zip(
            (f"a pass over {TOKENS} tokens", f"{NEW} new tokens"), ours, theirs, strict=True
        ):
            rows.append((f"{what}, {dtype}", *_paired(mine, other, place.turns)))
    head = ("what", "mergelab", "transformers", "mergelab / transformers")
    note = (
        f"Seconds, medians of {place.turns} turns, batch 1. First whole processes, start-up, reading and "
        "compiling included, and the most memory of their own (without mapped files) that they held; then "
        "passes and generations in one process, compiled before. " + _HELD
    )
    return Section(note, head, rows)


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
