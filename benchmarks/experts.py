"""CPU seconds of a mixture of experts: products with the chosen experts alone, and with all of them.

    python -m benchmarks.experts [--experts 64 --chosen 8 --width 512 --hidden 512 --tokens 512 --turns 5]

One layer, forward and with gradients, in one process; the forms take turns, and each figure is the least
of them in CPU seconds (all threads).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mergelab.models.layers.experts import chosen_experts, every_expert
from mergelab.models.layers.routing import Experts, choose, spread

__all__ = ["main", "seconds"]


def seconds(spec: Experts, width: int, tokens: int, turns: int) -> dict[str, float]:
    """The least CPU seconds of each form, by `forward` and `gradient` and its name."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(0, 0.05, shape), jnp.float32)

    inward, outward = (spec.count, width, spec.hidden), (spec.count, spec.hidden, width)
    kernels = {"gate": normal(*inward), "up": normal(*inward), "down": normal(*outward)}
    x, logits = normal(1, tokens, width), normal(1, tokens, spec.count)

    def every(x: jax.Array, kernels: Any, logits: jax.Array) -> jax.Array:
        return every_expert(x, kernels, spread(*choose(logits, spec), spec.count), spec)

    def chosen(x: jax.Array, kernels: Any, logits: jax.Array) -> jax.Array:
        return chosen_experts(x, kernels, *choose(logits, spec), spec)

    programs: dict[str, Callable[..., Any]] = {}
    for name, form in (("every", every), ("chosen", chosen)):
        programs[f"forward, {name}"] = jax.jit(form)
        loss = lambda *given, form=form: jnp.square(form(*given)).sum()  # noqa: E731
        programs[f"gradient, {name}"] = jax.jit(jax.grad(loss, argnums=(0, 1)))
    found = {name: float("inf") for name in programs}
    for turn in range(turns + 1):
        for name, run in programs.items():
            began = time.process_time()
            jax.block_until_ready(run(x, kernels, logits))
            if turn:  # the first compiles
                found[name] = min(found[name], time.process_time() - began)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the seconds of both forms, and what fraction of the plain form's the chosen experts take."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("experts", 64), ("chosen", 8), ("width", 512), ("hidden", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args(arguments)
    spec = Experts(given.experts, given.chosen, given.hidden)
    found = seconds(spec, given.width, given.tokens, given.turns)
    for what in ("forward", "gradient"):
        every, chosen = found[f"{what}, every"], found[f"{what}, chosen"]
        print(f"{what}: {every:.3f} s with all, {chosen:.3f} s with the chosen: {chosen / every:.3f}")


if __name__ == "__main__":
    main()
