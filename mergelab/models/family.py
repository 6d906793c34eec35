"""What one model family declares of itself, and what it declares it of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flax import linen as nn

from mergelab.models.sites import Shape
from mergelab.models.table import Parameters, Row

__all__ = ["Architecture", "Family"]


@dataclass(frozen=True)
class Architecture:
    """A flax module that several families share, and what is known of it without building it.

    Attributes:
        module: from a configuration to the module.
        parameters: path, shape and logical axes of every parameter.
        sites: name and symbolic shape of every site, in forward order.
        causal: whether tokens see only earlier ones (it can keep a cache, and has logits).
    """

    module: Callable[[Any], nn.Module]
    parameters: Callable[[Any], Parameters]
    sites: Callable[[Any], dict[str, Shape]]
    causal: bool


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        model_type: as `config.json` spells it.
        architecture: the module it runs on.
        read: `(config, place) -> configuration`; raises `CheckpointError` for what it cannot compute.
        rows: the table that maps parameters to HF tensors, for one configuration.
        prefix: what HF puts before tensor names in models with a head, and leaves away without one.
        unused: glob patterns of tensors that files may hold and that the model does not need.
        adapt: `(configuration, tensor names) -> configuration`, where files of one config differ.
    """

    model_type: str
    architecture: Architecture
    read: Callable[[Mapping[str, Any], str], Any]
    rows: Callable[[Any], Iterable[Row]]
    prefix: str = ""
    unused: tuple[str, ...] = ()
    adapt: Callable[[Any, Collection[str]], Any] = lambda config, names: config
