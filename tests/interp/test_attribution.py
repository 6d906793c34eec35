"""The parts of a logit sum to the logit, in every family of decoders."""

from __future__ import annotations

import numpy as np
import pytest

from mergelab.errors import SiteError
from mergelab.interp.attribution import direct_logit_attribution
from tests.interp.planted import planted
from tests.interp.running import logits_of
from tests.models.tiny_models import MASK, TOKENS, tiny

DECODERS = ["gpt2", "gpt_neox", "mixtral", "gemma2"]
RIGHT, WRONG = np.array([4, 9, 30]), np.array([7, 2, 5])


@pytest.mark.parametrize("name", DECODERS)
def test_parts_sum_to_the_logit(name: str) -> None:
    model, params = tiny(name)
    logits, cap = logits_of(model, params, TOKENS, mask=MASK), model.config.logit_cap
    if cap is not None:
        logits = cap * np.arctanh(logits / cap)
    expected = logits[np.arange(3), :, RIGHT] - logits[np.arange(3), :, WRONG]
    found = direct_logit_attribution(model, params, TOKENS, RIGHT, WRONG, mask=MASK)
    heads = direct_logit_attribution(model, params, TOKENS, RIGHT, WRONG, mask=MASK, by_head=True)
    scale = np.abs(expected[MASK]).max()
    tolerance = 1e-2 * scale if cap is not None else 1e-5 * scale  # arctanh loses digits near the cap
    np.testing.assert_allclose(found.logits[MASK], expected[MASK], atol=tolerance)
    for split in (found, heads):
        total = split.parts.sum(axis=1)
        np.testing.assert_allclose(total[MASK], split.logits[MASK], atol=2e-5 * np.abs(split.parts).max())
        assert np.abs(np.delete(split.parts, 1, axis=1).sum(axis=1) - split.logits)[MASK].max() > 1e-2 * scale
    attention = heads.parts[:, 1 : 1 + model.config.n_heads + model.config.blocks[0].attention.out_bias].sum(
        axis=1
    )
    np.testing.assert_allclose(attention[MASK], found.of("blocks.0.attn.out")[MASK], atol=1e-4 * scale)


def test_one_token_alone_and_the_planted_writer() -> None:
    model, params = planted()
    tokens = np.random.default_rng(0).integers(0, 12, (2, 6))
    found = direct_logit_attribution(model, params, tokens, [1, 1], [2, 2], by_head=True)
    size = np.abs(found.parts).max(axis=(0, 2))
    written = {name for name, part in zip(found.names, size, strict=True) if part > 1e-6}
    assert written == {"blocks.0.attn.head.3", "blocks.1.attn.head.2"}
    alone = direct_logit_attribution(model, params, tokens, [1, 1])
    np.testing.assert_allclose(alone.logits, found.logits / 2, rtol=1e-5)


def test_encoders_and_missing_tokens_are_refused() -> None:
    model, params = tiny("bert")
    with pytest.raises(SiteError, match="'bert' model is an encoder"):
        direct_logit_attribution(model, params, TOKENS, RIGHT)
    model, params = tiny("llama")
    with pytest.raises(SiteError, match="each of the 3 prompts"):
        direct_logit_attribution(model, params, TOKENS, [1, 2])
