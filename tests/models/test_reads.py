"""The table knows what each matrix reads: its site times the matrix is what comes next."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mergelab.activations.capture import capture
from mergelab.models.families import model_from_config
from tests.models.tiny_models import CONFIGS, tiny

NEXT = {"attn.v.kernel": "attn.v", "mlp.down.kernel": "mlp.out", "attn.o.kernel": "attn.out"}

SITELESS = {"embed_up", "unembed_down", "conv", "position_q", "position_k", "router", "a_log"}
"""What multiplies rows of the embedding, the stream behind the last norm, several tokens, vectors of relative
positions, a state, or a stream that was scaled for it (Gemma 4's router; other families' read a site)."""


@pytest.mark.parametrize("name", CONFIGS)
def test_every_matrix_reads_a_site_of_its_width(name: str) -> None:
    model = model_from_config(CONFIGS[name])
    sites = model.sites()
    for leaf in model.table():
        if leaf.reads is None:
            embedding = leaf.path[-1] == "embedding" or leaf.path[0] == "pooler"
            vector = len(leaf.shape) == 1 or leaf.path[-1] == "scale"  # a norm may have one scale per head
            stack = leaf.stack or leaf.axes[0] == "experts"
            siteless = SITELESS & {*leaf.path}
            assert leaf.input_axis is None and (embedding or stack or vector or siteless), leaf.name
        else:
            assert math.prod(map(int, sites[leaf.reads][2:])) == leaf.shape[-2], leaf.name
            assert leaf.input_axis is not None and leaf.hf_shape[leaf.input_axis] == leaf.shape[-2]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi3", "bert"])
def test_a_site_times_the_matrix_that_reads_it_is_what_comes_next(name: str) -> None:
    model = model_from_config(CONFIGS[name])
    params = tiny(name)[1]
    found = capture(model, params, [[5, 6, 7, 8]], ["blocks.1.*"])
    leaves = {leaf.name: leaf for leaf in model.table()}
    for parameter, site in NEXT.items():
        leaf = leaves[f"blocks_1.{parameter}"]
        group, layer = parameter.split(".")[:2]
        weights = params["blocks_1"][group][layer]
        read = found[leaf.reads or ""].reshape(4, -1)
        made = read @ np.asarray(weights["kernel"]) + np.asarray(weights.get("bias", 0.0))
        expected = found[f"blocks.1.{site}"].reshape(4, -1)
        np.testing.assert_allclose(made, expected, atol=1e-5)
        assert np.abs(made[::-1] - expected).max() > 1e-3  # the control: the tokens' order matters
