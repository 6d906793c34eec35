"""Only SAEs that differ in nothing but the seed are averaged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import pytest

from mergelab.errors import SAEError
from mergelab.sae.evaluation.metric import Score
from mergelab.sae.evaluation.scorecard import Scorecard, seed_spread
from mergelab.sae.evaluation.settings import differences, settings_of
from mergelab.sae.sae import SAE, SAEConfig

TRAIN = {"batch_size": 64, "tokens": 6400, "seed": 0}
DATA = {"kind": "model", "site": "blocks.0.resid_post"}


def _sae(n: int = 8, train: dict[str, Any] | None = None, **config: Any) -> SAE:
    arrays = (jnp.zeros((4, n)), jnp.zeros(n), jnp.zeros((n, 4)), jnp.zeros(4))
    told = {"settings": {"sae": {"n_latents": n}, "data": DATA, "train": {**TRAIN, **(train or {})}}}
    options = {"activation": "topk", "k": 2, "metadata": told, **config}
    return SAE(*arrays, config=SAEConfig(**options))


@pytest.mark.parametrize(
    ("other", "found"),
    [
        (_sae(), []),
        (_sae(train={"seed": 7}), []),
        (_sae(k=3), ["k: 2, 3"]),
        (_sae(n=9), ["n_latents: 8, 9", "sae.n_latents: 8, 9"]),
        (_sae(train={"tokens": 1280}), ["train.tokens: 6400, 1280"]),
        (_sae(train={"lr": 0.1}), ["train.lr: None, 0.1"]),
        (_sae(reads="blocks.0.resid_mid"), ["reads: None, ['blocks.0.resid_mid']"]),
        (_sae(transcoder=True), ["transcoder: False, True"]),
    ],
)
def test_what_differs_is_named(other: SAE, found: list[str]) -> None:
    settings = [settings_of(one) for one in (_sae(), other)]
    assert differences(settings) == found
    scores = [
        Scorecard({"a.b": Score(value, "", "")}, settings=one)
        for value, one in zip((1, 3), settings, strict=True)
    ]
    if not found:
        assert seed_spread(scores)["a.b"] == (2.0, pytest.approx(2**0.5))
        return
    with pytest.raises(SAEError, match="not seeds of one training"):
        seed_spread(scores)
    # The control: without settings nobody knows better.
    assert seed_spread([replace(card, settings=None) for card in scores])["a.b"][0] == 2.0


def test_many_differences_are_counted() -> None:
    one = {str(i): 0 for i in range(9)}
    assert differences([one, dict.fromkeys(one, 1)])[-1] == "4 more"
