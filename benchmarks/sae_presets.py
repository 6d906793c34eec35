"""The toy ground truths and SAEs of benchmarks/sae_quality.py; a budget is `steps * batch` activations."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.sae_peers.problem import Problem
from mergelab.sae.toy import ToyGroundTruth

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """A truth and what is trained on it; seeds of both are replaced in every run.

    Attributes:
        truth: what generates activations.
        problem: the training.
        aims: what mergelab is held to at its defaults: `nmse` and `dead` at most, `mean_max_cosine` at least.
    """

    truth: ToyGroundTruth
    problem: Problem
    aims: dict[str, float]


PRESETS = {
    # The setting in which the peers were first measured, and in which mergelab's defaults were chosen; what
    # part the other presets had in that is said in benchmarks/README.md.
    "reference": Preset(
        ToyGroundTruth(d_in=128, n_features=1024, l0=8.0),
        Problem(d=128, n=2048, k=16, batch=1024, steps=2500),
        {"nmse": 0.095, "mean_max_cosine": 0.975, "dead": 0.01},
    ),
    # Small, and with exactly as many latents per token as features are on:
    "small": Preset(
        ToyGroundTruth(d_in=64, n_features=256, l0=6.0, exponent=0.6),
        Problem(d=64, n=512, k=6, batch=512, steps=2000),
        {},
    ),
    # All features equally frequent, activations far from the origin, and a short training:
    "even": Preset(
        ToyGroundTruth(d_in=96, n_features=512, l0=5.0, exponent=0.0, mean_norm=4.0),
        Problem(d=96, n=1024, k=10, batch=1024, steps=1000),
        {},
    ),
    # Steep frequencies, features that come in groups, noise, small batches and many of them:
    "grouped": Preset(
        ToyGroundTruth(d_in=64, n_features=512, l0=4.0, exponent=1.0, group_size=4, lift=8.0, noise=0.05),
        Problem(d=64, n=1024, k=8, batch=256, steps=6000),
        {},
    ),
    # Shows that everything runs.
    "tiny": Preset(
        ToyGroundTruth(d_in=16, n_features=32, l0=2.0, exponent=0.0),
        Problem(d=16, n=64, k=2, batch=256, steps=200),
        {},
    ),
}
