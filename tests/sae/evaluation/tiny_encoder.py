"""A tiny BERT of random weights with a WordPiece tokenizer of its own, and an SAE: mechanics only."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import tokenizers

from mergelab.activations.model_activations import ModelActivations, open_model_activations
from mergelab.models.families import model_from_config
from mergelab.models.save import save_model
from mergelab.quickstart.corpus import sources_folder
from mergelab.sae.sae import SAE, SAEConfig
from tests.models.tiny_models import params_of, weights

SITE = "blocks.0.resid_post"
LENGTH = 24
SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}


@dataclass(frozen=True)
class Encoder:
    """A model folder and what belongs to it."""

    folder: Path
    text: Path
    mask_id: int
    sae: SAE
    source: ModelActivations


def write_encoder(folder: Path, text: str) -> Path:
    """A model folder of the sentence-transformers kind, without pooling modules."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=list(SPECIAL.values()), show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    ids = {role: tokenizer.token_to_id(token) for role, token in SPECIAL.items()}
    tokenizer.post_processor = tokenizers.processors.BertProcessing(
        ("[SEP]", ids["sep"]), ("[CLS]", ids["cls"])
    )
    model = model_from_config(
        {
            "model_type": "bert", "vocab_size": 300, "hidden_size": 24, "intermediate_size": 40,
            "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
        }
    )  # fmt: skip
    files = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(
            {f"{role}_token": token for role, token in SPECIAL.items()}
        ).encode(),
    }
    return save_model(model, params_of(model, weights(model)), folder, files=files)


def make_encoder(folder: Path) -> Encoder:
    """Writes it into a folder, with a text in which it is run."""
    text = folder / "bisect.py"
    text.write_text((sources_folder() / "bisect.py").read_text())
    model = write_encoder(folder / "model", text.read_text())
    source = open_model_activations(model, [SITE], [text], length=LENGTH)
    rows = np.random.default_rng(0).standard_normal((80, 24)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    config = SAEConfig(k=4, metadata={"site": SITE})
    sae = SAE(jnp.asarray(rows.T), jnp.zeros(80), jnp.asarray(rows), jnp.zeros(24), config)
    return Encoder(model, text, 4, sae.checked(), source)
