"""Mixtures of experts in `config.json` and in files, as most families spell them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mergelab.errors import CheckpointError
from mergelab.models.decoder import DecoderConfig
from mergelab.models.layers.block import BlockSpec
from mergelab.models.layers.recurrent_block import RecurrentBlockSpec
from mergelab.models.layers.routing import Experts
from mergelab.models.table import Row, linear_rows

__all__ = ["EXPERT_ROWS", "check_experts", "experts_in_layers", "shared_rows"]

_MLP = "model.layers.{i}.mlp"

EXPERT_ROWS = (
    Row("blocks_{i}.mlp.router", f"{_MLP}.gate.weight", "transpose"),
    Row("blocks_{i}.mlp.correction", f"{_MLP}.gate.e_score_correction_bias"),
    *(
        Row(f"blocks_{{i}}.mlp.{name}", f"{_MLP}.experts.{{e}}.{name}_proj.weight", "transpose")
        for name in ("gate", "up", "down")
    ),
)
"""The router and the experts, each a tensor of its own."""


def shared_rows(name: str) -> tuple[Row, ...]:
    """The layer that every token passes, of this name in the files."""
    parts = {f"mlp.shared.{part}": f"{name}.{part}_proj" for part in ("gate", "up", "down")}
    return tuple(linear_rows("blocks_{i}", _MLP, parts))


def check_experts(experts: Experts, place: str) -> Experts:
    """The experts, once their numbers fit each other.

    Raises:
        CheckpointError: more are chosen than there are, or groups do not divide them.
    """
    count, chosen, groups = experts.count, experts.chosen, experts.groups
    faults = []
    if chosen > count:
        faults.append(f"{place} chooses {chosen} of {count} experts; correct one of the two.")
    if count % groups:
        faults.append(f"{place} has {count} experts in {groups} groups, which cannot be equal; correct one.")
    elif experts.chosen_groups > groups or chosen > experts.chosen_groups * (count // groups):
        faults.append(
            f"{place} chooses {chosen} experts from {experts.chosen_groups} of {groups} groups of "
            f"{count // groups}; correct one of them."
        )
    if faults:
        raise CheckpointError(faults)
    return experts


def experts_in_layers(config: DecoderConfig, experts: Experts, sparse: Sequence[bool]) -> DecoderConfig:
    """A decoder with a mixture in place of the feed-forward layer wherever `sparse` says so."""
    made: dict[Any, Any] = {}
    blocks = []
    for block, has in zip(config.blocks, sparse, strict=True):
        assert isinstance(block, BlockSpec | RecurrentBlockSpec)
        blocks.append(made.setdefault(block, replace(block, mlp=experts)) if has else block)
    return replace(config, blocks=tuple(blocks))
