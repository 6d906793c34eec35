"""Reward models: read from and written to classifiers' files, and trained on scratchpads, on a mesh too."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest

from mergelab.errors import CheckpointError, MeshError, TuningError
from mergelab.models.families import model_from_config
from mergelab.models.model import Model, Params
from mergelab.reasoning.reward_files import load_reward_model, save_reward_model
from mergelab.reasoning.reward_model import new_reward_model, score_texts
from mergelab.reasoning.reward_rows import RewardRows, outcome_rows, pair_rows, process_rows
from mergelab.reasoning.reward_scratchpads import Scratchpads, generate_scratchpads
from mergelab.reasoning.reward_training import train_reward_model
from mergelab.sharding import make_mesh
from tests.models.tiny_models import CONFIGS, MASK, TOKENS
from tests.reasoning.classifiers import LIGHT, RECORDED, write_classifier


@pytest.mark.parametrize(("kind", "head"), LIGHT)
def test_a_classifier_of_transformers_gives_what_was_recorded(kind: str, head: str, tmp_path: Path) -> None:
    recorded = np.array(json.loads(RECORDED.read_text())[f"{kind} {head}"])
    folder = write_classifier(tmp_path / "model", kind, head)
    reward, params = load_reward_model(folder, positive="class 1")
    assert reward.labels == ("class 0", "class 1", "class 2") and reward.positive == 1
    real: Any = slice(None) if head == "sequence" else MASK
    scores = score_texts(reward, params, TOKENS, MASK, batch=2)
    wanted = recorded[..., 1] - np.log(np.exp(recorded[..., 0]) + np.exp(recorded[..., 2]))
    np.testing.assert_allclose(scores[real], wanted[real], rtol=0, atol=1e-4)
    assert np.abs(scores[real] - wanted[::-1][real]).max() > 0.1  # rows of the wrong text would be seen
    saved = save_reward_model(reward, params, tmp_path / "saved")
    again, read = load_reward_model(saved, positive=1)
    assert replace(again, model=reward.model) == reward
    chex.assert_trees_all_equal(read, params)
    assert (
        json.loads((saved / "config.json").read_text())["architectures"]
        == json.loads((folder / "config.json").read_text())["architectures"]
    )


def test_folders_without_a_readable_head_are_refused(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "bert", "bert", "sequence")
    with pytest.raises(CheckpointError, match="pooler is not computed"):
        load_reward_model(folder)
    folder = write_classifier(tmp_path / "llama", "llama", "sequence", other=np.zeros(2, np.float32))
    with pytest.raises(CheckpointError, match=r"no tensor 'score.weight'"):
        load_reward_model(folder)
    folder = write_classifier(tmp_path / "good", "llama", "sequence")
    with pytest.raises(CheckpointError, match="no label 'fine'"):
        load_reward_model(folder, positive="fine")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(CheckpointError, match="neither a sequence nor a token classifier"):
        load_reward_model(folder)
    assert load_reward_model(folder, kind="outcome")[0].kind == "outcome"


def test_scratchpads_are_sums_with_at_most_one_slip() -> None:
    pads = generate_scratchpads(200, digits=4, base=5, slips=0.5, seed=1)
    says = [" ".join(pads.vocabulary[token] for token in row) for row in pads.tokens[:50]]
    for row, text in enumerate(says):
        digits = [int(word) for word in text.split(" = ")[0].split()]
        total = digits[0]
        for n, step in enumerate(text.split(" ; ")[:-1]):
            left, said = step.split(" = ")[-2:]
            assert left.split()[-1] == str(digits[n + 1])
            total += digits[n + 1]
            assert (int(said) == total % 5) == pads.steps_right[row, n]
        assert (text.split()[-2] == str(total % 5)) == pads.right[row]
    assert 0.4 < pads.right.mean() < 0.6
    assert (pads.tokens[:, pads.ends] == pads.vocabulary.index(";")).all()
    with pytest.raises(TuningError, match="1 digits"):
        generate_scratchpads(5, digits=1)


@pytest.fixture(scope="module")
def pads() -> Scratchpads:
    return generate_scratchpads(256, digits=3, base=3, seed=0)


def small(pads: Scratchpads, width: int = 16, layers: int = 1) -> tuple[Model, Params]:
    sizes = {"vocab_size": len(pads.vocabulary), "hidden_size": width, "intermediate_size": 2 * width}
    config = {**CONFIGS["llama"], **sizes, "num_attention_heads": 2, "num_hidden_layers": layers}
    model = model_from_config(config)
    return model, model.init(0)


def labelled(pads: Scratchpads, rows: slice) -> RewardRows:
    return process_rows(pads.tokens[rows], pads.ends, pads.steps_right[rows])


@pytest.mark.slow
def test_a_process_reward_model_finds_slips_in_sums_it_has_not_seen() -> None:
    pads = generate_scratchpads(2304, digits=3, base=3, seed=0)
    reward, params = new_reward_model(*small(pads, 32, 2), kind="process", labels=2)
    options: dict[str, Any] = {"steps": 300, "batch": 64, "learning_rate": 0.005}
    _, record = train_reward_model(
        reward, params, labelled(pads, slice(2048)), held_out=labelled(pads, slice(2048, None)), **options
    )
    always = max(pads.steps_right.mean(), 1 - pads.steps_right.mean())
    assert record.held_out[1]["accuracy"] > 0.8 > always + 0.1


def test_a_process_reward_model_learns_and_is_the_same_on_a_mesh(pads: Scratchpads) -> None:
    reward, params = new_reward_model(*small(pads), kind="process", labels=2)
    assert "unembed" not in params["model"]
    rows = labelled(pads, slice(32))
    options: dict[str, Any] = {"steps": 60, "batch": 32, "learning_rate": 0.02}
    _, record = train_reward_model(reward, params, rows, held_out=rows, **options)
    before, after = record.held_out
    assert before["loss"] == pytest.approx(np.log(2), abs=0.05)
    assert after["loss"] < 0.6 * before["loss"] and after["accuracy"] > 0.8 > before["accuracy"]
    mesh = make_mesh({"data": 2, "fsdp": 2})
    spread = on_mesh(reward, params, mesh)
    again, other = train_reward_model(reward, spread, rows, **options)
    assert again["model"]["embed"]["embedding"].sharding.spec[1] == "fsdp"
    # Sums over devices round otherwise, which later steps at this learning rate carry on.
    single, shared = ([line["loss"] for line in one.steps[:20]] for one in (record, other))
    np.testing.assert_allclose(shared, single, atol=1e-3)
    assert single[-1] < single[0] - 0.1
    with pytest.raises(MeshError, match="multiple of 4"):
        train_reward_model(reward, spread, rows, steps=1, batch=6)


def on_mesh(reward: Any, params: Params, mesh: Any) -> Params:
    from mergelab.models.table import get_leaf, tree_from_leaves
    from mergelab.sharding import named_sharding

    return tree_from_leaves(
        {
            leaf: jax.device_put(get_leaf(params, leaf), named_sharding(mesh, leaf.shape, leaf.axes))
            for leaf in reward.table()
        }
    )


def test_outcomes_and_pairs_are_learned_by_the_head_alone(pads: Scratchpads) -> None:
    """A head on a model at random can tell a text's last digit, so that digit is what is right here."""
    reward, params = new_reward_model(*small(pads))
    labels = pads.tokens[:, -2] == 0
    rows = outcome_rows(pads.tokens, labels)
    trained, record = train_reward_model(
        reward, params, rows, head_only=True, steps=60, batch=32, learning_rate=0.3, held_out=rows
    )
    assert record.held_out[1]["loss"] < 0.9 * record.held_out[0]["loss"]
    chex.assert_trees_all_equal(trained["model"], params["model"])
    count = min(labels.sum(), (~labels).sum())
    pairs = pair_rows(pads.tokens[labels][:count], pads.tokens[~labels][:count])
    scored, record = train_reward_model(
        reward, params, pairs, head_only=True, steps=60, batch=16, learning_rate=0.3, held_out=pairs
    )
    assert record.held_out[0]["loss"] == pytest.approx(np.log(2), abs=0.02)
    assert record.held_out[1]["accuracy"] > 0.65 > record.held_out[0]["accuracy"]
    scores = score_texts(reward, scored, pads.tokens, batch=64)
    assert scores[labels].mean() > scores[~labels].mean()


def test_rows_that_do_not_fit_the_head_are_refused(pads: Scratchpads) -> None:
    outcome, params = new_reward_model(*small(pads))
    process = replace(outcome, kind="process")
    steps = process_rows(pads.tokens, pads.ends, pads.steps_right)
    with pytest.raises(TuningError, match="labels of steps for a head of outcomes"):
        train_reward_model(outcome, params, steps)
    with pytest.raises(TuningError, match="pairs for a head of steps"):
        train_reward_model(process, params, pair_rows(pads.tokens[:4], pads.tokens[4:8]))
    with pytest.raises(TuningError, match="labels from 0 to 2"):
        train_reward_model(outcome, params, outcome_rows(pads.tokens, np.arange(256) % 3))
    with pytest.raises(TuningError, match="expected one shape"):
        pair_rows(pads.tokens[:4], pads.tokens[:5])
    with pytest.raises(TuningError, match="columns below"):
        process_rows(pads.tokens, pads.ends + 99, pads.steps_right)
    with pytest.raises(TuningError, match="kind 'both'"):
        new_reward_model(*small(pads), kind="both")  # pyright: ignore[reportArgumentType]
