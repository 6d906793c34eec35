"""The table a model family declares: which leaf of its parameter tree is which tensor of an HF checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

__all__ = ["Leaf", "get_leaf", "tree_from_leaves"]

Transform = Literal["identity", "transpose"]


@dataclass(frozen=True)
class Leaf:
    """One row: a leaf, the HF tensor that stores it, and how the two layouts relate.

    Attributes:
        path: keys from the root of the parameter tree to the leaf.
        hf_name: the tensor's name in an HF checkpoint.
        shape: the *leaf's* shape.
        transform: `transpose` for kernels ([in, out] here, [out, in] in a torch `Linear`), else `identity`.
            Each is its own inverse.
    """

    path: tuple[str, ...]
    hf_name: str
    shape: tuple[int, ...]
    transform: Transform = "identity"

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape of the tensor in the HF checkpoint."""
        return self.shape[::-1] if self.transform == "transpose" else self.shape

    def apply(self, array: np.ndarray) -> np.ndarray:
        """Maps the HF layout to the leaf's, and (being an involution) the leaf's to the HF layout."""
        return array.T if self.transform == "transpose" else array


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
