"""LoRA factors of a model's matrices: which have some, how they begin, and the parameters they make."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from mergelab.errors import TuningError, did_you_mean
from mergelab.models.model import Model, Params
from mergelab.models.table import Leaf, get_leaf, tree_from_leaves
from mergelab.tuning.settings import LoraSettings

__all__ = ["Factored", "Factors", "find_factors", "init_factors", "with_factors"]

Trained = dict[str, dict[str, Array]]
"""Module -> `A [rank, in]` and `B [out, rank]`, as PEFT has them."""


@dataclass(frozen=True)
class Factored:
    """A module of the files that has factors: one matrix, or several that it holds side by side.

    Attributes:
        name: its name in `transformers`, such as `model.layers.0.self_attn.q_proj`.
        leaves: parameters that are parts of its weight.
        shape: number of outputs and of inputs.
        transposed: whether the weight is stored `[out, in]` (a torch `Linear`), not `[in, out]` (`Conv1D`).
    """

    name: str
    leaves: tuple[Leaf, ...]
    shape: tuple[int, int]
    transposed: bool


@dataclass(frozen=True)
class Factors:
    """The modules of a model that have factors; hashable.

    Attributes:
        model: the model.
        modules: what has factors, in the table's order.
        settings: rank and scale.
    """

    model: Model
    modules: tuple[Factored, ...]
    settings: LoraSettings

    @property
    def size(self) -> int:
        """Number of trained elements."""
        return sum(self.settings.rank * sum(module.shape) for module in self.modules)


def find_factors(model: Model, settings: LoraSettings) -> Factors:
    """The modules that get factors.

    Raises:
        TuningError: a target is the name of no linear layer of the blocks; all such are named.
    """
    known = list(_linear(model))
    if not settings.targets:
        # A router's small changes send tokens elsewhere; PEFT's users leave it alone too.
        chosen = [module for module in known if not any("router" in leaf.path for leaf in module.leaves)]
        return Factors(model, tuple(chosen), settings)
    ends = sorted({name.rpartition(".")[2] for module in known for name in _names(module)})
    faults = [
        f"no linear layer of the blocks is called {target!r}{did_you_mean(target, ends)}; there are "
        f"{', '.join(ends)}."
        for target in settings.targets
        if not any(_is_named(module, target) for module in known)
    ]
    if faults:
        raise TuningError(faults)
    chosen = [module for module in known if any(_is_named(module, target) for target in settings.targets)]
    return Factors(model, tuple(chosen), settings)


def _linear(model: Model) -> Iterable[Factored]:
    """The matrices of the blocks that read a site, by the files' names; experts in stacks have none."""
    table = replace(model, spelling=None).table()  # PEFT names modules of the whole class
    parts: dict[str, list[Leaf]] = {}
    for leaf in table:
        inner = any(key.startswith("blocks_") for key in leaf.path) and not leaf.stack
        if inner and leaf.reads is not None and len(leaf.hf_shape) == 2:
            parts.setdefault(leaf.hf_name, []).append(leaf)
    for name, leaves in parts.items():
        transposed = leaves[0].input_axis == 1
        first, second = leaves[0].hf_shape
        shape = (first, second) if transposed else (second, first)
        yield Factored(name.removesuffix(".weight"), tuple(leaves), shape, transposed)


def _names(module: Factored) -> Sequence[str]:
    ours = [".".join(leaf.path).removesuffix(".kernel") for leaf in module.leaves]
    return [module.name, *ours]


def _is_named(module: Factored, target: str) -> bool:
    return any(
        name == target or name.endswith(f".{target}") or fnmatchcase(name, target) for name in _names(module)
    )


def init_factors(factors: Factors, seed: int) -> Trained:
    """Factors whose product is zero: `A` uniform in `1 / sqrt(in)` as PEFT draws it, `B` zero; float32."""
    draw = np.random.default_rng([seed, 0x10A])
    rank = factors.settings.rank
    found: Trained = {}
    for module in factors.modules:
        outputs, inputs = module.shape
        bound = 1 / math.sqrt(inputs)
        a = draw.uniform(-bound, bound, (rank, inputs)).astype(np.float32)
        found[module.name] = {"A": jnp.asarray(a), "B": jnp.zeros((outputs, rank), jnp.float32)}
    return found


def with_factors(factors: Factors, params: Params, trained: Mapping[str, Mapping[str, Array]]) -> Params:
    """`W + scale * B @ A` for the matrices that have factors, added in float32, in the dtypes of `params`.

    Pure and differentiable. The parameters of a forward pass are what a merge of the adapter would write, so
    that the training minimizes the loss of what is used afterwards.
    """
    scale = jnp.float32(factors.settings.scale)
    found: dict[Leaf, Any] = {leaf: get_leaf(params, leaf) for leaf in factors.model.table()}
    by_path = {leaf.path: leaf for leaf in found}
    for module in factors.modules:
        pair = trained[module.name]
        change = scale * (pair["B"] @ pair["A"])
        stored: Any = change if module.transposed else change.T
        for leaf in module.leaves:
            own = by_path[leaf.path]
            weight = found[own]
            found[own] = (weight.astype(jnp.float32) + leaf.layout.forward(stored)).astype(weight.dtype)
    return tree_from_leaves(found)
