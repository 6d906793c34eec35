"""One string is one text: nowhere is it taken for a list of its letters."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mergelab
from mergelab.abliteration import abliterate, encode_prompts
from mergelab.abliteration.answers import is_refusal
from mergelab.activations import contexts_of_texts, open_model_activations
from mergelab.decoding import complete, generate_text
from mergelab.errors import MergelabError
from mergelab.models import load_model
from mergelab.quickstart import train_bpe
from mergelab.sae import load_config
from mergelab.sae.evaluation import label_texts
from mergelab.text import Tokenizer, load_tokenizer
from tests.goldens.models import write_models

LISTS = {
    "texts", "prompts", "harmful", "harmless", "phrases", "stop", "stop_strings", "targets", "sites",
    "capture", "patterns", "overrides", "text", "prompt",
}  # fmt: skip
"""Parameters that take several texts, names, globs or files."""
TEXT = "one two three four five six seven eight nine ten"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer."""
    root = tmp_path_factory.mktemp("models")
    write_models(root)
    (root / "text.txt").write_text(TEXT * 4)
    return root / "llama-base"


def public_functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Functions and methods of all faces, by their names."""
    for module in pkgutil.walk_packages(mergelab.__path__, "mergelab."):
        if not module.ispkg:
            continue
        face = importlib.import_module(module.name)
        for name in getattr(face, "__all__", ()):
            found = getattr(face, name)
            if inspect.isfunction(found):
                yield f"{module.name}.{name}", found
            elif inspect.isclass(found):
                methods = inspect.getmembers(found, inspect.isfunction)
                yield from ((f"{module.name}.{name}.{m}", f) for m, f in methods if not m.startswith("_"))


def letters_by_type(function: Callable[..., Any]) -> list[str]:
    """The parameters whose types do not say that one string is taken for one."""
    found = []
    for parameter in inspect.signature(function).parameters.values():
        kind = str(parameter.annotation)
        several = any(f"{each}[{one}" in kind for each in ("Sequence", "Iterable") for one in ("str", "Path"))
        if parameter.name in LISTS and several and not kind.startswith("str |"):
            found.append(parameter.name)
    return found


def test_every_public_list_of_texts_takes_one() -> None:
    wrong = [f"{name}({', '.join(bad)})" for name, f in public_functions() if (bad := letters_by_type(f))]
    assert wrong == []

    def careless(texts: Sequence[str], sites: str | Sequence[str]) -> None:
        """The control."""

    assert letters_by_type(careless) == ["texts"]


def ids(found: Any) -> list[Any]:
    return [np.asarray(part).tolist() for part in (found if isinstance(found, tuple) else (found,))]


CALLS: dict[str, Callable[[Path, Tokenizer, Any], Any]] = {
    "encode_batch": lambda folder, tokenizer, one: tokenizer.encode_batch(one),
    "encode_prompts": lambda folder, tokenizer, one: encode_prompts(tokenizer, one).tokens,
    "contexts_of_texts": lambda folder, tokenizer, one: contexts_of_texts(folder, one, 4),
    "is_refusal": lambda folder, tokenizer, one: is_refusal("one two", one),
    "train_bpe": lambda folder, tokenizer, one: sorted(train_bpe(one, 262).get_vocab()),
}


@pytest.mark.parametrize("call", CALLS)
def test_one_text_is_a_list_of_one(call: str, folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    found = ids(CALLS[call](folder, tokenizer, TEXT))
    assert found == ids(CALLS[call](folder, tokenizer, [TEXT]))
    assert found != ids(CALLS[call](folder, tokenizer, list(TEXT))), "the control: its letters"


def test_one_file_and_one_site_are_lists_of_one(folder: Path) -> None:
    text, site = folder.parent / "text.txt", "blocks.0.resid_post"
    alone = [open_model_activations(folder, site, path, length=4) for path in (text, str(text))]
    listed = open_model_activations(folder, [site], [text], length=4)
    for one in alone:
        assert one.sites == listed.sites == (site,)
        np.testing.assert_array_equal(one.tokens, listed.tokens)
    labels = [label_texts(folder, path, 4).tokens for path in (text, str(text), [text])]
    assert len(labels[0]) and all(np.array_equal(labels[0], found) for found in labels)


def test_one_prompt_is_answered_once(folder: Path) -> None:
    model, params = load_model(folder)
    tokenizer = load_tokenizer(folder)
    (one,), (other,) = (complete(model, params, tokenizer, p, max_new_tokens=2) for p in ("one", ["one"]))
    assert one.token_ids == other.token_ids
    answer = generate_text(model, params, tokenizer, "one", max_new_tokens=2)
    assert isinstance(answer, str) and [answer] == generate_text(
        model, params, tokenizer, ["one"], max_new_tokens=2
    )


def test_one_prompt_is_too_few_to_find_a_direction(folder: Path, tmp_path: Path) -> None:
    several = [f"{TEXT} {number}" for number in range(5)]
    with pytest.raises(MergelabError, match="there are 1 harmful prompts"):
        abliterate(folder, tmp_path / "out", TEXT, several)
    with pytest.raises(MergelabError, match="there are 1 harmless prompts"):
        abliterate(folder, tmp_path / "out", several, TEXT)


def test_one_override_is_one() -> None:
    config: dict[str, Any] = {
        "sae": {"variant": "topk", "d_in": 4, "n_latents": 8, "k": 2},
        "data": {"kind": "toy"},
    }
    config["train"] = {"batch_size": 4, "tokens": 8}
    assert load_config(config, "train.seed=7") == load_config(config, ["train.seed=7"])
