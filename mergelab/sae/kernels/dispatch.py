"""The forms of one computation, and which of them a platform takes: the one place that decides it.

XLA compiles the plain form of some computations badly for a CPU, and of others for a TPU. A kernel states its
plain form as the reference, and beside it the equal forms that serve a platform; callers see one function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

__all__ = ["Forms"]

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Forms(Generic[F]):
    """Equal forms of one function.

    Attributes:
        reference: plain form, taken where a platform has none of its own.
        cpu: form for XLA's CPU backend.
        gpu: form for a GPU.
        tpu: form for a TPU.
    """

    reference: F
    cpu: F | None = None
    gpu: F | None = None
    tpu: F | None = None

    def on(self, platform: str) -> F:
        """The form that a program compiled for this platform takes."""
        return {"cpu": self.cpu, "gpu": self.gpu, "tpu": self.tpu}.get(platform) or self.reference
