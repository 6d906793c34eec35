"""One rule for every command that writes: odd, dangerous and taken outputs are refused, untouched."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from mergelab.checkpoints.output_target import OutputLock
from mergelab.cli.main import cli
from mergelab.models.families import model_from_config
from mergelab.models.table import stored_shapes
from tests.decoding.tiny import CONFIGS

FOLDERS = {
    "merge": "merge r.yaml --overwrite --out",
    "uniform soup": "soup a b --overwrite --out",
    "running soup": "soup a b --method running --out",
    "greedy soup": "soup a b --method greedy --text t.txt --overwrite --out",
    "convert": "convert a --overwrite",
    "convert to orbax": "convert a --to orbax --overwrite",
    "diff": "diff a b --overwrite --out",
    "extract-lora": "extract-lora b --base a --rank 2 --overwrite --out",
    "extract-delta": "extract-delta b --base a --overwrite --out",
    "abliterate": "abliterate a --harmful t.txt --harmless t.txt --overwrite --out",
    "activations": "activations a --site blocks.0.resid_post --text t.txt --context 2 --out",
    "statistics": "statistics a --text t.txt --kind gram --context 2 --overwrite --out",
    "sae train": "sae train s.yaml --out",
    "sae export": "sae export sae --format saelens --out",
}
"""Commands that write folders, with all that allows them to replace one; the output comes last."""
FILES = {
    "sae export to a file": "sae export sae --format openai --out",
    "sae features": "sae features sae --model a --text t.txt --out",
}
INPUTS = {  # what a command reads, besides the models `a` and `b`
    "merge": ("r.yaml",), "greedy soup": ("t.txt",), "abliterate": ("t.txt",), "activations": ("t.txt",),
    "statistics": ("t.txt",), "sae train": ("x.npy",), "sae features": ("t.txt",),
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of inputs that is the working directory, in a folder with a few odd things."""
    here = tmp_path / "here"
    here.mkdir()
    config = CONFIGS["llama"]
    shapes = stored_shapes(model_from_config(config).table())
    for seed, name in enumerate("ab"):
        rng = np.random.default_rng(seed)
        (here / name).mkdir()
        (here / name / "config.json").write_text(json.dumps(config))
        tensors = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
        save_file(tensors, here / name / "model.safetensors")
        words = {f"w{i}": i for i in range(61)}
        tokenizer = {"version": "1.0", "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"}}
        (here / name / "tokenizer.json").write_text(
            json.dumps(tokenizer | {"pre_tokenizer": {"type": "Whitespace"}})
        )
    (here / "r.yaml").write_text(
        "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n"
    )
    (here / "t.txt").write_text("\n".join(f"w{i} w{i + 1} w{i + 2} w3" for i in range(30)))
    np.save(here / "x.npy", np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32))
    (here / "s.yaml").write_text(
        "sae: {variant: topk, n_latents: 8, k: 2}\ndata: {kind: files, path: x.npy}\n"
        "train: {batch_size: 32, tokens: 64, seed: 0}\n"
    )
    (here / "sae").mkdir()
    rng = np.random.default_rng(9)
    arrays = {"W_enc": (24, 32), "b_enc": (32,), "W_dec": (32, 24), "b_dec": (24,)}
    save_file(
        {name: rng.standard_normal(shape).astype(np.float32) for name, shape in arrays.items()},
        here / "sae" / "sae.safetensors",
    )
    (here / "sae" / "cfg.json").write_text(
        json.dumps(
            {
                "format": "mergelab-sae-1", "d_in": 24, "d_out": 24, "n_latents": 32, "activation": "topk",
                "k": 4, "metadata": {"site": "blocks.0.resid_post"},
            }
        )
    )  # fmt: skip
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("years of work")
    (tmp_path / "to_theirs").symlink_to(tmp_path / "theirs")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("a file")
    monkeypatch.chdir(here)
    return tmp_path


def state(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def refused(command: str, out: str, place: Path, *words: str) -> None:
    before = state(place)
    result = CliRunner().invoke(cli, [*command.split(), out])
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stderr.count("error:") == 1 and len(result.stderr) < 1000, result.stderr
    assert any(word in result.stderr for word in words), result.stderr
    assert state(place) == before


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_that_could_cost_something_are_refused(name: str, place: Path) -> None:
    command, parent = FOLDERS[name], str(place)
    refused(command, ".", place, "is the working directory")
    refused(command, parent, place, "contains the working directory")
    refused(command, f"{parent}/here", place, "is the working directory")
    refused(command, "/", place, "is the root")
    refused(command, f"{parent}/theirs", place, "was not written by mergelab", "is not empty", "holds no run",
            "no readable", "not a running average")  # fmt: skip
    refused(command, f"{parent}/to_theirs", place, "is a link to")
    refused(command, f"{parent}/dangling", place, "which does not exist")
    refused(command, f"{parent}/file", place, "is a file")
    refused(command, f"{parent}/file/out", place, "writing failed", "cannot be written")
    refused(command, "n" * 250, place, "bytes")
    refused(command, "n" * 300, place, "bytes")


@pytest.mark.parametrize("name", [*FOLDERS, *FILES])
def test_inputs_are_not_replaced(name: str, place: Path) -> None:
    command = FOLDERS.get(name) or FILES[name]
    words = command.removeprefix("sae ").split()
    models = [word for word in words if word in ("a", "b", "sae")] or (["a"] if name == "merge" else [])
    for model in models:
        expected = "is an input" if name in FOLDERS else "is a folder"
        refused(command, model, place, expected)
        if name in FOLDERS:
            refused(command, f"{model}/inside", place, "lies inside the input")
            (place / "elsewhere").symlink_to(place / "here" / model)
            refused(command, str(place / "elsewhere"), place, "is a link to")
            refused(command, str(place / "elsewhere" / "x"), place, "lies inside the input")
            (place / "elsewhere").unlink()
    for file in INPUTS.get(name, ()):
        refused(command, file, place, "is a file", "is an input")


@pytest.mark.parametrize("name", [*FOLDERS, *FILES])
def test_a_second_run_on_one_output_is_refused(name: str, place: Path) -> None:
    command = FOLDERS.get(name) or FILES[name]
    (place / "here" / ".out.partial").mkdir()
    (place / "here" / ".out.partial" / "piece").write_text("of the first run")
    with OutputLock(place / "here" / "out"):
        refused(command, "out", place, "another run is writing this output")


@pytest.mark.parametrize("name", FILES)
def test_files_in_odd_places_are_refused(name: str, place: Path) -> None:
    command, parent = FILES[name], str(place)
    refused(command, f"{parent}/theirs", place, "is a folder")
    refused(command, f"{parent}/theirs/thesis.tex", place, "is there already")
    refused(command, f"{parent}/dangling", place, "which does not exist")
    refused(command, "/", place, "is the root")
    refused(command, "n" * 300, place, "bytes")
