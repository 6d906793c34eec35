"""The quickstart's autoencoder: trained on the base model's middle layer, with some of its features shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.activations.model_activations import ModelActivations, contexts_of_texts
from mergelab.checkpoints.publish import publish_file
from mergelab.models.load import load_model
from mergelab.quickstart.corpus import TextDocument
from mergelab.quickstart.presets import AutoencoderSettings
from mergelab.sae.evaluation.reconstruction import reconstruction_on_model
from mergelab.sae.features.survey import survey
from mergelab.sae.formats import load_sae
from mergelab.sae.training import train
from mergelab.text.tokenizer import load_tokenizer

__all__ = ["Features", "find_features", "train_autoencoder"]

_SHOWN, _EXAMPLES = 8, 3
_RARE, _COMMON = 2e-4, 2e-2  # densities between which a latent is neither a fluke nor about everything


@dataclass(frozen=True)
class Features:
    """An autoencoder's figures on held-out text, and a few of its latents.

    Attributes:
        figures: normalized MSE, L0 and so on, held out; the SAE's sizes.
        latents: index, density and contexts of each latent, contexts as (token text, strength 0 to 1) pairs.
    """

    figures: Mapping[str, float | str]
    latents: Sequence[Mapping[str, Any]]


def train_autoencoder(
    model: Path,
    documents: Sequence[TextDocument],
    settings: AutoencoderSettings,
    path: Path,
    seed: int,
    on_step: Callable[[int, int], None],
) -> dict[str, float]:
    """Trains it on the base model's training text, into `path`, as `mergelab sae train` does.

    Returns:
        The metrics of the last step.
    """
    text = path.with_name(f"{path.name}.txt")
    publish_file(text, "\n\n".join(document.text for document in documents).encode())
    config: dict[str, Any] = {
        "sae": {"variant": "topk", "n_latents": settings.n_latents, "k": settings.k},
        "data": {
            "kind": "model",
            "model": str(model),
            "site": settings.site,
            "text": str(text),
            "context": settings.context,
        },
        "train": {"batch_size": settings.batch_size, "tokens": settings.tokens, "seed": seed},
        "checkpoint": {"log_every": 10},
    }
    result = train(config, path, progress=lambda done, total, _: on_step(done, total))
    return {name: result.metrics[name] for name in ("nmse", "dead_fraction", "l0")}


def find_features(
    model: Path, sae_folder: Path, documents: Sequence[TextDocument], settings: AutoencoderSettings
) -> Features:
    """Judges the autoencoder on held-out text and takes the latents that are strongest there."""
    sae = load_sae(sae_folder / "final")
    loaded, params = load_model(model)
    tokens = contexts_of_texts(model, [document.text for document in documents], settings.context)
    special = load_tokenizer(model).special_ids
    source = ModelActivations(loaded, params, tokens, (settings.site,), special_ids=special)
    found = survey(sae, source, count=_EXAMPLES)
    result = reconstruction_on_model(sae, source)
    telling = (found.density >= _RARE) & (found.density <= _COMMON)
    order = np.argsort(np.where(telling, found.peak, -1), kind="stable")[::-1]
    chosen = [int(latent) for latent in order[:_SHOWN] if telling[latent]]
    words = _token_texts(model)
    latents = [
        {
            "latent": latent,
            "density": float(found.density[latent]),
            "examples": [
                [
                    (words(token), code / float(found.peak[latent]))
                    for token, code in zip(example.tokens, example.codes, strict=True)
                ]
                for example in found.examples[latent]
            ],
        }
        for latent in chosen
    ]
    figures: dict[str, float | str] = {
        "site": settings.site,
        "latents": sae.n_latents,
        "k": settings.k,
        "nmse": result.nmse,
        "l0": result.l0,
        "alive": result.alive,
    }
    return Features(figures, latents)


def _token_texts(model: Path) -> Callable[[int], str]:
    return load_tokenizer(model).piece
