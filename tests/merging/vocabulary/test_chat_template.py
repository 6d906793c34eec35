"""Chat templates: the inputs' commonest, the named formats as published, and literal jinja."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mergelab.checkpoints.folder import open_checkpoint
from mergelab.checkpoints.source import Checkpoint
from mergelab.errors import RecipeError
from mergelab.merging.vocabulary import chat_template_files
from mergelab.merging.vocabulary.chat_templates import CHAT_FORMATS

Make = Callable[..., Checkpoint]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
]


def refuse(message: str) -> None:
    raise ValueError(message)


def render(template: str, messages: list[dict[str, str]], ask: bool = True) -> str:
    """As every reader of chat templates renders them."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    compiled = environment.from_string(template)
    return compiled.render(messages=messages, add_generation_prompt=ask, bos_token="<s>", eos_token="</s>")


FORMATS = {
    "alpaca": "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello.</s>\n\n### Instruction:\nBye\n\n"
    "### Response:\n",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]Hi\n[|assistant|]Hello.[|endofturn|]\n[|user|]Bye\n"
    "[|assistant|]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s> [INST] Be brief.\n\nHi [/INST] Hello.</s> [INST] Bye [/INST]",
}


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_a_named_format(name: str, make_model: Make) -> None:
    files = chat_template_files(name, {"zero": make_model("zero", ["a"])}, None)
    assert list(files) == ["chat_template.jinja"]
    template = files["chat_template.jinja"].decode()
    assert render(template, TALK) == FORMATS[name]
    asked, told = render(template, TALK), render(template, TALK, ask=False)
    assert asked.startswith(told) and (asked != told or name == "mistral")


def test_mistral_insists_on_taking_turns() -> None:
    with pytest.raises(ValueError, match="take turns"):
        render(CHAT_FORMATS["mistral"], [TALK[1], TALK[1]])


def test_goldens(goldens: Path) -> None:
    models = {n: open_checkpoint(goldens / "models" / n) for n in ("llama-ft1", "llama-tok")}
    auto = goldens / "recipes" / "tok_union" / "chat_template.jinja"
    assert chat_template_files("auto", models, None) == {"chat_template.jinja": auto.read_bytes()}
    chatml = (goldens / "recipes" / "tok_model_source" / "chat_template.jinja").read_text()
    for messages in (TALK, TALK[:-1], TALK[1:]):
        for ask in (False, True):
            assert render(CHAT_FORMATS["chatml"], messages, ask) == render(chatml, messages, ask)
            assert render(CHAT_FORMATS["alpaca"], messages, ask) != render(chatml, messages, ask)


def test_auto_takes_the_commonest_then_the_bases_then_the_first(make_model: Make) -> None:
    a, b = "{{ 'a' }}", "{{ 'b' }}"
    models = {
        "none": make_model("none", ["t"]),
        "a": make_model("a", ["t"], tokenizer_config={"chat_template": a}),
        "b": make_model("b", ["t"], tokenizer_config={"chat_template": [{"name": "default", "template": b}]}),
    }

    def auto(base: str | None) -> bytes:
        return chat_template_files("auto", models, base)["chat_template.jinja"]

    assert auto(None) == a.encode() and auto("b") == b.encode() and auto("none") == a.encode()
    models["b2"] = make_model("b2", ["t"])
    (models["b2"].path / "chat_template.jinja").write_text(b)
    assert auto("a") == b.encode()
    assert chat_template_files("auto", {"none": models["none"]}, None) == {}


def test_no_second_template_is_left_in_the_tokenizer_config(make_model: Make) -> None:
    config = {"chat_template": "{{ 'old' }}", "eos_token": "x"}
    models = {"zero": make_model("zero", ["t"], tokenizer_config=config)}
    files = chat_template_files("{{ 'new' }}", models, None)
    assert json.loads(files["tokenizer_config.json"]) == {"chat_template": "{{ 'new' }}", "eos_token": "x"}
    planned = {"tokenizer_config.json": b"{}"}
    assert list(chat_template_files("{{ 'new' }}", models, None, planned)) == ["chat_template.jinja"]


@pytest.mark.parametrize(
    "choice", ["{% generation %}{{ 1 }}{% endgeneration %}", "{% for m in messages %}{% break %}{% endfor %}"]
)
def test_extensions_of_chat_templates_are_allowed(choice: str, make_model: Make) -> None:
    models = {"zero": make_model("zero", ["t"])}
    assert chat_template_files(choice, models, None) == {"chat_template.jinja": choice.encode()}


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (
            "chatlm",
            r"'chatlm' is neither jinja nor a known format \(did you mean 'chatml'\?\); write one of auto",
        ),
        ("{% for m in messages %}", "chat_template: not valid jinja: .* at line 1; correct it"),
        ("{% unknown %}{{ 1 }}", "chat_template: not valid jinja: Encountered unknown tag 'unknown'"),
        ("{{ " + "-" * 50_000 + "1 }}", "chat_template: not valid jinja: it is nested too deeply"),
        ("{{ 1 }}" * 200_000, "chat_template: has 1,400,000 characters, more than the 1,000,000"),
        ("{{ " + "1" * 5_000 + " }}", "chat_template: not valid jinja: Exceeds the limit"),
    ],
)
def test_what_is_not_a_template(choice: str, message: str, make_model: Make) -> None:
    with pytest.raises(RecipeError, match=message):
        chat_template_files(choice, {"zero": make_model("zero", ["t"])}, None)


@pytest.mark.oracle
def test_transformers_renders_the_formats_alike(goldens: Path, tmp_path: Path) -> None:
    import transformers

    base = open_checkpoint(goldens / "models" / "llama-base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((base.path / name).read_bytes())
    for name, expected in FORMATS.items():
        for file, raw in chat_template_files(name, {"base": base}, "base").items():
            (tmp_path / file).write_bytes(raw)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True) == expected
