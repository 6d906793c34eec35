"""What a chip can do, and what a compiled program asks of it."""

from __future__ import annotations

from dataclasses import dataclass

from mergelab.errors import MeshError

__all__ = [
    "Chip",
    "ChipReport",
    "Collective",
    "Fit",
    "Roofline",
    "chip_of",
    "is_one_chip",
    "roofline",
    "slice_name",
]


@dataclass(frozen=True)
class Chip:
    """A kind of chip, by its vendor's figures.

    Attributes:
        flops: bfloat16 operations per second.
        bandwidth: bytes per second between the chip and its memory.
        memory: bytes of that memory.
        network: bytes per second to all of the chip's neighbors together, in one direction.
    """

    flops: float
    bandwidth: float
    memory: int
    network: float


# docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, "System architecture"; half of the bidirectional bandwidth
# between chips that is given there.
_CHIPS = {
    "v4": Chip(275e12, 1.228e12, 32 * 2**30, 300e9),
    "v5e": Chip(197e12, 0.819e12, 16 * 2**30, 200e9),
    "v5p": Chip(459e12, 2.765e12, 95 * 2**30, 600e9),
    "v6e": Chip(918e12, 1.640e12, 32 * 2**30, 400e9),
}


def chip_of(topology: str) -> Chip:
    """The chip a topology such as `v5p:4x8x8` is made of.

    Raises:
        MeshError: its figures are not known here.
    """
    kind = topology.partition(":")[0]
    if kind not in _CHIPS:
        raise MeshError(
            f"{topology}: the figures of {kind!r} chips are not known; known are {', '.join(_CHIPS)}."
        )
    return _CHIPS[kind]


def slice_name(topology: str) -> str:
    """The compiler's name of a slice: a kind of chip alone is one chip of it.

    >>> slice_name("v5e"), slice_name("v5p"), slice_name("v5e:2x4")
    ('v5e:1x1', 'v5p:1x1x1', 'v5e:2x4')
    """
    if ":" in topology:
        return topology
    return f"{topology}:1x1x1" if topology in ("v4", "v5p") else f"{topology}:1x1"


def is_one_chip(topology: str) -> bool:
    """Whether a slice is a single chip, over which there is nothing to divide."""
    return {*slice_name(topology).partition(":")[2].split("x")} == {"1"}


@dataclass(frozen=True)
class Fit:
    """Whether what is to lie on one chip at a time does.

    Attributes:
        needed: bytes.
        memory: bytes that the chip has.
    """

    needed: int
    memory: int

    def __str__(self) -> str:
        """Memory as vendors count it: a chip of 16 GB has 16 * 2**30 bytes."""
        answer = "yes" if self.needed <= self.memory else "no"
        return f"fits: {answer}, {self.needed / 2**30:.3g} of {self.memory / 2**30:g} GB"


@dataclass(frozen=True)
class Roofline:
    """Least seconds that each part of a chip is busy in one run; what is slowest bounds the run from below.

    Attributes:
        compute: all operations at the chip's peak in bfloat16.
        memory: all traffic at the memory's peak.
        network: all results of exchanges at the peak of the chip's links.
    """

    compute: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        """The bound, if all three overlap."""
        return max(self.compute, self.memory, self.network)


def roofline(report: ChipReport, chip: Chip) -> Roofline:
    """A lower bound of a program's time, from the compiler's own counts; not a prediction."""
    exchanged = sum(collective.nbytes for collective in report.collectives)
    return Roofline(report.flops / chip.flops, report.traffic / chip.bandwidth, exchanged / chip.network)


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
