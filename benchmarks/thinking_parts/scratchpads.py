"""Sums with their scratchpads, a tokenizer of characters, and a small transformer that is trained on them.

`3+5+9=` is answered by `3+5=8;8+9=17;#17.`. In some scratchpads a step is wrong, and followed by `W` and the
step done right: the model has seen that one may look again, and what that looks like.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

import mergelab as ml

__all__ = ["SITE", "Size", "problem", "tasks_of", "tokenizer", "trained"]

SIGNS = "0123456789+=;#W."
SITE = "blocks.1.resid_post"
_LENGTH = 88  # longer than 99 of 100 scratchpads with their prompts


@dataclass(frozen=True)
class Size:
    """How large the experiment is.

    Attributes:
        steps: steps of training.
        batch: scratchpads of a step.
        tasks: tasks that are solved, and as many on which probes are fitted.
        searched: those of them that searches solve.
        samples: most traces of a task.
        budget: most new tokens of a trace.
    """

    steps: int = 800
    batch: int = 48
    tasks: int = 60
    searched: int = 30
    samples: int = 16
    budget: int = 72


def problem(
    rng: np.random.Generator, low: int = 3, high: int = 7, slips: float = 0.15
) -> tuple[str, str, int]:
    """A prompt, its scratchpad, and the sum.

    Args:
        rng: source of the digits.
        low: least number of terms.
        high: most terms.
        slips: probability that a step is first done wrong.
    """
    terms = rng.integers(1, 10, int(rng.integers(low, high + 1))).tolist()
    total, pad = terms[0], ""
    for term in terms[1:]:
        if rng.random() < slips:
            wrong = total + term + int(rng.choice([-2, -1, 1, 2]))
            pad += f"{total}+{term}={wrong};W"
        pad += f"{total}+{term}={total + term};"
        total += term
    return "+".join(map(str, terms)) + "=", f"{pad}#{total}.", total


def tokenizer() -> ml.Tokenizer:
    """One token for each sign; `.` ends a text."""
    backend = tokenizers.Tokenizer(models.WordLevel({sign: i for i, sign in enumerate(SIGNS)}, "0"))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return ml.Tokenizer(backend, {"eos_token": "."}, (SIGNS.index("."),), {}, Path("scratchpads"))


def tasks_of(seed: int, count: int, *, low: int = 5, high: int = 7) -> list[dict[str, Any]]:
    """Tasks, none of them twice."""
    rng, found = np.random.default_rng(seed), {}
    while len(found) < count:
        prompt, _, total = problem(rng, low, high)
        found[prompt] = total
    return [{"prompt": prompt, "answer": total} for prompt, total in found.items()]


def trained(seed: int, size: Size) -> tuple[ml.Model, Any, float]:
    """The model, its parameters, and its loss on the last batches, in nats a token of the scratchpad."""
    model = ml.model_from_config(
        {
            "model_type": "llama",
            "vocab_size": len(SIGNS),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 2 * _LENGTH,
            "tie_word_embeddings": True,
        }
    )
    params, rng = model.init(seed), np.random.default_rng([seed, 1])
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, size.steps))

    @jax.jit
    def step(params: Any, state: Any, tokens: jax.Array, counted: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            logits = model.apply(params, tokens[:, :-1]).logits
            assert logits is not None
            nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
            return (nats * counted[:, 1:]).sum() / counted[:, 1:].sum()

        value, gradients = jax.value_and_grad(loss)(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    for _ in range(size.steps):
        params, state, value = step(params, state, *map(jnp.asarray, _batch(rng, size.batch)))
        losses.append(value)
    return model, params, float(np.mean(jax.device_get(losses[-50:])))


def _batch(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of problems with their scratchpads, and which of them count: those of the scratchpad."""
    tokens, counted = np.zeros((count, _LENGTH), np.int32), np.zeros((count, _LENGTH), np.float32)
    for row in range(count):
        prompt, pad, _ = problem(rng)
        ids = [SIGNS.index(sign) for sign in prompt + pad][:_LENGTH]
        tokens[row, : len(ids)] = ids
        counted[row, len(prompt) : len(ids)] = 1
    return tokens, counted
