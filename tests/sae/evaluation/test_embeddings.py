"""An encoder's embeddings with an SAE spliced in: as by hand, and none the worse for an exact one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import spearmanr

from mergelab.activations.kept import EVERY_TOKEN
from mergelab.activations.model_activations import ModelActivations
from mergelab.errors import SAEError
from mergelab.models.load import load_model
from mergelab.sae.evaluation.metric import Evidence, Options
from mergelab.sae.evaluation.scorecard import applicable_metrics, scorecard
from mergelab.sae.evaluation.text_embeddings import evaluate_embeddings, rank_agreement
from mergelab.sae.sae import SAE, SAEConfig
from mergelab.sharding import make_mesh
from tests.models.tiny_models import tiny, write
from tests.sae.evaluation.trained_model import SubjectModel

SITE = "blocks.0.resid_post"


@pytest.fixture(scope="module")
def source() -> ModelActivations:
    model, params = tiny("bert")
    tokens = np.random.default_rng(0).integers(3, 61, (21, 12)).astype(np.int32)
    return ModelActivations(model, params, tokens, (SITE,), batch=8, rule=EVERY_TOKEN)


def _signed(d: int, scale: float = 1.0) -> SAE:
    """An exact SAE, or one that shrinks the first half of the coordinates."""
    both = jnp.concatenate([jnp.eye(d), -jnp.eye(d)])
    shrunk = both * jnp.where(jnp.arange(d) < d // 2, scale, 1.0)[None]
    return SAE(both.T, jnp.zeros(2 * d), shrunk, jnp.zeros(d), SAEConfig("relu")).checked()


def test_figures_are_those_of_forward_passes(source: ModelActivations) -> None:
    lossy = _signed(24, 0.2)
    tokens = jnp.asarray(source.tokens)
    x = source.model.apply(source.params, tokens, capture=[SITE]).captured[SITE]
    vectors = []
    for value in (
        x,
        lossy(x.reshape(-1, 24)).reshape(x.shape),
        jnp.broadcast_to(x.mean((0, 1))[None, None], x.shape),
    ):
        hidden = source.model.apply(source.params, tokens, edit={SITE: lambda _, v=value: v}).hidden
        mean = np.asarray(hidden, np.float64).mean(axis=1)
        vectors.append(mean / np.linalg.norm(mean, axis=1, keepdims=True))
    found = evaluate_embeddings(lossy, source)
    assert found.contexts == 21
    assert found.cosine == pytest.approx((vectors[0] * vectors[1]).sum(1).mean(), abs=1e-5)
    assert found.cosine_mean == pytest.approx((vectors[0] * vectors[2]).sum(1).mean(), abs=1e-5)
    pairs = np.triu_indices(21, 1)
    plain, spliced = (part @ part.T for part in vectors[:2])
    assert found.rank == pytest.approx(spearmanr(plain[pairs], spliced[pairs]).statistic, abs=1e-3)
    for similarities in (plain, spliced):
        np.fill_diagonal(similarities, -1)
    assert found.nearest == (plain.argmax(1) == spliced.argmax(1)).mean()
    assert 0 < found.recovered < 0.99 and found.rank < 0.99 and found.nearest < 1


def test_an_exact_sae_costs_nothing_and_an_empty_one_all(source: ModelActivations) -> None:
    exact = evaluate_embeddings(_signed(24), source)
    assert (exact.nearest, exact.rank) == (1, pytest.approx(1, abs=1e-4))
    assert exact.recovered == pytest.approx(1, abs=1e-4) and exact.cosine_mean < 0.95
    mean = np.asarray(source.read_sites(0, source.rows)[0]).mean(axis=0)
    nothing = replace(_signed(24), W_dec=jnp.zeros((48, 24)), b_dec=jnp.asarray(mean))
    assert evaluate_embeddings(nothing, source).recovered == pytest.approx(0, abs=1e-4)


def test_ranks_share_ties_and_know_no_constant() -> None:
    one = np.array([[1, 0], [0, 1], [1, 0], [0.6, 0.8]])
    other = np.array([[1, 0], [0.6, 0.8], [0, 1], [0.8, 0.6]])
    pairs = np.triu_indices(4, 1)
    wanted = spearmanr((one @ one.T)[pairs], (other @ other.T)[pairs]).statistic
    assert rank_agreement(one, other) == pytest.approx(wanted, abs=1e-12)
    assert np.isnan(rank_agreement(one, np.ones((4, 1))))


def test_a_mesh_changes_nothing(source: ModelActivations, tmp_path: Path) -> None:
    mesh = make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    model, params = load_model(write(tmp_path, "bert"), mesh=mesh)
    many = evaluate_embeddings(_signed(24, 0.2), replace(source, model=model, params=params))
    one = evaluate_embeddings(_signed(24, 0.2), source)
    assert many.cosine == pytest.approx(one.cosine, abs=1e-5)
    assert many.recovered == pytest.approx(one.recovered, abs=1e-4)


def test_a_scorecard_of_an_encoder_has_embeddings_and_no_losses(source: ModelActivations) -> None:
    labeled = Evidence(source, {"labels": {"even": source.tokens % 2 == 0}})
    assert {"embeddings", "reconstruction"} <= set(applicable_metrics(Evidence(source)))
    assert not {"downstream", "sparsity"} & set(applicable_metrics(labeled))
    card = scorecard(_signed(24, 0.2), source, Options(metrics=["embeddings"]))
    judged = replace(source, tokens=source.tokens[10:])
    assert card.values()["embeddings.rank"] == evaluate_embeddings(_signed(24, 0.2), judged).rank


def test_what_has_no_embeddings_is_said(subject: SubjectModel, source: ModelActivations) -> None:
    with pytest.raises(SAEError, match="predicts next tokens"):
        evaluate_embeddings(subject.sae, subject.source)
    with pytest.raises(SAEError, match="2 contexts"):
        evaluate_embeddings(_signed(24), source, contexts=2)
