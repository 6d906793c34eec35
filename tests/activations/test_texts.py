"""A corpus under a model: what counts is known to the activations, and labels stand at the same tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from tokenizers import processors

from mergelab.activations.model_activations import SiteActivations, halves, open_model_activations
from mergelab.cli.main import cli
from mergelab.errors import CorpusError, SAEError
from mergelab.quickstart import small_llama
from mergelab.quickstart.family import train_bpe
from mergelab.sae.evaluation.probing_tasks import label_texts
from mergelab.sae.sae import SAE, SAEConfig
from mergelab.sae.subject_model import trained_text
from mergelab.sae.training import train
from mergelab.sae.training.config import DataSection
from mergelab.sae.training.data import host_metadata, open_data
from mergelab.text import corpus_tokens, kept_contexts
from mergelab.text.corpus import TextOptions

SITE = "blocks.0.resid_post"
TEXT = "def add(a, b):\n    return a + b\n\nfor number in range(10):\n    print(add(number, 1))\n"
CHAT = [{"role": "user", "content": "Add 1 and 2."}, {"role": "assistant", "content": TEXT}]
ARRAYS = dict(W_enc=np.ones((4, 8)), b_enc=np.zeros(8), W_dec=np.ones((8, 4)), b_dec=np.zeros(4))
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    config = small_llama.LlamaConfig(
        vocab_size=302, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    backend = train_bpe([TEXT * 20], 300)
    backend.add_special_tokens(["<s>", "</s>"])
    begin = ("<s>", backend.token_to_id("<s>"))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[begin])
    roles = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    files = {"tokenizer.json": backend.to_str().encode(), "tokenizer_config.json": json.dumps(roles).encode()}
    small_llama.save(small_llama.init(config, 0), config, path / "model", files=files)
    records = [{"messages": CHAT}] * 6
    (path / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (path / "code.py").write_text(TEXT * 20)
    return path


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("code.py", {}),
        ("code.py", {"bos": False}),
        ("chats.jsonl", {"roles": "assistant"}),
        ("chats.jsonl", {"packing": "documents", "tokens": 300}),
    ],
)
def test_activations_and_labels_are_of_the_same_tokens(
    folder: Path, name: str, options: dict[str, Any]
) -> None:
    text = TextOptions(**options)
    source = open_model_activations(folder / "model", [SITE], [folder / name], length=16, text=text)
    assert source.text is not None and source.text.bos is options.get("bos", True)
    found = label_texts(folder / "model", [folder / name], 16, source.text)
    np.testing.assert_array_equal(found.tokens, source.tokens)
    assert (source.counted is None) == (name == "code.py")
    if source.counted is not None:
        assert 0.1 < source.counted.mean() < 1
        first, second = halves(source)
        assert first.counted is not None and second.counted is not None
        np.testing.assert_array_equal(np.concatenate([first.counted, second.counted]), source.counted)
        assert not found.labels["is_code"].any()
    else:
        assert found.labels["is_keyword"].mean() > 0.05


def test_a_text_that_cannot_be_read_ends_the_opening(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(TEXT.encode() + b"\xff")
    with pytest.raises(CorpusError, match=r"bad\.txt cannot be read as UTF-8 text"):
        open_model_activations(folder / "model", [SITE], [tmp_path / "bad.txt"])


def test_a_store_and_a_training_keep_how_the_text_was_cut(folder: Path, tmp_path: Path) -> None:
    command = ["activations", folder / "model", "--site", SITE, "--text", folder / "chats.jsonl"]
    options = ["--packing", "documents", "--compute-dtype", "bfloat16", "--part", "2/2", "--json"]
    arguments = [*map(str, [*command, "--context", "16", "--out", tmp_path / "acts"]), *options]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout.splitlines()[-1])["rows"]
    text = TextOptions(packing="documents")
    whole = open_model_activations(folder / "model", [SITE], [folder / "chats.jsonl"], length=16, text=text)
    assert rows * 2 == whole.rows  # every second of six equal conversations
    stored = host_metadata(DataSection(kind="files", path=str(tmp_path / "acts")))
    assert {n: stored[n] for n in ("prepend_bos", "packing")} == {"prepend_bos": True, "packing": "documents"}
    assert "roles" not in stored
    data: dict[str, Any] = {"kind": "model", "model": str(folder / "model"), "site": SITE, "context": 16}
    section = DataSection(**data, text=str(folder / "chats.jsonl"), roles="assistant", bos=False)
    source = open_data(section, 64).source
    assert isinstance(source, SiteActivations) and source.of.counted is not None
    metadata = host_metadata(section)
    known = SAE(**ARRAYS, config=SAEConfig("relu", metadata=metadata))
    assert trained_text(known) == TextOptions(bos=False, roles="assistant")
    assert trained_text(known, {"bos": True}) == TextOptions(bos=True, roles="assistant")
    bad = [*arguments[:-2], "3/2"]
    result = CliRunner().invoke(cli, bad)
    assert result.exit_code == 2 and "is not a part; write 1/4" in result.output


class Killed(Exception):
    """What ends a call in the middle."""


def test_a_training_killed_while_it_reads_text_goes_on_and_leaves_no_tokens(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_contexts, "_SAVE_EVERY", 0.0)
    monkeypatch.setattr(corpus_tokens, "_BATCH", 100)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{n} {TEXT}"}) + "\n" for n in range(90)))
    data = {"kind": "model", "model": str(folder / "model"), "site": SITE, "context": 16}
    config = {
        "sae": {"variant": "topk", "n_latents": 8, "k": 2},
        "data": {**data, "text": str(tmp_path / "a.jsonl"), "buffer_rows": 64},
        "train": {"tokens": 320, "batch_size": 32},
    }

    def kill(tokens: int) -> None:
        if tokens > 100:
            raise Killed

    with pytest.raises(Killed):
        train(config, tmp_path / "run", reading=kill)
    assert (tmp_path / "run" / "tokens" / "00000" / "state.json").is_file()
    read: list[str] = []
    original = corpus_tokens.token_pieces

    def noted(tokenizer: Any, documents: Any, options: Any) -> Any:
        return original(tokenizer, (read.append(one.place) or one for one in documents), options)

    monkeypatch.setattr(kept_contexts, "token_pieces", noted)
    result = train(config, tmp_path / "run", tell=None)
    assert not read[0].endswith("record 1") and result.steps == 10
    assert not (tmp_path / "run" / "tokens").exists()
    bad = {**config, "train": {"tokens": 10**6, "batch_size": 10**6}}
    with pytest.raises(SAEError, match="batch_size is 1000000"):
        train(bad, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_a_harvest_keeps_its_tokens_until_it_is_published_and_none_when_it_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def harvest(text: Path, out: str) -> Any:
        command = ["activations", folder / "model", "--site", SITE, "--text", text, "--context", "16"]
        return CliRunner().invoke(cli, [*map(str, command), "--out", str(tmp_path / out)])

    (tmp_path / "bad.txt").write_bytes(TEXT.encode() * 20 + b"\xff")
    assert "cannot be read as UTF-8" in harvest(tmp_path / "bad.txt", "bad").output
    assert not list(tmp_path.glob(".bad*")) and not (tmp_path / "bad").exists()
    with monkeypatch.context() as patched:
        patched.setattr("mergelab.activations.store.read_in_pieces", None)  # ends it before the first row
        assert harvest(folder / "code.py", "acts").exit_code == 70
    kept = tmp_path / ".acts.stages" / "tokens" / "00000" / "state.json"
    assert kept.is_file()
    monkeypatch.setattr(corpus_tokens, "_whole", None)
    assert harvest(folder / "code.py", "acts").exit_code == 0 and not kept.exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    assert harvest(folder / "code.py", "mine").exit_code != 0 and not list(tmp_path.glob(".mine.stages"))
