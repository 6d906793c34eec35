"""A lens at the last stream is the model; a tuned lens agrees with the model better than a logit lens."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from mergelab.errors import SiteError
from mergelab.interp.lens import TunedLens, logit_lens, read_lens, train_tuned_lens
from mergelab.models.families import model_from_config
from mergelab.models.streamed import StreamedParams
from mergelab.models.weights_by_part import HeldWeights
from tests.interp.domains import Trained, lines
from tests.interp.running import logits_of
from tests.models.tiny_models import CONFIGS, TOKENS, tiny


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_the_lens_at_the_last_stream_is_the_model(name: str) -> None:
    model, params = tiny(name)
    read = logit_lens(model, params, TOKENS)
    own = logits_of(model, params, TOKENS)
    np.testing.assert_allclose(read["blocks.1.resid_post"], own, atol=2e-4)
    assert np.abs(np.asarray(read["blocks.0.resid_post"] - own)).max() > 0.1


def batches() -> Iterator[np.ndarray]:
    seed = 100
    while True:
        seed += 1
        yield np.concatenate([lines(domain, 8, seed=seed) for domain in (0, 1)])


@pytest.mark.slow
def test_a_tuned_lens_agrees_better_and_leaves_the_last_site_alone(domains: Trained) -> None:
    model, params = domains.model, domains.params
    text = np.concatenate([lines(domain, 10, seed=9) for domain in (0, 1)])
    sites = ["embed", "blocks.*.resid_post"]
    plain = read_lens(model, params, text, TunedLens.identity(model, sites), batch=8)
    lens, losses = train_tuned_lens(model, params, batches(), sites=sites, steps=60, learning_rate=1e-2)
    tuned = read_lens(model, params, text, lens, batch=8)
    assert losses.shape == (60, 3) and plain.sites == ("embed", "blocks.0.resid_post", "blocks.1.resid_post")
    assert (tuned.kl[:2] < 0.5 * plain.kl[:2]).all() and (tuned.agreement[:2] > plain.agreement[:2]).all()
    assert plain.kl[2] < 1e-6 and plain.agreement[2] == 1 and tuned.kl[2] < 1e-2
    assert tuned.kl[1] < tuned.kl[0], "a later stream knows more"
    # The cross-entropy of the last site is the model's own on this text.
    own = logits_of(model, params, text)[:, :-1]
    logp = own - np.log(np.exp(own).sum(-1, keepdims=True))
    expected = -np.take_along_axis(logp, text[:, 1:, None], axis=-1).mean()
    assert plain.cross_entropy[2] == pytest.approx(expected, rel=1e-4)


def test_masked_tokens_do_not_count(domains: Trained) -> None:
    text = lines(0, 3)
    mask = np.arange(16)[None] < np.array([[16], [5], [9]])
    other = np.where(mask, text, 25)
    readings = [
        read_lens(domains.model, domains.params, tokens, mask=mask, batch=2) for tokens in (text, other)
    ]
    np.testing.assert_allclose(readings[0].kl, readings[1].kl, atol=1e-5)
    np.testing.assert_allclose(readings[0].cross_entropy, readings[1].cross_entropy, rtol=1e-5)
    assert abs(read_lens(domains.model, domains.params, text, batch=2).kl[0] - readings[0].kl[0]) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("front", [True, False])
def test_the_logit_lens_reads_real_tokens_as_if_there_were_no_padding(front: bool) -> None:
    """The lens of a padded prompt is that of the prompt alone, whatever stands in the padding."""
    model, params = tiny("llama")
    prompt, filler = np.asarray(TOKENS)[:1, :4], np.asarray(TOKENS)[1:2, :3]
    pieces = (filler, prompt) if front else (prompt, filler)
    padded, real = np.concatenate(pieces, axis=1), slice(3, 7) if front else slice(0, 4)
    mask = np.zeros(padded.shape, bool)
    mask[:, real] = True
    alone = logit_lens(model, params, prompt)
    read = logit_lens(model, params, padded, mask=mask)
    blind = logit_lens(model, params, padded)
    assert read.keys() == alone.keys()
    for name, wanted in alone.items():
        np.testing.assert_allclose(read[name][:, real], wanted, atol=2e-5)
    last = "blocks.1.resid_post"
    assert not front or np.abs(np.asarray(blind[last][:, real] - alone[last])).max() > 1e-2
    with pytest.raises(SiteError, match="mask"):
        logit_lens(model, params, padded, mask=mask[:, 1:])


def test_lenses_read_streams_of_decoders() -> None:
    with pytest.raises(SiteError, match="lens reads streams"):
        TunedLens.identity(model_from_config(CONFIGS["llama"]), "blocks.0.mlp.post")
    with pytest.raises(SiteError, match="'bert' model is an encoder"):
        TunedLens.identity(model_from_config(CONFIGS["bert"]))


@pytest.mark.parametrize("name", ["gpt2", "llama, one key head, tied, biases"])
def test_a_streamed_model_is_read_alike(name: str) -> None:
    model, params = tiny(name)
    streamed = StreamedParams(model, HeldWeights(params))
    one, other = (read_lens(model, given, TOKENS, batch=2) for given in (params, streamed))
    np.testing.assert_allclose(other.kl, one.kl, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(other.cross_entropy, one.cross_entropy, rtol=1e-5)
    assert other.agreement.tolist() == one.agreement.tolist()
    site = "blocks.0.resid_post"
    found = logit_lens(model, streamed, TOKENS)[site]
    np.testing.assert_allclose(found, logit_lens(model, params, TOKENS)[site], atol=1e-4)
