"""`mergelab sae eval` and `sae features` on a text and a model of random weights: mechanics only."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

from mergelab.checkpoints.folder import weights_sha256
from mergelab.cli.main import cli
from mergelab.quickstart import small_llama
from mergelab.quickstart.family import train_bpe
from mergelab.sae.formats import load_sae, save_sae
from mergelab.sae.sae import SAE, SAEConfig

SITE = "blocks.0.resid_post"
TEXT = "def add(a, b):\n    return a + b\n\nfor number in range(10):\n    print(add(number, 1))  # Sum\n" * 20


BATCH = {"model_id", "layer", "sae_set", "sae_id_suffix", "features"}
FEATURE = {
    "feature_index", "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1",
    "correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson",
    "correlated_features_indices", "correlated_features_l1", "correlated_features_pearson", "neg_str",
    "neg_values", "pos_str", "pos_values", "frac_nonzero", "freq_hist_data_bar_values",
    "freq_hist_data_bar_heights", "logits_hist_data_bar_heights", "logits_hist_data_bar_values",
    "n_prompts_total", "n_tokens_in_prompt", "dataset", "activations", "decoder_weights_dist", "vector",
}  # fmt: skip
ACTIVATION = {"bin_min", "bin_max", "bin_contains", "tokens", "values", "qualifying_token_index"}
"""Parameters of sae-dashboard 0.8.0's classes, those of an activation that have to be given."""


def _invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("features")
    config = small_llama.LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, max_position_embeddings=32,
    )  # fmt: skip
    files = {"tokenizer.json": train_bpe([TEXT], 300).to_str().encode()}
    for seed, name in enumerate(("model", "other")):
        small_llama.save(small_llama.init(config, seed), config, path / name, files=files)
    (path / "text.py").write_text(TEXT)
    for seed in range(2):
        rows = np.random.default_rng(seed).standard_normal((40, 16)).astype(np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        metadata = {"site": SITE, "model_hash": weights_sha256(path / "model")}
        config_ = SAEConfig(k=3, transcoder=False, metadata=metadata)
        arrays = (jnp.asarray(rows.T), jnp.zeros(40), jnp.asarray(rows), jnp.zeros(16))
        save_sae(SAE(*arrays, config=config_), path / f"seed{seed}")
    return path


def test_eval_on_text_says_units_and_yardsticks(folder: Path) -> None:
    asked = ("sae", "eval", folder / "seed0", "--model", folder / "model", "--text", folder / "text.py")
    asked = (*asked, "--context", 16, "--metrics", "reconstruction,downstream")
    (folder / "curve.json").write_text("[[10, 9.0], [100, 3.0]]")
    code, said = _invoke(*asked, "--curve", folder / "curve.json", "--json")
    found = json.loads(said.splitlines()[-1])
    scores = found["dictionaries"][str(folder / "seed0")]
    assert code == 0 and found["host_checked"] and set(found["seconds"]) == {"reconstruction", "downstream"}
    assert scores["downstream.delta_ce"]["unit"] == "nats / token"
    assert 0.1 < scores["downstream.compute_equivalent"]["value"] < 1
    kept = (*asked, "--keep", folder / "scores.jsonl", "--json")
    first, second = (_invoke(*kept)[1].splitlines()[-1] for _ in range(2))
    assert first == second and len((folder / "scores.jsonl").read_text().splitlines()) == 2
    table = folder / "latents.csv"
    few = [*asked[:-1], "reconstruction", "--contexts", 6, "--latents", table, "--json"]
    code, said = _invoke(*few)
    assert table.read_text().startswith("latent,density,") and table.read_text().count("\n") == 41
    assert _invoke(*few)[0] == 2  # what is there stays
    few_scores = json.loads(said.splitlines()[-1])["dictionaries"][str(folder / "seed0")]
    assert code == 0 and "active in 45 tokens" in str(few_scores)
    few = [*asked[:-1], "reconstruction"]
    code, said = _invoke(*few, "--controls", "--control-steps", 2)
    header, _, *rows = said[said.index("score") :].splitlines()
    assert code == 0 and all(kind in header for kind in ("random", "frozen decoder", "random model"))
    named = [row.split()[0] for row in rows]
    assert named[0] == "reconstruction.nmse" and "reconstruction.nmse_all" in named and len(rows) == 13


@pytest.mark.parametrize(("limit", "contexts"), [(("--contexts", 5), 5), (("--tokens", 40), 3), ((), 42)])
def test_no_more_is_judged_than_was_asked(
    folder: Path, tmp_path: Path, limit: tuple[object, ...], contexts: int
) -> None:
    common = ("--model", folder / "model", "--text", folder / "text.py", "--context", 16)
    page = ("sae", "features", folder / "seed0", *common, "--out", tmp_path / "page.html", "--latents", 2)
    code, said = _invoke(*page, *limit, "--json")
    assert code == 0, said
    found = json.loads(said)["rows"]
    assert found == contexts * 15  # the first token of a context does not count


def test_several_seeds_have_a_spread(folder: Path) -> None:
    common = ("--model", folder / "model", "--text", folder / "text.py", "--context", 16)
    values = []
    for seeds in (["seed0"], ["seed1"], ["seed0", "seed1"]):
        sources = [folder / seed for seed in seeds]
        code, said = _invoke("sae", "eval", *sources, *common, "--metrics", "reconstruction")
        line = next(line for line in said.splitlines() if line.startswith("reconstruction.nmse"))
        values.append([float(cell) for cell in line.split()[1 : len(seeds) + 1]])
        assert code == 0
    (one,), (two,), (mean, deviation) = values
    assert mean == pytest.approx((one + two) / 2, rel=1e-3)
    assert deviation == pytest.approx(abs(one - two) / 2**0.5, rel=1e-2) and deviation > 0


def test_saes_that_differ_in_more_than_a_seed_stand_side_by_side(folder: Path, tmp_path: Path) -> None:
    one = load_sae(folder / "seed0")
    save_sae(replace(one, config=replace(one.config, k=5)), tmp_path / "k5")
    common = ("--model", folder / "model", "--text", folder / "text.py", "--context", 16)
    asked = ("sae", "eval", folder / "seed0", tmp_path / "k5", *common, "--metrics", "reconstruction")
    code, said = _invoke(*asked)
    header = said[said.index("score") :].splitlines()[0]
    assert code == 0 and "mean" not in header and str(tmp_path / "k5") in header
    assert "Not averaged as seeds of one training, as they differ in k: 3, 5." in said
    moved = replace(one.config, reads="blocks.0.resid_pre", writes="blocks.0.resid_pre")
    save_sae(replace(one, config=moved), tmp_path / "pre")
    code, said = _invoke("sae", "eval", folder / "seed0", tmp_path / "pre", *common)
    assert code == 2 and "judge SAEs of other sites by themselves" in said


def test_features_write_a_page_and_neuronpedias_json(folder: Path, tmp_path: Path) -> None:
    common = ("--model", folder / "model", "--text", folder / "text.py", "--context", 16)
    out, batch = tmp_path / "page.html", tmp_path / "batch.json"
    asked = ("sae", "features", folder / "seed0", *common, "--out", out, "--latents", 12)
    code, said = _invoke(*asked, "--explain", 3, "--examples", 2, "--neuronpedia", batch, "--json")
    assert code == 0 and json.loads(said)["latents"] == 12
    text = out.read_text()
    data = json.loads(text[text.index('id="data">') + 10 : text.index("</script>")])
    assert len(data["features"]) == 12 and sum("patterns" in f for f in data["features"]) == 3
    written = json.loads(batch.read_text())
    assert written["layer"] == 0 and len(written["features"]) == 12
    assert (written["model_id"], written["sae_set"], written["sae_id_suffix"]) == ("model", "seed0", None)
    first = written["features"][0]
    prompts = first["n_prompts_total"] * first["n_tokens_in_prompt"]
    assert (first["dataset"], first["n_tokens_in_prompt"]) == ("text.py", 16)
    assert prompts * 15 == data["rows"] * 16  # the first token of a context does not count
    assert set(written) == BATCH
    for feature in written["features"]:
        assert (
            set(feature) == FEATURE and {key for one in feature["activations"] for key in one} == ACTIVATION
        )
        assert all(-1 <= value <= 1 for value in feature["correlated_features_pearson"])
    for feature, shown in zip(written["features"], data["features"], strict=True):
        assert feature["feature_index"] == shown["i"] and len(feature["activations"]) == len(
            shown["examples"]
        )
        assert len(feature["freq_hist_data_bar_heights"]) == len(feature["freq_hist_data_bar_values"])
        assert len(feature["logits_hist_data_bar_heights"]) == len(feature["logits_hist_data_bar_values"])
        assert feature["pos_values"] == sorted(feature["pos_values"], reverse=True)
        top = feature["activations"][0]
        assert len(top["tokens"]) == len(top["values"]) == 16
        assert top["values"][top["qualifying_token_index"]] == pytest.approx(shown["peak"], rel=1e-3)
    code, said = _invoke(*asked)
    assert code == 2 and "is there already" in said


_DASHBOARD = """
import json, sys
from sae_dashboard.neuronpedia.neuronpedia_dashboard import NeuronpediaDashboardBatch

data = json.load(open(sys.argv[1]))
batch = NeuronpediaDashboardBatch(**data)
said = json.loads(json.dumps(batch.to_dict()))
print(said["features"] == data["features"] and len(batch.features), batch.sae_set, batch.model_id)
"""


@pytest.mark.peers
def test_sae_dashboard_takes_the_json_as_it_stands(folder: Path, tmp_path: Path) -> None:
    python = os.environ.get("MERGELAB_SAE_PEERS")
    assert python, "set MERGELAB_SAE_PEERS to a Python with sae-lens and sae-dashboard 0.8.0"
    batch = tmp_path / "batch.json"
    common = ("--model", folder / "model", "--text", folder / "text.py", "--context", 16)
    asked = ("sae", "features", folder / "seed0", *common, "--out", tmp_path / "page.html")
    assert _invoke(*asked, "--latents", 12, "--neuronpedia", batch)[0] == 0
    done = subprocess.run([python, "-c", _DASHBOARD, str(batch)], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-3:] == ["12", "seed0", "model"]


def test_a_page_shows_what_latents_become_in_a_wider_sae(folder: Path, tmp_path: Path) -> None:
    narrow = load_sae(folder / "seed0")
    rows = np.asarray(narrow.W_dec)
    wide = np.concatenate([rows, rows[:5] + 0.02])
    arrays = (jnp.asarray(wide.T), jnp.zeros(45), jnp.asarray(wide), jnp.zeros(16))
    save_sae(SAE(*arrays, config=narrow.config), tmp_path / "wide")
    out = tmp_path / "page.html"
    common = ("--model", folder / "model", "--text", folder / "text.py", "--context", 16, "--out", out)
    code, _ = _invoke("sae", "features", folder / "seed0", *common, "--wider", tmp_path / "wide", "--json")
    text = out.read_text()
    data = json.loads(text[text.index('id="data">') + 10 : text.index("</script>")])
    assert code == 0 and len(data["features"]) > 20
    for feature in data["features"]:
        numbers = {child for child, _, _ in feature["children"]}
        assert feature["i"] in numbers and (feature["i"] + 40 in numbers) == (feature["i"] < 5)
        assert feature["splits"] == len(numbers) and feature["children"][0][1] == 1
    assert any(tokens for feature in data["features"] for _, _, tokens in feature["children"])


def test_a_trained_sae_remembers_its_model(folder: Path, tmp_path: Path) -> None:
    data = {"kind": "model", "model": str(folder / "model"), "site": SITE, "text": str(folder / "text.py")}
    config = {
        "sae": {"variant": "topk", "n_latents": 32, "k": 2},
        "data": {**data, "context": 16},
        "train": {"batch_size": 64, "tokens": 128},
        "metadata": {"note": "mine"},
    }
    (tmp_path / "sae.yaml").write_text(json.dumps(config))
    code, said = _invoke("sae", "train", tmp_path / "sae.yaml", "--out", tmp_path / "run", "--json")
    assert code == 0, said
    metadata = load_sae(tmp_path / "run" / "final").config.metadata
    assert metadata["site"] == SITE and metadata["note"] == "mine"
    assert metadata["model_hash"] == weights_sha256(folder / "model")
    asked = ("--text", folder / "text.py", "--context", 16, "--metrics", "reconstruction", "--json")
    code, said = _invoke("sae", "eval", tmp_path / "run", "--model", folder / "model", *asked)
    assert code == 0 and json.loads(said.splitlines()[-1])["host_checked"]
    code, said = _invoke("sae", "eval", tmp_path / "run", "--model", folder / "other", *asked)
    assert code == 2 and "belongs to a model with" in said


def test_faults_are_said(folder: Path, tmp_path: Path) -> None:
    common = ("--text", folder / "text.py", "--context", 16, "--model", folder / "other")
    code, said = _invoke("sae", "features", folder / "seed0", *common, "--out", tmp_path / "x.html")
    assert (
        code == 2
        and said.startswith("error:")
        and "--any-model" in said
        and not (tmp_path / "x.html").exists()
    )
    code, said = _invoke("sae", "eval", folder / "seed0", *common, "--metrics", "downstrem", "--any-model")
    assert code == 2 and "did you mean 'downstream'" in said
    code, said = _invoke("sae", "eval", folder / "seed0")
    assert code == 2 and "either --data" in said
