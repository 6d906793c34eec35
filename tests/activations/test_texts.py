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
from mergelab.errors import CorpusError
from mergelab.quickstart import small_llama
from mergelab.quickstart.family import train_bpe
from mergelab.sae.evaluation.probing_tasks import label_texts
from mergelab.sae.sae import SAE, SAEConfig
from mergelab.sae.subject_model import trained_text
from mergelab.sae.training.config import DataSection
from mergelab.sae.training.data import host_metadata, open_data
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
