"""Two models on one text: activations, outputs and losses, against the definitions in numpy."""

from __future__ import annotations

import json
from dataclasses import astuple
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from mergelab.activations import capture
from mergelab.errors import EvaluationError
from mergelab.merging import diff_models
from mergelab.merging.diff.on_text import TextDiff, linear_cka, perturbed
from mergelab.models import Streaming, load_model
from tests.decoding.tiny import CONFIGS, tensors

LENGTH = 64  # as many as the model has positions
COUNT = 10 * LENGTH


def write(folder: Path, values: dict[str, np.ndarray], order: list[int] | None = None) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    save_file(values, folder / "model.safetensors")
    vocabulary = {f"w{number}": i for i, number in enumerate(order or range(61))}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}
    data = {"version": "1.0", "model": model, "pre_tokenizer": {"type": "WhitespaceSplit"}}
    (folder / "tokenizer.json").write_text(json.dumps(data))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    base = tensors("llama")
    write(place / "b", dict(base))
    write(place / "a", {n: x + 0.1 * rng.standard_normal(x.shape, np.float32) for n, x in base.items()})
    write(place / "moved", dict(base), [60, *range(60)])
    ids = rng.integers(0, 61, COUNT)
    (place / "text.txt").write_text(" ".join(f"w{i}" for i in ids))
    np.save(place / "ids.npy", ids)
    return place


@pytest.fixture(scope="module")
def found(place: Path) -> TextDiff:
    text = diff_models(place / "a", place / "b", text=place / "text.txt").on_text
    assert text is not None
    return text


@pytest.fixture(scope="module")
def logits(place: Path) -> list[np.ndarray]:
    """Log-probabilities of both models, float64 `[contexts, length, vocabulary]`."""
    ids = np.load(place / "ids.npy").reshape(-1, LENGTH).astype(np.int32)
    every = []
    for name in ("a", "b"):
        model, params = load_model(place / name)
        found = np.asarray(jax.jit(model.apply)(params, ids).logits, np.float64)
        every.append(found - np.log(np.exp(found).sum(axis=-1, keepdims=True)))
    return every


def test_outputs_and_losses_are_those_of_the_definitions(
    found: TextDiff, logits: list[np.ndarray], place: Path
) -> None:
    a, b = logits
    ids = np.load(place / "ids.npy").reshape(-1, LENGTH)
    assert found.tokens == COUNT - len(ids)
    assert found.kl == pytest.approx((np.exp(b) * (b - a)).sum(axis=-1).mean(), rel=1e-4)
    assert found.agreement == pytest.approx((a.argmax(axis=-1) == b.argmax(axis=-1)).mean())
    wanted = [-np.take_along_axis(x[:, :-1], ids[:, 1:, None], axis=-1).mean() for x in (a, b)]
    assert found.losses == pytest.approx(wanted, rel=1e-5)
    assert found.losses is not None
    alphas, line = zip(*found.line, strict=True)
    assert line[0] == found.losses[1] and line[-1] == found.losses[0]
    straight = np.interp(alphas, [0, 1], [line[0], line[-1]])
    assert found.barrier == pytest.approx(max(0.0, *(np.array(line) - straight)), abs=1e-9)
    assert len(found.noise) == 3 and len(set(found.noise)) == 3
    assert found.flatness == pytest.approx(np.mean(found.noise) - wanted[1], abs=1e-5)
    (_, first), (_, second) = (load_model(place / name) for name in ("a", "b"))
    moved = perturbed(first, second, jax.random.key(0))
    for one, other, noisy in zip(*map(jax.tree.leaves, (first, second, moved)), strict=True):
        true, random = np.asarray(one - other), np.asarray(noisy - other)
        assert np.linalg.norm(random) == pytest.approx(np.linalg.norm(true), rel=1e-4)
        assert abs(np.vdot(true, random)) < 0.8 * np.vdot(true, true)


def test_activations_are_those_of_both_models(found: TextDiff, place: Path) -> None:
    ids = np.load(place / "ids.npy").reshape(-1, LENGTH)
    sites = [f"blocks.{i}.resid_post" for i in range(2)]
    x, y = (capture(*load_model(place / name), ids, sites) for name in ("a", "b"))
    assert [layer.site for layer in found.layers] == sites
    for layer in found.layers:
        one, other = (each[layer.site][:, 1:].reshape(-1, 24).astype(np.float64) for each in (x, y))
        change = np.linalg.norm(one - other) / np.linalg.norm(other)
        assert layer.relative_change == pytest.approx(change, rel=1e-4)
        assert layer.cka == pytest.approx(cka(one, other), rel=1e-5)
        assert 0 < layer.cosine < 1


def cka(x: np.ndarray, y: np.ndarray) -> float:
    """Equation 3 of 1905.00414, by kernels of tokens."""
    centering = np.eye(len(x)) - 1 / len(x)
    k, m = (centering @ z @ z.T @ centering for z in (x, y))
    return float(np.trace(k @ m) / np.sqrt(np.trace(k @ k) * np.trace(m @ m)))


def test_cka_knows_rotations_and_takes_either_side() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 8)) + 3
    turned = 2 * x @ np.linalg.qr(rng.standard_normal((8, 8)))[0] - 1
    assert linear_cka(x, turned) == pytest.approx(1)
    for shape in ((50, 20), (50, 80)):
        y = x @ rng.standard_normal((8, shape[1])) + rng.standard_normal(shape)
        assert linear_cka(x, y) == pytest.approx(cka(x, y), rel=1e-9)
        assert linear_cka(x, y) < 0.999


def test_texts_that_do_not_serve_are_refused(place: Path) -> None:
    (place / "empty.txt").write_text(" \n")
    with pytest.raises(EvaluationError, match="is empty"):
        diff_models(place / "a", place / "b", text=place / "empty.txt")
    with pytest.raises(EvaluationError, match="different tokens"):
        diff_models(place / "moved", place / "b", text=place / "text.txt")


def test_models_that_stay_in_their_files_are_told_apart_alike(found: TextDiff, place: Path) -> None:
    again = diff_models(place / "a", place / "b", text=place / "text.txt", streamed=Streaming(place)).on_text
    assert again is not None and again.tokens == found.tokens
    for one, other in zip(again.layers, found.layers, strict=True):
        assert astuple(one)[1:] == pytest.approx(astuple(other)[1:], rel=1e-4)
    assert again.kl == pytest.approx(found.kl, rel=1e-4)
    assert again.agreement == found.agreement
    assert again.losses == pytest.approx(found.losses, rel=1e-5)
    assert np.array(again.line) == pytest.approx(np.array(found.line), rel=1e-5)
    # Other draws, of the same size.
    assert len(again.noise) == len(found.noise)
    assert np.mean(again.noise) == pytest.approx(np.mean(found.noise), rel=0.2)
