"""The embedded main job: a model family trained on text that ships with Python, merged, judged, reported."""

from typing import TYPE_CHECKING

from mergelab.lazy import lazy_names

if TYPE_CHECKING:
    from mergelab.quickstart.autoencoder import Features, find_features, train_autoencoder
    from mergelab.quickstart.corpus import Corpus, TextDocument, gather
    from mergelab.quickstart.experiment import run
    from mergelab.quickstart.family import (
        TrainedFamily,
        bits_per_byte,
        summed_loss,
        train_bpe,
        train_tokenizer,
    )
    from mergelab.quickstart.models_at_hand import example_models
    from mergelab.quickstart.presets import PRESETS, AutoencoderSettings, QuickstartSettings
    from mergelab.quickstart.results import ModelScore, Results, score_models
    from mergelab.quickstart.train import TrainSettings, next_token_loss, train_lm

__all__ = [
    "PRESETS",
    "AutoencoderSettings",
    "Corpus",
    "Features",
    "ModelScore",
    "QuickstartSettings",
    "Results",
    "TextDocument",
    "TrainSettings",
    "TrainedFamily",
    "bits_per_byte",
    "example_models",
    "find_features",
    "gather",
    "next_token_loss",
    "run",
    "score_models",
    "summed_loss",
    "train_autoencoder",
    "train_bpe",
    "train_lm",
    "train_tokenizer",
]

__getattr__, __dir__ = lazy_names(__name__)
