"""The real language model: a GGUF file read, chatted with, merged and converted, beside transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

import mergelab as ml
from mergelab.checkpoints import open_checkpoint, read_whole
from mergelab.cli.main import cli
from mergelab.decoding import complete, greedy
from mergelab.text import chat_ids, chat_text, turn_end_ids
from tests.smollm import smollm_file

QUESTION = [{"role": "user", "content": "What is the capital of Japan?"}]
ANSWER = "The capital of Japan is Tokyo."
PROMPT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
)
PROMPT += "<|im_start|>user\nWhat is the capital of Japan?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def path() -> Path:
    return smollm_file()


@pytest.fixture(scope="module")
def loaded(path: Path) -> tuple[ml.Model, Any, ml.Tokenizer]:
    return *ml.load_model(path), ml.load_tokenizer(path)


@pytest.fixture(scope="module")
def theirs(path: Path) -> tuple[Any, Any]:
    """The model and the tokenizer of transformers, from the same file."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    return model.eval(), transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.extra
def test_it_answers(loaded: tuple[ml.Model, Any, ml.Tokenizer]) -> None:
    model, params, tokenizer = loaded
    prompt = chat_text(tokenizer, QUESTION)
    assert prompt == PROMPT
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    (found,) = complete(model, params, tokenizer, [ids], max_new_tokens=12, sampler=greedy())
    assert found.text == ANSWER and found.stop == "token"


CHATS = [
    QUESTION,
    [
        {"role": "system", "content": "Answer in French."},
        {"role": "user", "content": "Name three colors."},
    ],
    [
        {"role": "user", "content": "My name is Anna."},
        {"role": "assistant", "content": "Hello Anna!"},
        {"role": "user", "content": "What is my name?"},
    ],
]
# What transformers 5.24 answers, greedily in float32.
ANSWERS = [ANSWER, "Ceux et céros, cérémonies et amis.", "Hello Anna!"]


@pytest.mark.extra
def test_chats_are_answered(loaded: tuple[ml.Model, Any, ml.Tokenizer]) -> None:
    assert ml.generate(*loaded, CHATS, max_new_tokens=40) == ANSWERS


@pytest.mark.oracle
def test_chats_are_answered_as_transformers_does(
    loaded: tuple[ml.Model, Any, ml.Tokenizer], theirs: tuple[Any, Any]
) -> None:
    model, params, tokenizer = loaded
    their_model, their_tokenizer = theirs
    for messages in CHATS:
        given = their_tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        expected = their_model.generate(**given, do_sample=False, max_new_tokens=40)[0].tolist()
        ids = chat_ids(tokenizer, messages)
        (found,) = complete(
            model, params, tokenizer, [ids], max_new_tokens=40, end_ids=turn_end_ids(tokenizer)
        )
        assert [*ids, *found.token_ids] == expected


@pytest.mark.extra
def test_the_command_prints_the_answer_alone(path: Path) -> None:
    arguments = ["generate", str(path), "--chat", "--prompt", "What is the capital of Japan?", "--greedy"]
    found = CliRunner().invoke(cli, arguments)
    assert (found.stdout, found.stderr, found.exit_code) == (ANSWER + "\n", "", 0)


@pytest.mark.extra
def test_its_blocks_are_what_the_gguf_package_makes_of_them(path: Path) -> None:
    import gguf

    tensors = open_checkpoint(path).tensors
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert len(tensors) == len(stored) == 272
    for ours, name in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.29.mlp.down_proj.weight", "blk.29.ffn_down.weight"),
        ("model.layers.7.self_attn.v_proj.weight", "blk.7.attn_v.weight"),
        ("model.norm.weight", "output_norm.weight"),
    ):
        wanted = gguf.quants.dequantize(stored[name].data, stored[name].tensor_type)
        assert np.array_equal(read_whole(tensors[ours]).view(np.uint32), wanted.view(np.uint32))


@pytest.mark.extra
def test_a_merge_of_siblings_is_a_folder_with_its_tokenizer(path: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"merge_method: slerp\nbase_model: {path}\nparameters: {{t: 0.3}}\nmodels:\n  - model: {path}\n"
        f"  - model: {_sibling(path, tmp_path)}\n"
    )
    result = CliRunner().invoke(cli, ["merge", str(recipe), "-o", str(tmp_path / "merged")])
    assert result.exit_code == 0, result.output
    tokenizer = ml.load_tokenizer(tmp_path / "merged")
    assert tokenizer.encode(PROMPT) == ml.load_tokenizer(path).encode(PROMPT)
    tensors = open_checkpoint(tmp_path / "merged").tensors
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"float32"}


def _sibling(path: Path, folder: Path) -> Path:
    """The same model with other norms, as a GGUF file."""
    raw = bytearray(path.read_bytes())
    from mergelab.checkpoints.gguf.header import read_header

    (norm,) = (info for info in read_header(path).tensors if info.name == "output_norm.weight")
    values = np.frombuffer(raw, np.float32, norm.shape[0], norm.offset)
    raw[norm.offset : norm.offset + values.nbytes] = (values * 1.1).astype(np.float32).tobytes()
    other = folder / "sibling.gguf"
    other.write_bytes(raw)
    return other


@pytest.mark.oracle
def test_weights_and_logits_are_those_of_transformers(
    path: Path, loaded: tuple[ml.Model, Any, ml.Tokenizer], theirs: tuple[Any, Any]
) -> None:
    import torch

    model, params, tokenizer = loaded
    tensors, state = open_checkpoint(path).tensors, theirs[0].state_dict()
    for name, source in tensors.items():
        wanted = state[name].numpy()
        assert np.array_equal(read_whole(source).view(np.uint32), wanted.view(np.uint32)), name
    ids = tokenizer.encode(PROMPT)
    assert ids == theirs[1](PROMPT, add_special_tokens=False)["input_ids"]
    ours = np.asarray(model.apply(params, jnp.asarray([ids])).logits)
    with torch.no_grad():
        logits = theirs[0](torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(ours, logits, atol=1e-3, rtol=1e-4)
    assert np.abs(ours - logits).max() < 1e-4 * np.abs(logits).max()
    assert np.abs(ours[:, 1:] - logits[:, :-1]).max() > 1


@pytest.mark.oracle
def test_transformers_reads_what_convert_writes(path: Path, theirs: tuple[Any, Any], tmp_path: Path) -> None:
    import torch
    import transformers

    for arguments in (["folder"], ["m.gguf", "--to", "gguf", "--dtype", "q8_0"]):
        out = tmp_path / arguments[0]
        result = CliRunner().invoke(cli, ["convert", str(path), str(out), *arguments[1:]])
        assert result.exit_code == 0, result.output
    folder = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32)
    packed = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    )
    own = {name: read_whole(t) for name, t in open_checkpoint(tmp_path / "m.gguf").tensors.items()}
    for name, wanted in theirs[0].state_dict().items():
        assert torch.equal(folder.state_dict()[name], wanted), name
        if name in own:
            assert np.array_equal(packed.state_dict()[name].numpy(), own[name]), name
        error = (packed.state_dict()[name] - wanted).abs().max()
        assert error <= wanted.abs().max() / 127, name
    for tokenizer in (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "folder"),
        transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf"),
    ):
        rendered = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
        assert rendered == PROMPT
        assert tokenizer(PROMPT, add_special_tokens=False)["input_ids"] == theirs[1](PROMPT)["input_ids"]
