"""Which row every token gets, and which ids, sizes, files and warnings a merged vocabulary has."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mergelab.checkpoints.source import Checkpoint
from mergelab.merging.recipe.schema import TokenizerSpec
from mergelab.merging.vocabulary import VocabularyPlan, plan_vocabulary

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Make = Callable[..., Checkpoint]


def spec(source: str = "union", **rest: Any) -> TokenizerSpec:
    return TokenizerSpec.model_validate({"source": source, **rest})


def first_column(plan: VocabularyPlan, name: str, tensor: str = EMBED) -> list[float]:
    """The first element of every row of a model's re-ordered tensor."""
    source = plan.source(name, plan.models[name].tensors[tensor])
    out = np.empty(int(np.prod(source.shape)), source.dtype)
    source.read_into(0, out)
    return out.reshape(source.shape[0], -1)[:, 0].astype(np.float32).tolist()


@pytest.fixture
def three(make_model: Make) -> dict[str, Checkpoint]:
    """Model 0 has a b c; 1 has them permuted, and x; 2 has a b c, and added <u> and x."""
    return {
        "zero": make_model("zero", ["a", "b", "c"]),
        "one": make_model("one", ["c", "a", "b", "x"]),
        "two": make_model("two", ["a", "b", "c"], added={"<u>": 3, "x": 4}),
    }


def test_union_keeps_the_first_models_ids_and_fills_rows_by_rule(three: dict[str, Checkpoint]) -> None:
    plan = plan_vocabulary(spec(), three, None)
    assert dict(plan.vocabulary) == {"a": 0, "b": 1, "c": 2, "x": 3, "<u>": 4}
    assert plan.size == 5 and plan.config_updates == {"vocab_size": 5} and plan.donor == "zero"
    # x: mean of its owners 103 and 204; <u>: its only owner's 203.
    assert first_column(plan, "zero") == [0, 1, 2, 153.5, 203]
    assert first_column(plan, "one") == [101, 102, 100, 103, 203]
    assert first_column(plan, "two") == [200, 201, 202, 204, 203]
    assert first_column(plan, "two", HEAD) == [1200, 1201, 1202, 1204, 1203]


def test_the_base_gives_the_ids_and_the_rows_that_several_models_have(three: dict[str, Checkpoint]) -> None:
    plan = plan_vocabulary(spec(), three, "one")
    assert dict(plan.vocabulary) == {"c": 0, "a": 1, "b": 2, "x": 3, "<u>": 4}
    assert first_column(plan, "zero") == [2, 0, 1, 103, 203]


def test_one_models_vocabulary_leaves_out_the_others_tokens(three: dict[str, Checkpoint]) -> None:
    plan = plan_vocabulary(spec("two"), three, "zero")
    assert first_column(plan, "one") == [101, 102, 100, 203, 103]
    plan = plan_vocabulary(spec("base"), three, "zero")
    assert first_column(plan, "one") == [101, 102, 100]


def test_rules_choose_rows_and_force_overrides(three: dict[str, Checkpoint]) -> None:
    tokens = {
        "x": {"source": "one"},
        "a": {"source": {"kind": "model_token", "model": "two", "token": "<u>"}},
        "b": {"source": {"kind": "model_token", "model": "two", "token_id": 2}, "force": True},
        "c": {"source": {"kind": "zero"}, "force": True},
        "<u>": {"force": True},
    }
    plan = plan_vocabulary(spec(tokens=tokens), three, None)
    assert first_column(plan, "zero") == [0, 202, 0, 103, 203]
    assert first_column(plan, "one") == [101, 202, 0, 103, 203]
    assert first_column(plan, "two") == [200, 202, 0, 204, 203]


def test_a_rule_adds_a_token_that_the_vocabulary_lacks(three: dict[str, Checkpoint]) -> None:
    tokens = {"<u>": {"source": "two"}, "<new>": {"source": {"kind": "zero"}}}
    plan = plan_vocabulary(spec("base", tokens=tokens), three, "zero")
    assert dict(plan.vocabulary) == {"a": 0, "b": 1, "c": 2, "<u>": 3, "<new>": 4}
    assert first_column(plan, "zero") == [0, 1, 2, 203, 0]
    added = {t["content"]: t for t in json.loads(plan.files["tokenizer.json"])["added_tokens"]}
    assert added["<u>"]["special"] and not added["<new>"]["special"]
    assert any("'<new>' is in no model's vocabulary" in w for w in plan.warnings)


def test_a_model_that_is_not_merged_lends_only_what_rules_ask(three: dict[str, Checkpoint]) -> None:
    plan = plan_vocabulary(spec("two"), three, None, inputs=["zero"])
    assert first_column(plan, "zero") == [0, 1, 2, 0, 0]
    assert any("zeros: 2 in all, such as '<u>'" in w for w in plan.warnings)
    plan = plan_vocabulary(spec("two", tokens={"<u>": {"source": "two"}}), three, None, inputs=["zero"])
    assert first_column(plan, "zero") == [0, 1, 2, 203, 0]
    assert list(plan.rows) == ["zero"]


def test_equal_vocabularies_hand_back_the_source_itself_and_the_files_as_they_are(make_model: Make) -> None:
    models = {n: make_model(n, ["a", "b"], rows=8, tokenizer_config={}) for n in ("zero", "one")}
    plan = plan_vocabulary(spec(), models, None)
    for name, model in models.items():
        for source in model.tensors.values():
            assert plan.source(name, source) is source
    assert plan.size == 8 and not plan.warnings
    assert plan.files == {
        f: (models["zero"].path / f).read_bytes() for f in ("tokenizer.json", "tokenizer_config.json")
    }


def test_padding_rows_are_kept_while_vocabularies_agree_and_padded_further(make_model: Make) -> None:
    models = {n: make_model(n, ["a", "b"], rows=5) for n in ("zero", "one")}
    plan = plan_vocabulary(spec(pad_to_multiple_of=4), models, None)
    assert plan.size == 8
    assert first_column(plan, "one") == [100, 101, 102, 103, 104, 102, 102, 102]
    # A forced row does not cost the padding; a new token does.
    forced = plan_vocabulary(spec(tokens={"a": {"source": "one", "force": True}}), models, None)
    assert first_column(forced, "zero") == [100, 1, 2, 3, 4]
    extended = plan_vocabulary(spec(tokens={"<n>": {"source": {"kind": "zero"}}}), models, None)
    assert first_column(extended, "zero") == [0, 1, 0]
    assert any("past the 3 of the merged vocabulary are dropped" in w for w in extended.warnings)


def test_padding_of_different_lengths_is_dropped_with_a_warning(make_model: Make) -> None:
    models = {"zero": make_model("zero", ["a", "b"], rows=5), "one": make_model("one", ["a", "b"], rows=2)}
    plan = plan_vocabulary(spec(), models, None)
    assert plan.size == 2 and "different numbers of rows" in plan.warnings[0]


def test_ids_may_have_gaps(make_model: Make) -> None:
    models = {
        "zero": make_model("zero", ["a", "b"], added={"<u>": 5}),
        "one": make_model("one", ["a", "b", "x"]),
    }
    plan = plan_vocabulary(spec(), models, None)
    assert dict(plan.vocabulary) == {"a": 0, "b": 1, "<u>": 5, "x": 6}
    assert first_column(plan, "one") == [100, 101, 0, 0, 0, 5, 102]


def test_a_bias_follows_its_rows_and_a_tied_head_borrows_from_heads(make_model: Make, read: Any) -> None:
    models = {
        "zero": make_model("zero", ["a", "b"], bias=True),
        "one": make_model("one", ["b", "a", "x"], bias=True),
        "two": make_model("two", ["a", "b"], tied=True),
    }
    plan = plan_vocabulary(spec(), models, "zero")
    assert first_column(plan, "zero", "lm_head.bias") == [5000, 5001, 5102]
    assert first_column(plan, "one", "lm_head.bias") == [5101, 5100, 5102]
    head = plan.source("two", models["two"].tensors[EMBED], role=HEAD)
    assert read(head)[:, 0].tolist() == [200, 201, 1102]
    norm = models["zero"].tensors["model.norm.weight"]
    assert plan.source("zero", norm) is norm


def test_a_tied_lender_gives_its_input_embedding(make_model: Make) -> None:
    models = {"zero": make_model("zero", ["a"]), "one": make_model("one", ["a", "x"], tied=True)}
    assert first_column(plan_vocabulary(spec(), models, None), "zero", HEAD) == [1000, 101]


def test_special_token_ids_follow_their_tokens(make_model: Make) -> None:
    config = {"eos_token_id": 0, "bos_token_id": [0, 1], "mask_token_id": 2, "sep_token_id": None}
    models = {
        "zero": make_model("zero", ["a", "b", "gone"], config=config),
        "one": make_model("one", ["b", "x", "a"], config={"eos_token_id": 2, "pad_token_id": 1}),
    }
    updates = plan_vocabulary(spec("one"), models, "zero").config_updates
    # eos and pad as the donor has them; bos by spelling; mask's token is gone; sep stays unset.
    assert updates == {
        "vocab_size": 3,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "bos_token_id": [2, 0],
        "mask_token_id": None,
    }
    assert plan_vocabulary(spec("base"), models, "zero").config_updates == {"vocab_size": 3}


def test_added_tokens_without_rows_count_as_missing(make_model: Make) -> None:
    models = {
        "zero": make_model("zero", ["a", "b"], added={"<u>": 2}, rows=2),
        "one": make_model("one", ["a", "b"], added={"<u>": 2}),
    }
    plan = plan_vocabulary(spec(), models, None)
    assert first_column(plan, "zero") == [0, 1, 102]
    found = "added tokens of 'zero' without a row in its embedding count as tokens it lacks"
    assert plan.warnings == (f"{found}: 1 in all, such as '<u>'",)
