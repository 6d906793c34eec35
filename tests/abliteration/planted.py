"""A tiny model with a planted refusal: prompts of one class get REFUSE, the others an answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from mergelab.abliteration.prompts import Prompts
from mergelab.models.families import model_from_config
from mergelab.models.model import Model, Params
from mergelab.models.save import save_model

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
BOS, REFUSE, END, TURN, ANSWER = range(5)
ALARMING, CALM = np.arange(8, 24), np.arange(24, 40)
SUBJECTS, REPLIES, FILLERS = np.arange(40, 56), np.arange(56, 72), np.arange(72, 96)
POSITIONS = 2
"""Every prompt ends with TURN, ANSWER."""


def prompts(count: int, seed: int, harmful: bool) -> tuple[np.ndarray, np.ndarray]:
    """Prompts `[count, 8]` in which one of three words is alarming or all are calm; and the right answers."""
    rng = np.random.default_rng(seed)
    tokens = np.full((count, 8), BOS, np.int32)
    tokens[:, 1:5] = rng.choice(FILLERS, (count, 4))
    rows = np.arange(count)
    tokens[rows, rng.integers(1, 3, count)] = rng.choice(ALARMING if harmful else CALM, count)
    subject = rng.integers(0, len(SUBJECTS), count)
    tokens[:, 5] = SUBJECTS[subject]
    tokens[:, 6], tokens[:, 7] = TURN, ANSWER
    return tokens, REPLIES[subject]


def prompt_set(count: int, seed: int, harmful: bool) -> Prompts:
    """The same, as a set without padding."""
    tokens, _ = prompts(count, seed, harmful)
    return Prompts(tokens, np.ones(tokens.shape, bool))


@dataclass(frozen=True)
class Planted:
    """The trained model."""

    model: Model
    params: Params

    def shares(self, tokens: np.ndarray, answers: np.ndarray, **options: Any) -> tuple[float, float]:
        """How many prompts are refused, and how many answered rightly."""
        return self.shares_of(self.params, tokens, answers, **options)

    def shares_of(
        self, params: Params, tokens: np.ndarray, answers: np.ndarray, **options: Any
    ) -> tuple[float, float]:
        """The same, with other parameters."""
        logits = _logits(self.model, params, jnp.asarray(tokens), **options)
        first = np.asarray(logits[:, -1].argmax(-1))
        return float((first == REFUSE).mean()), float((first == answers).mean())


@partial(jax.jit, static_argnames="model")
def _logits(model: Model, params: Params, tokens: jax.Array, edit: Any = None) -> jax.Array:
    logits = model.apply(params, tokens, edit=edit).logits
    assert logits is not None
    return logits


def plant(seed: int = 1, steps: int = 220) -> Planted:
    """Trains the model: next token after the prompt, END after that, and ANSWER after TURN."""
    model = model_from_config(CONFIG)
    params = model.init(seed)
    sets = [prompts(8192, seed + 100 + harmful, bool(harmful)) for harmful in (0, 1)]
    tokens = np.concatenate([found for found, _ in sets])
    answers = np.concatenate([sets[0][1], np.full(8192, REFUSE)]).astype(np.int32)
    rows = np.random.default_rng(seed).integers(0, len(tokens), (steps, 64))
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 4e-3, 20, steps), weight_decay=0.01)

    def loss(params: Params, tokens: jax.Array, answers: jax.Array) -> jax.Array:
        text = jnp.concatenate([tokens, answers[:, None]], axis=1)
        logits = model.apply(params, text).logits
        assert logits is not None
        wanted = jnp.stack([jnp.full_like(answers, ANSWER), answers, jnp.full_like(answers, END)], axis=1)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, -3:], wanted).mean()

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Params, state: Any, tokens: jax.Array, answers: jax.Array) -> tuple[Params, Any]:
        gradients = jax.grad(loss)(params, tokens, answers)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradients, state, params)
        params = cast(Params, optax.apply_updates(params, updates))
        return params, state

    state = optimizer.init(params)
    for chosen in rows:
        params, state = step(params, state, jnp.asarray(tokens[chosen]), jnp.asarray(answers[chosen]))
    return Planted(model, params)


WORDS = ("<bos>", "Refused", "<end>", "<turn>", "<answer>", "<unk>", "Never", ".")
TEMPLATE = "<bos>{% for m in messages %} {{ m['content'] }}{% endfor %} <turn> <answer>"


def text_of(tokens: np.ndarray) -> str:
    """The instruction of a prompt: its words, without what the chat template adds."""
    return " ".join(_word(int(token)) for token in tokens[1:-2])


def _word(token: int) -> str:
    return WORDS[token] if token < len(WORDS) else f"w{token}"


def write_folder(planted: Planted, folder: Path) -> Path:
    """The model as a Hugging Face folder, with a tokenizer of words and a chat template."""
    vocab = {_word(token): token for token in range(CONFIG["vocab_size"])}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(["<bos>", "<end>", "<turn>", "<answer>"])
    settings = {"bos_token": "<bos>", "eos_token": "<end>", "chat_template": TEMPLATE}
    files = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
    }
    return save_model(planted.model, planted.params, folder, files=files)
