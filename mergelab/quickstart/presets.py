"""How large the quickstart is: one frozen object per preset, whose content is part of every cache key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mergelab.quickstart.small_llama import LlamaConfig
from mergelab.quickstart.train import TrainSettings

__all__ = ["PRESETS", "QuickstartSettings"]

ALL_RECIPES = (
    "linear",
    "task_arithmetic_0.3",
    "task_arithmetic_0.5",
    "task_arithmetic_1.0",
    "ties",
    "dare_ties",
    "model_stock",
    "karcher",
    "slerp",
)


@dataclass(frozen=True)
class AutoencoderSettings:
    """Size of the autoencoder and of its training.

    Attributes:
        site: where it reads the base model.
        n_latents, k: the SAE.
        tokens, batch_size: length of the training and size of its batches, in tokens.
        context: tokens in a context.
    """

    site: str
    n_latents: int
    k: int
    tokens: int
    batch_size: int
    context: int


@dataclass(frozen=True)
class QuickstartSettings:
    """Sizes of the corpus, the model and the training runs.

    Attributes:
        train_bytes, held_out_bytes: UTF-8 bytes of text per domain.
        model: the model; its `vocab_size` is the tokenizer's, its `max_position_embeddings` the context.
        batch: windows per training step.
        base: training of the base model, on the three domains mixed.
        specialist: fine-tuning of the base on one domain.
        autoencoder: settings of the sparse autoencoder on the base model.
        recipes: file names, without `.yaml`, in `configs/quickstart`.
    """

    train_bytes: int
    held_out_bytes: int
    model: LlamaConfig
    batch: int
    base: TrainSettings
    specialist: TrainSettings
    autoencoder: AutoencoderSettings
    recipes: tuple[str, ...] = ALL_RECIPES

    @property
    def context(self) -> int:
        return self.model.max_position_embeddings


def _llama(vocab: int, width: int, hidden: int, layers: int, heads: int, context: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width // heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )


PRESETS: Mapping[str, QuickstartSettings] = {
    "default": QuickstartSettings(
        train_bytes=700_000,
        held_out_bytes=40_000,
        model=_llama(vocab=1024, width=128, hidden=384, layers=4, heads=2, context=128),
        batch=16,
        base=TrainSettings(steps=400, learning_rate=3e-3),
        specialist=TrainSettings(steps=80, learning_rate=5e-4, warmup_steps=10),
        autoencoder=AutoencoderSettings("blocks.2.resid_post", 1024, 16, 500_000, 1024, context=64),
    ),
    "tiny": QuickstartSettings(
        train_bytes=60_000,
        held_out_bytes=20_000,
        model=_llama(vocab=384, width=32, hidden=64, layers=2, heads=2, context=32),
        batch=8,
        base=TrainSettings(steps=40, learning_rate=5e-3, warmup_steps=4),
        specialist=TrainSettings(steps=15, learning_rate=2e-3, warmup_steps=2),
        autoencoder=AutoencoderSettings("blocks.0.resid_post", 128, 4, 20_000, 256, context=32),
        recipes=("linear", "task_arithmetic_1.0", "slerp"),
    ),
}
