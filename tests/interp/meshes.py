"""Parameters spread over the eight devices that tests have."""

from __future__ import annotations

import jax

from mergelab.models.model import Model, Params
from mergelab.models.table import get_leaf, tree_from_leaves
from mergelab.sharding import DEFAULT_RULES, make_mesh, named_sharding


def on_mesh(model: Model, params: Params) -> Params:
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    shardings = {leaf: named_sharding(mesh, leaf.shape, leaf.axes, DEFAULT_RULES) for leaf in model.table()}
    return tree_from_leaves(
        {leaf: jax.device_put(get_leaf(params, leaf), s) for leaf, s in shardings.items()}
    )
