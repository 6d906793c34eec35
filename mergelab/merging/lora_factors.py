"""The factors of a change, as tensors that are found when they are read: two jobs of one SVD."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from mergelab.checkpoints import TensorSource, read_whole
from mergelab.errors import OperatorError
from mergelab.merging.engine.job import Job
from mergelab.operators.low_rank import (
    LowRank,
    balanced_factors,
    randomized_svd,
    rank_for_energy,
    truncated_svd,
)
from mergelab.operators.region import tensor_key

__all__ = ["ChangeFactors", "FactorSetting", "tensor_bytes"]


@dataclass(frozen=True)
class FactorSetting:
    """How one matrix is approximated."""

    rank: int | None
    energy: float | None
    randomized: bool
    seed: int
    dtype: np.dtype

    def check(self) -> None:
        if self.rank is None and self.energy is None:
            raise OperatorError("neither a rank nor an energy was given: say how large the adapter may be.")
        if self.rank is not None and self.rank < 1:
            raise OperatorError(f"the rank is {self.rank} where at least 1 was expected.")
        if self.energy is not None:
            rank_for_energy(np.ones(1, np.float32), self.energy, 1.0)
        if self.randomized and self.rank is None:
            raise OperatorError("the randomized SVD needs a rank, which an energy may then undercut.")

    def approximate(self, name: str, delta: np.ndarray) -> LowRank:
        if self.randomized and self.rank is not None:
            key = jax.random.wrap_key_data(jnp.asarray(tensor_key(self.seed, name)))
            svd = randomized_svd(jnp.asarray(delta), min(self.rank, *delta.shape), key)
        else:
            svd = truncated_svd(jnp.asarray(delta))
        rank = svd.singular.size if self.rank is None else self.rank
        if self.energy is not None:
            total = float(np.sum(np.square(delta, dtype=np.float64)))
            rank = min(rank, rank_for_energy(np.asarray(svd.singular), self.energy, total))
        return svd.cut(rank)

    def factors(self, name: str, delta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`B` `[rows, rank]` and `A` `[rank, columns]` as stored."""
        with jax.default_matmul_precision("highest"):
            b, a = (np.asarray(f).astype(self.dtype) for f in balanced_factors(self.approximate(name, delta)))
        return b, a


def _missed(delta: np.ndarray, b: np.ndarray, a: np.ndarray) -> float:
    """The norm of what the factors miss of a change, over the norm of the change."""
    missed = delta - b.astype(np.float32) @ a.astype(np.float32)
    return float(np.linalg.norm(missed) / np.linalg.norm(delta))


@dataclass(eq=False)
class ChangeFactors:
    """The factors of one module's change: found when one is first read, forgotten when both have been.

    Attributes:
        module: Name of the module.
        tuned, base: Its weight in both models, `[rows, columns]`, or the other way round if `transposed`.
        setting: How the change is approximated.
        one_at_a_time: Lock that all modules share: a single change is in memory.
        found: Function called with the bytes of the base that were dealt with.
        rank: Columns of `B`; None until the SVD says, where an energy decides.
        error: Norm of what the factors miss over the norm of the change, once known.
        held: The factors that have been found and not been read.
        names: Names under which `B` and `A` are stored.
    """

    module: str
    tuned: TensorSource
    base: TensorSource
    transposed: bool
    setting: FactorSetting
    one_at_a_time: threading.Lock
    found: Callable[[int], object]
    rank: int | None = None
    error: float | None = None
    held: dict[str, np.ndarray] = field(default_factory=dict)
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.setting.energy is None and self.setting.rank is not None:
            self.rank = min(self.setting.rank, *self.base.shape)
        else:
            self.rank = self.take("B").shape[1]

    def delta(self) -> np.ndarray:
        """The whole change, `[rows, columns]`, float32."""
        delta = read_whole(self.tuned).astype(np.float32) - read_whole(self.base).astype(np.float32)
        return delta.T if self.transposed else delta

    def take(self, side: str) -> np.ndarray:
        """`B` or `A`."""
        with self.one_at_a_time:
            if side not in self.held:
                delta = self.delta()
                b, a = self.setting.factors(self.module, delta)
                self.held |= {"B": b, "A": a}
                if self.error is None:
                    self.error = _missed(delta, b, a)
                    self.found(tensor_bytes(self.base))
            return self.held[side]

    def forget(self, side: str) -> None:
        """Gives up a factor that has been read."""
        with self.one_at_a_time:
            self.held.pop(side, None)

    def check(self, b: np.ndarray, a: np.ndarray) -> None:
        """Takes the error from factors that an interrupted run has written."""
        self.error = _missed(self.delta(), b, a)
        self.found(tensor_bytes(self.base))

    def jobs(self, stem: str, names: tuple[str, str], rank: int | None = None) -> list[Job]:
        """Jobs that write `B` and `A` as PEFT names them, with zeros up to a larger `rank`."""
        assert self.rank is not None
        rows, columns = self.base.shape[::-1] if self.transposed else self.base.shape
        wide = self.rank if rank is None else rank
        sources = [
            _Factor(f"{stem}.{names[0]}", (rows, wide), self, "B"),
            _Factor(f"{stem}.{names[1]}", (wide, columns), self, "A"),
        ]
        self.names = tuple(source.name for source in sources)
        return [Job(source.name, source.shape, source.dtype, (source,)) for source in sources]


@dataclass(frozen=True)
class _Factor:
    """A `TensorSource` of one factor; its sibling comes from the same SVD."""

    name: str
    shape: tuple[int, ...]
    factors: ChangeFactors
    side: str

    @property
    def dtype(self) -> np.dtype:
        return self.factors.setting.dtype

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fills `out` with flat elements `[start, start + out.size)`."""
        found = self.factors.take(self.side)
        found = np.pad(found, [(0, want - have) for want, have in zip(self.shape, found.shape, strict=True)])
        flat = np.ascontiguousarray(found).reshape(-1)
        out[:] = flat[start : start + out.size]
        if start + out.size == flat.size:
            self.factors.forget(self.side)


def tensor_bytes(tensor: TensorSource) -> int:
    """Size of a tensor as stored."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize
