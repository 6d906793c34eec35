"""A transcoder of equal widths is judged on what it writes: library, commands, and every file format.

The MLP of the planted model has as many neurons as the stream is wide, and a ReLU, so

    mlp.out = relu(mlp.pre) @ W_down + b_down

is a transcoder of equal widths that is exact: its error and what splicing it in costs are 0 in closed form.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

from mergelab.activations.kept import EVERY_TOKEN
from mergelab.activations.model_activations import ModelActivations, halves, open_model_activations
from mergelab.activations.store import write_store
from mergelab.cli.main import cli
from mergelab.cli.options import open_sae
from mergelab.errors import SAEError
from mergelab.interp.latent_edits import ablate
from mergelab.interp.steering import latent_direction
from mergelab.models.families import model_from_config
from mergelab.models.save import save_model
from mergelab.quickstart.family import train_bpe
from mergelab.sae.evaluation.absorption import absorption
from mergelab.sae.evaluation.metric import Evidence, Options
from mergelab.sae.evaluation.progressive import progressive_recovery
from mergelab.sae.evaluation.reconstruction import evaluate_reconstruction, reconstruction_on_model
from mergelab.sae.evaluation.scorecard import control_scorecard, scorecard
from mergelab.sae.evaluation.sparse_coding import coding_target
from mergelab.sae.evaluation.sparsity import latent_sparsity
from mergelab.sae.formats import load_sae, save_sae
from mergelab.sae.sae import SAE, SAEConfig, at_sites
from mergelab.sae.splice import splice
from mergelab.sae.spliced_losses import evaluate_downstream
from mergelab.sae.subject_model import check_modules, check_target, open_subject_model
from tests.models.tiny_models import tiny

D, LENGTH = 16, 16
READS, WRITES = "blocks.0.mlp.pre", "blocks.0.mlp.out"
TEXT = "def add(a, b):\n    return a + b\n\nfor number in range(10):\n    print(add(number, 1))  # Sum\n" * 12


class Planted:
    """The model, its folder, activations of both sites, and the transcoder that is its MLP."""

    def __init__(self, path: Path) -> None:
        self.path, self.folder, self.text = path, path / "model", path / "text.py"
        config = {
            "model_type": "gpt2", "vocab_size": 300, "n_embd": D, "n_inner": D, "n_layer": 1, "n_head": 2,
            "n_positions": LENGTH, "activation_function": "relu",
        }  # fmt: skip
        model = model_from_config(config)
        params = jax.tree.map(lambda x: 3 * x if x.ndim == 2 else x, model.init(0))
        bias = jnp.asarray(np.random.default_rng(0).normal(0, 1, D), jnp.float32)
        mlp = params["blocks_0"]["mlp"]
        params["blocks_0"]["mlp"] = {**mlp, "down": {**mlp["down"], "bias": bias}}
        files = {
            "tokenizer.json": train_bpe([TEXT], 300).to_str().encode(),
            "config.json": json.dumps(config).encode(),
        }
        save_model(model, params, self.folder, files=files)
        self.text.write_text(TEXT)
        self.down, self.bias = np.asarray(mlp["down"]["kernel"]), np.asarray(bias)
        self.source = open_model_activations(self.folder, [READS, WRITES], [self.text], length=LENGTH)

    def exact(self, activation: str = "relu", **config: Any) -> SAE:
        """The MLP as a transcoder: top-k of all latents and a threshold of 0 are a ReLU too."""
        settings = SAEConfig(activation, k=D if activation == "topk" else None, **config)
        arrays = (jnp.eye(D), jnp.zeros(D), jnp.asarray(self.down), jnp.asarray(self.bias))
        threshold = jnp.zeros(D) if activation == "jump_relu" else None
        return SAE(*arrays, config=settings, threshold=threshold).checked()


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return Planted(tmp_path_factory.mktemp("planted"))


SITES = {"reads": (READS,), "writes": (WRITES,)}


def _invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
    return result.exit_code, result.output


def _on_model(planted: Planted, source: Path, *options: object) -> dict[str, float]:
    common = ("--model", planted.folder, "--text", planted.text, "--context", LENGTH)
    code, said = _invoke(
        "sae", "eval", source, *common, "--metrics", "reconstruction,downstream", *options, "--json"
    )
    assert code == 0, said
    scores = json.loads(said.splitlines()[-1])["dictionaries"][str(source)]
    return {name: score["value"] for name, score in scores.items()}


def test_an_exact_transcoder_costs_nothing_and_one_taken_for_an_autoencoder_does(planted: Planted) -> None:
    right, wrong = planted.exact(**SITES), planted.exact(reads=(READS,), transcoder=False)
    assert not right.is_autoencoder and right.target_known and wrong.is_autoencoder
    found = reconstruction_on_model(right, planted.source)
    assert found.nmse < 1e-9 and found.explained_variance > 1 - 1e-9
    every = replace(planted.source, rule=EVERY_TOKEN)
    cost = evaluate_downstream(right, every)
    assert abs(cost.delta_ce) < 1e-6 and cost.kl < 1e-6
    # The control: what was judged before, its own input and a splice there.
    assert reconstruction_on_model(wrong, planted.source).nmse > 0.5
    spliced = evaluate_downstream(wrong, every)
    assert abs(spliced.delta_ce) > 1e-3 and spliced.kl > 1e-3
    # What is ablated is the site that is written.
    tokens = jnp.asarray(planted.source.tokens)
    model, params = planted.source.model, planted.source.params
    logits = model.apply(params, tokens, edit={WRITES: jnp.zeros_like}).logits
    assert logits is not None
    logp = np.asarray(jax.nn.log_softmax(logits[:, :-1]), np.float64)
    zero = -np.take_along_axis(logp, np.asarray(tokens[:, 1:, None]), axis=-1).mean()
    assert cost.ce_zero == pytest.approx(zero, rel=1e-6)
    assert abs(spliced.ce_zero - zero) > 1e-3


def test_a_latent_acts_where_it_is_written(planted: Planted) -> None:
    sae, source = planted.exact(**SITES), planted.source
    found = latent_sparsity(sae, source, samples=8, horizon=4)
    wrong = latent_sparsity(planted.exact(reads=(READS,), transcoder=False), source, samples=8, horizon=4)
    assert 0 < found.sparsity < 1 and found.sparsity != wrong.sparsity


@pytest.mark.parametrize(
    ("format", "activation"),
    [
        ("mergelab", "topk"),
        ("saelens", "relu"),
        ("saelens", "jump_relu"),
        ("sparsify", "topk"),
        ("gemma-scope", "jump_relu"),
    ],
)
def test_every_format_that_can_hold_one_says_that_it_is_a_transcoder(
    planted: Planted, tmp_path: Path, format: str, activation: str
) -> None:
    save_sae(planted.exact(activation, **SITES), tmp_path / "own")
    assert _invoke("sae", "export", tmp_path / "own", "--format", format, "--out", tmp_path / "out")[0] == 0
    back = load_sae(tmp_path / "out")
    assert (back.config.reads, back.config.writes) == ((READS,), (WRITES,)) and not back.is_autoencoder
    assert (
        _invoke("sae", "export", tmp_path / "out", "--format", "mergelab", "--out", tmp_path / "again")[0]
        == 0
    )
    for one in (back, load_sae(tmp_path / "again")):
        assert reconstruction_on_model(one, planted.source).nmse < 1e-9
    if format == "saelens":
        found = _on_model(planted, tmp_path / "out")
        assert found["reconstruction.nmse"] < 1e-9 and abs(found["downstream.delta_ce"]) < 1e-6


@pytest.mark.parametrize(
    ("format", "activation", "words"),
    [
        ("openai", "relu", "a transcoder"),
        ("dictionary_learning", "topk", "a transcoder"),
        ("saelens", "topk", "a topk transcoder"),
    ],
)
def test_a_format_without_place_for_one_refuses_it(
    planted: Planted, tmp_path: Path, format: str, activation: str, words: str
) -> None:
    path = tmp_path / "out.pt"
    with pytest.raises(SAEError, match=f"no place for {words}"):
        save_sae(planted.exact(activation, **SITES), path, format)
    save_sae(planted.exact("relu", reads=(READS,), transcoder=False), tmp_path / "sae.pt", "openai")
    assert not path.exists() and load_sae(tmp_path / "sae.pt").is_autoencoder


def test_stored_activations_are_judged_with_their_targets(planted: Planted, tmp_path: Path) -> None:
    save_sae(planted.exact(**SITES), tmp_path / "tc")
    write_store(planted.source, tmp_path / "acts", model=planted.folder)
    data = tmp_path / "acts" / f"{READS}-*.safetensors"
    code, said = _invoke("sae", "eval", tmp_path / "tc", "--data", data, "--json")
    found = json.loads(said)
    assert code == 0 and found["nmse"] < 1e-9 and found["transcoder"] is True
    # Without the folder of the store nobody knows the targets.
    x, y = planted.source.read_sites(0, planted.source.rows)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    code, said = _invoke("sae", "eval", tmp_path / "tc", "--data", tmp_path / "x.npy")
    assert code == 2 and "--target-data" in said and WRITES in said
    both = ("--data", tmp_path / "x.npy", "--target-data", tmp_path / "y.npy", "--json")
    assert json.loads(_invoke("sae", "eval", tmp_path / "tc", *both)[1])["nmse"] < 1e-9
    # One that does not say what it is is taken for an autoencoder aloud, or told its target.
    save_sae(planted.exact(metadata={"site": READS}), tmp_path / "old")
    said = _invoke("sae", "eval", tmp_path / "old", "--data", tmp_path / "x.npy")[1]
    assert "does not say what it writes" in said
    assert json.loads(_invoke("sae", "eval", tmp_path / "old", *both)[1])["nmse"] < 1e-9
    alone = json.loads(_invoke("sae", "eval", tmp_path / "old", *both[:2], "--json")[1])
    assert alone["nmse"] > 0.5 and alone["target_known"] is False
    save_sae(planted.exact(reads=(READS,), transcoder=False), tmp_path / "sae")
    code, said = _invoke("sae", "eval", tmp_path / "sae", *both)
    assert code == 2 and "omit --target-data" in said
    other = tmp_path / "acts" / f"{WRITES}-*.safetensors"
    code, said = _invoke("sae", "eval", tmp_path / "sae", "--data", other)
    assert code == 2 and f"reads {READS}, but the data is of {WRITES}" in said


def test_one_without_sites_is_told_them_or_refused(planted: Planted, tmp_path: Path) -> None:
    old, unknown = planted.exact(metadata={"site": READS}), planted.exact(transcoder=True)
    save_sae(old, tmp_path / "old")
    save_sae(unknown, tmp_path / "unknown")
    with pytest.warns(UserWarning, match=r"NMSE of 3\.\d+ at blocks\.0\.mlp\.pre .* or a transcoder"):
        assert _on_model(planted, tmp_path / "old")["reconstruction.nmse"] > 0.5
    assert _on_model(planted, tmp_path / "old", "--target-site", WRITES)["reconstruction.nmse"] < 1e-9
    told = ("--site", READS, "--target-site", WRITES)
    assert _on_model(planted, tmp_path / "unknown", *told)["downstream.kl"] < 1e-6
    common = ("--model", planted.folder, "--text", planted.text, "--context", LENGTH)
    code, said = _invoke("sae", "eval", tmp_path / "unknown", *common, "--site", READS)
    assert code == 2 and "--target-site" in said and said.count("\n") == 1
    with pytest.warns(UserWarning, match="or a transcoder"):
        code, said = _invoke("sae", "eval", tmp_path / "old", *common, "--metrics", "reconstruction")
    assert code == 0 and "does not say what it writes" in said
    with pytest.raises(SAEError, match="does not say whether it writes"):
        check_target(old, planted.source)
    with pytest.raises(SAEError, match="which it reads; name the site"):
        at_sites(planted.exact(**SITES), target_site=READS)
    with pytest.raises(SAEError, match="is an autoencoder and writes what it reads"):
        at_sites(planted.exact(reads=(READS,), transcoder=False), target_site=WRITES)
    with pytest.raises(SAEError, match="open them with that site too"):
        evaluate_downstream(planted.exact(**SITES), replace(planted.source, sites=(READS,)))
    assert open_subject_model(
        planted.exact(**SITES), planted.folder, [planted.text], length=LENGTH
    ).sites == (
        READS,
        WRITES,
    )


def test_a_trained_transcoder_is_judged_on_what_it_was_trained_for(planted: Planted, tmp_path: Path) -> None:
    config = {
        "sae": {"variant": "topk", "n_latents": 64, "k": 8},
        "data": {
            "kind": "model", "model": str(planted.folder), "site": READS, "target_site": WRITES,
            "text": str(planted.text), "context": LENGTH,
        },
        "train": {"batch_size": 64, "tokens": 64 * 150, "lr": 3e-3},
    }  # fmt: skip
    (tmp_path / "tc.json").write_text(json.dumps(config))
    code, said = _invoke("sae", "train", tmp_path / "tc.json", "--out", tmp_path / "run", "--json")
    assert code == 0, said
    sae = load_sae(tmp_path / "run" / "final")
    assert (sae.config.reads, sae.config.writes) == ((READS,), (WRITES,))
    assert sae.config.metadata["target_site"] == WRITES
    x, y = planted.source.read_sites(0, planted.source.rows)
    rows = len(planted.source.tokens) // 2 * LENGTH  # the half that judges
    counted = planted.source.by_place.reshape(-1)[rows:]
    assert not counted.all()
    x, y = x[rows:][counted].astype(np.float64), y[rows:][counted].astype(np.float64)
    out = np.asarray(sae(jnp.asarray(x, jnp.float32)), np.float64)
    by_hand = ((y - out) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
    old = ((x - out) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    found = _on_model(planted, tmp_path / "run")
    assert found["reconstruction.nmse"] == pytest.approx(by_hand, rel=1e-4)
    assert by_hand < 0.4 and old > 2 * by_hand
    # A model of random weights predicts nothing: only how far its predictions move says something.
    nothing = replace(sae, W_dec=jnp.zeros_like(sae.W_dec))
    judge = halves(planted.source)[1]
    assert found["downstream.kl"] == pytest.approx(evaluate_downstream(sae, judge).kl, rel=1e-3)
    assert found["downstream.kl"] < 0.7 * evaluate_downstream(nothing, judge).kl
    code, _ = _invoke(
        "sae", "export", tmp_path / "run", "--format", "sparsify", "--out", tmp_path / "sparsify"
    )
    assert code == 0 and json.loads((tmp_path / "sparsify" / "cfg.json").read_text())["transcode"] is True
    again = _on_model(planted, tmp_path / "sparsify")
    assert again["reconstruction.nmse"] == pytest.approx(by_hand, rel=1e-3)


def test_a_scorecard_of_a_transcoder_says_what_it_cannot_judge(planted: Planted) -> None:
    exact = planted.exact(**SITES)
    few = replace(planted.source, tokens=planted.source.tokens[:8])
    labels = {"even": few.tokens % 2 == 0}
    options = Options(metrics=["reconstruction", "progressive", "absorption"])
    card = scorecard(exact, Evidence(few, {"labels": labels}), options)
    values = card.values()
    assert values["reconstruction.nmse"] < 1e-9
    fewer = [value for name, value in values.items() if name.startswith("progressive.")]
    assert fewer and all(np.isfinite(fewer))
    assert WRITES in card.scores["reconstruction.nmse"].against and 0 <= values["absorption.rate"] <= 1
    # Without a target there are rows that say so, and what only looks at codes is there all the same.
    evidence = Evidence(replace(few, sites=(READS,)), {"labels": labels})
    unknown = scorecard(planted.exact(transcoder=True), evidence)
    for name in ("reconstruction", "downstream", "progressive", "absorption", "sparsity", "explanations"):
        assert np.isnan(unknown.values()[name]) and "target_site" in unknown.scores[name].against
        assert unknown.scores[name].against.startswith("not available: ")
    assert "probing.loss" in unknown.scores
    short = replace(few, tokens=few.tokens[:, :8])
    with pytest.raises(SAEError, match="contexts have 8"):
        scorecard(exact, short, Options(metrics=["sparsity"]))
    control = control_scorecard("random", exact, few, Options(metrics=["reconstruction"]), k=4)
    assert 0.2 < control.values()["reconstruction.nmse"] < 50
    assert WRITES in control.scores["reconstruction.nmse"].against


def test_what_needs_an_autoencoder_refuses_a_transcoder_of_equal_widths(planted: Planted) -> None:
    exact = planted.exact(**SITES)
    x, y = planted.source.read_sites(0, 64)
    for use in (lambda d: ablate(d, 0), splice, lambda d: coding_target(d, jnp.asarray(x))):
        with pytest.raises(SAEError, match="transcoder"):
            use(exact)
        use(planted.exact(reads=(READS,), transcoder=False))
    with pytest.raises(SAEError, match="give the targets"):
        evaluate_reconstruction(exact, [x])
    assert evaluate_reconstruction(exact, [jnp.asarray(x)], [y]).nmse < 1e-9
    with pytest.raises(SAEError, match="give the targets"):
        progressive_recovery(exact, x, ks=[2])
    assert progressive_recovery(exact, x, ks=[D], targets=y)[0].nmse < 1e-9
    with pytest.raises(SAEError, match="give both"):
        absorption(exact, y, np.arange(64) % 2 == 0)
    with pytest.raises(SAEError, match="8 wide"):
        latent_direction(exact, 0, np.ones((3, 8)))


def test_a_page_of_a_transcoder_says_what_its_latents_write(planted: Planted, tmp_path: Path) -> None:
    save_sae(planted.exact(**SITES), tmp_path / "tc")
    common = ("--model", planted.folder, "--text", planted.text, "--context", LENGTH)
    code, said = _invoke(
        "sae", "features", tmp_path / "tc", *common, "--out", tmp_path / "page.html", "--json"
    )
    page = (tmp_path / "page.html").read_text()
    assert code == 0, said
    assert WRITES in page and READS in page


def test_rows_of_crosscoders_stay_side_by_side(planted: Planted, tmp_path: Path) -> None:
    names = ("blocks.0.resid_pre", "blocks.0.resid_post")
    config = SAEConfig("relu", sites=2, reads=names, transcoder=False)
    both = SAE(jnp.eye(2 * D), jnp.zeros(2 * D), jnp.eye(2 * D), jnp.zeros(2 * D), config).checked()
    assert both.config.writes == names and both.is_autoencoder
    save_sae(both, tmp_path / "cc")
    assert load_sae(tmp_path / "cc").config.reads == names
    with pytest.raises(SAEError, match="crosscoder of 2 sites"):
        save_sae(both, tmp_path / "out", "saelens")
    with pytest.raises(SAEError, match="activations side by side"):
        evaluate_downstream(both, planted.source)
    with pytest.raises(SAEError, match="edits need an autoencoder"):
        splice(both)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"reads": "a", "writes": "b", "transcoder": False},
            "said to be an autoencoder, but reads a and writes b",
        ),
        ({"reads": "a", "writes": "a", "transcoder": True}, "said to be a transcoder"),
        ({"reads": 3}, "reads is 3"),
        ({"reads": []}, "expected names of sites"),
        ({"reads": "a", "sites": 2}, "reads names 1 sites"),
        ({"transcoder": "yes"}, "transcoder is 'yes'"),
    ],
)
def test_sites_that_contradict_each_other_are_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(SAEError, match=words):
        SAEConfig("relu", **config)


def test_a_run_of_before_says_its_target_in_its_configuration(planted: Planted, tmp_path: Path) -> None:
    save_sae(planted.exact(metadata={"site": READS}), tmp_path / "run" / "final")
    data = {"kind": "model", "model": "m", "site": READS, "target_site": WRITES, "text": "t"}
    config = {"sae": {"n_latents": D}, "data": data, "train": {"batch_size": 1, "tokens": 1}}
    assert not open_sae(tmp_path / "run").target_known
    (tmp_path / "run" / "config.yaml").write_text(json.dumps(config))
    assert open_sae(tmp_path / "run").config.writes == (WRITES,)
    files = {"kind": "files", "path": "x.npy"}
    (tmp_path / "run" / "config.yaml").write_text(json.dumps({**config, "data": files}))
    found = open_sae(tmp_path / "run")
    assert found.target_known and found.config.writes == (READS,)


def test_an_export_is_told_sites_or_says_what_it_took_for_granted(planted: Planted, tmp_path: Path) -> None:
    save_sae(planted.exact(metadata={"site": READS}), tmp_path / "old")
    asked = ("sae", "export", tmp_path / "old", "--format", "saelens", "--out")
    code, said = _invoke(*asked, tmp_path / "a")
    assert code == 0 and "was exported as an autoencoder" in said
    code, said = _invoke(*asked, tmp_path / "b", "--target-site", WRITES)
    assert code == 0 and said.strip() == str(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "cfg.json").read_text())["architecture"] == "transcoder"


def test_the_output_of_a_module_is_no_site_where_it_is_normalized() -> None:
    model, params = tiny("gemma2")
    name = "blocks.0.mlp.out"
    source = ModelActivations(model, params, np.zeros((2, 8), np.int32), (name,))
    config = SAEConfig("relu", reads=(name,), writes=(name,), metadata={"hookpoint": "layers.0.mlp"})
    d = source.widths[0]
    sae = SAE(jnp.eye(d), jnp.zeros(d), jnp.eye(d), jnp.zeros(d), config).checked()
    with pytest.raises(SAEError, match="normalizes before it adds it to the stream"):
        check_modules(sae, source)
    check_modules(replace(sae, config=replace(config, metadata={})), source)
    check_modules(sae, ModelActivations(*tiny("llama"), np.zeros((2, 8), np.int32), (name,)))
