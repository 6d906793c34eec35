"""Adapters of models whose head is their embedding: what PEFT's merge makes of both, and no other answer."""

from __future__ import annotations

import json
import runpy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from mergelab.checkpoints import open_checkpoint, read_whole, with_lora
from mergelab.checkpoints.lora import LoraCheckpoint
from mergelab.checkpoints.tied_head import find_tied_head, is_tied
from mergelab.errors import CheckpointError

HERE = Path(__file__).parent
RECORDED: dict[str, dict[str, Any]] = json.loads((HERE / "data" / "tied_adapters.json").read_text())
EMBEDDINGS = {"llama": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}
CLASSES = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel", "bert": "BertForMaskedLM"}


def write_base(folder: Path, tensors: dict[str, Any], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.asarray(value, np.float32) for name, value in tensors.items()}
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_adapter(folder: Path, tensors: dict[str, Any], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {f"base_model.model.{n}": np.asarray(v, np.float32) for n, v in tensors.items()}
    safetensors.numpy.save_file(arrays, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | config))
    return folder


def tied_ones(folder: Path) -> Path:
    return write_base(folder, {"model.embed_tokens.weight": np.ones((2, 2))}, tie_word_embeddings=True)


def merged(case: dict[str, Any], folder: Path, *, stored: bool = False) -> LoraCheckpoint:
    """The recorded base with the recorded adapter; `stored`: the base keeps a copy of its head."""
    kind = case["model_type"]
    tensors = {EMBEDDINGS[kind]: case["embedding"]} | (
        {"lm_head.weight": case["embedding"]} if stored else {}
    )
    config = {"model_type": kind, "tie_word_embeddings": True, "architectures": [CLASSES[kind]]}
    base = write_base(folder / "base", tensors, **config)
    parts = {name.removeprefix("base_model.model."): value for name, value in case["adapter"].items()}
    return with_lora(open_checkpoint(base), write_adapter(folder / "adapter", parts, **case["config"]))


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("name", RECORDED)
def test_embedding_and_head_are_those_of_pefts_merge(name: str, stored: bool, tmp_path: Path) -> None:
    case = RECORDED[name]
    found = merged(case, tmp_path, stored=stored)
    embedding = read_whole(found.tensors[EMBEDDINGS[case["model_type"]]])
    head = read_whole(found.tensors["lm_head.weight"]) if "lm_head.weight" in found.tensors else embedding
    np.testing.assert_allclose(embedding, case["merged_embedding"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(head, case["merged_head"], rtol=0, atol=1e-6)
    apart = case["merged_embedding"] != case["merged_head"]
    assert found.untied == apart and found.config["tie_word_embeddings"] is not apart
    assert ("lm_head.weight" in found.tensors) == (apart or stored)
    # The control: the adapter does change what is compared.
    assert np.abs(np.subtract([embedding, head], [case["embedding"]] * 2)).max() > 0.01


@pytest.mark.parametrize("name", RECORDED)
def test_what_peft_warns_of_is_said(name: str, tmp_path: Path) -> None:
    case = RECORDED[name]
    found = merged(case, tmp_path)
    factors = any("lora_" in tensor for tensor in case["adapter"])
    assert any("no longer tied" in warning for warning in found.warnings) == found.untied
    assert any("whose head is its embedding" in w for w in found.warnings) == (factors and not found.untied)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")  # peft's and transformers' own
@pytest.mark.parametrize("name", RECORDED)
def test_peft_merges_the_same(name: str) -> None:
    kind, _, case = name.partition(", ")
    with tempfile.TemporaryDirectory() as folder:
        tied_case = runpy.run_path(str(HERE / "record.py"))["tied_case"]
        made = tied_case(kind, case, Path(folder))
        found = with_lora(open_checkpoint(Path(folder) / "base"), Path(folder) / "adapter")
        embedding = read_whole(found.tensors[EMBEDDINGS[kind]])
        np.testing.assert_allclose(embedding, made["merged_embedding"], rtol=0, atol=1e-6)
        head = read_whole(found.tensors.get("lm_head.weight", found.tensors[EMBEDDINGS[kind]]))
        np.testing.assert_allclose(head, made["merged_head"], rtol=0, atol=1e-6)


def test_factors_of_a_tied_head_by_hand(tmp_path: Path) -> None:
    base = write_base(
        tmp_path / "base", {"model.embed_tokens.weight": np.ones((2, 2))}, tie_word_embeddings=True
    )
    parts = {"lm_head.lora_A.weight": [[1, 2]], "lm_head.lora_B.weight": [[1], [0]]}
    found = with_lora(open_checkpoint(base), write_adapter(tmp_path / "a", parts, r=1, lora_alpha=1))
    assert list(found.tensors) == ["model.embed_tokens.weight"] and not found.untied
    assert read_whole(found.tensors["model.embed_tokens.weight"]).tolist() == [[2, 3], [1, 1]]
    again = with_lora(found, tmp_path / "a")  # adapters stack
    assert read_whole(again.tensors["model.embed_tokens.weight"]).tolist() == [[3, 5], [1, 1]]


def test_a_bias_stored_under_another_name_follows_the_head(tmp_path: Path) -> None:
    tensors = {"bert.embeddings.word_embeddings.weight": np.ones((3, 2)), "cls.predictions.bias": np.zeros(3)}
    config = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}  # tied, though it does not say so
    base = open_checkpoint(write_base(tmp_path / "base", tensors, **config))
    head = "cls.predictions.decoder"
    parts = {f"{head}.weight": np.full((3, 2), 5), f"{head}.bias": np.full(3, 7)}
    found = with_lora(base, write_adapter(tmp_path / "a", parts, modules_to_save=[head]))
    values = {name: read_whole(tensor).ravel()[0] for name, tensor in found.tensors.items()}
    assert values == {
        "bert.embeddings.word_embeddings.weight": 1, "cls.predictions.bias": 7,
        f"{head}.weight": 5, f"{head}.bias": 7,
    }  # fmt: skip
    assert found.config["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("config", "tensors", "tied"),
    [
        ({"tie_word_embeddings": True}, ["model.embed_tokens.weight"], True),
        ({"tie_word_embeddings": False}, ["model.embed_tokens.weight"], False),
        (
            {"text_config": {"tie_word_embeddings": True}},
            ["model.embed_tokens.weight", "lm_head.weight"],
            True,
        ),
        ({"model_type": "gpt2"}, ["wte.weight", "lm_head.weight"], True),
        ({"model_type": "llama"}, ["model.embed_tokens.weight"], False),
        ({"model_type": "new"}, ["model.embed_tokens.weight"], True),
        ({"model_type": "new"}, ["model.embed_tokens.weight", "lm_head.weight"], False),
        ({}, ["model.embed_tokens.weight"], False),
    ],
)
def test_a_config_that_is_silent_ties_as_transformers_does(
    config: dict[str, Any], tensors: list[str], tied: bool
) -> None:
    assert is_tied(config, tensors) is tied


def test_a_model_without_a_head_has_none_that_is_tied() -> None:
    config = {"model_type": "bert", "architectures": ["BertModel"]}
    assert find_tied_head(["embeddings.word_embeddings.weight"], config) is None
    found = find_tied_head(["language_model.model.embed_tokens.weight"], {"tie_word_embeddings": True})
    assert found is not None and found.head == "language_model.lm_head.weight"


@pytest.mark.parametrize("infix", ["", "modules_to_save."])
def test_an_embedding_of_another_size_says_that_the_vocabulary_was_resized(
    infix: str, tmp_path: Path
) -> None:
    base = write_base(
        tmp_path / "base", {"model.embed_tokens.weight": np.ones((2, 2))}, tie_word_embeddings=True
    )
    parts = {f"model.embed_tokens.{infix}weight": np.ones((5, 2))}
    adapter = write_adapter(tmp_path / "a", parts, modules_to_save=["embed_tokens"])
    with pytest.raises(CheckpointError, match=r"vocabulary was resized from 2 to 5 tokens .* to 5 rows"):
        with_lora(open_checkpoint(base), adapter)


def test_an_embedding_that_encoder_and_decoder_share_is_not_replaced_once(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {"shared.weight": np.ones((2, 2))}, model_type="t5")
    adapter = write_adapter(tmp_path / "a", {"shared.weight": np.ones((2, 2))}, modules_to_save=["shared"])
    with pytest.raises(CheckpointError, match=r"'shared.weight', which encoder and decoder share"):
        with_lora(open_checkpoint(base), adapter)


def test_a_square_conv1d_is_told_by_the_models_type(tmp_path: Path) -> None:
    parts = {"h.0.attn.c_proj.lora_A.weight": [[1, 2]], "h.0.attn.c_proj.lora_B.weight": [[1], [0]]}
    adapter = write_adapter(tmp_path / "a", parts, r=1, lora_alpha=1, fan_in_fan_out=False)
    for kind, expected in (("gpt2", [[1, 0], [2, 0]]), ("llama", [[1, 2], [0, 0]])):
        base = write_base(tmp_path / kind, {"h.0.attn.c_proj.weight": np.zeros((2, 2))}, model_type=kind)
        found = with_lora(open_checkpoint(base), adapter).tensors["h.0.attn.c_proj.weight"]
        assert read_whole(found).tolist() == expected
