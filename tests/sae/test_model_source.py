"""Activations of a model: the rows of its sites, any range of them, as files and as training data."""

from __future__ import annotations

import json
import os
from copy import copy
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors import SafetensorError
from safetensors.numpy import load_file

from mergelab.activations import ActivationStream, open_activation_files, store
from mergelab.activations.model_activations import ModelActivations, open_model_activations
from mergelab.activations.store import quantized, write_store
from mergelab.checkpoints.output_target import OutputLock
from mergelab.cli.main import cli
from mergelab.errors import OutputError, SAEError, SiteError, TokenError
from mergelab.quickstart import small_llama
from mergelab.quickstart.family import train_bpe
from mergelab.sae.training import train

SITES = ("blocks.0.resid_post", "blocks.1.mlp.out")
TEXT = "def add(a, b):\n    return a + b\n\nfor number in range(10):\n    print(add(number, 1))\n" * 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    config = small_llama.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    tokenizer = train_bpe([TEXT], 300).to_str()
    small_llama.save(
        small_llama.init(config, 0), config, path / "model", files={"tokenizer.json": tokenizer.encode()}
    )
    (path / "text.txt").write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def source(folder: Path) -> ModelActivations:
    return open_model_activations(folder / "model", SITES, [folder / "text.txt"], length=16)


def test_rows_are_those_of_the_forward_pass(source: ModelActivations) -> None:
    found = source.model.apply(
        source.params, jnp.asarray(source.tokens), capture=SITES, logits=False
    ).captured
    for index, site in enumerate(SITES):
        whole = np.asarray(found[site]).reshape(-1, 32)
        assert source.at(site).rows == len(whole) == source.tokens.size
        for start, stop in ((0, 16), (5, 7), (15, 50), (source.rows - 3, source.rows)):
            rows = source.read_sites(start, stop)[index]
            np.testing.assert_allclose(rows, whole[start:stop], atol=1e-5)
    assert np.abs(source.read_sites(0, 16)[0] - source.read_sites(16, 32)[0]).max() > 1e-3


def test_rows_lead_back_to_their_tokens(source: ModelActivations) -> None:
    stream = ActivationStream(source.at(SITES[0]), 32, target=source.at(SITES[1]), seed=1)
    batch = next(stream)
    context, position = np.divmod(batch.rows, 16)
    again = source.model.apply(
        source.params, jnp.asarray(source.tokens[context]), capture=SITES, logits=False
    ).captured
    mine = np.asarray(again[SITES[0]])[np.arange(32), position]
    np.testing.assert_allclose(batch.input, mine, atol=1e-5)
    np.testing.assert_allclose(batch.target, np.asarray(again[SITES[1]])[np.arange(32), position], atol=1e-5)


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0.0), ("bfloat16", 2**-8), ("int8", 1 / 250)])
def test_a_store_is_read_as_it_was_written(
    folder: Path, source: ModelActivations, tmp_path: Path, dtype: str, error: float
) -> None:
    rows = write_store(source, tmp_path / "acts", model=folder / "model", rows=200, dtype=dtype)
    assert rows == 192  # whole contexts
    for index, site in enumerate(SITES):
        files = open_activation_files(tmp_path / "acts" / f"{site}-*.safetensors")
        wanted = source.read_sites(0, rows)[index]
        off = np.abs(files.read(0, rows) - wanted).max(axis=1) / np.abs(wanted).max(axis=1)
        assert off.max() <= error
    tokens = load_file(tmp_path / "acts" / "tokens.safetensors")["tokens"]
    np.testing.assert_array_equal(tokens, source.tokens.reshape(-1)[:rows])
    facts = json.loads((tmp_path / "acts" / "store.json").read_text())
    assert facts["sites"] == dict.fromkeys(SITES, 32) and len(facts["model_sha256"]) == 64
    with pytest.raises(OutputError, match="not empty"):
        write_store(source, tmp_path / "acts", model=folder / "model")


def test_a_begun_store_goes_on_and_is_no_one_elses(
    folder: Path, source: ModelActivations, tmp_path: Path
) -> None:
    def stop(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_store(source, tmp_path / "acts", model=folder / "model", progress=stop)
    assert not (tmp_path / "acts").exists()
    with pytest.raises(OutputError, match="begun work of another call"):
        write_store(source, tmp_path / "acts", model=folder / "model", dtype="int8")
    assert write_store(source, tmp_path / "acts", model=folder / "model") == source.rows
    assert [path.name for path in tmp_path.iterdir()] == ["acts"]


@pytest.fixture
def begun(folder: Path, source: ModelActivations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The work folder of a store that was stopped after two of its shards; the whole one is beside it."""
    monkeypatch.setattr(store, "_SHARD_ROWS", 320)
    write_store(source, tmp_path / "whole", model=folder / "model")

    def stop(done: int, total: int) -> None:
        if done >= 640:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_store(source, tmp_path / "acts", model=folder / "model", progress=stop)
    assert source.rows > 640
    return tmp_path / ".acts.partial"


def _files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "words", "made"),
    [
        (lambda work: None, None, 0),
        (lambda work: _flip(work / f"{SITES[0]}-00001.safetensors"), "other content", 1),
        (lambda work: os.truncate(work / f"{SITES[1]}-00000.safetensors", 50), "has 50 of", 1),
        (lambda work: (work / f"{SITES[1]}-00000.safetensors").unlink(), "lacks", 1),
        (lambda work: os.truncate(work / "store.json", 50), "begun anew", 2),
        (lambda work: os.truncate(work.with_name(".acts.journal"), 60), None, 2),
        (lambda work: work.with_name(".acts.journal").unlink(), None, 2),
        (lambda work: (work / ".half.safetensors").write_text("left by a kill"), None, 0),
    ],
)
def test_a_begun_store_takes_over_what_is_whole(
    folder: Path, source: ModelActivations, begun: Path, spoil: Any, words: str | None, made: int
) -> None:
    spoil(begun)
    reads: list[int] = []
    read = source.read_sites
    counting = copy(source)
    object.__setattr__(counting, "read_sites", lambda start, stop: reads.append(start) or read(start, stop))
    said: list[str] = []
    write_store(counting, begun.with_name("acts"), model=folder / "model", notice=said.append)
    assert len([start for start in reads if start < 640]) == made
    assert len(said) == (words is not None) and (words or "") in "".join(said)
    assert _files(begun.with_name("acts")) == _files(begun.with_name("whole"))
    assert sorted(path.name for path in begun.parent.iterdir()) == ["acts", "whole"]


def test_a_begun_store_is_of_one_text(folder: Path, begun: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT.replace("range(10)", "range(11)"))
    other = open_model_activations(folder / "model", SITES, [tmp_path / "text.txt"], length=16)
    before = _files(begun)
    with pytest.raises(OutputError, match="begun work of another call"):
        write_store(other, begun.with_name("acts"), model=folder / "model")
    assert _files(begun) == before


def test_a_full_disk_is_a_sentence_and_the_next_call_goes_on(
    folder: Path, source: ModelActivations, begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("mergelab.checkpoints.new_files.save_file", full)
    with pytest.raises(OutputError, match=r"acts: the disk is full \(No space left"):
        write_store(source, begun.with_name("acts"), model=folder / "model")
    monkeypatch.undo()
    monkeypatch.setattr(store, "_SHARD_ROWS", 320)
    with (
        OutputLock(begun.with_name("acts")),
        pytest.raises(OutputError, match="another run is writing this output"),
    ):
        write_store(source, begun.with_name("acts"), model=folder / "model")
    write_store(source, begun.with_name("acts"), model=folder / "model")
    assert _files(begun.with_name("acts")) == _files(begun.with_name("whole"))


def test_quantization_is_off_by_half_a_step() -> None:
    rows = np.random.default_rng(0).standard_normal((50, 9)).astype(np.float32)
    rows[7] = 0
    values, scales = quantized(rows)
    assert (np.abs(values * scales[:, None] - rows) <= scales[:, None] * 0.5001).all()


def test_the_command_and_a_training_on_the_model(folder: Path, tmp_path: Path) -> None:
    command = ["activations", folder / "model", "--site", SITES[0], "--text", folder / "text.txt"]
    result = CliRunner().invoke(cli, [*map(str, command), "--out", str(tmp_path / "acts"), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output.splitlines()[-1])["rows"] > 500
    model = {
        "kind": "model",
        "model": str(folder / "model"),
        "site": SITES[0],
        "text": str(folder / "text.txt"),
    }
    sae = {"n_latents": 64, "k": 4}
    budget = {"batch_size": 64, "tokens": 1280, "lr": 1e-3}
    online = train({"sae": sae, "data": model, "train": budget}, tmp_path / "online")
    files = {"kind": "files", "path": str(tmp_path / "acts" / "blocks*.safetensors")}
    offline = train({"sae": sae, "data": files, "train": budget}, tmp_path / "offline")
    np.testing.assert_allclose(online.sae.W_dec, offline.sae.W_dec, atol=1e-3)
    # The same with the weights left in their files.
    again = [
        *map(str, command),
        "--out",
        str(tmp_path / "streamed"),
        "--stream-layers",
        "--spill",
        str(tmp_path),
    ]
    result = CliRunner().invoke(cli, again)
    assert result.exit_code == 0, result.output
    for file in sorted((tmp_path / "acts").glob("*.safetensors")):
        for name, rows in load_file(file).items():
            np.testing.assert_allclose(load_file(tmp_path / "streamed" / file.name)[name], rows, atol=1e-6)
    out_of_core = {**model, "stream_layers": True, "spill": str(tmp_path)}
    streamed = train({"sae": sae, "data": out_of_core, "train": budget}, tmp_path / "out_of_core")
    np.testing.assert_allclose(online.sae.W_dec, streamed.sae.W_dec, atol=1e-3)
    assert "spill" not in (tmp_path / "out_of_core" / "final" / "cfg.json").read_text()
    refused = CliRunner().invoke(cli, [*again[:-3], "--spill", str(tmp_path)])
    assert refused.exit_code == 2 and "add --stream-layers" in refused.output
    both = {**model, "target_site": SITES[1]}
    transcoder = train({"sae": sae, "data": both, "train": budget}, tmp_path / "transcoder").sae
    assert transcoder.W_dec.shape == (64, 32) and not np.allclose(transcoder.W_dec, online.sae.W_dec)


def test_a_training_runs_the_model_once_over_its_tokens(
    folder: Path, source: ModelActivations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    run = ModelActivations._run
    monkeypatch.setattr(ModelActivations, "_run", lambda *args: passes.append(0) or run(*args))
    data = {
        "kind": "model", "model": str(folder / "model"), "site": SITES[0], "target_site": SITES[1],
        "text": str(folder / "text.txt"), "context": 16, "buffer_rows": 1024,
    }  # fmt: skip
    kept = int(source.by_place.sum())
    budget = {"batch_size": 64, "tokens": kept // 64 * 64}
    result = train({"sae": {"n_latents": 64, "k": 4}, "data": data, "train": budget}, tmp_path / "run")
    assert result.sae.config.metadata["rows"]["sampled"]["rows"] >= min(kept // 64 * 64, 1024)
    groups = -(-kept // 1024)
    # One for the limit of norms; of both sites at once; groups share the contexts at their ends.
    assert len(passes) <= 1 + len(source.tokens) // source.batch + 2 * groups


def test_a_tokenizer_larger_than_the_embedding_is_named(folder: Path, tmp_path: Path) -> None:
    config = small_llama.LlamaConfig(
        vocab_size=100, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=4, max_position_embeddings=48,
    )  # fmt: skip
    files = {"tokenizer.json": (folder / "model" / "tokenizer.json").read_bytes()}
    small_llama.save(small_llama.init(config, 0), config, tmp_path / "model", files=files)
    message = r"tokenizer.json: token \d+ is beyond the model's vocabulary of 100"
    with pytest.raises(TokenError, match=message):
        open_model_activations(tmp_path / "model", ["embed"], [folder / "text.txt"])


def test_a_context_nobody_asked_for_fits_the_model(folder: Path) -> None:
    texts = [folder / "text.txt"]
    found = [
        open_model_activations(folder / "model", SITES, texts, default=default).tokens.shape[1]
        for default in (16, 4096)
    ]
    assert found == [16, 64]


def test_what_cannot_be_read_is_said(folder: Path) -> None:
    with pytest.raises(SiteError, match=r"blocks\.9"):
        open_model_activations(folder / "model", ["blocks.9.resid_post"], [folder / "text.txt"])
    with pytest.raises(SAEError, match="reads"):
        open_model_activations(folder / "model", ["blocks.0.attn.pattern"], [folder / "text.txt"])
    with pytest.raises(SAEError, match="do not fill one context"):
        (folder / "short.txt").write_text("def")
        open_model_activations(folder / "model", SITES, [folder / "short.txt"], length=64)
    with pytest.raises(TokenError, match="1000000 tokens are more than the model's 64 positions"):
        open_model_activations(folder / "model", SITES, [folder / "text.txt"], length=10**6)
    with pytest.raises(SAEError, match="cannot be read"):
        open_model_activations(folder / "model", SITES, [folder / "none.txt"])
