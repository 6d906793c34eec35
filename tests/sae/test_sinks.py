"""Attention sinks: left out of training, evaluation, features, steering and stores.

Each is a case of a real model: the first token of a context, and now and then another, is a hundred times as
long as the rest and holds nearly all of the variance.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

from mergelab.abliteration.directions import mean_activations
from mergelab.abliteration.prompts import Prompts
from mergelab.activations.kept import DEFAULT_RULE, EVERY_TOKEN, TokenRule
from mergelab.activations.left_out import LeftOut, count_left_out
from mergelab.activations.store import open_activation_files, write_store
from mergelab.activations.stored_tokens import kept_of_files
from mergelab.cli.main import cli
from mergelab.interp.steering import latent_direction, steering_vector
from mergelab.sae.evaluation.evaluate import evaluate_sae
from mergelab.sae.evaluation.metric import Evidence, Options
from mergelab.sae.evaluation.probing import rows_with_labels
from mergelab.sae.evaluation.scorecard import scorecard
from mergelab.sae.features.gallery import make_gallery
from mergelab.sae.features.survey import survey
from mergelab.sae.formats import save_sae
from mergelab.sae.sae import SAE
from mergelab.sae.spliced_losses import evaluate_downstream
from mergelab.sae.subject_model import judging_rule
from mergelab.sae.training import train_sae
from mergelab.sae.training.config import DataSection, load_config
from mergelab.sae.training.data import open_data
from mergelab.sae.training.start import start_training
from tests.sae.planted_sink import LENGTH, SINK, SITE, WIDTH, planted_sink, sink_source, sink_tokens

CONTEXTS = 64
ROWS = CONTEXTS * LENGTH
HOW = {"variant": "topk", "n_latents": 32, "k": 3, "batch_size": 64, "steps": 300, "lr": 3e-3}


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return sink_source().read_sites(0, ROWS)[0]


@pytest.fixture(scope="module")
def normal(rows: np.ndarray) -> np.ndarray:
    return (sink_tokens(CONTEXTS) != SINK).reshape(-1)


@pytest.fixture(scope="module")
def saes(rows: np.ndarray) -> dict[str, SAE]:
    """Trained on all tokens, and by default."""
    meta = {"site": SITE}
    return {
        "all": train_sae(rows, max_norm_multiple=None, metadata=meta, **HOW),
        "default": train_sae(rows, metadata=meta, **HOW),
    }


def _fvu(sae: SAE, x: np.ndarray) -> float:
    error = ((x - np.asarray(sae(jnp.asarray(x)), np.float64)) ** 2).sum()
    return float(error / ((x - x.mean(axis=0)) ** 2).sum())


def test_the_planted_model_is_like_a_real_one(rows: np.ndarray, normal: np.ndarray) -> None:
    norms = np.linalg.norm(rows, axis=1)
    assert norms[~normal].min() > 50 * np.median(norms) and norms[normal].max() < 5 * np.median(norms)
    spread = ((rows - rows.mean(axis=0)) ** 2).sum(axis=1)
    assert spread[~normal].sum() > 0.9 * spread.sum()


def test_training_leaves_them_out(rows: np.ndarray, normal: np.ndarray, saes: dict[str, SAE]) -> None:
    ordinary = rows[normal]
    plain, default = _fvu(saes["all"], ordinary), _fvu(saes["default"], ordinary)
    assert default < 0.8 * plain
    alive = [
        float((np.asarray(one.encode(jnp.asarray(ordinary))) > 0).any(axis=0).mean()) for one in saes.values()
    ]
    assert alive[1] >= alive[0]
    told = saes["default"].config.metadata
    assert told["token_rule"] == DEFAULT_RULE.facts()
    assert told["rows"]["sampled"]["by_norm"] == (~normal).sum() and told["rows"]["norms"]["max"] < 100


def test_figures_are_those_of_the_tokens_that_count(
    rows: np.ndarray, normal: np.ndarray, saes: dict[str, SAE]
) -> None:
    source = sink_source()
    judged = rows[ROWS // 2 :], normal[ROWS // 2 :]
    found = scorecard(saes["all"], source, Options(metrics=("reconstruction",)))
    values = {name.partition(".")[2]: value for name, value in found.values().items()}
    assert values["nmse"] == pytest.approx(_fvu(saes["all"], judged[0][judged[1]]), rel=1e-3)
    assert values["nmse_all"] == pytest.approx(_fvu(saes["all"], judged[0]), rel=1e-3)
    assert values["nmse_all"] < values["nmse"] / 20  # what was reported for it
    assert values["left_out"] == pytest.approx((~judged[1]).mean())
    assert "2 by norm" not in found.scores["reconstruction.left_out"].against
    assert "by norm, at position 2" in found.scores["reconstruction.left_out"].against
    on_rows = evaluate_sae(saes["all"], judged[0]).values()
    assert on_rows["reconstruction.nmse"] == pytest.approx(values["nmse"], rel=1e-4)
    assert on_rows["reconstruction.nmse_all"] == pytest.approx(values["nmse_all"], rel=1e-4)


def test_commands_take_the_rule(rows: np.ndarray, saes: dict[str, SAE], tmp_path: Path) -> None:
    save_sae(saes["all"], tmp_path / "sae")
    np.save(tmp_path / "rows.npy", rows)

    def judged(*options: str) -> dict[str, float]:
        given = ["sae", "eval", str(tmp_path / "sae"), "--data", str(tmp_path / "rows.npy"), "--json"]
        result = CliRunner().invoke(cli, [*given, *options], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return json.loads(result.output)

    found, every = judged(), judged("--max-norm-multiple", "none")
    assert found["nmse_all"] == pytest.approx(every["nmse"]) and found["nmse"] > 20 * every["nmse"]
    assert found["left_out"] == pytest.approx(72 / ROWS) and "left_out" not in every
    assert (found["rows"], every["rows"], judged("--rows", "16")["rows"]) == (ROWS - 72, ROWS, 14)
    bad = ["sae", "eval", "x", "--data", "y", "--max-norm-multiple", "0.5"]
    assert "0.5 is not in the range x>1" in CliRunner().invoke(cli, bad).output


def test_the_better_dictionary_is_ranked_first(saes: dict[str, SAE]) -> None:
    source = sink_source(seed=3)
    cost = {name: evaluate_downstream(sae, source) for name, sae in saes.items()}
    every = {name: evaluate_downstream(sae, replace(source, rule=EVERY_TOKEN)) for name, sae in saes.items()}
    assert cost["default"].delta_ce < cost["all"].delta_ce
    for name in saes:
        assert cost[name].ce_everywhere == pytest.approx(every[name].ce_spliced, rel=1e-5)
        assert every[name].ce_everywhere is None
    # One rule for all that are compared: that of a training on every token does not decide.
    assert judging_rule(saes["all"], saes["default"]) == judging_rule(saes["all"]) == DEFAULT_RULE


def test_splices_and_ablations_leave_them_as_they_are(saes: dict[str, SAE]) -> None:
    source, (model, params) = sink_source(8), planted_sink()
    tokens = jnp.asarray(source.tokens)
    x = np.asarray(model.apply(params, tokens, capture=[SITE]).captured[SITE])
    kept = source.tokens != SINK
    out = np.asarray(saes["default"](jnp.asarray(x.reshape(-1, WIDTH)))).reshape(x.shape)
    found = evaluate_downstream(saes["default"], source)
    for value, got in (
        (out, found.ce_spliced),
        (0 * x, found.ce_zero),
        (x[kept].mean(0) + 0 * x, found.ce_mean),
    ):
        edited = jnp.asarray(np.where(kept[..., None], value, x), jnp.float32)
        logits = np.asarray(
            model.apply(params, tokens, edit={SITE: lambda _, v=edited: v}).logits, np.float64
        )[:, :-1]
        logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        wanted = -np.take_along_axis(logp, source.tokens[:, 1:, None], axis=-1).mean()
        assert got == pytest.approx(wanted, rel=1e-5)


def test_padding_is_neither_predicted_nor_counted(saes: dict[str, SAE]) -> None:
    source = sink_source(32)
    counted = np.ones((32, LENGTH), bool)
    counted[:, 12:] = False
    short = evaluate_downstream(saes["default"], replace(source, counted=counted))
    model, params = planted_sink()
    logits = np.asarray(model.apply(params, jnp.asarray(source.tokens)).logits, np.float64)[:, :11]
    logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    wanted = -np.take_along_axis(logp, source.tokens[:, 1:12, None], axis=-1).mean()
    assert short.tokens == 32 * 11 and short.ce == pytest.approx(wanted, rel=1e-5)
    assert count_left_out(replace(source, counted=counted)).kept == (32 * 11) - 4


def test_probes_and_features_see_none_of_them(saes: dict[str, SAE], normal: np.ndarray) -> None:
    source = sink_source()
    labels = {"odd": sink_tokens(CONTEXTS) % 2 == 1}
    codes, tasks = rows_with_labels(
        saes["all"], Evidence(source, {"labels": labels}), lambda d, x: d.encode(x)
    )
    judged = sink_tokens(CONTEXTS)[CONTEXTS // 2 :].reshape(-1)
    assert (
        len(codes) == normal[ROWS // 2 :].sum() and (tasks["odd"] == (judged[judged != SINK] % 2 == 1)).all()
    )
    found, every = survey(saes["all"], source), survey(saes["all"], replace(source, rule=EVERY_TOKEN))
    assert found.rows == normal.sum() and every.rows == ROWS
    assert every.peak.max() > 5 * found.peak.max()  # what the page showed first
    for examples in found.examples.values():
        for example in examples:
            assert example.tokens[int(np.argmax(example.codes))] != SINK
    page = make_gallery(saes["all"], source, examples=2)
    assert page.survey.rows == normal.sum() and (page.survey.density == found.density).all()


def test_units_of_steering_are_those_of_ordinary_tokens(
    rows: np.ndarray, normal: np.ndarray, saes: dict[str, SAE]
) -> None:
    norms = np.linalg.norm(rows, axis=1)
    unit = float(latent_direction(saes["default"], 0, rows).norm)
    assert unit == pytest.approx(norms[normal].mean(), rel=1e-5) and norms.mean() > 5 * unit
    model, params = planted_sink()
    tokens = sink_tokens(16)
    found = steering_vector(model, params, SITE, tokens[:8], tokens[8:], position=None)
    kept = (tokens != SINK).reshape(-1)
    assert float(found.norm) == pytest.approx(norms[: 16 * LENGTH][kept].mean(), rel=1e-5)
    every = steering_vector(model, params, SITE, tokens[:8], tokens[8:], position=None, rule=EVERY_TOKEN)
    assert float(every.norm) > 5 * float(found.norm)
    special = steering_vector(
        model, params, SITE, tokens[:8], tokens[8:], position=None, special_ids=range(40)
    )
    ordinary = ((tokens != SINK) & (tokens >= 40)).reshape(-1)
    assert float(special.norm) == pytest.approx(norms[: 16 * LENGTH][ordinary].mean(), rel=1e-5)
    pairs = steering_vector(model, params, SITE, tokens[:8], tokens[8:], position=None, method="pca")
    assert float(pairs.norm) == pytest.approx(float(found.norm), rel=0.05)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LeftOut]:
    path, left_out = tmp_path_factory.mktemp("store"), LeftOut()
    (path / "model").mkdir()
    import mergelab.activations.store as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SHARD_ROWS", 24 * LENGTH + 8)  # a file may begin within a context
        patch.setattr(module, "weights_sha256", lambda _: "0" * 64)
        source = replace(sink_source(), special_ids=(9,))
        write_store(source, path / "acts", model=path / "model", left_out=left_out)
    return path / "acts", left_out


def test_a_store_says_which_of_its_rows_count(store: tuple[Path, LeftOut], normal: np.ndarray) -> None:
    folder, left_out = store
    facts = json.loads((folder / "store.json").read_text())
    tokens = sink_tokens(CONTEXTS).reshape(-1)
    assert facts["rule"] == DEFAULT_RULE.facts() and facts["left_out"] == left_out.facts()
    assert left_out.kept == (normal & (tokens != 9)).sum() and left_out.places == {2: CONTEXTS // 8}
    files = open_activation_files(str(folder / f"{SITE}-*.safetensors"))
    assert len(files.shards) == 3
    kept = kept_of_files(files, DEFAULT_RULE)
    assert kept.by_place is not None and kept.context == LENGTH
    place = (np.arange(ROWS) % LENGTH > 0) & (tokens != 9)
    for start, stop in ((0, ROWS), (5, 6), (390, 800), (0, 392)):
        assert (kept.by_place(start, stop) == place[start:stop]).all()
        part = files.read(start, stop)
        assert (
            kept.short_enough(part, part)[place[start:stop]] == normal[start:stop][place[start:stop]]
        ).all()
    second = open_activation_files(str(folder / f"{SITE}-00001.safetensors"))
    alone = kept_of_files(second, DEFAULT_RULE)
    assert alone.by_place is not None
    assert (alone.by_place(0, 40) == place[392:432]).all() and alone.limit == kept.limit
    assert kept_of_files(files, EVERY_TOKEN).by_place is None


def test_trainings_on_a_store_and_on_files_of_others_leave_them_out(
    store: tuple[Path, LeftOut], rows: np.ndarray, normal: np.ndarray, tmp_path: Path
) -> None:
    np.save(tmp_path / "rows.npy", rows)
    places = {"own": str(store[0] / f"{SITE}-*.safetensors"), "other": str(tmp_path / "rows.npy")}
    told: dict[str, list[str]] = {}
    tokens = sink_tokens(CONTEXTS).reshape(-1)
    special = {"own": tokens == 9, "other": np.zeros(ROWS, bool)}
    for name, path in places.items():
        config = load_config(
            {
                "sae": {"variant": "topk", "n_latents": 16, "k": 3},
                "data": {"kind": "files", "path": path},
                "train": {"batch_size": 64, "tokens": 6400},
            }
        )
        start = start_training(config, open_data(config.data, 6400), None)
        told[name] = start.begin()[1].lines()
        counts = normal & ~special[name]
        seen = np.concatenate([next(start.stream).rows for _ in range(40)])
        assert counts[seen].all() and len(np.unique(seen)) > 0.95 * counts.sum()
    left = (np.arange(ROWS) % LENGTH == 0).sum() + special["own"].sum()
    assert told["own"][0] == (
        f"data: 1,024 rows, {left} of them left out by place; "
        f"{6400 / (ROWS - left):.3g} epochs of {ROWS - left}"
    )
    # The start is told of the rows that are shuffled first, and of the seven of the eight sinks among them.
    assert told["own"][1].startswith("attention sinks: of 896 rows 7 are longer than")
    assert told["own"][1].endswith("at position 2")
    assert told["other"][0] == "data: 1,024 rows; 6.25 epochs of 1,024"
    assert told["other"][1].startswith("attention sinks: of 1,024 rows 72 are longer than")
    for lines in told.values():
        assert lines[-1].startswith("norms: min ") and "as long as the spread" in lines[-1]


def test_means_of_abliteration_are_of_prompts_that_do_not_end_in_a_sink() -> None:
    model, params = planted_sink()
    rows = [[8, 9, 10], [8, 11, 12], [8, 9, SINK], [8, 13, 14], [8, 15, 16]]
    found = mean_activations(model, params, Prompts.of(rows), positions=2, batch=2)
    last = np.asarray(params["embed"]["embedding"])[[10, 12, 14, 16]]
    np.testing.assert_allclose(found[1, 0], last.mean(axis=0), rtol=1e-5, atol=1e-6)
    every = mean_activations(model, params, Prompts.of(rows), positions=2, batch=2, rule=EVERY_TOKEN)
    assert np.linalg.norm(every[1, 0]) > 50 * np.linalg.norm(found[1, 0])
    np.testing.assert_allclose(found[0], every[0], rtol=1e-6)


def test_the_rule_of_a_store_is_that_of_a_training_unless_the_configuration_says_another() -> None:
    written = TokenRule(4, False, None)
    assert DataSection(kind="files").rule(written) == written
    assert DataSection(kind="files").rule() == DEFAULT_RULE
    said = DataSection(kind="files", skip_positions=2, max_norm_multiple=None)
    assert said.rule() == TokenRule(2, True, None) and said.rule(written) == TokenRule(2, False, None)
    assert DataSection(kind="files", max_norm_multiple=20).rule(written).max_norm_multiple == 20
