"""Every writing command, killed before any change of files and given again, ends as if undisturbed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mergelab.models.families import model_from_config
from mergelab.models.table import stored_shapes
from tests.compilation import flags_without_devices

TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 12
CONFIG: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 256, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A command, how it is given again, and which of its outputs must be as those of an undisturbed run.

    `run` are options of the training whose SAE it takes.
    """

    command: str
    again: str = ""
    output: str = "out"
    setup: str = ""
    run: str = ""

    @property
    def repeated(self) -> str:
        return f"{self.command} {self.again}".strip()


CASES = {
    "merge": Case("merge r.yaml --out out --shard-size 20KB --sha256", "--resume"),
    "merge in place of another": Case(
        "merge r.yaml --out out --overwrite", "--resume", setup="merge s.yaml --out out"
    ),
    "merge of stages": Case("merge stages.yaml --out out", "--resume"),
    "uniform soup": Case("soup a b --out out"),
    "running soup": Case("soup b c --method running --out out", setup="soup a --method running --out out"),
    "greedy soup": Case("soup a b c --method greedy --text t.txt --out out"),
    "convert": Case("convert a out --shard-size 20KB"),
    "convert in place of another": Case("convert b out --overwrite", setup="convert a out"),
    "convert to orbax": Case("convert a out --to orbax"),
    "adapter": Case("extract-lora b --base a --rank 2 --out out", "--resume"),
    "delta": Case("extract-delta b --base a --density 0.5 --out out"),
    "diff": Case("diff a b --out out"),
    "abliterate": Case(
        "abliterate a --harmful bad.txt --harmless good.txt --out out --anyway"
        " --max-kl 1e9 --min-induced=-1e9",
        "--resume",
    ),
    "activations": Case("activations a --site blocks.0.resid_post --text t.txt --context 16 --out out"),
    "statistics": Case("statistics a --text t.txt --kind gram --context 16 --out out"),
    "fisher": Case(
        "statistics b --text t.txt --kind fisher --context 16 --out out --overwrite",
        setup="statistics a --text t.txt --kind gram --context 16 --out out",
    ),
    "sae train": Case("sae train s.yml --out out", "--resume", output="out/final"),
    **{
        f"sae export to {name}": Case(f"sae export run --format {name} --out out", run=options)
        for name, options in {
            "saelens": "",
            "sparsify": "",
            "dictionary_learning": "",
            "gemma-scope": "--set sae.variant=batch_topk",
            "openai": "--set train.normalize=layer_norm",
        }.items()
    },
    "solve": Case(
        "solve a tasks.jsonl --samples 2 --budget 4 --step a --verifier entropy --out out",
        output="out/results.json",
    ),
    "sae features": Case("sae features run --model a --text t.txt --out page.html", output="page.html"),
}
ALWAYS = {"convert in place of another"}
"""Cases of the light suite; the others take minutes together (a merge is interrupted in tests/merging)."""


def write_model(folder: Path, seed: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng(seed)
    shapes = stored_shapes(model_from_config(CONFIG).table())
    fixed = np.random.default_rng(99)
    tensors = {
        name: 0.3 * fixed.standard_normal(shape) + 0.01 * seed * rng.standard_normal(shape)
        for name, shape in shapes.items()
    }
    save_file({name: x.astype(np.float32) for name, x in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    for seed, name in enumerate("abc"):
        write_model(folder / name, seed)
    linear = "merge_method: linear\nmodels:\n- {{model: a, parameters: {{weight: {w}}}}}\n"
    linear += "- {{model: b, parameters: {{weight: 1}}}}\n"
    (folder / "r.yaml").write_text(linear.format(w=1))
    (folder / "s.yaml").write_text(linear.format(w=2))
    (folder / "stages.yaml").write_text(
        "name: first\n" + linear.format(w=3) + "---\nmerge_method: linear\nmodels:\n"
        "- {model: first, parameters: {weight: 1}}\n- {model: c, parameters: {weight: 1}}\n"
    )
    (folder / "t.txt").write_text(TEXT)
    tasks = [{"prompt": "the quick", "answer": "1"}, {"prompt": "the lazy", "answer": "2"}]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    (folder / "bad.txt").write_text("\n".join(f"do the bad thing {i}" for i in range(6)))
    (folder / "good.txt").write_text("\n".join(f"say a nice word {i}" for i in range(6)))
    x = np.random.default_rng(0).standard_normal((512, 16)).astype(np.float32)
    np.save(folder / "x.npy", x)
    (folder / "s.yml").write_text(
        "sae: {variant: topk, n_latents: 32, k: 4}\ndata: {kind: files, path: x.npy}\n"
        "train: {batch_size: 64, tokens: 1280, seed: 0}\ncheckpoint: {every: 6, keep: 2}\n"
    )
    (folder / "run.yml").write_text(
        "sae: {variant: topk, n_latents: 32, k: 4}\n"
        "data: {kind: model, model: a, site: blocks.0.resid_post, text: t.txt, context: 16}\n"
        "train: {batch_size: 64, tokens: 640, seed: 0}\n"
    )
    return folder


class Commands:
    """The process that runs commands."""

    def __init__(self, cache: Path) -> None:
        repository = Path(__file__).resolve().parent.parent
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": flags_without_devices(),
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "PYTHONPATH": os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")]),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(repository / "tests" / "killing.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def run(self, command: str, folder: Path, kill: int | None = None) -> dict[str, Any]:
        job = {"command": command.split(), "cwd": str(folder), "kill": kill}
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    server = Commands(tmp_path_factory.mktemp("compiled"))
    yield server
    server.close()


def content(path: Path) -> dict[str, bytes] | bytes | None:
    if path.is_dir():
        return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}
    return path.read_bytes() if path.exists() else None


def comparable(found: dict[str, bytes] | bytes | None) -> Any:
    """Without what two undisturbed runs do not share: Orbax writes times and random file names."""
    if isinstance(found, dict) and any(name.startswith("params") for name in found):
        return {name: data for name, data in found.items() if not name.startswith("params")}
    return found


def workshop(inputs: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(inputs, folder)
    return folder


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow) for name in CASES]
)
def test_killed_at_any_moment_and_given_again(
    name: str, inputs: Path, commands: Commands, tmp_path: Path
) -> None:
    case = CASES[name]
    start = workshop(inputs, tmp_path / "start")
    if "run" in case.command.split():
        done = commands.run(f"sae train run.yml --out run {case.run}", start)
        assert done["status"] == 0, done["err"]
    if case.setup:
        done = commands.run(case.setup, start)
        assert done["status"] == 0, done["err"]
    before = comparable(content(start / case.output))

    work = tmp_path / "work"  # one name for all runs, as outputs name their inputs
    whole = commands.run(case.command, workshop(start, work))
    assert whole["status"] == 0, whole["err"]
    expected, names = comparable(content(work / case.output)), sorted(os.listdir(work))
    assert expected and expected != before and whole["changes"] > 3

    for moment in range(1, whole["changes"] + 1):
        killed = commands.run(case.command, workshop(start, work), kill=moment)
        where = f"{name}, killed before change {moment} of {whole['changes']}"
        if killed["status"] != 137:  # threads may need a change or two less than before
            assert moment > whole["changes"] - 3, where
            continue
        found = comparable(content(work / case.output))
        assert found in (before, expected), where
        again = commands.run(case.repeated, work)
        assert again["status"] == 0, f"{where}: {again['err']}"
        assert comparable(content(work / case.output)) == expected, where
        assert sorted(os.listdir(work)) == names, where
