"""Splicing an SAE in: losses as by hand, recovered loss, compute equivalence, the model's hash."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.activations.left_out import count_left_out
from mergelab.errors import SAEError
from mergelab.models.load import load_model
from mergelab.quickstart import small_llama
from mergelab.sae.evaluation.scorecard import scorecard
from mergelab.sae.evaluation.training_curve import compute_equivalent
from mergelab.sae.features.survey import survey
from mergelab.sae.sae import SAE, SAEConfig, at_sites
from mergelab.sae.spliced_losses import Downstream, evaluate_downstream
from mergelab.sae.subject_model import check_subject_model, open_subject_model
from mergelab.sharding import make_mesh
from tests.sae.evaluation.trained_model import LENGTH, SITE, SubjectModel


def _identity(d: int) -> SAE:
    eye = jnp.eye(d)
    both = jnp.concatenate([eye, -eye])
    config = SAEConfig(activation="relu")
    return SAE(both.T, jnp.zeros(2 * d), both, jnp.zeros(d), config).checked()


@pytest.fixture(scope="module")
def found(subject: SubjectModel) -> Downstream:
    return evaluate_downstream(subject.sae, subject.source)


def test_losses_are_those_of_forward_passes(subject: SubjectModel, found: Downstream) -> None:
    source, tokens = subject.source, jnp.asarray(subject.source.tokens)
    x = source.model.apply(source.params, tokens, capture=[SITE]).captured[SITE]
    x_hat = subject.sae(x.reshape(-1, 32)).reshape(x.shape)
    kept = (np.arange(LENGTH)[None] > 0) & ~np.isin(source.tokens, source.special_ids)
    norms = np.linalg.norm(np.asarray(x), axis=-1)
    assert norms.max() < 10 * np.median(norms[kept])  # this model has no sinks
    mean = jnp.broadcast_to(jnp.asarray(np.asarray(x)[kept].mean(axis=0)), x.shape)
    logp = []
    for changed in (x, x_hat, jnp.zeros_like(x), mean, x_hat):
        value = changed if len(logp) == 4 else jnp.where(kept[..., None], changed, x)
        logits = source.model.apply(source.params, tokens, edit={SITE: lambda _, v=value: v}).logits
        assert logits is not None
        logp.append(np.asarray(jax.nn.log_softmax(logits[:, :-1]), np.float64))
    targets = np.asarray(tokens[:, 1:, None])
    wanted = [-np.take_along_axis(p, targets, axis=-1).mean() for p in logp]
    got = [found.ce, found.ce_spliced, found.ce_zero, found.ce_mean, found.ce_everywhere]
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    kl = (np.exp(logp[0]) * (logp[0] - logp[1])).sum(axis=-1).mean()
    assert found.kl == pytest.approx(kl, rel=1e-4) and found.tokens == targets.size


def test_a_trained_sae_keeps_what_an_exact_one_keeps_and_a_zero_one_loses(
    subject: SubjectModel, found: Downstream
) -> None:
    assert 0 < found.delta_ce < 0.5 * (found.ce_zero - found.ce)
    assert found.recovered_zero > 0.7 and found.recovered_mean > 0.5
    exact = evaluate_downstream(_identity(32), subject.source, contexts=8)
    assert exact.recovered_mean == pytest.approx(1, abs=1e-4) and exact.kl == pytest.approx(0, abs=1e-6)
    nothing = replace(subject.sae, W_dec=jnp.zeros((96, 32)), b_dec=jnp.zeros(32))
    zero = evaluate_downstream(nothing, subject.source, contexts=8)
    assert zero.recovered_zero == pytest.approx(0, abs=1e-6) and zero.kl > 0.1


def test_a_mesh_changes_nothing(subject: SubjectModel) -> None:
    mesh = make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    model, params = load_model(subject.folder, mesh=mesh)
    spread = replace(subject.source, model=model, params=params)
    one = evaluate_downstream(subject.sae, subject.source, contexts=8)
    many = evaluate_downstream(subject.sae, spread, contexts=8)
    assert many.ce_spliced == pytest.approx(one.ce_spliced, rel=1e-5)
    assert many.kl == pytest.approx(one.kl, rel=1e-3)


def test_compute_equivalence_inverts_the_curve(subject: SubjectModel) -> None:
    steps, losses = np.array([10, 100, 50_000, 100_000]), np.array([5.0, 4.0, 4.2, 3.0])
    assert compute_equivalent(steps, losses, 5.0) == pytest.approx(1e-4)
    assert compute_equivalent(steps, losses, 4.0) == pytest.approx(1e-3)  # 4.2 improves on nothing
    assert compute_equivalent(steps, losses, 3.5) == pytest.approx(np.sqrt(100 * 1e5) / 1e5)
    assert compute_equivalent(steps, losses, 2.0) == 1 and np.isnan(compute_equivalent(steps, losses, 5.1))
    with pytest.raises(SAEError, match="rising"):
        compute_equivalent(steps[::-1], losses, 4.0)


def test_another_model_is_refused_unless_any_will_do(subject: SubjectModel) -> None:
    assert check_subject_model(subject.sae, subject.folder)
    other = subject.folder.with_name("other")
    tokenizer = (subject.folder / "tokenizer.json").read_bytes()
    small_llama.save(
        small_llama.init(subject.config, 1), subject.config, other, files={"tokenizer.json": tokenizer}
    )
    with pytest.raises(SAEError, match="belongs to a model with"):
        open_subject_model(subject.sae, other, [subject.held_out], length=LENGTH)
    source = open_subject_model(subject.sae, other, [subject.held_out], length=LENGTH, any_model=True)
    assert source.sites == (SITE,) and not check_subject_model(subject.sae, other, any_model=True)
    nameless = replace(subject.sae, config=replace(subject.sae.config, metadata={}, reads=None, writes=None))
    assert not check_subject_model(nameless, other)
    with pytest.raises(SAEError, match="which site"):
        open_subject_model(nameless, other, [subject.held_out])


def test_what_does_not_fit_is_said(subject: SubjectModel) -> None:
    with pytest.raises(SAEError, match="32 wide"):
        evaluate_downstream(_identity(24), subject.source)


def test_an_sae_is_judged_on_the_site_it_says_it_reads(subject: SubjectModel) -> None:
    elsewhere = replace(subject.source, sites=("blocks.1.resid_post",))  # as wide
    for use in (evaluate_downstream, survey, scorecard):
        with pytest.raises(SAEError, match=r"reads 'blocks\.0\.resid_post', but the activations are of"):
            use(subject.sae, elsewhere)
    counted = count_left_out(elsewhere).kept
    assert survey(at_sites(subject.sae, "blocks.1.resid_post"), elsewhere, latents=[]).rows == counted
