"""Every file of examples/ does its task, on a tiny model, in an empty folder."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import mergelab as ml

REPOSITORY = Path(__file__).resolve().parent.parent
EXAMPLES = REPOSITORY / "examples"
SITE = "blocks.1.resid_post"
LETTERS = ["<end>", *map(chr, range(32, 127))]
TEXT = "The quick brown fox jumps over the lazy dog, and then it looks back at what it left.\n" * 40

RUNS: dict[str, tuple[str, str]] = {
    "evaluate_a_merge.py": ("model other text.txt", "bits per byte, 95 % interval"),
    "residual_activations.py": ("model", "blocks.1.resid_post (1, 23, 16)"),
    "sae_from_array.py": ("rows.npy", "W_enc (16, 128) W_dec (128, 16)"),
    "saelens_sae_on_text.py": ("model saelens", "codes (1, 32, 32)"),
    "top_examples.py": ("model sae text.txt 3", "context "),
    "finetune_and_save.py": ("model text.txt tuned", "try: mergelab generate tuned"),
    "train_with_optax.py": ("model", "step 20: "),
    "steer_with_a_feature.py": ("model sae 3", "clamp "),
    "sweep_a_density.py": ("model other model", "density 1.0: "),
    "merge_on_a_mesh.py": ("model other merged", " on 8 devices"),
    "remove_a_direction.py": ("model refused.txt answered.txt edited", "nothing was written: "),
}
"""Arguments of each example, and what it prints."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tiny models, an SAE of theirs in two formats, rows and texts."""
    folder = tmp_path_factory.mktemp("examples")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(LETTERS)}, []))
    backend.decoder = tokenizers.decoders.Fuse()
    tokenizer = ml.Tokenizer(backend, {"eos_token": "<end>"}, (0,), {}, Path("nowhere"))
    model = ml.model_from_config(
        {
            "model_type": "llama",
            "vocab_size": len(LETTERS),
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        }
    )
    params = model.init(0)
    ml.save_model(model, params, folder / "model", tokenizer=tokenizer)
    other = jax.tree.map(lambda a, b: a + 0.1 * b, params, model.init(1))
    ml.save_model(model, other, folder / "other", tokenizer=tokenizer)
    (folder / "text.txt").write_text(TEXT)
    (folder / "refused.txt").write_text("\n".join(f"Refuse {i}." for i in range(8)))
    (folder / "answered.txt").write_text("\n".join(f"Answer {i}." for i in range(8)))
    tokens = np.asarray(tokenizer.encode(TEXT)[:1280], np.int32).reshape(-1, 32)
    rows = np.asarray(ml.capture(model, params, jnp.asarray(tokens), [SITE])[SITE]).reshape(-1, 16)
    np.save(folder / "rows.npy", rows)
    options: dict[str, Any] = {"n_latents": 32, "k": 4, "steps": 20, "batch_size": 128}
    sae = ml.train_sae(rows, metadata={"site": SITE}, **options)
    ml.save_sae(sae, folder / "sae")
    ml.save_sae(sae, folder / "saelens", format="saelens")
    return folder


def run(name: str, arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments.split()])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.parametrize("name", RUNS)
def test_the_example_runs(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, printed = RUNS[name]
    monkeypatch.chdir(place)
    try:
        run(name, arguments, monkeypatch)
        said = capsys.readouterr().out
    except SystemExit as leaving:
        said = str(leaving.code)
    assert printed in said
    usage = f"python examples/{name} "
    assert usage in (EXAMPLES / name).read_text("utf-8") or name == "merge_on_a_mesh.py"


def test_what_was_fine_tuned_generates(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (place / "tuned").exists():
        monkeypatch.chdir(place)
        run("finetune_and_save.py", "model text.txt tuned", monkeypatch)
    model, params = ml.load_model(place / "tuned")
    assert ml.generate(model, params, ml.load_tokenizer(place / "tuned"), "The", max_new_tokens=4)
    before = ml.load_model(place / "model")[1]
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.abs(a - b).max(), params, before))) > 1e-4


@pytest.mark.slow
def test_the_shell_example_runs(place: Path, tmp_path: Path) -> None:
    command = tmp_path / "bin" / "mergelab"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mergelab "$@"\n')
    command.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{command.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
    }
    asked = ["bash", str(EXAMPLES / "merge_from_the_shell.sh")]
    asked += [str(place / name) for name in ("model", "other", "text.txt")]
    done = subprocess.run(asked, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "merged" / "tokenizer.json").is_file() and "bits" in done.stdout


def test_every_example_is_run_and_listed() -> None:
    files = {file.name for file in EXAMPLES.iterdir() if file.suffix in (".py", ".sh")}
    assert files == {*RUNS, "merge_from_the_shell.sh"}
    page = (EXAMPLES / "README.md").read_text("utf-8")
    assert all(f"]({name})" in page for name in files)
