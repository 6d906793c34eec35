"""What a chip can do, and what a compiled program asks of it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from mergelab.errors import MeshError, quoted

__all__ = [
    "LINKED",
    "Chip",
    "ChipReport",
    "Collective",
    "Fit",
    "Gpu",
    "Roofline",
    "chip_kind",
    "chip_of",
    "device_count",
    "is_one_chip",
    "roofline",
    "slice_name",
    "slices",
]


_GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """What XLA asks of a GPU before it compiles for it.

    Attributes:
        name: what the device is called.
        capability: CUDA's compute capability, major and minor.
        cores: number of multiprocessors.
        cache: bytes of the cache that they share.
        clock: cycles per second, in units of 10^9.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    cache: int
    clock: float


@dataclass(frozen=True)
class Chip:
    """A kind of chip as JAX sees it, by its vendor's figures: a chip of two devices is half of it each.

    Attributes:
        flops: products and sums of bfloat16 numbers per second.
        bandwidth: bytes per second between the device and its memory.
        memory: bytes of that memory.
        network: bytes per second to all of the device's neighbors together, in one direction.
        usable: bytes of the memory that the compiler leaves to a program.
        devices: number of devices on one chip.
        axes: number of axes of a slice; 1 for GPUs, of which some number are linked.
        gpu: what the compiler is told of a GPU; None for TPUs.
    """

    flops: float
    bandwidth: float
    memory: int
    network: float
    usable: int
    devices: int = 1
    axes: int = 2
    gpu: Gpu | None = None


# docs.cloud.google.com/tpu/docs/{v2,v3,v4,v5e,v5p,v6e,tpu7x}, "System architecture", the links of v2 and v3
# by Jouppi et al. 2020 (10.1145/3360307); half of the bidirectional bandwidth between chips that is given.
# What is usable says the compiler (libtpu 0.0.42), where a program asks for more.
_CHIPS = {
    "v2": Chip(22.5e12, 0.350e12, 8 * _GIB, 124e9, int(7.48 * _GIB), devices=2),
    "v3": Chip(61.5e12, 0.450e12, 16 * _GIB, 164e9, int(15.48 * _GIB), devices=2),
    "v4": Chip(275e12, 1.228e12, 32 * _GIB, 300e9, int(30.75 * _GIB), axes=3),
    "v5e": Chip(197e12, 0.819e12, 16 * _GIB, 200e9, int(15.75 * _GIB)),
    "v5p": Chip(459e12, 2.765e12, 95 * _GIB, 600e9, int(95.74 * _GIB), axes=3),
    "v6e": Chip(918e12, 1.640e12, 32 * _GIB, 400e9, int(31.25 * _GIB)),
    "tpu7x": Chip(1153.5e12, 3.690e12, 96 * _GIB, 300e9, int(94.75 * _GIB), devices=2, axes=3),
    # NVIDIA's data sheets of the SXM boards, dense bfloat16; three quarters are what JAX takes by default
    # (XLA_PYTHON_CLIENT_MEM_FRACTION). NVLink carries half of its 900 GB/s in each direction.
    "h100": Chip(
        989.4e12, 3.352e12, 84_942_979_072, 450e9, 63_707_234_304, axes=1,
        gpu=Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 50 << 20, 1.98),
    ),
    "h200": Chip(
        989.4e12, 4.8e12, 150_109_880_320, 450e9, 112_582_410_240, axes=1,
        gpu=Gpu("NVIDIA H200", (9, 0), 132, 50 << 20, 1.98),
    ),
}  # fmt: skip

_OTHER_NAMES = {
    "v5litepod": "v5e",
    "v7x": "tpu7x",
    "v7": "tpu7x",
    "7x": "tpu7x",
    "ironwood": "tpu7x",
    "trillium": "v6e",
}


_COUNTED = re.compile(r"^([ha]\d00)x(\d+)$")


def chip_kind(topology: str) -> str:
    """The kind of chip that a topology is made of: `tpu7x` of `v7x:2x2x1`, `h100` of `h100:8` or `H100x8`.

    Raises:
        MeshError: its figures are not known here.
    """
    named = topology.partition(":")[0].strip().lower()
    named = _COUNTED.sub(r"\1", named)
    kind = _OTHER_NAMES.get(named, named)
    if kind not in _CHIPS:
        raise MeshError(
            f"{quoted(topology)}: the figures of {quoted(named)} chips are not known; known are "
            f"{', '.join(_CHIPS)}, each with the shape of a slice, such as v5e:2x4, or a number of "
            "GPUs: h100:8."
        )
    return kind


def chip_of(topology: str) -> Chip:
    """The chip a topology such as `v5p:4x8x8` is made of.

    Raises:
        MeshError: its figures are not known here.
    """
    return _CHIPS[chip_kind(topology)]


LINKED = 8
"""GPUs of a host, which NVLink connects."""


def slice_name(topology: str) -> str:
    """The compiler's name of a slice: a kind of chip alone is one chip of it.

    >>> slice_name("v5e"), slice_name("v5p"), slice_name("v5e:2x4"), slice_name("v7x:2x2x1")
    ('v5e:1x1', 'v5p:1x1x1', 'v5e:2x4', 'tpu7x:2x2x1')
    >>> slice_name("h100"), slice_name("H100x8")
    ('h100:1', 'h100:8')

    Raises:
        MeshError: the kind of chip is not known, or the shape is none of its slices.
    """
    kind, axes = chip_kind(topology), chip_of(topology).axes
    counted = _COUNTED.match(topology.strip().lower())
    shape = counted[2] if counted else topology.partition(":")[2] or "x".join(["1"] * axes)
    sizes = [int(n) for n in shape.split("x") if n.isdecimal() and len(n) < 5]
    if axes == 1:
        if len(sizes) != 1 or sizes[0] < 1 or (sizes[0] > LINKED and sizes[0] % LINKED):
            raise MeshError(
                f"{quoted(topology)}: give a number of GPUs, up to {LINKED} or a multiple of it: {kind}:8."
            )
        return f"{kind}:{sizes[0]}"
    if len(sizes) != shape.count("x") + 1 or len(sizes) not in (2, axes) or min(sizes) < 1:
        raise MeshError(
            f"{quoted(topology)} names no slice: the shape of {kind} is {axes} whole numbers, such as "
            f"{kind}:{'x'.join(['2', '2', '4'][:axes])}."
        )
    # A host has 2 x 2 chips; a slice of a part of one is a host of its own.
    part = all(size <= most for size, most in zip([*sizes, 1][:3], (2, 2, 1), strict=False))
    if not part and any(size % 2 for size in sizes[:2]):
        raise MeshError(
            f"{quoted(topology)} names no slice: hosts have 2 x 2 chips, so that the first two sizes are "
            "even where there is more than one host."
        )
    return f"{kind}:{'x'.join(map(str, sizes))}"


def device_count(topology: str) -> int:
    """Number of devices of a slice as JAX counts them.

    >>> device_count("v5e:4x4"), device_count("v5p"), device_count("v7x:2x2x1"), device_count("h100:8")
    (16, 1, 8, 8)

    Raises:
        MeshError: as `slice_name`.
    """
    sizes = slice_name(topology).partition(":")[2].split("x")
    return chip_of(topology).devices * math.prod(map(int, sizes))


def slices(kind: str, most: int = 256) -> list[str]:
    """The usual slices of a kind of chip, smallest first, of no more chips than `most`.

    >>> slices("v5e", 16), slices("v5p", 8)
    (['v5e:1x1', 'v5e:2x2', 'v5e:2x4', 'v5e:4x4'], ['v5p:1x1x1', 'v5p:2x2x1', 'v5p:2x2x2'])

    Raises:
        MeshError: the kind of chip is not known.
    """
    name, axes = chip_kind(kind), chip_of(kind).axes
    if axes == 1:
        return [f"{name}:{2**n}" for n in range(most.bit_length()) if 2**n <= most]
    shape = [1] * axes
    found: list[str] = []
    while math.prod(shape) <= most:
        found.append(f"{name}:{'x'.join(map(str, shape))}")
        if shape[1] == 1:  # the first two sizes grow together: a host has 2 x 2
            shape[:2] = 2, 2
        elif axes == 3 and shape[2] < min(shape[:2]):
            shape[2] = shape[2] * 2
        else:
            place = shape.index(min(shape), 0)
            last = max(n for n, size in enumerate(shape) if size == shape[place])
            shape[last] *= 2
    return found


def is_one_chip(topology: str) -> bool:
    """Whether a slice is a single device, over which there is nothing to divide."""
    return device_count(topology) == 1


@dataclass(frozen=True)
class Fit:
    """Whether what is to lie on one chip at a time does.

    Attributes:
        needed: bytes.
        memory: bytes that the chip has.
        usable: bytes of these that a program may take; all if None.
    """

    needed: int
    memory: int
    usable: int | None = None

    @property
    def fits(self) -> bool:
        """Whether a program may take as much."""
        return self.needed <= (self.memory if self.usable is None else self.usable)

    def __str__(self) -> str:
        """Memory as vendors count it: a chip of 16 GB has 16 * 2**30 bytes."""
        kept = self.memory - (self.memory if self.usable is None else self.usable)
        near = not self.fits and self.needed <= self.memory
        less = f", of which the system keeps {kept / _GIB:.2g}" if near else ""
        answer = "yes" if self.fits else "no"
        return f"fits: {answer}, {self.needed / _GIB:.3g} of {self.memory / _GIB:g} GB{less}"


@dataclass(frozen=True)
class Roofline:
    """Least seconds that each part of a chip is busy in one run; what is slowest bounds the run from below.

    Attributes:
        compute: all operations at the chip's peak for their dtype and precision.
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
    """A lower bound of a program's time, from the compiler's own counts; not a prediction.

    A chip multiplies bfloat16 numbers. Products of float32 numbers take passes over bfloat16 parts: one
    at JAX's default precision, which rounds them, three at `high`, six at `highest`. GPUs take longer than
    that for them.
    """
    exchanged = sum(collective.nbytes for collective in report.collectives)
    compute = report.flops * report.passes / chip.flops
    return Roofline(compute, report.traffic / chip.bandwidth, exchanged / chip.network)


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
        chips: how many devices the topology has; a chip of v2, v3 and tpu7x is two.
        device: what one is, as the compiler calls it.
        arguments: bytes of the inputs.
        outputs: bytes of the results.
        aliased: bytes of results that take the place of inputs that are used up.
        temporaries: bytes of the largest working memory.
        flops: floating-point operations of one run on one chip, loops counted once.
        traffic: bytes that one run reads and writes in the chip's memory, as the compiler estimates them.
        collectives: what the chips exchange.
        seconds: how long the compilation took.
        fits: whether the compiler found room; where not, `temporaries` are what it asked for, and nothing is
            known of operations, traffic and exchanges.
        float32: fraction of the operations in matrix products whose factors are float32.
        passes: bfloat16 passes that a matrix product takes, on average over the operations in them.
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
    fits: bool = True
    float32: float = 0.0
    passes: float = 1.0

    @property
    def peak(self) -> int:
        """Bytes that one chip needs."""
        return self.arguments + self.outputs - self.aliased + self.temporaries
