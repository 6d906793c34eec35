"""Sparse autoencoders: variants, training, finished SAEs and their files, features, evaluation."""

from typing import TYPE_CHECKING

from mergelab.lazy import lazy_names

if TYPE_CHECKING:
    from mergelab.sae import evaluation, features, formats, training, variants
    from mergelab.sae.activation_functions import is_active
    from mergelab.sae.belonging import Belonging, check_belongs
    from mergelab.sae.cross_layer import CrossLayerTranscoder
    from mergelab.sae.evaluation.evaluate import evaluate_sae
    from mergelab.sae.features.latents_over_prompts import latent_table
    from mergelab.sae.formats.cross_layer import load_cross_layer_transcoder
    from mergelab.sae.formats.detect import FORMATS, load_sae, save_sae
    from mergelab.sae.formats.releases import sae_releases
    from mergelab.sae.sae import SAE, Crosscoder, SAEConfig, Transcoder, at_sites
    from mergelab.sae.subject_model import check_subject_model, open_subject_model
    from mergelab.sae.toy import ToyGroundTruth
    from mergelab.sae.training.config import TrainConfig, load_config
    from mergelab.sae.training.in_memory import train_sae
    from mergelab.sae.training.trainer import Result, train
    from mergelab.sae.variants import VARIANTS, Variant, crosscoder, make_variant, transcoder

__all__ = [
    "FORMATS",
    "SAE",
    "VARIANTS",
    "Belonging",
    "CrossLayerTranscoder",
    "Crosscoder",
    "Result",
    "SAEConfig",
    "ToyGroundTruth",
    "TrainConfig",
    "Transcoder",
    "Variant",
    "at_sites",
    "check_belongs",
    "check_subject_model",
    "crosscoder",
    "evaluate_sae",
    "evaluation",
    "features",
    "formats",
    "is_active",
    "latent_table",
    "load_config",
    "load_cross_layer_transcoder",
    "load_sae",
    "make_variant",
    "open_subject_model",
    "sae_releases",
    "save_sae",
    "train",
    "train_sae",
    "training",
    "transcoder",
    "variants",
]

__getattr__, __dir__ = lazy_names(__name__)
