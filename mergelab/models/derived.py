"""Parameters and sites of a module, read off an abstract run in which nothing is computed.

A module names the axes of a parameter where it makes it (`param`), and calls the tap with every site.
`derive` runs it under `jax.eval_shape` and records both: no list of either has to be kept beside the module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array

from mergelab.models.cache import ArrayLeaf
from mergelab.models.sites import Shape, Tap
from mergelab.models.table import Parameter, Parameters

__all__ = ["Configuration", "Derived", "ReadsOtherThanTokens", "derive", "derive_blocks", "draw", "param"]
__all__ += ["zeros_for"]

_VALUES = "values"  # the flax collection that, without the other, says that an abstract run gives values
_AXES = "axes"  # the flax collection that an abstract run fills with the axes of every parameter
_BATCH, _LENGTH = (2, 3), (5, 7)  # the two calls whose shapes are compared: what differs is not fixed
T = TypeVar("T")


class Configuration(Protocol):
    """What derivation asks of a configuration whose blocks may be alike."""

    def one_of_each(self) -> tuple[Configuration, Sequence[int]]:
        """The configuration with one block of each kind, and for every layer the number of its kind.

        Blocks are of one kind if their parameters and sites have the same names and shapes. What changes
        neither may be dropped: the result is run abstractly, and then it is not computed with at all.
        """
        ...


@runtime_checkable
class ReadsOtherThanTokens(Protocol):
    """A module that reads images in place of tokens, or beside them."""

    def example(self, batch: int, length: int) -> tuple[Any, Any]:
        """Shapes of what it reads, and of the positions, in a call of that batch and length."""
        ...


class Derived(NamedTuple):
    """What an abstract run finds.

    Attributes:
        parameters: shape and logical axes of every parameter by path, in the order they are made.
        sites: symbolic shape of every site by name, in the order of the forward pass.
    """

    parameters: Parameters
    sites: dict[str, Shape]


def param(
    module: nn.Module,
    name: str,
    initial: Callable[..., Array],
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
) -> ArrayLeaf:
    """`module.param(name, initial, shape)`, with the logical name of each axis (None: never split).

    A kernel or a table may be given as `mergelab.models.layers.bfloat16_bits.Bits` of that shape.
    """
    if module.is_mutable_collection(_AXES):
        module.put_variable(_AXES, name, axes)
        return module.param(name, _no_values, shape)
    if module.is_mutable_collection(_VALUES):
        with jax.ensure_compile_time_eval():
            return module.param(name, initial, shape)
    return module.param(name, initial, shape)


def _no_values(key: Array, shape: tuple[int, ...]) -> Array:
    """An initializer for abstract runs, which need no random numbers."""
    return jnp.zeros(shape)


class _Recorder(Tap):
    """A tap that keeps the shape of every site it is called with."""

    def __init__(self) -> None:
        super().__init__({})
        self.shapes: dict[str, tuple[int, ...]] = {}

    def __call__(self, site: str, value: jax.Array) -> jax.Array:
        self.shapes[site] = value.shape
        return value

    def uses(self, site: str) -> bool:
        return True


def derive(module: nn.Module) -> Derived:
    """The parameters and sites of a module that is called as `Model` calls it.

    Raises:
        ValueError: a parameter was made without `param`, or a site has a size that is neither fixed nor the
            batch or the length.
    """
    variables, first = _run(module, _BATCH[0], _LENGTH[0])
    _, second = _run(module, _BATCH[1], _LENGTH[1])
    axes = dict(_leaves(variables.get(_AXES, {})))
    parameters: Parameters = {}
    for path, shape in _leaves(variables["params"]):
        if len(axes.get(path, ())) != len(shape):
            raise ValueError(
                f"the parameter {'.'.join(path)!r} of shape {shape} has axes {axes.get(path)}; make it with "
                "mergelab.models.derived.param and name every axis."
            )
        parameters[path] = Parameter(shape, axes[path])
    return Derived(parameters, {site: _symbolic(site, shape, second[site]) for site, shape in first.items()})


def draw(module: nn.Module, key: Array) -> dict[str, Any]:
    """Fresh parameters of a module that is called as `Model` calls it, drawn with a key that is not traced.

    The pass is abstract. Only the draws are computed, each by itself: one small program for each shape, where
    a program of the whole would hold the generator once for every parameter and take seconds to compile.
    """
    made: dict[str, Any] = {}

    def call() -> None:
        made.update(module.init(key, *zeros_for(module), None, None, Tap({}), mutable=["params", _VALUES]))

    jax.eval_shape(call)
    return made["params"]


def _run(module: nn.Module, batch: int, length: int) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The shapes of the variables, and of the sites, of one call."""
    recorder, variables = _Recorder(), {}

    def call(key: Array, tokens: Any, positions: Any) -> None:
        made = module.init(key, tokens, positions, None, None, recorder)
        # Taken out here and not returned: `eval_shape` would sort the names, and knows no tuples of words.
        variables["params"] = jax.tree.map(jnp.shape, made["params"])
        variables[_AXES] = made.get(_AXES, {})

    key = jax.eval_shape(lambda: jax.random.key(0))
    with np.errstate(all="ignore"):  # constants beyond float32 change no shape
        jax.eval_shape(call, key, *_example(module, batch, length))
    return variables, recorder.shapes


def zeros_for(module: nn.Module) -> tuple[Any, Any]:
    """Tokens and positions, or what a module reads in their place, for a call that only makes parameters."""
    return jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), _example(module, 1, 1))


def _example(module: nn.Module, batch: int, length: int) -> tuple[Any, Any]:
    """Shapes of the tokens and positions of a call; a module that reads something else has an `example`."""
    if isinstance(module, ReadsOtherThanTokens):
        return module.example(batch, length)
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    return tokens, tokens


def _leaves(tree: Mapping[str, Any], *path: str) -> list[tuple[tuple[str, ...], tuple[Any, ...]]]:
    """The leaves of nested dictionaries, which are tuples here, in the order of the dictionaries."""
    found: list[tuple[tuple[str, ...], tuple[Any, ...]]] = []
    for name, value in tree.items():
        found += _leaves(value, *path, name) if isinstance(value, Mapping) else [((*path, name), value)]
    return found


def _symbolic(site: str, first: tuple[int, ...], second: tuple[int, ...]) -> Shape:
    """A site's shape with names for the sizes that differ between two calls."""
    names = {_BATCH: ["batch"], _LENGTH: ["length"]}
    pairs = list(zip(first, second, strict=True))
    if pairs.count(_LENGTH) == 2:
        names[_LENGTH] = ["query", "key"]
    shape: list[str | int] = []
    for pair in pairs:
        if pair[0] == pair[1]:
            shape.append(pair[0])
        elif names.get(pair):
            shape.append(names[pair].pop(0) if len(names[pair]) > 1 else names[pair][0])
        else:
            raise ValueError(
                f"the site {site!r} has the shapes {first} and {second} for tokens of {_BATCH} by {_LENGTH}; "
                "every size must be fixed, or that of one axis of the tokens."
            )
    return tuple(shape)


def derive_blocks(build: Callable[[Any], nn.Module], config: Any) -> Derived:
    """`derive(build(config))` at the cost of one block of each kind, however many layers there are.

    Args:
        build: makes the module of a configuration. Its blocks are named `blocks_{i}`, and their sites
            `blocks.{i}`.
        config: a hashable `Configuration`.
    """
    small, kinds = config.one_of_each()
    parameters, sites = _derived(build, small)
    dotted = {".".join(path): parameter for path, parameter in parameters.items()}
    return Derived(
        {tuple(name.split(".")): parameter for name, parameter in _spread(dotted, "blocks_", kinds)},
        dict(_spread(sites, "blocks.", kinds)),
    )


@lru_cache(maxsize=256)
def _derived(build: Callable[[Any], nn.Module], config: Any) -> Derived:
    return derive(build(config))


def _spread(found: Mapping[str, T], prefix: str, kinds: Sequence[int]) -> Iterator[tuple[str, T]]:
    """Entries of one block of each kind (`{prefix}{kind}.rest`), given to every layer of that kind."""
    blocks: dict[int, list[tuple[str, T]]] = {}
    for name, value in found.items():
        if name.startswith(prefix):
            kind, _, rest = name.removeprefix(prefix).partition(".")
            blocks.setdefault(int(kind), []).append((rest, value))
    names = list(found)
    first = next(n for n, name in enumerate(names) if name.startswith(prefix))
    yield from ((name, found[name]) for name in names[:first])
    for layer, kind in enumerate(kinds):
        yield from ((f"{prefix}{layer}.{rest}", value) for rest, value in blocks[kind])
    yield from ((name, found[name]) for name in names[first:] if not name.startswith(prefix))
