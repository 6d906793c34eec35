"""Probes agree with scikit-learn's; the questions about tokens have the answers a reader would give."""

from __future__ import annotations

import keyword

import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.activations.model_activations import contexts_of_texts
from mergelab.errors import SAEError
from mergelab.sae.evaluation.probing import best_probes, fit_logistic, probe_losses, sparse_probe
from mergelab.sae.evaluation.probing_tasks import TASKS, character_labels, label_texts
from mergelab.text.tokenizer import load_tokenizer
from tests.sae.evaluation.trained_model import LENGTH, SubjectModel


def _sparse_data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.random(1500) < 0.1
    values = np.where(rng.random((1500, 10)) < 0.05, rng.exponential(3.0, (1500, 10)), 0)
    values += rng.normal(0, 0.01, values.shape)
    values[:, 3] += labels * rng.exponential(2.0, 1500)  # one tells, heavy-tailed
    values[:, 6] = 4.0  # one is constant
    values[:, 7] = 1e3 + 50 * rng.standard_normal(1500) - 80 * labels  # one has an offset, and tells more
    return values.astype(np.float32), labels


def test_every_latents_probe_is_scikit_learns() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.preprocessing import StandardScaler

    values, labels = _sparse_data()
    found = probe_losses(values, labels, piece=4)
    assert found.shape == (10,)
    for latent in range(10):
        column = StandardScaler().fit_transform(values[:, latent : latent + 1].astype(np.float64))
        oracle = LogisticRegression(C=1e6, tol=1e-10, max_iter=1000).fit(column, labels)
        assert found[latent] == pytest.approx(log_loss(labels, oracle.predict_proba(column)), abs=1e-4)
    task = best_probes(values, {"told": labels})["told"]
    assert task.latent == 7 and task.loss < 0.8 * task.prior
    assert found[6] == pytest.approx(task.prior, abs=1e-5) and found[0] > 0.95 * task.prior


def test_several_inputs_and_separable_classes() -> None:
    from sklearn.linear_model import LogisticRegression

    values, labels = _sparse_data()
    x = values[:, [0, 3, 5]]
    weights, bias, _ = fit_logistic(jnp.asarray(x), jnp.asarray(labels))
    oracle = LogisticRegression(C=1e6, tol=1e-10, max_iter=1000).fit(x.astype(np.float64), labels)
    np.testing.assert_allclose(weights, oracle.coef_[0], rtol=2e-3, atol=2e-3)
    assert float(bias) == pytest.approx(oracle.intercept_[0], abs=2e-3)
    assert probe_losses(labels[:, None].astype(np.float32), labels, piece=1)[0] < 1e-3


def test_sparse_probes_find_the_latents_that_tell() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.random((2, 2000)) < 0.3
    codes = rng.random((2000, 20)).astype(np.float32) * (rng.random((2000, 20)) < 0.2)
    codes[:, 4], codes[:, 9] = 2 * a, 2 * b
    one, two = (sparse_probe(codes, a | b, k) for k in (1, 2))
    assert set(two.latents) == {4, 9} and two.f1 == two.accuracy == 1 and two.loss < 0.01
    assert one.latents[0] in (4, 9) and 0.5 < one.f1 < 0.9
    shuffled = sparse_probe(codes, rng.permutation(a | b), 2)
    assert shuffled.accuracy < 0.6
    with pytest.raises(SAEError, match="both classes"):
        sparse_probe(codes, np.zeros(2000, bool), 1)
    with pytest.raises(SAEError, match="1 to 20"):
        sparse_probe(codes, a, 21)


def test_characters_of_python() -> None:
    text = 'def f(x):\n    # Why: é\n    if x:\n        return {1: "a b"}\n'
    found = dict(zip(TASKS, character_labels(text, python=True), strict=True))

    def spelt(task: str) -> str:
        return "".join(c for c, yes in zip(text, found[task], strict=True) if yes)

    assert spelt("is_keyword") == "defifreturn"
    assert spelt("in_string") == '"a b"' and spelt("in_comment") == "# Why: é"
    assert spelt("is_indented") == 'return{1:"a b"}' and spelt("in_brackets") == 'x1:"a b"'
    assert spelt("is_number") == spelt("is_digit") == "1" and spelt("is_capital") == "W"
    assert spelt("starts_line") == "d#ir"
    assert spelt("is_operator") == "():" + ":" + "{:}"
    other = dict(zip(TASKS, character_labels(text, python=False), strict=True))
    assert not other["is_code"].any() and other["is_digit"].sum() == 1
    broken = dict(zip(TASKS, character_labels("x = (1 +\n'", python=True), strict=True))
    assert not broken["is_code"].any()


def test_tokens_of_a_file(subject: SubjectModel) -> None:
    found = label_texts(subject.folder, [subject.held_out], LENGTH)
    text = subject.held_out.read_text()
    np.testing.assert_array_equal(found.tokens, contexts_of_texts(subject.folder, [text], LENGTH))
    tokenizer = load_tokenizer(subject.folder)
    keywords = found.tokens[found.labels["is_keyword"]].tolist()
    words = [tokenizer.decode([token]).strip() for token in keywords]
    assert len(words) > 20 and all(any(word in k for k in keyword.kwlist) for word in words)
    assert {"def", "if"} & set(words)
    solid = np.reshape(
        [bool(tokenizer.decode([t]).strip()) for t in found.tokens.ravel().tolist()], (-1, LENGTH)
    )
    kinds = sum(found.labels[name].astype(int) for name in ("in_string", "in_comment", "is_code"))
    np.testing.assert_array_equal(kinds[solid], 1)
    as_text = subject.held_out.with_suffix(".txt")
    as_text.write_text(text)
    plain = label_texts(subject.folder, [as_text], LENGTH)
    assert not plain.labels["is_code"].any() and plain.labels["is_capital"].any()
