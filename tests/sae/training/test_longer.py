"""A run's checkpoints are SAEs; a run can be made longer; an SAE can be where a training starts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from mergelab.cli.main import cli
from mergelab.errors import CheckpointError, SAEError
from mergelab.sae.formats import load_sae, save_sae
from mergelab.sae.sae import SAE
from mergelab.sae.training import train
from mergelab.sae.training.config import TrainingRecipe
from mergelab.sae.training.finish import finished_sae
from mergelab.sae.training.initialize import initialize
from mergelab.sae.training.snapshot import snapshot_sae
from mergelab.sae.training.step import make_step
from mergelab.sae.training.tracking import read_metrics
from mergelab.sae.training.update import averaged_params, learning_rate
from mergelab.sae.training.warm_start import extended_state, warm_state
from mergelab.sae.variants import make_variant

ROWS = np.random.default_rng(0).standard_normal((512, 16)).astype(np.float32) @ np.diag(
    np.linspace(0.2, 2, 16).astype(np.float32)
)


class Stop(Exception):
    """Stands for what ends a run."""


def _config(folder: Path, steps: int = 120) -> dict[str, Any]:
    return {
        "sae": {"variant": "topk", "n_latents": 32, "k": 4},
        "data": {"kind": "files", "path": str(folder / "x.npy")},
        "train": {"batch_size": 64, "tokens": 64 * steps},
        "checkpoint": {"every": 40, "log_every": 10, "keep": 9},
        "metadata": {"site": "blocks.1.resid_post"},
    }


def _stop_at(step: int) -> Any:
    def progress(done: int, *_: Any) -> None:
        if done >= step:
            raise Stop

    return progress


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, a run that has finished, and one that was stopped after step 90."""
    path = tmp_path_factory.mktemp("runs")
    np.save(path / "x.npy", ROWS)
    train(_config(path), path / "whole")
    with pytest.raises(Stop):
        train(_config(path), path / "stopped", progress=_stop_at(90))
    (path / "sae.yaml").write_text(yaml.safe_dump(_config(path)))
    return path


def _invoke(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


def _same(one: SAE, other: SAE) -> bool:
    arrays = one.as_numpy(), other.as_numpy()
    return all(np.array_equal(arrays[0][name], arrays[1][name]) for name in arrays[0])


def test_a_checkpoint_is_the_sae_of_a_run_that_ended_there(folder: Path) -> None:
    found = snapshot_sae(folder / "stopped")
    assert (found.step, found.steps) == (80, 120)
    assert _same(found.sae, snapshot_sae(folder / "whole", 80).sae)
    assert not _same(found.sae, snapshot_sae(folder / "whole", 40).sae)  # the control
    metadata = found.sae.config.metadata
    assert metadata["training"]["step"] == 80 and metadata["training"]["steps"] == 120
    assert metadata["training"]["nmse"] == read_metrics(folder / "stopped" / "metrics.jsonl")[7]["nmse"]
    assert found.sae.config.reads == ("blocks.1.resid_post",)
    # It is far better than chance, and close to what the run ends with.
    ends = [((sae(ROWS) - ROWS) ** 2).mean() for sae in (found.sae, load_sae(folder / "whole" / "final"))]
    assert ends[0] < 1.5 * ends[1] < 0.8 * ROWS.var()


def test_commands_take_a_run_that_has_not_finished_and_say_so(folder: Path, tmp_path: Path) -> None:
    code, said, told = _invoke("sae", "eval", folder / "stopped", "--data", folder / "x.npy", "--json")
    assert code == 0 and 0 < json.loads(said)["nmse"] < 1
    assert "the run has not finished; taken is its checkpoint of step 80 of 120" in told
    export = ("sae", "export", folder / "whole", "--format", "saelens")
    code, _, told = _invoke(*export, "--step", 40, "--out", tmp_path / "out")
    assert code == 0 and "not finished" not in told
    np.testing.assert_allclose(load_sae(tmp_path / "out")(ROWS), snapshot_sae(folder / "whole", 40).sae(ROWS))
    code, _, told = _invoke(*export, "--step", 41, "--out", tmp_path / "none")
    assert code == 2 and "keeps no checkpoint of step 41 (it has: 40, 80)" in told
    code, _, told = _invoke(
        "sae", "export", folder / "whole" / "final", *export[3:], "--step", 1, "--out", "x"
    )
    assert code == 2 and "this is not a run" in told


def test_a_damaged_checkpoint_is_no_sae(folder: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(folder / "stopped", tmp_path / "run"))
    (run / "checkpoints" / "80" / "manifest.json").unlink()
    assert snapshot_sae(run).step == 40
    with pytest.raises(CheckpointError, match="80 has no manifest"):
        snapshot_sae(run, 80)
    shutil.rmtree(run / "checkpoints" / "40")
    with pytest.raises(CheckpointError, match="has no whole checkpoint"):
        snapshot_sae(run)


def test_a_run_is_made_longer(folder: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(folder / "stopped", tmp_path / "run"))
    longer = _config(folder, steps=200)
    said: list[str] = []
    with pytest.raises(Stop):
        train(longer, run, resume=True, notice=said.append, progress=_stop_at(150))
    assert len(said) == 1 and "the run of 7,680 tokens is made one of 12,800; the learning rate" in said[0]
    # From here on it is a run like others: it goes on by itself, and is not made shorter.
    with pytest.raises(SAEError, match=r"train\.tokens: 12800, not 7680"):
        train(_config(folder), run, resume=True)
    result = train(longer, run, resume=True, notice=pytest.fail)
    assert result.steps == 200 and not result.resumed
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(10, 201, 10))
    recipe, peak = TrainingRecipe(steps=200, batch_size=64), _peak(folder / "stopped")
    for line in lines[8:]:  # after step 80, from which it went on
        wanted = float(learning_rate(recipe, peak, jnp.int32(line["step"] - 1)))
        assert line["learning_rate"] == pytest.approx(wanted, rel=1e-5)
    assert lines[-1]["nmse"] < lines[7]["nmse"]
    # A run that had finished goes on from the same checkpoint, and never stopped in between ends in the same.
    other = Path(shutil.copytree(folder / "whole", tmp_path / "other"))
    assert not train(longer, other, resume=True, notice=said.append).resumed
    assert _same(load_sae(run / "final"), load_sae(other / "final"))
    assert train(longer, other, resume=True).resumed


def _peak(run: Path) -> float:
    """The peak learning rate of a run, by one of its lines."""
    line = read_metrics(run / "metrics.jsonl")[7]
    return line["learning_rate"] / float(learning_rate(TrainingRecipe(120, 64), 1.0, jnp.int32(79)))


def test_running_means_are_carried_over_to_another_length() -> None:
    variant = make_variant("topk", d_in=16, n_latents=32, k=4)
    short, long = (TrainingRecipe(steps=steps, batch_size=64) for steps in (40, 4000))
    assert short.ema_decay == 0 and long.ema_decay > 0.9 and long.square_decay > short.square_decay
    state = initialize(variant, short, jax.random.key(0), ROWS)
    step = make_step(variant, short)
    for _ in range(5):
        state, _ = step(state, jnp.asarray(ROWS[:64]), jnp.asarray(ROWS[:64]))
    found = extended_state(state, short, long)
    for name, value in averaged_params(found, long.ema_decay).items():
        np.testing.assert_allclose(value, state.params[name], rtol=2e-5, atol=1e-7)
    for name, square in found.square.items():  # what Adam divides by is what it was
        np.testing.assert_allclose(
            square / (1 - long.square_decay**5), state.square[name] / (1 - short.square_decay**5), rtol=1e-3
        )
    assert extended_state(found, long, short).average == {}


VARIANTS: dict[str, dict[str, Any]] = {
    "topk": {"k": 4},
    "batch_topk": {"k": 4},
    "jump_relu": {"l0": 4.0},
    "gated": {},
    "relu": {"l1": 1e-3},
    "transcoder": {"k": 4, "d_out": 8, "skip": True},
}


@pytest.mark.parametrize(
    "name",
    [name if name == "transcoder" else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS],
)
def test_a_warm_start_is_the_inverse_of_the_finish(name: str) -> None:
    kind = "topk" if name == "transcoder" else name
    variant = make_variant(kind, d_in=16, n_latents=32, **VARIANTS[name])
    recipe = TrainingRecipe(steps=100, batch_size=64, learning_rate=1e-2)
    x = jnp.asarray(ROWS)
    y = x[:, :8] + 3.0 if name == "transcoder" else x
    state = initialize(variant, recipe, jax.random.key(0), x, None if name != "transcoder" else y)
    step = make_step(variant, recipe)
    for _ in range(3):
        state, _ = step(state, x[:64], y[:64])
    sae = finished_sae(variant, recipe, state, use_average=False)
    # Other rows, of another scale and mean, normalize differently: the function stays.
    other = initialize(variant, recipe, jax.random.key(1), 3 * x[:100] + 1, None if y is x else 2 * y[:100])
    found = finished_sae(variant, recipe, warm_state(sae, variant, recipe, other), use_average=False)
    for part, array in sae.as_numpy().items() if y is x else ():  # else codes have another unit
        np.testing.assert_allclose(found.as_numpy()[part], array, rtol=2e-4, atol=2e-4, err_msg=part)
    np.testing.assert_allclose(found(x), sae(x), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_rows_of_other_norms_are_the_same_function() -> None:
    variant = make_variant("gated", d_in=16, n_latents=32)
    assert variant.unit_decoder
    recipe = TrainingRecipe(steps=100, batch_size=64)
    state = initialize(variant, recipe, jax.random.key(0), ROWS)
    sae = finished_sae(variant, recipe, state, use_average=False)
    scales = jnp.linspace(0.5, 3, 32)
    scaled = replace(
        sae,
        W_dec=sae.W_dec * scales[:, None],
        W_enc=sae.W_enc / scales[None, :],
        b_enc=sae.b_enc / scales,
        magnitude_bias=sae.magnitude_bias / scales,
    )
    found = finished_sae(
        variant,
        recipe,
        warm_state(scaled, variant, recipe, state),
        use_average=False,
    )
    np.testing.assert_allclose(found.W_dec, sae.W_dec, atol=1e-5)
    np.testing.assert_allclose(found(ROWS), sae(ROWS), atol=1e-4)


@pytest.mark.slow
def test_a_training_starts_from_an_sae_of_any_format(folder: Path, tmp_path: Path) -> None:
    save_sae(load_sae(folder / "whole" / "final"), tmp_path / "there", "saelens")
    first = []
    for start in (folder / "whole", tmp_path / "there", None):
        out = tmp_path / f"out{len(first)}"
        options = [] if start is None else ["--from", start]
        arguments = ("--set", "train.lr=1e-6", "--set", "checkpoint.log_every=1", "--set", "train.tokens=640")
        code, _, told = _invoke("sae", "train", folder / "sae.yaml", "--out", out, *arguments, *options)
        assert code == 0, told
        first.append(read_metrics(out / "metrics.jsonl")[0]["nmse"])
    end = read_metrics(folder / "whole" / "metrics.jsonl")[-1]["nmse"]
    assert first[0] == pytest.approx(first[1], rel=1e-4) and first[0] == pytest.approx(end, rel=0.15)
    assert first[2] > 1.5 * end  # the control
    settings = load_sae(tmp_path / "out1" / "final").config.metadata["settings"]
    assert settings["start_from"] == "there"
    with pytest.raises(SAEError, match=r"there/.* has other content since the run began"):
        (tmp_path / "there" / "cfg.json").write_text((tmp_path / "there" / "cfg.json").read_text() + "\n")
        config = {**_config(folder), "start_from": str(tmp_path / "there")}
        more = {"train.tokens=640", "train.lr=1e-6", "checkpoint.log_every=1"}
        train(config, tmp_path / "out1", resume=True, overrides=[*more, "train.tokens=1280"])


def test_what_does_not_fit_is_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    config = {**_config(folder), "start_from": str(folder / "whole")}
    for overrides, words in {
        ("sae.n_latents=64",): "n_latents=32, d_out=16, but the configuration and its data 16, 64, 16",
        ("train.normalize=layer_norm",): "normalizes its input by 'none'",
        ("start_from=/nowhere/at-all",): "nowhere/at-all",
    }.items():
        with pytest.raises((SAEError, CheckpointError), match=words):
            train(config, tmp_path / "run", overrides=overrides)
        assert not (tmp_path / "run").exists()
    with pytest.warns(UserWarning, match=r"has the activation topk, but is trained as relu"):
        train(config, tmp_path / "run", overrides=["sae={variant: relu, n_latents: 32, l1: 1e-3}"])
