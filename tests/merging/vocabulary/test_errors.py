"""Everything wrong with a tokenizer section or folder is one sentence that says what and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from mergelab.checkpoints.source import Checkpoint
from mergelab.errors import CheckpointError, RecipeError
from mergelab.merging.recipe.schema import TokenizerSpec
from mergelab.merging.vocabulary import plan_vocabulary

Make = Callable[..., Checkpoint]


def plan(models: dict[str, Checkpoint], source: str = "union", **rest: Any) -> None:
    plan_vocabulary(TokenizerSpec.model_validate({"source": source, **rest}), models, None)


def of_one(**which: Any) -> dict[str, Any]:
    return {"source": {"kind": "model_token", "model": "one", **which}}


FAULTS = {
    "unknown token without a source": (
        {"appel": {}},
        "tokenizer.tokens['appel']: no model has this token (did you mean 'apple'?), so its row needs "
        "a source: give it {kind: zero} or {kind: model_token, model: ..., token: ...}",
    ),
    "token the named model lacks": (
        {"apple": {"source": "one"}},
        "tokenizer.tokens['apple'].source: model 'one' has no token 'apple'; name one it has with "
        "{kind: model_token, model: ..., token: ...}",
    ),
    "other token the named model lacks": (
        {"apple": of_one(token="pare")},
        "tokenizer.tokens['apple'].source: model 'one' has no token 'pare' (did you mean 'pear'?); "
        "name one it has with {kind: model_token, model: ..., token: ...}",
    ),
    "unknown model": (
        {"apple": {"source": "onne"}},
        "tokenizer.tokens['apple'].source: no model 'onne' in this merge (did you mean 'one'?); its "
        "models are 'zero', 'one'",
    ),
    "id past the rows": (
        {"apple": of_one(token_id=3)},
        "tokenizer.tokens['apple'].source.token_id: 3 is not a row of 'one', whose embedding has rows 0 to 2",
    ),
    "negative id": (
        {"apple": of_one(token_id=-1)},
        "tokenizer.tokens['apple'].source.token_id: -1 is not a row of 'one', whose embedding "
        "has rows 0 to 2",
    ),
}


@pytest.fixture
def two(make_model: Make) -> dict[str, Checkpoint]:
    return {"zero": make_model("zero", ["apple", "b"]), "one": make_model("one", ["pear", "b"], rows=3)}


@pytest.mark.parametrize("case", FAULTS)
def test_a_faulty_rule(case: str, two: dict[str, Checkpoint]) -> None:
    tokens, sentence = FAULTS[case]
    with pytest.raises(RecipeError) as error:
        plan(two, tokens=tokens)
    assert error.value.faults == (sentence,)


def test_all_faulty_rules_are_named_at_once(two: dict[str, Checkpoint]) -> None:
    with pytest.raises(RecipeError) as error:
        plan(two, tokens={"apple": of_one(token_id=9), "x": {}, "b": {"source": "two"}})
    assert len(error.value.faults) == 3


def test_an_unknown_tokenizer_source(two: dict[str, Checkpoint]) -> None:
    with pytest.raises(RecipeError, match=r"tokenizer.source: no model 'uniom' in this merge.*'zero', 'one'"):
        plan(two, "uniom")


def test_a_missing_tokenizer(two: dict[str, Checkpoint], make_model: Make) -> None:
    two["bare"] = make_model("bare", None, rows=2)
    with pytest.raises(
        CheckpointError, match=r"model 'bare' has no tokenizer.json in .*; copy the tokenizer files"
    ):
        plan(two)
    (two["bare"].path / "tokenizer.model").write_bytes(b"\n")
    with pytest.raises(
        CheckpointError, match=r"'bare' has tokenizer.model but no tokenizer.json.*save_pretrained"
    ):
        plan(two)


def test_a_vocabulary_larger_than_the_embedding(two: dict[str, Checkpoint], make_model: Make) -> None:
    two["short"] = make_model("short", ["a", "b", "c"], rows=2)
    with pytest.raises(
        CheckpointError, match=r"model 'short' has 2 embedding rows but its tokenizer gives 'c' the id 2"
    ):
        plan(two)


def test_models_of_different_widths(two: dict[str, Checkpoint], make_model: Make) -> None:
    models = {"zero": two["zero"], "wide": make_model("wide", ["apple", "x"], bias=True)}
    done = plan_vocabulary(TokenizerSpec(), models, None)
    with pytest.raises(CheckpointError, match=r"rows of 'lm_head.weight' are \[2\] in 'wide' and \[\] in"):
        bias = models["wide"].tensors["lm_head.bias"]
        done.source("zero", bias, role="lm_head.weight")


def test_a_head_with_fewer_rows_than_the_vocabulary(two: dict[str, Checkpoint], make_model: Make) -> None:
    small = make_model("small", ["apple"])
    done = plan_vocabulary(TokenizerSpec(), two, None)
    with pytest.raises(
        CheckpointError, match=r"'lm_head\.weight' of 'zero' has 1 rows but its vocabulary needs 2"
    ):
        done.source("zero", small.tensors["lm_head.weight"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"model": {}}, "has no 'model.vocab'"),
        ({"model": {"type": "BPE", "vocab": []}}, "has a 'BPE' model with a list vocabulary"),
        ({"model": {"type": "Magic", "vocab": {}}}, "expected one of BPE, Unigram, WordPiece, WordLevel"),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1}]}, "malformed vocabulary or added token"),
        ({"model": {"vocab": {"a": "x"}}}, "malformed vocabulary or added token"),
    ],
)
def test_a_file_that_is_no_tokenizer(data: dict[str, Any], message: str, two: dict[str, Checkpoint]) -> None:
    (two["one"].path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=message):
        plan(two)


def test_a_unigram_vocabulary_with_gaps_takes_no_tokens(make_model: Make) -> None:
    models = {
        "zero": make_model("zero", ["<unk>", "a"], added={"<u>": 5}, kind="Unigram"),
        "one": make_model("one", ["<unk>", "b"], kind="Unigram"),
    }
    with pytest.raises(CheckpointError, match="the Unigram tokenizer of 'zero' leaves ids unused"):
        plan(models)
