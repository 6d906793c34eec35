"""Lists that name every family by itself, so that rooms need not load them, agree with the families."""

from __future__ import annotations

import pytest

from mergelab.merging.head_extraction import _INNER
from mergelab.models.families import FAMILIES
from mergelab.reasoning.reward_files import _CLASSES


def test_adapters_of_heads_know_what_stands_before_the_names_of_every_family() -> None:
    # Their towers have heads of their own kind, and no language model's.
    towers = {"clip", "clip_text_model", "clip_vision_model"}
    assert {kind: family.prefix for kind, family in FAMILIES.items() if kind not in towers} == {
        kind: lead for kind, lead in _INNER.items() if kind in FAMILIES
    }


@pytest.mark.oracle
def test_classifiers_are_named_as_transformers_names_them() -> None:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as NAMES,
    )

    expected = {kind: NAMES[kind] for kind in FAMILIES if kind in NAMES}
    decoders = {kind for kind, family in FAMILIES.items() if family.architecture.causal}
    assert expected.keys() & decoders <= _CLASSES.keys() <= expected.keys()
    assert all(f"{name}ForSequenceClassification" == expected[kind] for kind, name in _CLASSES.items())
