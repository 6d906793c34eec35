"""mergelab: merge language models in JAX.

The package imports nothing heavy until a name is used: `mergelab.merge`, `mergelab.Recipe`, and the rooms
`mergelab.operators`, `mergelab.merging`, `mergelab.checkpoints`, ... load on first access.
"""

from __future__ import annotations

import importlib

from mergelab.version import __version__

TYPE_CHECKING = False  # that of `typing`, which takes longer to import than all the rest
if TYPE_CHECKING:
    from typing import Any

    from mergelab import errors as errors
    from mergelab import operators as operators
    from mergelab.merging.recipe.schema import Recipe as Recipe
    from mergelab.merging.run_merge import merge as merge

__all__ = ["Recipe", "__version__", "errors", "merge", "operators"]

_NAMES = {"merge": "mergelab.merging.run_merge", "Recipe": "mergelab.merging.recipe.schema"}
_ROOMS = (
    "checkpoints", "data", "decoding", "errors", "merging", "models",
    "operators", "quickstart", "report", "sae", "sharding", "trees",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"mergelab.{name}")
    from mergelab.errors import did_you_mean

    raise AttributeError(f"module 'mergelab' has no attribute {name!r}{did_you_mean(name, __dir__())}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_NAMES, *_ROOMS})
