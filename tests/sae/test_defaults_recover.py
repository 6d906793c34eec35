"""What each variant finds of a toy ground truth with nothing set but its number of latents."""

from __future__ import annotations

import numpy as np
import pytest

from mergelab.sae import ToyGroundTruth, train_sae
from mergelab.sae.features import recovery
from mergelab.sae.variants import VARIANTS

STEPS, BATCH = 1500, 512
TOY = ToyGroundTruth(d_in=64, n_features=256, l0=6.0, exponent=0.6, rows=STEPS * BATCH, seed=1)


# Features of this toy stand alone, and a small nested prefix must mix them.
LEAST = {"matryoshka": 0.4}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_defaults_recover_nearly_every_feature(variant: str) -> None:
    """With the sparsity given where a variant takes one: `k`, or the `l0` of JumpReLU."""
    takes = VARIANTS[variant].__dataclass_fields__
    sparsity = {name: value for name, value in (("k", 8), ("l0", 8.0)) if name in takes}
    rows = TOY.read(0, STEPS * BATCH)
    sae = train_sae(rows, n_latents=512, variant=variant, batch_size=BATCH, steps=STEPS, **sparsity)
    rows = np.asarray(sae.W_dec)
    # Codes of `abs_topk` have signs: about half of its rows are features turned round, with negative codes.
    signed = variant == "abs_topk"
    found = recovery(TOY.features, rows, either_sign=signed)
    assert found.above > LEAST.get(variant, 0.9), found
    if signed:
        assert recovery(TOY.features, rows).above < 0.7


@pytest.mark.slow
def test_too_small_a_penalty_recovers_nothing() -> None:
    """The control: a gated SAE at the penalty that others use for another scale of the loss."""
    rows = TOY.read(0, STEPS * BATCH)
    sae = train_sae(rows, n_latents=512, variant="gated", batch_size=BATCH, steps=STEPS, l1=0.01)
    assert recovery(TOY.features, np.asarray(sae.W_dec)).above < 0.05
