"""What every logits transform is: a pure map of next-token logits that may look at a row's past."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from mergelab.errors import DecodingError

__all__ = ["Chain", "History", "LogitsTransform", "chain", "per_row", "require", "transform"]

T = TypeVar("T")


class History(NamedTuple):
    """What a transform may know besides the logits.

    Attributes:
        seen: bool `[batch, vocab]`, True for tokens of the row's prompt (padding not counted) and output.
        generated: int32 `[batch]`, tokens generated in the row so far.
    """

    seen: Bool[Array, "batch vocab"]
    generated: Int[Array, " batch"]


class LogitsTransform(Protocol):
    """Maps float32 logits `[batch, vocab]`; a token given `-inf` is never chosen."""

    def __call__(
        self, logits: Float[Array, "batch vocab"], history: History
    ) -> Float[Array, "batch vocab"]: ...


@dataclass_transform(frozen_default=True)
def transform(cls: type[T]) -> type[T]:
    """Class decorator: a frozen dataclass that is also a pytree.

    Fields are leaves, so another temperature needs no new compilation, unless declared with
    `dataclasses.field(metadata={"static": True})`.
    """
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@transform
class Chain:
    """Transforms applied one after the other, the first one first."""

    transforms: tuple[LogitsTransform, ...] = ()

    def __call__(self, logits: Float[Array, "batch vocab"], history: History) -> Float[Array, "batch vocab"]:
        for step in self.transforms:
            logits = step(logits, history)
        return logits


def chain(*transforms: LogitsTransform) -> Chain:
    """Composes transforms from left to right; without any, the identity.

    Order matters: `chain(Temperature(0.5), TopP(0.9))` keeps the tokens that hold 0.9 of the sharpened
    distribution.
    """
    return Chain(tuple(transforms))


def per_row(value: ArrayLike) -> Float[Array, "rows 1"]:
    """A scalar, or one value per row, as a column that broadcasts over the vocabulary."""
    return jnp.asarray(value, jnp.float32).reshape(-1, 1)


def require(name: str, value: object, holds: bool, expected: str) -> None:
    """Refuses a hyper-parameter out of its range.

    Raises:
        DecodingError: `holds` is False.
    """
    if not holds:
        raise DecodingError(f"{name} was given {value!r}, but needs {expected}.")
