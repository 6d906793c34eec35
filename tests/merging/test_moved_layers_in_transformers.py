"""transformers reads the kinds of layers as we do, and runs moved layers as in their own places."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mergelab.merging import merge
from mergelab.merging.structure.layer_fields import FAMILY_FIELDS, layer_fields
from mergelab.merging.structure.layer_kinds import same_kind
from tests.merging.layer_cases import CONFIGS, SLICES, config_of, order, recipe
from tests.merging.layers_in_transformers import LISTS, RECORDED, kinds, load, logits, restacked, save_random
from tests.merging.layers_in_transformers import config_of as in_transformers

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize("name", CONFIGS)
def test_what_was_recorded_is_what_transformers_reads(name: str) -> None:
    assert kinds(in_transformers(CONFIGS[name]), 6) == json.loads(RECORDED.read_text())["source"][name]


def test_the_defaults_of_every_model_type_are_those_of_transformers() -> None:
    from transformers.models.auto import configuration_auto as auto

    tried = set()
    for model_type in auto.CONFIG_MAPPING_NAMES:
        if model_type.removesuffix("_text") not in FAMILY_FIELDS:
            continue
        for count in (7, 13, 54):
            try:
                config = auto.CONFIG_MAPPING[model_type](num_hidden_layers=count)
            except Exception:  # a config class may ask for more than a number of layers
                continue
            stated = {"model_type": model_type, "num_hidden_layers": count}
            for field in layer_fields(stated, ()):
                theirs = getattr(config, field.name, None) if field.name in LISTS else None
                if isinstance(theirs, (list, tuple)) and len(theirs) == count:
                    ours = field.read(stated, count)
                    assert all(map(same_kind, ours, theirs)), (model_type, field.name, ours, theirs)
                    tried.add(model_type)
    assert len(tried) > 50


@pytest.mark.parametrize("name", CONFIGS)
def test_moved_layers_run_as_in_their_own_places(name: str, tmp_path: Path) -> None:
    config, moves = CONFIGS[name], order(name)
    source = save_random(tmp_path / "source", config)
    merge(recipe(source, SLICES[name]), tmp_path / "out")
    merged = load(tmp_path / "out")
    before, after = kinds(in_transformers(config), 6), kinds(merged.config, len(moves))
    assert {key: [kinds_[i] for i in moves] for key, kinds_ in before.items()} == after
    found = logits(merged)
    if name in ("bamba", "recurrent_gemma", "jamba"):
        # The kinds of their layers cannot be set on a config object; the key we wrote is put there.
        model = load(source)
        for key in ("attn_layer_indices", "block_types", "attn_layer_period", "attn_layer_offset"):
            if key in config:
                setattr(model.config, key, config_of(tmp_path / "out")[key])
        expected = logits(restacked(model, moves))
    else:
        expected = logits(restacked(load(source), moves))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert (
        np.abs(found - logits(restacked(load(source), moves[::-1]))).max() > 1e-2 if name != "jamba" else True
    )
