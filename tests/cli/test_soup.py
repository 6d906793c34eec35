"""`mergelab soup` over tiny checkpoints with a fake evaluation program."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file

from mergelab.cli.main import cli
from mergelab.merging.soups.folders import average_checkpoints

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 4,
    "intermediate_size": 4,
    "num_hidden_layers": 0,
    "num_attention_heads": 1,
    "tie_word_embeddings": True,
}
EMBEDDING = "model.embed_tokens.weight"

PROGRAM = """
import json, struct, sys
with open(sys.argv[1] + "/model.safetensors", "rb") as file:
    header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    file.seek(header["model.embed_tokens.weight"]["data_offsets"][0], 1)
    (value,) = struct.unpack("<f", file.read(4))
with open(sys.argv[2], "a") as log:
    print(sys.argv[1], file=log)
print("evaluating", sys.argv[1])
print(json.dumps({"accuracy": 1 - abs(value) / 10, "loss": abs(value), "model": sys.argv[1]}))
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs `mergelab soup ...` in a folder with constant checkpoints ft-1 (-1.5), ft-2 (1), ft-10 (2)."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"ft-1": -1.5, "ft-2": 1.0, "ft-10": 2.0}.items():
        folder = Path(name)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CONFIG))
        weights = {EMBEDDING: np.full((8, 4), value, np.float32), "model.norm.weight": np.ones(4, np.float32)}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    Path("eval.py").write_text(PROGRAM)

    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(cli, ["soup", *arguments])

    return invoke


def value(folder: str) -> float:
    weights = load_file(Path(folder) / "model.safetensors")[EMBEDDING]
    assert np.ptp(weights) == 0
    return float(weights[0, 0])


def command(log: str) -> str:
    return f"{sys.executable} -I -S eval.py {{model}} {log}"


ALL = ("ft-1", "ft-10", "ft-2")


def test_uniform_and_last_by_step(run) -> None:
    result = run(*ALL, "--out", "all")
    assert result.exit_code == 0, result.output
    assert value("all") == 0.5
    assert run(*ALL, "--method", "last", "--last", "2", "--out", "tail").exit_code == 0
    assert value("tail") == 1.5, "ft-2 and ft-10, not the last two as a shell sorts them"
    result = run(*ALL, "--out", "half", "--dtype", "bfloat16", "--json")
    assert json.loads(result.stdout) == {
        "method": "uniform",
        "members": ["ft-1", "ft-2", "ft-10"],
        "out": "half",
    }
    refused = run(*ALL, "--out", "all")
    assert refused.exit_code == 2
    assert run(*ALL[:1], "--out", "all", "--overwrite").exit_code == 0
    assert value("all") == -1.5


def test_running_and_exponential(run) -> None:
    for name in ("ft-1", "ft-2", "ft-10"):
        result = run(name, "--method", "running", "--out", "average")
        assert result.exit_code == 0, result.output
    assert value("average") == 0.5
    assert "average of 3" in result.output
    assert run(*ALL, "--method", "ema", "--decay", "0.5", "--out", "ema").exit_code == 0
    assert value("ema") == pytest.approx(-1.5 / 4 + 1 / 4 + 2 / 2)
    assert run(*ALL, "--method", "ema", "--decay", "0", "--out", "newest").exit_code == 0
    assert value("newest") == 2.0


def test_greedy_with_a_program(run) -> None:
    result = run(
        *(*ALL, "--method", "greedy", "--out", "soup", "--metric", "accuracy"),
        *("--evaluate", command("valid.log"), "--test-evaluate", command("test.log")),
    )
    assert result.exit_code == 0, result.output
    assert value("soup") == -0.25
    assert "soup of 2: ft-2 + ft-1" in result.stdout
    assert "left out ft-10" in result.stdout
    assert "best single: accuracy 0.9" in result.stdout
    assert len(Path("valid.log").read_text().splitlines()) == 3 + 2
    assert len(Path("test.log").read_text().splitlines()) == 3
    trace = json.loads(Path("soup.trace.json").read_text())
    assert trace["members"] == ["ft-2", "ft-1"]
    assert trace["test"]["uniform"]["loss"] == 0.5
    # The trace is enough to make the soup again.
    average_checkpoints(trace["members"], "again")
    assert value("again") == value("soup")


@pytest.mark.parametrize(
    ("options", "members"),
    [
        (["--metric", "loss", "--direction", "min"], ["ft-2", "ft-1"]),
        (["--metric", "loss:min"], ["ft-2", "ft-1"]),
        (["--metric", "accuracy=1", "--metric", "loss:min=2"], ["ft-2", "ft-1"]),
        (["--metric", "loss:max"], ["ft-10"]),
        (["--metric", "loss:max", "--limit", "loss:min=0", "--min-delta", "0"], ["ft-10"]),
        (["--metric", "accuracy", "--min-delta", "0.5"], ["ft-2"]),
        (["--metric", "accuracy", "--max-size", "1"], ["ft-2"]),
    ],
)
def test_selection_rules(run, options: list[str], members: list[str]) -> None:
    evaluate = ("--evaluate", command("log"))
    result = run(*ALL, "--method", "greedy", "--out", "soup", *evaluate, *options, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["members"] == members


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "greedy"], "needs --evaluate COMMAND or --text FILE"),
        (["--method", "last"], "needs --last N"),
        (["--method", "ema"], "needs --decay"),
        (["--last", "2"], "--last has no effect with --method uniform"),
        (["--method", "running", "--dtype", "float16"], "--dtype has no effect with --method running"),
        (["--method", "greedy", "--evaluate", "x {model}", "--text", "y"], "both name an evaluator"),
        (["--method", "greedy", "--text", "absent.txt"], "absent.txt cannot be read"),
        (["--metric", "loss:up", "--method", "greedy", "--evaluate", "echo {model}"], "neither min nor max"),
        (["--metric", "a=b", "--method", "greedy", "--evaluate", "echo {model}"], "'b' is not a number"),
        (["--limit", "a", "--method", "greedy", "--evaluate", "echo {model}"], "--limit a names no bound"),
        (
            ["--metric", "a=1", "--metric", "b", "--method", "greedy", "--evaluate", "echo {model}"],
            "to all of",
        ),
        (["--method", "greedy", "--evaluate", "echo {model}"], "printed 'ft-1' as its last line"),
        (["--method", "greedy", "--evaluate", "false {model}"], "exited with status 1"),
    ],
)
def test_faults_are_one_sentence(run, options: list[str], message: str) -> None:
    result = run(*ALL, "--out", "soup", *options)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not Path("soup").exists()


def test_greedy_with_the_loss_on_a_text(run) -> None:
    import jax

    from mergelab.quickstart import small_llama
    from mergelab.quickstart.family import train_bpe

    text = "a soup of siblings is the mean of their weights.\n" * 8
    Path("valid.txt").write_text(text)
    config = small_llama.LlamaConfig(
        vocab_size=280,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=0,
    )
    params = small_llama.init(config, seed=0)
    for i in range(2):
        Path(f"lm-{i}").mkdir()
        noisy = jax.tree.map(lambda x, i=i: x + 0.3 * jax.random.normal(jax.random.key(i), x.shape), params)
        small_llama.save(noisy, config, Path(f"lm-{i}"))
        train_bpe([text], config.vocab_size).save(f"lm-{i}/tokenizer.json")
    options = ("--method", "greedy", "--text", "valid.txt", "--test-text", "valid.txt", "--json")
    result = run("lm-0", "lm-1", "--out", "soup", *options)
    assert result.exit_code == 0, result.output
    trace = json.loads(result.stdout)
    alone = [entry["scores"]["bits_per_byte"] for entry in trace["ranking"]]
    assert alone == sorted(alone) and len(set(alone)) == 2, "the lower loss is first"
    assert trace["validation"]["bits_per_byte"] <= alone[0]
    # The same text as test data must give the same numbers: the folder kept is the folder judged.
    assert trace["test"]["soup"] == trace["validation"]
    assert trace["test"]["best_single"]["bits_per_byte"] == alone[0]
