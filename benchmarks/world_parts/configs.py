"""Published `config.json` files: which families load, and which are refused with a true sentence."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.world_parts.section import Place, Section
from mergelab.errors import CheckpointError
from mergelab.models.families import FAMILIES, model_from_config
from mergelab.models.families.nearest import NEAREST
from mergelab.models.families.wrappers import WRAPPERS

__all__ = ["measure"]

CONFIGS = Path(__file__).parents[2] / "tests" / "models" / "hub_configs.json"


def _accepted(config: Mapping[str, Any]) -> bool:
    """Whether a config is a model; its parameters come of an abstract run of the module, none allocated."""
    try:
        model = model_from_config(config)
    except CheckpointError:
        return False
    return all(leaf.size > 0 for leaf in model.table())


def _refusal(config: Mapping[str, Any]) -> str:
    """The family that the refusal of a config names; `none` where it names none."""
    try:
        model_from_config(config)
    except CheckpointError as error:
        named = [family for family in FAMILIES if f"(nearest to {family!r}, but" in str(error)]
        return named[0] if named else "none"
    return "accepted"


def measure(place: Place) -> Section:
    """Reads every config; writes nothing."""
    del place
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for config in json.loads(CONFIGS.read_text()).values():
        kinds.setdefault(config["model_type"], []).append(config)
    supported = {*FAMILIES, *WRAPPERS}
    rows: list[Sequence[str]] = []
    totals = [0, 0, 0, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind, configs in sorted(kinds.items(), key=lambda item: (item[0] not in supported, item[0])):
            if kind in supported:
                accepted = sum(map(_accepted, configs))
                totals[0] += accepted
                totals[1] += len(configs)
                rows.append((f"`{kind}`", str(len(configs)), str(accepted), "-"))
                continue
            named = [_refusal(config) for config in configs]
            right = sum(name == NEAREST[kind][0] for name in named)
            totals[2] += right
            totals[3] += len(configs)
            rows.append((f"`{kind}`", str(len(configs)), "-", f"{right}, as nearest to `{named[0]}`"))
    note = (
        f"{totals[0]} of {totals[1]} published configs of supported families are models (parameters by "
        f"`jax.eval_shape`); {totals[2]} of {totals[3]} others are refused with the family that is nearest "
        "in truth."
    )
    return Section(note, ("model type", "configs", "accepted", "refused with the nearest family"), rows)
