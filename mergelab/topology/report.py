"""What the compiler says of a program: memory, operations and exchanges of one chip."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ChipReport", "Collective"]


@dataclass(frozen=True)
class Collective:
    """One kind of exchange between chips in a compiled program.

    Attributes:
        kind: `all-gather`, `all-reduce`, `reduce-scatter`, `all-to-all` or `collective-permute`.
        count: how many the program has; those inside a loop count once.
        nbytes: bytes of their results on one chip, together.
    """

    kind: str
    count: int
    nbytes: int


@dataclass(frozen=True)
class ChipReport:
    """A program as it was compiled for one chip of many.

    Attributes:
        chips: how many chips the topology has.
        device: what one is, as the compiler calls it.
        arguments: bytes of the inputs.
        outputs: bytes of the results.
        aliased: bytes of results that take the place of inputs that are used up.
        temporaries: bytes of the largest working memory.
        flops: floating-point operations of one run on one chip, loops counted once.
        traffic: bytes that one run reads and writes in the chip's memory, as the compiler estimates them.
        collectives: what the chips exchange.
        seconds: how long the compilation took.
    """

    chips: int
    device: str
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    flops: float
    traffic: float
    collectives: tuple[Collective, ...]
    seconds: float

    @property
    def peak(self) -> int:
        """Bytes that one chip needs."""
        return self.arguments + self.outputs - self.aliased + self.temporaries
