"""A small language model trained on the standard library, and an SAE of one of its sites."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mergelab.activations.model_activations import ModelActivations, open_model_activations
from mergelab.checkpoints.folder import weights_sha256
from mergelab.quickstart import small_llama
from mergelab.quickstart.corpus import sources_folder
from mergelab.quickstart.family import tokenizer_files, train_bpe
from mergelab.quickstart.train import TrainSettings, train_lm
from mergelab.sae.sae import SAE
from mergelab.sae.training import train
from mergelab.text.packing import random_windows, token_stream

SITE = "blocks.0.resid_post"
LENGTH = 32


@dataclass(frozen=True)
class SubjectModel:
    """A trained model and what belongs to it."""

    folder: Path
    text: Path
    held_out: Path
    config: small_llama.LlamaConfig
    sae: SAE
    source: ModelActivations
    curve: tuple[tuple[int, float], ...]


def train_subject_model(folder: Path) -> SubjectModel:
    """Trains both into a folder."""
    files = [sources_folder() / name for name in ("textwrap.py", "shlex.py", "heapq.py", "string.py")]
    texts = [file.read_text() for file in files]
    text, held_out = folder / "train.txt", folder / "bisect.py"
    text.write_text("\n\n".join(texts))
    held_out.write_text((sources_folder() / "bisect.py").read_text())
    tokenizer = train_bpe(texts, 384)
    config = small_llama.LlamaConfig(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=LENGTH, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    stream = token_stream([tokenizer.encode(text).ids for text in texts], 0)
    apply = partial(small_llama.apply, config)
    settings = TrainSettings(steps=150, learning_rate=1e-2, warmup_steps=5)
    params, losses = train_lm(
        apply, small_llama.init(config, 0), random_windows(stream, LENGTH, 16, 0), settings
    )
    model = folder / "model"
    small_llama.save(params, config, model, files=tokenizer_files(tokenizer, LENGTH))
    data = {"kind": "model", "model": str(model), "site": SITE, "text": str(text), "context": LENGTH}
    result = train(
        {
            "sae": {"variant": "topk", "n_latents": 96, "k": 4},
            "data": data,
            "train": {"batch_size": 256, "tokens": 256 * 200, "lr": 4e-3},
            "metadata": {"site": SITE, "model_hash": weights_sha256(model)},
        },
        folder / "sae",
    )
    source = open_model_activations(model, [SITE], [held_out], length=LENGTH)
    curve = tuple((step, float(losses[max(0, step - 5) : step].mean())) for step in (5, 20, 50, 150))
    return SubjectModel(model, text, held_out, config, result.sae, source, curve)
