"""The model's losses while an SAE of it is trained: what they are, on what, and that they change nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mergelab.activations.model_activations import open_model_activations
from mergelab.activations.store import write_store
from mergelab.errors import SAEError
from mergelab.quickstart import small_llama
from mergelab.quickstart.family import train_bpe
from mergelab.sae.formats import load_sae
from mergelab.sae.spliced_losses import evaluate_downstream
from mergelab.sae.training import train, train_sae
from mergelab.sae.training.config import load_config
from mergelab.sae.training.data import open_data
from mergelab.sae.training.model_loss import hold_out

SITE = "blocks.0.resid_post"
TEXT = "def add(a, b):\n    return a + b\n\nfor number in range(10):\n    print(add(number, 1))\n" * 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one block, a text, and its stored activations."""
    path = tmp_path_factory.mktemp("model")
    config = small_llama.LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    tokenizer = train_bpe([TEXT], 300).to_str()
    small_llama.save(
        small_llama.init(config, 0), config, path / "model", files={"tokenizer.json": tokenizer.encode()}
    )
    (path / "text.txt").write_text(TEXT)
    source = open_model_activations(path / "model", [SITE], [path / "text.txt"], length=16)
    write_store(source, path / "store", model=path / "model")
    return path


def _config(folder: Path, kind: str = "model", **more: Any) -> dict[str, Any]:
    data: dict[str, Any] = {"kind": "files", "path": str(folder / "store")}
    if kind == "model":
        data = {"kind": "model", "model": str(folder / "model"), "site": SITE, "context": 16}
        data |= {"text": str(folder / "text.txt")}
    return {
        "sae": {"variant": "topk", "n_latents": 32, "k": 4},
        "data": data,
        "train": {"batch_size": 64, "tokens": 64 * 12, "model_loss_every": 4, "lr": 1e-3},
        "checkpoint": {"every": 5, "log_every": 5},
        **more,
    }


def _lines(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    told: list[str] = []
    train(_config(folder), out, tell=told.append)
    assert "not trained on, every 4 steps; the model's own" in told[-1]
    return out


def test_losses_are_those_of_the_evaluation_on_rows_that_were_not_trained_on(folder: Path, run: Path) -> None:
    lines = _lines(run)
    assert [line["step"] for line in lines if "ce" in line] == [4, 8, 12]
    assert [line["step"] for line in lines] == [4, 5, 8, 10, 12]
    settings = load_config(_config(folder))
    data, source = hold_out(settings, open_data(settings.data, settings.train.tokens))
    assert source is not None
    found = evaluate_downstream(load_sae(run / "final"), source)
    last = lines[-1]
    for name in ("ce", "ce_spliced", "ce_zero", "ce_mean", "delta_ce", "kl", "recovered_mean"):
        assert last[name] == pytest.approx(getattr(found, name), rel=1e-4, abs=1e-6), name
    assert lines[0]["ce"] == last["ce"] and lines[0]["ce_spliced"] != last["ce_spliced"]
    held = source.tokens.size
    assert held == len(open_data(settings.data, 768).source.of.tokens) // 10 * 16  # type: ignore[attr-defined]
    assert data.kept.by_place is not None and not data.kept.by_place(0, held).any()
    assert data.kept.by_place(held, held + 16).sum() == 15  # the first of each context counts for nothing


def test_a_resumed_run_writes_the_same_lines_and_weights(folder: Path, run: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int, metrics: Any) -> None:
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(_config(folder), tmp_path / "run", progress=stop)
    train(_config(folder), tmp_path / "run", resume=True)
    assert _lines(tmp_path / "run") == _lines(run)
    mine, other = (load_sae(out / "final").as_numpy() for out in (tmp_path / "run", run))
    for name, array in mine.items():
        np.testing.assert_array_equal(array, other[name])


def test_stored_activations_and_a_mesh_give_the_same_losses(folder: Path, run: Path, tmp_path: Path) -> None:
    mesh = {"data": jax.device_count() // 2, "latents": 2}
    train(_config(folder, "files", mesh=mesh), tmp_path / "run")
    for mine, other in zip(_lines(tmp_path / "run"), _lines(run), strict=True):
        assert mine.keys() == other.keys()
        for name in {"ce", "ce_spliced", "ce_zero", "ce_mean"} & mine.keys():
            assert mine[name] == pytest.approx(other[name], rel=2e-3), name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": {"kind": "toy"}}, "come from no model"),
        ({"data": {"kind": "files", "path": "plain.npy"}}, "do not say of which model"),
        ({"data": {"kind": "files", "path": "store", "model": "other"}}, "weights in .*other are not those"),
        ({"data": {"kind": "files", "path": "moved"}}, "the model of the stored activations, .*gone, is not"),
        ({"train": {"model_loss_every": -1}}, "model_loss_every: input should be greater than or equal to 0"),
    ],
    ids=["toy", "plain", "other", "gone", "negative"],
)
def test_what_cannot_be_had_is_refused_before_training(
    folder: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    config = _config(folder, "files")
    config["train"] |= change.get("train", {})
    if "data" in change:
        data = dict(change["data"])
        np.save(tmp_path / "plain.npy", np.random.default_rng(0).normal(size=(2000, 16)).astype(np.float32))
        if data.get("path") == "moved":
            (tmp_path / "moved").mkdir()
            for file in (folder / "store").iterdir():
                (tmp_path / "moved" / file.name).write_bytes(file.read_bytes())
            facts = json.loads((tmp_path / "moved" / "store.json").read_text())
            facts["model"] = str(tmp_path / "gone")
            (tmp_path / "moved" / "store.json").write_text(json.dumps(facts))
        if "model" in data:
            files = {f.name: f.read_bytes() for f in (folder / "model").iterdir() if "tokenizer" in f.name}
            shape = small_llama.LlamaConfig(
                vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                num_attention_heads=2, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
            )  # fmt: skip
            small_llama.save(small_llama.init(shape, 5), shape, tmp_path / "other", files=files)
            data["model"] = str(tmp_path / "other")
        if "path" in data:
            data["path"] = str((folder if data["path"] == "store" else tmp_path) / data["path"])
        config["data"] = data
    with pytest.raises(SAEError, match=words):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_an_array_has_no_model() -> None:
    with pytest.raises(SAEError, match="come from no model"):
        train_sae(np.ones((64, 4), np.float32), n_latents=8, k=2, model_loss_every=1)
