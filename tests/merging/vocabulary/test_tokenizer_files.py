"""The tokenizer that is written loads, keeps every id, and segments the donor's text as the donor does."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mergelab.checkpoints.folder import open_checkpoint
from mergelab.checkpoints.source import Checkpoint
from mergelab.merging.recipe.schema import TokenizerSpec
from mergelab.merging.vocabulary import VocabularyPlan, plan_vocabulary, vocabulary_differences

Make = Callable[..., Checkpoint]
UNION = TokenizerSpec(source="union")


def load(plan: VocabularyPlan) -> Tokenizer:
    return Tokenizer.from_str(plan.files["tokenizer.json"].decode())


def loaded_ids(plan: VocabularyPlan) -> dict[str, int]:
    return load(plan).get_vocab(with_added_tokens=True)


@pytest.mark.parametrize("kind", ["BPE", "Unigram", "WordPiece", "WordLevel"])
def test_every_kind_of_tokenizer_is_extended_and_keeps_its_ids(kind: str, make_model: Make) -> None:
    models = {
        "zero": make_model("zero", ["<unk>", "a", "b", "ab"], added={"<one>": 4}, kind=kind),
        "one": make_model("one", ["<unk>", "b", "a", "ba"], added={"<two>": 4}, kind=kind),
    }
    plan = plan_vocabulary(UNION, models, None)
    expected = {"<unk>": 0, "a": 1, "b": 2, "ab": 3, "<one>": 4, "ba": 5, "<two>": 6}
    # On loading, added tokens would take other ids if the subword model had no entries for them.
    assert dict(plan.vocabulary) == expected == loaded_ids(plan)
    assert load(plan).encode("ab<two>").ids == [3, 6]
    # Only BPE needs more than the vocabulary (its merges) to make a new token of text.
    assert load(plan).encode("ba").tokens == (["b", "a"] if kind == "BPE" else ["ba"])
    assert any("never produced from text" in w for w in plan.warnings) == (kind == "BPE")


def test_a_new_unigram_piece_keeps_its_own_log_probability(make_model: Make) -> None:
    models = {
        "zero": make_model("zero", ["<unk>", "a"], kind="Unigram"),
        "one": make_model("one", ["<unk>", "a", "b", "c"], kind="Unigram"),
    }
    vocab = json.loads(plan_vocabulary(UNION, models, None).files["tokenizer.json"])["model"]["vocab"]
    assert vocab == [["<unk>", 0.0], ["a", -1.0], ["b", -2.0], ["c", -3.0]]


def test_different_kinds_are_matched_by_spelling_with_a_warning(make_model: Make) -> None:
    models = {
        "zero": make_model("zero", ["a", "b"]),
        "one": make_model("one", ["b", "##a"], kind="WordPiece"),
    }
    plan = plan_vocabulary(UNION, models, None)
    assert dict(plan.vocabulary) == loaded_ids(plan) == {"a": 0, "b": 1, "##a": 2}
    assert any("BPE" in w and "WordPiece" in w for w in plan.warnings)


def test_a_plain_token_that_another_model_adds_is_matched_whole(make_model: Make) -> None:
    models = {
        "zero": make_model("zero", ["a", "b", "<u>", "<", "u", ">"]),
        "one": make_model("one", ["a", "b"], added={"<u>": 2}),
    }
    assert load(plan_vocabulary(UNION, models, None)).encode("<u>").ids == [2]
    assert load(plan_vocabulary(TokenizerSpec(source="base"), models, None)).encode("<u>").ids == [3, 4, 5]


def test_added_tokens_that_only_the_config_files_have_count(make_model: Make) -> None:
    config = {"added_tokens_decoder": {"2": {"content": "<u>", "special": True}}}
    models = {
        "zero": make_model("zero", ["a", "b"], rows=4, tokenizer_config=config),
        "one": make_model("one", ["a", "b"], added={"<v>": 2}),
    }
    (models["zero"].path / "added_tokens.json").write_text('{"<w>": 3, "<u>": 2}')
    (models["zero"].path / "vocab.json").write_text("{}")
    plan = plan_vocabulary(UNION, models, None)
    assert dict(plan.vocabulary) == loaded_ids(plan) == {"a": 0, "b": 1, "<u>": 2, "<w>": 3, "<v>": 4}
    decoder = json.loads(plan.files["tokenizer_config.json"])["added_tokens_decoder"]
    assert decoder["4"]["content"] == "<v>" and decoder["2"]["content"] == "<u>"
    assert sorted(plan.files) == ["tokenizer.json", "tokenizer_config.json"]


def test_a_definition_that_differs_is_reported_and_the_first_kept(make_model: Make) -> None:
    models = {n: make_model(n, ["a"], added={"<u>": 1}) for n in ("zero", "one")}
    path = models["one"].path / "tokenizer.json"
    data = json.loads(path.read_text())
    data["added_tokens"][0]["lstrip"] = True
    path.write_text(json.dumps(data))
    plan = plan_vocabulary(UNION, models, None)
    assert "'<u>' is defined differently by 'zero' and 'one'" in plan.warnings[0]
    assert not json.loads(plan.files["tokenizer.json"])["added_tokens"][0]["lstrip"]


def golden_union(goldens: Path) -> tuple[VocabularyPlan, Path]:
    folder = goldens / "models"
    models = {name: open_checkpoint(folder / name) for name in ("llama-base", "llama-tok", "llama-perm")}
    return plan_vocabulary(UNION, models, "llama-base"), folder / "llama-base"


TEXTS = st.text(st.characters(codec="utf-8"), max_size=40).filter(lambda t: "<|im_" not in t)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
def test_base_text_is_segmented_as_by_the_base(text: str, goldens: Path) -> None:
    plan, base = golden_union(goldens)
    assert load(plan).encode(text).ids == Tokenizer.from_file(str(base / "tokenizer.json")).encode(text).ids


def test_new_tokens_are_segmented_as_by_their_model(goldens: Path) -> None:
    plan, base = golden_union(goldens)
    text = "<|im_start|>user\nprint(1)<|im_end|>\n"
    ids = load(plan).encode(text).ids
    assert ids == Tokenizer.from_file(str(base.parent / "llama-tok" / "tokenizer.json")).encode(text).ids
    assert ids != Tokenizer.from_file(str(base / "tokenizer.json")).encode(text).ids


@pytest.mark.oracle
def test_transformers_loads_the_tokenizer_and_keeps_its_special_tokens(goldens: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
    plan, base = golden_union(goldens)
    for name, raw in plan.files.items():
        (tmp_path / name).write_bytes(raw)
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(base)
    text = "def f(x):\n    return x + 1  # <s> naïve"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [512, 513]
    assert ours.decode(ours("<|im_start|>hi")["input_ids"]) == "<|im_start|>hi"


def test_differences_are_named_and_agreement_is_silent(make_model: Make) -> None:
    models = {
        "zero": make_model("zero", ["a", "b", "c"]),
        "same": make_model("same", ["a", "b", "c"]),
        "none": make_model("none", None, rows=3),
    }
    assert vocabulary_differences(models, None) == ()
    models["other"] = make_model("other", ["b", "a"], added={"<u>": 2})
    (sentence,) = vocabulary_differences(models, "zero")
    assert sentence == (
        "model 'other' has, compared with 'zero', 2 tokens with other ids (such as 'b', 'a') and 1 "
        "token it lacks (such as '<u>') and 1 token fewer, so rows of different tokens would be merged; set "
        "tokenizer_source to 'union' or 'base'"
    )


def test_the_order_of_keys_in_a_file_decides_nothing(make_model: Make) -> None:
    models: dict[str, Any] = {"zero": make_model("zero", ["a"]), "one": make_model("one", ["a", "x", "y"])}
    plan = plan_vocabulary(UNION, models, None)
    path = models["one"].path / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["vocab"] = dict(reversed(data["model"]["vocab"].items()))
    path.write_text(json.dumps(data))
    assert plan_vocabulary(UNION, models, None).files == plan.files
