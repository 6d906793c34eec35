"""The two evaluators of folders: the user's command, and the loss on a text file."""

from __future__ import annotations

import math
import shlex
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mergelab.errors import CheckpointError, EvaluationError
from mergelab.merging.soups.evaluators import CommandEvaluator, TextLoss
from mergelab.models.families import model_from_config
from mergelab.models.save import save_model
from mergelab.quickstart import small_llama
from mergelab.quickstart.family import train_bpe

TEXT = "the soup of the day is the mean of the pots; naïve cooks weigh it.\n" * 5
CONFIG = small_llama.LlamaConfig(
    vocab_size=300,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=32,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
)
_SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32},
    "bert": {
        "model_type": "bert",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 32,
    },
}


def python(code: str) -> str:
    """A command that runs Python code; the model's folder is `sys.argv[1]`."""
    return f"{sys.executable} -I -S -c {shlex.quote('import sys; ' + code)} {{model}}"


def test_a_command_gets_the_folder_and_its_last_line_counts(tmp_path: Path) -> None:
    folder = tmp_path / "a model; with $(odd) name"
    folder.mkdir()
    code = "import os; print('loading'); print(int(os.path.isdir(sys.argv[1])), flush=True); print()"
    assert CommandEvaluator(python(code))(folder) == 1
    scores = CommandEvaluator(python("""print('{"acc": 0.5, "n": 3}')"""))(folder)
    assert scores == {"acc": 0.5, "n": 3}


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("sys.exit('the GPU is on fire')", "exited with status 1; its last words: the GPU is on fire"),
        ("sys.exit(3)", r"exited with status 3; its last words: \(nothing"),
        ("print('great')", "printed 'great' as its last line; expected a number or a JSON object"),
        ("print('true')", "printed 'true'"),
        ("pass", "printed '' as its last line"),
        ("import time; time.sleep(30)", r"took longer than 0\.5 s"),
    ],
)
def test_a_failing_command_is_told_with_its_words(code: str, message: str, tmp_path: Path) -> None:
    timeout = 0.5 if "sleep" in code else None
    with pytest.raises(EvaluationError, match=message):
        CommandEvaluator(python(code), timeout)(tmp_path)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("python eval.py", "has no {model}"),
        ("python 'eval.py {model}", "cannot be split"),
        ("no-such-program-here {model}", "there is no 'no-such-program-here'"),
    ],
)
def test_an_impossible_command_is_refused_before_anything_runs(command: str, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        CommandEvaluator(command)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a byte-level BPE of 300 tokens."""
    folder = tmp_path_factory.mktemp("model")
    small_llama.save(small_llama.init(CONFIG, seed=0), CONFIG, folder)
    train_bpe([TEXT], CONFIG.vocab_size).save(str(folder / "tokenizer.json"))
    return folder


def test_the_loss_on_a_text_is_its_definition(model: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    text = tmp_path / "valid.txt"
    text.write_text(TEXT, encoding="utf-8")
    assert len(TEXT) != len(TEXT.encode()), "the text has a character of two bytes"
    found = [TextLoss(text, length=32, batch=batch)(model)["bits_per_byte"] for batch in (1, 3)]

    tokens = np.array([0, *Tokenizer.from_file(str(model / "tokenizer.json")).encode(TEXT).ids], np.int32)
    _, params = small_llama.load(model)
    apply = jax.jit(partial(small_llama.apply, CONFIG))
    bits = 0.0
    for start in range(0, len(tokens) - 1, 32):
        window = tokens[start : start + 33]
        inputs = np.pad(window[:-1], (0, 33 - len(window)))[None]  # causal: what follows changes nothing
        logits = np.asarray(apply(params, inputs), np.float64)[0, : len(window) - 1]
        normalizer = np.log(np.exp(logits).sum(axis=-1))
        bits += (normalizer - logits[np.arange(len(logits)), window[1:]]).sum() / math.log(2)
    expected = bits / len(TEXT.encode())
    assert found == pytest.approx([expected, expected], rel=1e-5)
    swapped = jax.tree.map(lambda leaf: leaf[::-1], params)
    other = tmp_path / "other"
    small_llama.save(swapped, CONFIG, other)
    shutil.copy(model / "tokenizer.json", other)
    assert TextLoss(text, length=32, batch=3)(other)["bits_per_byte"] != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_the_loss_on_a_text_of_other_families(family: str, model: Path, tmp_path: Path) -> None:
    text = tmp_path / "valid.txt"
    text.write_text(TEXT, encoding="utf-8")
    tiny = model_from_config(_SIZES[family] | {"vocab_size": CONFIG.vocab_size})
    save_model(tiny, tiny.init(0), tmp_path / "tiny")
    shutil.copy(model / "tokenizer.json", tmp_path / "tiny")
    if family == "bert":
        with pytest.raises(CheckpointError, match="predicts no next token"):
            TextLoss(text)(tmp_path / "tiny")
    else:  # untrained: about as uncertain as can be
        from tokenizers import Tokenizer

        tokens = len(Tokenizer.from_file(str(model / "tokenizer.json")).encode(TEXT).ids)
        even = tokens * math.log2(CONFIG.vocab_size) / len(TEXT.encode())
        assert TextLoss(text, length=32)(tmp_path / "tiny")["bits_per_byte"] == pytest.approx(even, rel=0.05)


def test_what_a_text_loss_needs(model: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="cannot be read"):
        TextLoss(tmp_path / "absent.txt")
    text = tmp_path / "valid.txt"
    text.write_text(" \n")
    with pytest.raises(EvaluationError, match="is empty"):
        TextLoss(text)
    text.write_text(TEXT, encoding="utf-8")
    bare = tmp_path / "bare"
    bare.mkdir()
    small_llama.save(small_llama.init(CONFIG, seed=0), CONFIG, bare)
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        TextLoss(text)(bare)
    other = TextLoss(text)
    text.write_text(TEXT + "more", encoding="utf-8")
    assert TextLoss(text).subject != TextLoss(text, length=16).subject
    assert other.subject == TextLoss(text).subject, "the subject is what the file holds now"
