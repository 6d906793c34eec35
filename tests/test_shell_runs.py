"""Commands that the pages show run, block by block, beside tiny files of the names that they use."""

from __future__ import annotations

import contextlib
import glob
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from click.testing import CliRunner
from safetensors.numpy import save_file

import mergelab as ml
from mergelab.cli import options
from mergelab.cli.main import cli
from mergelab.interp import SteeringVector
from mergelab.models.table import stored_shapes
from tests.test_shell_examples import PAGES, REPOSITORY, commands_in, is_a_form

NOT_RUN: dict[str, str] = {
    "quickstart": "a minute; tests/quickstart runs it",
    "inspect org/": "asks the hub",
    "inspect gs:": "asks a bucket",
    "generate HuggingFaceTB/": "asks the hub",
    "merge ties.yaml --out merged --push": "writes to the hub",
    "inspect model --topology": "needs libtpu; tests/aot runs it",
    "sae plan": "needs libtpu; tests/aot runs it",
    "abliterate": "needs a model that refuses; tests/abliteration plants one",
    "inspect model-awq": "needs a quantized model; tests/checkpoints/quantized reads recorded ones",
    "convert model-fp8": "needs a quantized model; tests/checkpoints/quantized reads recorded ones",
    "sae eval run --model": "minutes with its controls; tests/sae/evaluation runs each",
    "sae eval mergelab-quickstart/sae": "minutes with its curve; tests/sae/evaluation runs each",
    "sae eval old": "needs an SAE of another library; tests/sae reads recorded ones",
    "sae export old": "needs an SAE of another library; tests/sae reads recorded ones",
    "sae export mine.pt": "needs an SAE of another library; tests/sae reads recorded ones",
    "generate model --token-ids 1,415,2936": "needs thousands of tokens; tests/cli/test_generate.py has some",
    "finetune model --text code.jsonl --out code-lora --lora 16 --tokens 2000000": "two million tokens",
}
"""Beginnings of commands that cannot be run here, or take too long, and what says that they work."""

STANDS_FOR = {r"\bblocks\.(3|8|40)\.": "blocks.1.", r"^/scratch$": "scratch"}
"""What names stand for here: sites of models with many layers, where these have two, and a disk."""

TEXT = "The quick brown fox jumps over the lazy dog, and then it looks back.\n" * 60
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}<end>{% endfor %}assistant: "
RECIPE = """merge_method: {method}
base_model: {base}
models:
  - {{model: {a}, parameters: {{weight: 0.5{density}}}}}
  - {{model: {b}, parameters: {{weight: 0.5{density}}}}}
dtype: float32
"""


def shell_blocks(text: str) -> list[list[str]]:
    """Lines of the indented and fenced blocks of a page that show commands of mergelab."""
    text = text.replace("\\\n", " ")
    fences = [body for kind, body in re.findall(r"^```(\S*)\n(.*?)^```", text, flags=re.M | re.S) if not kind]
    rest = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    blocks = [*fences, *re.findall(r"(?:^(?:    .*)?\n)*^    .*\n", rest, flags=re.M)]
    found = [[line.strip() for line in block.splitlines() if line.strip()] for block in blocks]
    return [lines for lines in found if any(True for line in lines for _ in commands_in(line))]


def runs_of(lines: list[str]) -> Iterator[list[str]]:
    """The commands of a block that are to be run, with what its variables and patterns stand for."""
    variables: dict[str, str] = {}
    for line in lines:
        if given := re.fullmatch(r"(\w+)=(\S+)", line):
            variables[given[1]] = given[2]
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        for words in commands_in(line):
            if words and not is_a_form(words) and "--version" not in words and not reason(words):
                yield [found for word in words for found in expanded(word, line)]


def expanded(word: str, line: str) -> list[str]:
    """What a word means: the paths that fit it, unless it is quoted; what is here for what it names."""
    quoted = f"'{word}'" in line or f'"{word}"' in line
    for name, here in STANDS_FOR.items():
        word = re.sub(name, here, word)
    return sorted(glob.glob(word)) if "*" in word and not quoted else [word]


def reason(words: list[str]) -> str | None:
    """Why a command is not run."""
    line = " ".join(words)
    return next((why for beginning, why in NOT_RUN.items() if line.startswith(beginning)), None)


def outputs(words: list[str]) -> Iterator[str]:
    """What a command writes, which must not be there before."""
    yield from (words[n + 1] for n, word in enumerate(words[:-1]) if word in ("--out", "-o"))
    if words[0] == "convert":
        yield words[2]


CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
}


def write_models(folder: Path) -> None:
    """The folders `base`, `law` and `code`, drawn without jax, whose programs cost more than commands do."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({token: n for n, token in enumerate(["<end>", *alphabet])}, [])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    shapes = stored_shapes(ml.model_from_config(CONFIG).table())
    draw = np.random.default_rng(0)
    base = {name: draw.normal(scale=0.3, size=shape).astype(np.float32) for name, shape in shapes.items()}
    for model, step in (("base", 0.0), ("law", 0.1), ("code", 0.1)):
        drawn = {
            name: value
            + np.float32(step * ("_proj" in name)) * draw.normal(size=value.shape).astype(np.float32)
            for name, value in base.items()  # fine-tunes of the linear layers alone, which adapters can hold
        }
        (folder / model).mkdir()
        save_file(drawn, folder / model / "model.safetensors", metadata={"format": "pt"})
        (folder / model / "config.json").write_text(json.dumps(CONFIG))
        backend.save(str(folder / model / "tokenizer.json"))
        told = {"eos_token": "<end>", "chat_template": CHAT}
        (folder / model / "tokenizer_config.json").write_text(json.dumps(told))


def write_world(folder: Path) -> None:
    """Every file that pages name, as small as can be."""
    write_models(folder)
    q = "mergelab-quickstart"
    for name in ("model", "big", "small-model", "path/to/model", f"{q}/models/base"):
        shutil.copytree(folder / "base", folder / name)
    for name in ("other", "tuned", f"{q}/merges/linear", f"{q}/models/prose", "ft-1", "models/prose"):
        shutil.copytree(folder / "law", folder / name)
    for name in (f"{q}/models/code", "ft-2", "models/code"):
        shutil.copytree(folder / "code", folder / name)
    shutil.copytree(folder / "base", folder / "models/base")
    for name in ("corpus", "held-out", "prose", "code", "valid", "test", f"{q}/held-out"):
        (folder / f"{name}.txt").write_text(TEXT)
    records = {
        "tasks": {"prompt": "Which is red?", "choices": ["grass", "blood"], "answer": "B"},
        "other": {"prompt": "2 + 1 =", "answer": "3"},
        "held-out": {"text": TEXT},
        "code": {"text": TEXT},
        "chats": {
            "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes." * 40}]
        },
    }
    for name, record in records.items():
        (folder / f"{name}.jsonl").write_text(4 * (json.dumps(record) + "\n"))
    for name in ("questions", "prompts"):
        (folder / f"{name}.txt").write_text("Why?\nWhere?\n")
    (folder / "eval.py").write_text("import sys\nprint({'valid': 0.5, 'test': 0.4}[sys.argv[2]])\n")
    parts = {"a": "models/code", "b": "models/prose", "base": "models/base"}
    linear = RECIPE.format(method="task_arithmetic", density="", **parts)
    ties = RECIPE.format(method="ties", density=", density: 0.5", **parts)
    (folder / "recipe.yaml").write_text(linear)
    (folder / "ties.yaml").write_text(ties)
    (folder / q / "recipes").mkdir()
    (folder / q / "recipes/ties.yaml").write_text(ties.replace(": models/", ": ../models/"))
    (folder / q / "recipes/linear.yaml").write_text(linear.replace(": models/", ": ../models/"))
    rows = np.random.default_rng(0).normal(size=(512, 32)).astype(np.float32)
    (folder / "held-out").mkdir()
    np.save(folder / "held-out/rows.npy", rows)
    site = "blocks.1.resid_post"
    (folder / "sae.yaml").write_text(
        "sae: {variant: topk, n_latents: 64, k: 4}\n"
        f"data: {{kind: model, model: model, site: {site}, text: corpus.txt, context: 32}}\n"
        "train: {batch_size: 64, tokens: 640, seed: 0}\n"
    )
    settings: dict[str, Any] = {"k": 4, "steps": 2, "batch_size": 64, "metadata": {"site": site}}
    ml.train_sae(rows, folder / "run", n_latents=1100, **settings)
    shutil.copytree(folder / "run", folder / "sae")
    shutil.copytree(folder / "run", folder / q / "sae")
    for number in range(500, 901, 100):
        shutil.copytree(folder / "base", folder / f"run/checkpoint-{number}")
    adapters = RECIPE.format(
        method="task_arithmetic", density="", base="base", a="adapters/law", b="adapters/code"
    )
    (folder / "adapters.yaml").write_text(adapters)
    for line in (
        "extract-lora law --base base --rank 4 --out adapters/law",
        "convert model model.Q4_K_M.gguf --to gguf --dtype q8_0",
    ):
        assert (fault := asked(folder, line.split())) is None, fault
    shutil.copytree(folder / "adapters/law", folder / "adapters/code")
    vector = SteeringVector(jnp.ones(32), jnp.float32(1.0), site, "llama")
    ml.save_steering(vector, folder / "happy.gguf")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that pages name."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


def asked(place: Path, words: list[str]) -> str | None:
    """Runs a command in this process, in a folder; what went wrong."""
    with contextlib.chdir(place):
        result = CliRunner().invoke(cli, words, input="Hello.\n")
    return None if result.exit_code == 0 else f"mergelab {shlex.join(words)}: {result.output[-600:]}"


SHOWN = {str(page.relative_to(REPOSITORY)): shell_blocks(page.read_text("utf-8")) for page in PAGES}


RUN = ("docs/diff.md", "docs/recipes.md", "docs/soups.md", "docs/verdict.md")
"""Pages that merge, compare and judge; the others are parsed, not run."""


@pytest.mark.parametrize("page", RUN)
def test_the_commands_of_the_page_run(
    page: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its settings are for a process of its own.
    monkeypatch.setattr(options, "configure_jax", lambda **_: None)
    wrong = []
    for number, block in enumerate(SHOWN[page]):
        place = tmp_path / str(number)
        shutil.copytree(world, place)
        monkeypatch.chdir(place)
        for words in runs_of(block):
            for name in outputs(words):  # of the prepared folder, or of another way that the block shows
                shutil.rmtree(place / name, ignore_errors=True)
            wrong += [fault] if (fault := asked(place, words)) else []
    assert wrong == []


def test_what_is_not_run_is_shown_and_little() -> None:
    lines = [line for blocks in SHOWN.values() for block in blocks for line in block]
    commands = [words for line in lines for words in commands_in(line.replace("$Q", "mergelab-quickstart"))]
    for beginning in NOT_RUN:
        assert any(" ".join(words).startswith(beginning) for words in commands), (
            f"{beginning} is shown nowhere"
        )
    assert len([words for page in RUN for block in SHOWN[page] for words in runs_of(block)]) > 10


def test_a_command_that_fails_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "nowhere" in str(asked(tmp_path, ["inspect", "nowhere"]))
    (block,) = shell_blocks("text\n\n    Q=there\n    mergelab inspect $Q/model  # a comment\n\nmore\n")
    assert list(runs_of(block)) == [["inspect", "there/model"]]
