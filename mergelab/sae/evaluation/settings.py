"""What SAEs have in common: only those that differ in nothing but a seed are averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergelab.sae.sae import SAE

__all__ = ["differences", "settings_of"]

_SHOWN = 5  # differences that are named


def settings_of(sae: SAE) -> dict[str, Any]:
    """Everything known of how an SAE works and was trained, by dotted name, but the seed.

    A training writes its configuration into the metadata (`settings`); of other SAEs the sizes, the
    activation, the sites and, where they are recorded, the variant and the tokens are known.
    """
    config, metadata = sae.config, sae.config.metadata
    found: dict[str, Any] = {
        "d_in": sae.d_in,
        "d_out": sae.d_out,
        "n_latents": sae.n_latents,
        "activation": config.activation,
        "k": config.k,
        "normalization": config.normalization,
        "sites": config.sites,
        "reads": None if config.reads is None else list(config.reads),
        "writes": None if config.writes is None else list(config.writes),
        "transcoder": not sae.is_autoencoder,
        "skip": sae.W_skip is not None,
    }
    found |= {name: metadata[name] for name in ("variant", "model_hash", "control") if name in metadata}
    training = metadata.get("training")
    if isinstance(training, Mapping) and "tokens" in training:
        found["training.tokens"] = training["tokens"]
    told = metadata.get("settings")
    if isinstance(told, Mapping):
        found |= _flat(told)
        found.pop("train.seed", None)
    return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def differences(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """What differs between SAEs, one phrase each, such as `k: 4, 8`; nothing where they are alike."""
    names = list(dict.fromkeys(name for one in settings for name in one))
    found = []
    for name in names:
        values = list(dict.fromkeys(repr(one.get(name)) for one in settings))
        if len(values) > 1:
            found.append(f"{name}: {', '.join(values)}")
    more = len(found) - _SHOWN
    return found if more <= 0 else [*found[:_SHOWN], f"{more} more"]
