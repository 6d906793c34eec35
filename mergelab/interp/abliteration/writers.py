"""Which parameters write to the residual stream: read from a family's table, not from a list of names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mergelab.errors import MergelabError
from mergelab.models.declaration import Leaf
from mergelab.models.model import Model

__all__ = ["Component", "Writer", "check_decoder", "writers"]

Component = Literal["embeddings", "attention", "mlp"]
_WIDTH = "embed"
"""The logical axis that runs over the residual stream."""


@dataclass(frozen=True)
class Writer:
    """A parameter whose last axis is the residual stream: a kernel `[..., in, width]`, a bias or a table.

    Attributes:
        leaf: its row of the table.
        component: what it belongs to.
        layer: the block, or None for embeddings.
        gain: the scale of the norm that stands between it and the stream (sandwich blocks), or None.
    """

    leaf: Leaf
    component: Component
    layer: int | None
    gain: Leaf | None = None

    @property
    def is_bias(self) -> bool:
        """Whether it is a vector, added to every token."""
        return len(self.leaf.shape) == 1


def check_decoder(model: Model) -> None:
    """Checks that a model is a decoder.

    Raises:
        MergelabError: it is an encoder, whose norms stand on the stream itself and predict no next token.
    """
    if not model.family.architecture.causal:
        raise MergelabError(
            f"a {model.family.model_type!r} model is an encoder and answers no prompt; directions are "
            "removed from decoders only."
        )


def writers(model: Model) -> tuple[Writer, ...]:
    """Every parameter that writes to the residual stream, in table order.

    Those are the leaves of two or more axes whose last is the residual width (embeddings, attention and
    feed-forward outputs, those of experts stacked), and the biases beside them. Norms of a block's input read
    the stream, and are not among them; a norm of its output is a `gain`.

    Raises:
        MergelabError: the model is an encoder.
    """
    check_decoder(model)
    table = {leaf.path: leaf for leaf in model.table()}
    kernels = {path for path, leaf in table.items() if len(leaf.shape) > 1 and leaf.axes[-1:] == (_WIDTH,)}
    found = []
    for path, leaf in table.items():
        if path not in kernels and not (path[-1] == "bias" and (*path[:-1], "kernel") in kernels):
            continue
        if not path[0].startswith("blocks_"):
            found.append(Writer(leaf, "embeddings", None))
            continue
        component: Component = "attention" if path[1] == "attn" else "mlp"
        gain = table.get((*path[:2], "out_norm", "scale"))
        found.append(Writer(leaf, component, int(path[0].removeprefix("blocks_")), gain))
    return tuple(found)
