"""The table of a family: where each parameter stands in the tree and in files, and what happens between."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

from mergelab.models.layout import Box, Layout, slices, whole

__all__ = [
    "Channels",
    "Fused",
    "FusedHeads",
    "Leaf",
    "Parameter",
    "Parameters",
    "Piece",
    "Reshaped",
    "Row",
    "Transform",
    "build_table",
    "check_table",
    "get_leaf",
    "linear_rows",
    "norm_rows",
    "stored_shapes",
    "tree_from_leaves",
    "within",
]


@dataclass(frozen=True)
class Fused:
    """Part of a tensor that several leaves share: a range of its output features.

    The leaf's last axis is the range that begins at `start` of the `size` output features in the file; where
    those are in groups, such a range of each group.

    Attributes:
        start: the first feature (of a group).
        size: number of features of the fused tensor (of a group).
        transposed: True where the file holds [out, in] (a torch `Linear`), False for [in, out] (`Conv1D`).
            A vector has one order only.
        groups: number of groups (Falcon: of heads that share a key head).
    """

    start: int
    size: int
    transposed: bool = True
    groups: int = 1


@dataclass(frozen=True)
class FusedHeads:
    """One of the parts that a tensor interleaves head by head: its output features are [heads, parts, -1].

    Attributes:
        part: which part the leaf is.
        parts: number of parts (query, key, value: 3).
        heads: number of heads.
        transposed: same as in `Fused`.
    """

    part: int
    parts: int
    heads: int
    transposed: bool = True


@dataclass(frozen=True)
class Reshaped:
    """A whole tensor whose axes are joined: the kernel of a convolution over patches, a row among ones.

    Attributes:
        stored: the tensor's shape in the file.
        transposed: whether its first axis, the output features, is the leaf's last; all others are its first.
    """

    stored: tuple[int, ...]
    transposed: bool = False


@dataclass(frozen=True)
class Channels:
    """A range of the channels of a torch `Conv1d` of one channel a group, [channels, 1, taps] in the file.

    The leaf is [taps, channels].

    Attributes:
        start: the first channel.
        size: number of channels of the tensor.
    """

    start: int
    size: int


Transform = Literal["identity", "transpose"] | Fused | FusedHeads | Reshaped | Channels


class Piece(NamedTuple):
    """The same elements in a file and in a leaf.

    Attributes:
        hf_name: the tensor in the file.
        source: a box of that tensor seen in the shape `leaf.layout.view`.
        target: the box of the leaf, of the same elements.
    """

    hf_name: str
    source: Box
    target: Box


@dataclass(frozen=True)
class Leaf:
    """One row: a leaf, the HF tensor (or stack of tensors) that stores it, and how the two layouts relate.

    Attributes:
        path: keys from the root of the parameter tree to the leaf.
        hf_name: the tensor's name in an HF checkpoint. In a stack, `{}` stands for the number of the tensor.
        shape: the *leaf's* shape.
        transform: `transpose` swaps the last two axes: kernels are [in, out] here, [out, in] in a torch
            `Linear`. `Fused`, `FusedHeads` and `Channels` take a part of a tensor that other
            leaves share.
        axes: the logical name of each axis for sharding rules (see `mergelab.sharding`), None where it is
            never split; empty if no axis ever is.
        stack: if positive, the leaf's first axis runs over that many HF tensors (experts).
        reads: the site whose vectors the matrix multiplies, its axes after the tokens in one
            (`blocks.3.attn.z` for an output projection); None for all else: embeddings, norms, biases, and
            stacked experts, which read only the tokens that are routed to them.
    """

    path: tuple[str, ...]
    hf_name: str
    shape: tuple[int, ...]
    transform: Transform = "identity"
    axes: tuple[str | None, ...] = ()
    stack: int = 0
    reads: str | None = None

    def __post_init__(self) -> None:
        if self.axes and len(self.axes) != len(self.shape):
            raise ValueError(f"leaf {'.'.join(self.path)}: {self.axes} do not name the axes of {self.shape}")
        if self.stack and (self.shape[:1] != (self.stack,) or "{}" not in self.hf_name):
            raise ValueError(f"leaf {'.'.join(self.path)} of shape {self.shape} does not stack {self.stack}")
        if self.layout.shape != self.shape[bool(self.stack) :]:
            raise ValueError(f"leaf {'.'.join(self.path)}: {self.transform} does not fit shape {self.shape}")

    @property
    def name(self) -> str:
        """The path, dotted."""
        return ".".join(self.path)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @cached_property
    def layout(self) -> Layout:
        """How the leaf lies in its HF tensor, or each element of its first axis in one of the stack."""
        return _layout(self.transform, self.shape[bool(self.stack) :])

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape of the tensor (of each tensor of a stack) in the HF checkpoint."""
        return self.layout.stored_shape

    @property
    def input_axis(self) -> int | None:
        """The axis of the HF tensor that runs over what the matrix reads; None if it reads no site."""
        if self.reads is None:
            return None
        transposed = self.transform == "transpose" or getattr(self.transform, "transposed", False)
        return len(self.hf_shape) - (1 if transposed else 2)

    @cached_property
    def hf_names(self) -> tuple[str, ...]:
        """The tensors of the HF checkpoint that the leaf is made of."""
        if not self.stack:
            return (self.hf_name,)
        return tuple(self.hf_name.replace("{}", str(number)) for number in range(self.stack))

    def forward(self, stored: Sequence[np.ndarray]) -> np.ndarray:
        """The leaf, from the tensors that `hf_names` names; a view where numpy can give one."""
        parts = [self.layout.forward(array) for array in stored]
        return np.stack(parts) if self.stack else parts[0]

    def inverse(self, leaf: np.ndarray, out: Sequence[np.ndarray]) -> None:
        """Puts the leaf's elements into contiguous arrays for the tensors that `hf_names` names."""
        for part, array in zip(leaf if self.stack else [leaf], out, strict=True):
            self.layout.inverse(part, array)

    def pullback(self, box: Box) -> Iterator[Piece]:
        """Follows a slice of the leaf to the file: the pieces whose targets make up `box`."""
        if not self.stack:
            for source, target in self.layout.pullback(box):
                yield Piece(self.hf_name, source, target)
            return
        (first, last), *rest = box
        for number in range(first, last):
            for source, target in self.layout.pullback(tuple(rest)):
                yield Piece(self.hf_names[number], source, ((number, number + 1), *target))


def _layout(transform: Transform, shape: tuple[int, ...]) -> Layout:
    """The layout of a leaf of this shape (the axis of a stack not among it)."""
    if isinstance(transform, Reshaped):
        view = shape[::-1] if transform.transposed else shape
        axes = tuple((axis,) for axis in range(len(shape)))
        return Layout(transform.stored, view, whole(view), axes[::-1] if transform.transposed else axes)
    if isinstance(transform, Channels):
        taps, channels = shape
        window = ((transform.start, transform.start + channels), (0, taps))
        return Layout((transform.size, 1, taps), (transform.size, taps), window, ((1,), (0,)))
    if isinstance(transform, FusedHeads):
        width = shape[-1] // transform.heads
        outputs = (transform.heads, transform.parts, width)
        chosen = ((0, transform.heads), (transform.part, transform.part + 1), (0, width))
    elif isinstance(transform, Fused) and transform.groups > 1:
        width = shape[-1] // transform.groups
        outputs = (transform.groups, transform.size)
        chosen = ((0, transform.groups), (transform.start, transform.start + width))
    elif isinstance(transform, Fused):
        outputs, chosen = (transform.size,), ((transform.start, transform.start + shape[-1]),)
    else:
        outputs, chosen = shape[-1:], whole(shape[-1:])
    if not shape:
        return Layout((), (), (), ())
    transposed = len(shape) > 1 and (transform == "transpose" or getattr(transform, "transposed", False))
    before, after = (shape[:-2], shape[-2:-1]) if transposed else (shape[:-1], ())
    first, last = len(before), len(before) + len(outputs)
    axes = [(i,) for i in range(first)] + [(last,)] * transposed + [tuple(range(first, last))]
    return Layout(
        (*before, math.prod(outputs), *after),
        (*before, *outputs, *after),
        (*whole(before), *chosen, *whole(after)),
        tuple(axes),
    )


def stored_shapes(leaves: Iterable[Leaf]) -> dict[str, tuple[int, ...]]:
    """The shape of every HF tensor of a table, by name, in table order.

    Raises:
        ValueError: two leaves see one tensor in different shapes.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for leaf in leaves:
        for name in leaf.hf_names:
            if shapes.setdefault(name, leaf.hf_shape) != leaf.hf_shape:
                raise ValueError(f"tensor {name!r} is {shapes[name]} to one leaf, {leaf.hf_shape} to another")
    return shapes


def check_table(leaves: Sequence[Leaf]) -> None:
    """Checks that a table is a one-to-one map: each leaf once, each element of each HF tensor once.

    Raises:
        ValueError: it is not; the message names the leaf or tensor.
    """
    paths = [leaf.path for leaf in leaves]
    if len(set(paths)) != len(paths):
        raise ValueError(f"leaf {next(p for p in paths if paths.count(p) > 1)} stands twice in the table")
    seen = {name: np.zeros(shape, np.uint8) for name, shape in stored_shapes(leaves).items()}
    for leaf in leaves:
        for name in leaf.hf_names:
            seen[name].reshape(leaf.layout.view)[slices(leaf.layout.window)] += 1
    for name, times in seen.items():
        if (times != 1).any():
            raise ValueError(f"tensor {name!r} has elements that belong to no leaf or to more than one")


def get_leaf(params: Mapping[str, Any], leaf: Leaf) -> Any:
    """The array that `leaf` names in a parameter tree."""
    node: Any = params
    for key in leaf.path:
        node = node[key]
    return node


def tree_from_leaves(arrays: Mapping[Leaf, Any]) -> dict[str, Any]:
    """Builds the nested parameter tree that holds each array at its leaf's path."""
    tree: dict[str, Any] = {}
    for leaf, array in arrays.items():
        *parents, last = leaf.path
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = array
    return tree


class Parameter(NamedTuple):
    """What a leaf is: its shape, and the logical name of each axis (None: never split)."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]


Parameters = dict[tuple[str, ...], Parameter]


class Row(NamedTuple):
    """One row of a family's table, for all blocks at once.

    Attributes:
        path: the leaf's path, joined by dots; `{i}` stands for the number of the block.
        hf_name: the HF tensor's name, with the same `{i}`; `{e}` for the number of the expert.
        transform: same as in `Leaf`.
        reads: same as in `Leaf`, with the same `{i}`; that of the shared layers by default.
    """

    path: str
    hf_name: str
    transform: Transform = "identity"
    reads: str | None = None


_READS = {
    "attn.q.kernel": "attn.input",
    "attn.k.kernel": "attn.input",
    "attn.v.kernel": "attn.input",
    "attn.o.kernel": "attn.z",
    "attn.q_down.kernel": "attn.input",
    "attn.q_up.kernel": "attn.q_latent",
    "attn.kv_down.kernel": "attn.input",
    "attn.kv_up.kernel": "attn.kv_latent",
    "attn.gate.kernel": "attn.input",
    **{
        f"mixer.{name}.kernel": "mixer.input"
        for name in ("q", "k", "v", "x", "b", "c", "gate", "step", "strength")
    },
    "mixer.o.kernel": "mixer.z",
    "mlp.router": "mlp.input",
    "mlp.gate.kernel": "mlp.input",
    "mlp.up.kernel": "mlp.input",
    "mlp.down.kernel": "mlp.post",
    "mlp.shared.gate.kernel": "mlp.shared.input",
    "mlp.shared.up.kernel": "mlp.shared.input",
    "mlp.shared.down.kernel": "mlp.shared.post",
    "mlp.shared_gate.kernel": "mlp.input",
    "per_layer.gate.kernel": "per_layer.input",
    "per_layer.down.kernel": "per_layer.post",
    "layer_projection.kernel": "embed",
    "unembed.kernel": "unembed.input",
}
"""Matrices of the layers that families share, and the sites they read, both within a block."""


def _reads(path: str) -> str | None:
    inner = path.removeprefix("blocks_{i}.")
    site = _READS.get(inner)
    return site if site is None or inner == path else f"blocks.{{i}}.{site}"


def linear_rows(ours: str, theirs: str, names: Mapping[str, str]) -> Iterator[Row]:
    """The kernel and the bias of linear layers that are torch `Linear` modules in HF.

    Args:
        ours: what stands before the names here.
        theirs: what stands before them in HF.
        names: our layers' names to HF's.
    """
    for name, hf_name in names.items():
        yield Row(f"{ours}.{name}.kernel", f"{theirs}.{hf_name}.weight", "transpose")
        yield Row(f"{ours}.{name}.bias", f"{theirs}.{hf_name}.bias")


def norm_rows(ours: str, theirs: str) -> tuple[Row, Row]:
    """The scale and the bias of a norm that is a torch `LayerNorm` in HF."""
    return Row(f"{ours}.scale", f"{theirs}.weight"), Row(f"{ours}.bias", f"{theirs}.bias")


def within(tower: str, rows: Iterable[Row]) -> Iterator[Row]:
    """The rows of a tower, its parameters and sites under its name in a larger model."""
    for row in rows:
        reads = row.reads or _reads(row.path)
        yield row._replace(path=f"{tower}.{row.path}", reads=None if reads is None else f"{tower}.{reads}")


def build_table(rows: Iterable[Row], parameters: Parameters, blocks: int) -> tuple[Leaf, ...]:
    """One leaf for every parameter of a configuration; rows of parameters it does not have fall away.

    The order is the rows' order, all rows of block 0 before those of block 1.

    Raises:
        ValueError: a parameter has no row.
    """
    rows = list(rows)
    first = next((n for n, row in enumerate(rows) if "{i}" in row.path), len(rows))
    before, per_block = rows[:first], [row for row in rows if "{i}" in row.path]
    after = [row for row in rows[first:] if "{i}" not in row.path]
    numbered = [(row, i) for i in range(blocks) for row in per_block]
    leaves = []
    for row, i in [*((row, 0) for row in before), *numbered, *((row, 0) for row in after)]:
        path = tuple(row.path.replace("{i}", str(i)).split("."))
        if path not in parameters:
            continue
        shape, axes = parameters[path]
        name = row.hf_name.replace("{i}", str(i))
        stack = shape[0] if "{e}" in name else 0
        reads = row.reads or _reads(row.path)
        site = None if reads is None else reads.replace("{i}", str(i))
        leaves.append(Leaf(path, name.replace("{e}", "{}"), shape, row.transform, axes, stack, site))
    missing = parameters.keys() - {leaf.path for leaf in leaves}
    if missing:
        raise ValueError(f"the family's table has no row for the parameter {'.'.join(min(missing))!r}")
    return tuple(leaves)
