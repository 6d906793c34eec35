"""A small Llama with a tokenizer of words, in a folder, and a text that it can learn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from mergelab.models.families import model_from_config
from mergelab.models.model import Model
from mergelab.models.save import save_model

WORDS = ["</s>", "<user>", "<assistant>", *(f"w{n}" for n in range(29))]
LENGTH = 12

_TEMPLATE = "{% for m in messages %}{{ '<' + m['role'] + '> ' }}{{ m['content'] }}{{ ' </s> ' }}{% endfor %}"


def model() -> Model:
    return model_from_config(
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": len(WORDS),
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "max_position_embeddings": 32,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
        }
    )


def write(folder: Path) -> Path:
    backend = Backend(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "chat_template": _TEMPLATE}
    files = {
        "tokenizer.json": backend.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }
    return save_model(model(), model().init(0), folder, files=files)


def text(words: int, seed: int = 0, least: int = 1) -> str:
    """Words that count up by `least` or one more, at random: a bit a word, of `log2(29)`."""
    steps = np.random.default_rng(seed).integers(least, least + 2, words)
    return " ".join(f"w{n}" for n in np.cumsum(steps) % 29)
