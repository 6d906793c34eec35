"""Adapters extracted from models whose head is their embedding: PEFT's merge gives the fine-tune's logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from mergelab.checkpoints import open_checkpoint, read_whole, with_lora
from mergelab.errors import CheckpointError
from mergelab.merging.lora_extraction import extract_lora
from mergelab.merging.recipe.recipe_file import parse_recipe
from mergelab.merging.run_merge import merge

RNG = np.random.default_rng(0)
GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
BERT = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
FAMILIES: dict[str, tuple[dict[str, Any], str, str, str, str]] = {
    "llama": (LLAMA, "model.embed_tokens", "lm_head", "model.layers.0.self_attn.q_proj", ""),
    "gpt2": (GPT2, "transformer.wte", "lm_head", "transformer.h.0.attn.c_attn", ""),
    "gpt2 on the hub": (GPT2, "wte", "lm_head", "h.0.attn.c_attn", "transformer."),
    "bert": (
        BERT, "bert.embeddings.word_embeddings", "cls.predictions.decoder",
        "bert.encoder.layer.0.attention.self.query", "",
    ),
}  # fmt: skip


def write(folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> Path:
    folder.mkdir()
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def draw(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def pair(folder: Path, family: str, *, untied: bool) -> tuple[dict[str, np.ndarray], str, str]:
    """Writes a base and its fine-tune; returns the latter's tensors, and embedding and head by name."""
    config, embedding, head, matrix, _ = FAMILIES[family]
    base = {f"{embedding}.weight": draw(7, 4), f"{matrix}.weight": draw(4, 4)}
    if family == "bert":
        base["cls.predictions.bias"] = draw(7)
    tuned = {name: value + draw(*value.shape) for name, value in base.items()}
    if untied:
        tuned[f"{head}.weight"] = draw(7, 4)
    write(folder / "base", base, config)
    write(folder / "tuned", tuned, config | ({"tie_word_embeddings": False} if untied else {}))
    return tuned, embedding, head


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("embeddings", ["whole", "low_rank"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_gives_the_embedding_and_the_head_of_the_fine_tune(
    family: str, embeddings: Any, untied: bool, tmp_path: Path
) -> None:
    tuned, embedding, head = pair(tmp_path, family, untied=untied)
    found = extract_lora(
        tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=4, embeddings=embeddings
    )
    merged = with_lora(open_checkpoint(tmp_path / "base"), tmp_path / "out")
    values = {name: read_whole(tensor) for name, tensor in merged.tensors.items()}
    for name, value in tuned.items():
        np.testing.assert_allclose(values[name], value, rtol=0, atol=1e-5)
    # Factors are added to the matrix that both share, unless the head is stored; an exact copy stays tied.
    stored = head in found.whole
    assert stored == (untied or embeddings == "whole" or family == "bert")
    assert merged.untied == (untied or (stored and embeddings == "low_rank"))
    if merged.untied and not untied:
        np.testing.assert_allclose(values[f"{head}.weight"], tuned[f"{embedding}.weight"], atol=1e-5)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["ensure_weight_tying"] == (embeddings == "whole" and not untied)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_spells_modules_as_the_class_does(family: str, tmp_path: Path) -> None:
    _, embedding, head = pair(tmp_path, family, untied=False)
    extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=4)
    config, *_, matrix, inner = FAMILIES[family]
    names = open_checkpoint(tmp_path / "out" / "adapter_model.safetensors").tensors
    prefix = "base_model.model."
    expected = {f"{prefix}{inner}{embedding}.weight", f"{prefix}{head}.weight"}
    expected |= {f"{prefix}{inner}{matrix}.lora_{part}.weight" for part in "AB"}
    assert names.keys() == expected | ({f"{prefix}{head}.bias"} if config is BERT else set())
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["modules_to_save"]
    assert saved == [f"{inner}{embedding}", head]


def test_targets_and_skipped_embeddings_leave_the_head_out(tmp_path: Path) -> None:
    pair(tmp_path, "gpt2", untied=False)
    for out, options in (("a", {"embeddings": "skip"}), ("b", {"targets": ["*c_attn"]})):
        found = extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / out, rank=4, **options)
        assert (found.whole, found.skipped) == ((), ("transformer.wte",))


@pytest.mark.parametrize("name", ["shared", "gpt_neox.embed_in"])
def test_an_embedding_that_no_stored_module_can_replace_is_refused(name: str, tmp_path: Path) -> None:
    config = {"model_type": "t5" if name == "shared" else "gpt_neox", "tie_word_embeddings": True}
    tensors = {f"{name}.weight": draw(7, 4), "block.q.weight": draw(4, 4)}
    write(tmp_path / "base", tensors, config)
    write(tmp_path / "tuned", {n: v + 1 for n, v in tensors.items()}, config)
    with pytest.raises(CheckpointError, match=f"'{name}.weight', which has several uses"):
        extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=1)
    found = extract_lora(
        tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=1, embeddings="low_rank"
    )
    assert name in found.ranks


def test_a_merge_of_an_untied_adapter_writes_the_head_and_says_so(tmp_path: Path) -> None:
    tuned, embedding, head = pair(tmp_path, "llama", untied=True)
    extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=4)
    model = f"{tmp_path / 'base'}+{tmp_path / 'out'}"
    for name, recipe in (
        ("alone", {"merge_method": "passthrough", "models": [{"model": model}]}),
        (
            "half",
            {
                "merge_method": "task_arithmetic", "base_model": str(tmp_path / "base"),
                "models": [{"model": model, "parameters": {"weight": 0.5}}],
            },
        ),
    ):  # fmt: skip
        result = merge(parse_recipe(json.dumps(recipe)), tmp_path / name)
        assert any("no longer tied" in warning for warning in result.plan.warnings)
        written = open_checkpoint(tmp_path / name)
        assert written.config["tie_word_embeddings"] is False
        base = read_whole(open_checkpoint(tmp_path / "base").tensors[f"{embedding}.weight"])
        part = 1 if name == "alone" else 0.5
        for module in (embedding, head):
            wanted = base + part * (tuned[f"{module}.weight"] - base)
            np.testing.assert_allclose(
                read_whole(written.tensors[f"{module}.weight"]), wanted, rtol=0, atol=1e-5
            )


def tiny(kind: str) -> Any:
    """A tiny transformers model with a tied head, of random weights."""
    import torch
    import transformers as t

    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": 13, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 32,
    }  # fmt: skip
    if kind == "llama":
        model = t.LlamaForCausalLM(t.LlamaConfig(**shape, num_key_value_heads=2, tie_word_embeddings=True))
    elif kind == "gpt2":
        model = t.GPT2LMHeadModel(t.GPT2Config(vocab_size=13, n_embd=8, n_layer=1, n_head=2, n_positions=32))
    elif kind == "bert":
        model = t.BertForMaskedLM(t.BertConfig(**shape))
    elif kind == "roberta":
        model = t.RobertaForMaskedLM(t.RobertaConfig(**shape, pad_token_id=0))
    else:
        model = t.AlbertForMaskedLM(t.AlbertConfig(**shape, embedding_size=8))
    return change(model, 0.05)


def change(model: Any, size: float) -> Any:
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * size)
    return model.eval()


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")  # peft's and transformers' own
@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("embeddings", ["whole", "low_rank"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "roberta", "albert"])
def test_logits_after_pefts_merge_are_the_fine_tunes(
    kind: str, embeddings: Any, untied: bool, tmp_path: Path
) -> None:
    import peft
    import torch

    base = tiny(kind)
    base.save_pretrained(tmp_path / "base")
    tokens = torch.arange(13)[None]
    before = base(tokens).logits.detach().numpy()
    tuned = type(base).from_pretrained(tmp_path / "base")
    if untied:
        head = tuned.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        tuned.config.tie_word_embeddings = False
    wanted = change(tuned, 0.1)(tokens).logits.detach().numpy()
    tuned.save_pretrained(tmp_path / "tuned")
    extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=8, embeddings=embeddings)

    loaded = type(base).from_pretrained(tmp_path / "base")
    merged = peft.PeftModel.from_pretrained(loaded, tmp_path / "out").merge_and_unload().eval()
    np.testing.assert_allclose(merged(tokens).logits.detach().numpy(), wanted, rtol=0, atol=2e-5)
    assert np.abs(before - wanted).max() > 0.1

    ours = with_lora(open_checkpoint(tmp_path / "base"), tmp_path / "out")
    write(tmp_path / "ours", {n: read_whole(t) for n, t in ours.tensors.items()}, dict(ours.config))
    again = type(base).from_pretrained(tmp_path / "ours").eval()
    np.testing.assert_allclose(again(tokens).logits.detach().numpy(), wanted, rtol=0, atol=2e-5)
