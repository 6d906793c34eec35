"""A small model family: its tokenizer, a base, specialists, and their scores."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mergelab.activations.batches import filled_batches
from mergelab.checkpoints.model_card import CardFacts, short_card
from mergelab.models.model import Params
from mergelab.quickstart import small_llama
from mergelab.quickstart.corpus import DOMAINS, Corpus, TextDocument
from mergelab.quickstart.presets import QuickstartSettings
from mergelab.quickstart.train import train_lm
from mergelab.text.packing import EvaluationWindows, evaluation_windows, random_windows, token_stream
from mergelab.version import __version__

__all__ = [
    "END_OF_TEXT",
    "END_OF_TEXT_ID",
    "TrainedFamily",
    "bits_per_byte",
    "checkpoint_steps",
    "fresh_params",
    "summed_loss",
    "tokenizer_files",
    "train_bpe",
    "train_tokenizer",
]


END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0  # the trainer numbers special tokens first
"""Separates documents, begins and ends generation."""


def train_bpe(texts: str | Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (every string decodes back to itself), deterministic for equal input.

    Args:
        texts: training documents, or one.
        vocab_size: number of tokens, the 256 bytes and `END_OF_TEXT` among them.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([texts] if isinstance(texts, str) else texts, trainer)
    return tokenizer


def tokenizer_files(tokenizer: Tokenizer, model_max_length: int) -> dict[str, bytes]:
    """`tokenizer.json` and `tokenizer_config.json` as `transformers` reads them, by file name."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": model_max_length,
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": (tokenizer.to_str(pretty=True) + "\n").encode(),
        "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode(),
    }


Apply = Callable[[Params, Int[Array, "batch length"]], Float[Array, "batch length vocab"]]
SummedLoss = Callable[[Params, np.ndarray, np.ndarray], Float[Array, " batch"]]


def summed_loss(apply: Apply) -> SummedLoss:
    """Compiles `(params, windows, is_target) -> sum of -ln p(target)` of each; one program for all models."""

    @jax.jit
    def loss(
        params: Params, windows: Int[Array, "batch length_plus_1"], is_target: Bool[Array, "batch length"]
    ) -> Float[Array, " batch"]:
        logits = apply(params, windows[:, :-1])
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
        return jnp.sum(jnp.where(is_target, nats, 0.0), axis=-1)

    return loss


def bits_per_byte(loss: SummedLoss, params: Params, windows: EvaluationWindows, batch: int = 32) -> float:
    """`sum over tokens of -log2 p(token | the tokens before it in its window) / UTF-8 bytes of the text`.

    Args:
        loss: what `summed_loss` returns.
        params: the model's parameters.
        windows: text of which every token is a target once.
        batch: windows evaluated at a time; the last batch is filled with rows that count nothing.
    """
    return float(_nats(loss, params, windows, batch).sum()) / math.log(2) / windows.num_bytes


def _nats(
    loss: SummedLoss, params: Params, windows: EvaluationWindows, batch: int = 32
) -> Float[np.ndarray, " windows"]:
    """Sum of `-ln p` over the targets of each window, float64."""
    parts = [
        np.asarray(loss(params, tokens, is_target), np.float64)[:count]
        for (tokens, is_target), count in filled_batches(batch, windows.tokens, windows.is_target)
    ]
    return np.concatenate(parts)


_CHECKPOINTS = 8  # of a training, at steps evenly spaced in their logarithm
_REPORT_EVERY = 5  # steps; between reports they are dispatched ahead of their execution


def train_tokenizer(corpus: Corpus, settings: QuickstartSettings) -> str:
    """`tokenizer.json` of a BPE tokenizer that has seen the training text of all domains, and no other."""
    texts = (document.text for documents in corpus.train.values() for document in documents)
    return train_bpe(texts, settings.model.vocab_size).to_str()


def fresh_params(model: small_llama.LlamaConfig, seed: int) -> small_llama.Params:
    """Initial parameters with token embeddings of unit length.

    At the usual deviation of 0.02 what the blocks add drowns the tokens, and so short a training spends its
    first hundred steps on undoing that.
    """
    params = small_llama.init(model, seed)
    embedding = params["embed"]["embedding"]
    length = jnp.linalg.norm(embedding, axis=-1, keepdims=True)
    return params | {"embed": {"embedding": embedding / jnp.broadcast_to(length, embedding.shape)}}


def checkpoint_steps(steps: int) -> tuple[int, ...]:
    """The steps after which a training of so many keeps a checkpoint; the last is among them."""
    spaced = np.geomspace(max(1, steps // 80), steps, _CHECKPOINTS)
    return tuple(sorted({round(float(step)) for step in spaced}))


class TrainedFamily:
    """Trains and scores models of one shape; the compiled programs are shared by all of them."""

    def __init__(self, settings: QuickstartSettings, corpus: Corpus, tokenizer: str, seed: int) -> None:
        self.settings = settings
        self.corpus = corpus
        self.tokenizer = Tokenizer.from_str(tokenizer)
        self.seed = seed
        self._apply = partial(small_llama.apply, settings.model)
        self._loss = summed_loss(self._apply)

    def train(
        self,
        name: str,
        start: Path | None,
        path: Path,
        on_step: Callable[[int, int], None],
        *,
        checkpoints: Path | None = None,
    ) -> dict[str, float]:
        """Trains `base` from scratch on all domains, or the specialist of a domain from the model at `start`.

        Args:
            name: `base` or a domain.
            start: HF folder to start from; None for fresh parameters.
            path: HF folder to write.
            on_step: called now and then with the steps done and the steps in all.
            checkpoints: write HF folders named by their step here, eight evenly spaced in its logarithm.

        Returns:
            The loss of the first step and the mean over the last twenty, in nats per token.
        """
        domains, steps = (
            (DOMAINS, self.settings.base) if start is None else ((name,), self.settings.specialist)
        )
        params = fresh_params(self.settings.model, self.seed) if start is None else small_llama.load(start)[1]
        documents = [document for domain in domains for document in self.corpus.train[domain]]
        stream = token_stream(self._encode(documents), END_OF_TEXT_ID)
        seed = self.seed * (1 + len(DOMAINS)) + ("base", *DOMAINS).index(name)
        batches = random_windows(stream, self.settings.context, self.settings.batch, seed)
        files = tokenizer_files(self.tokenizer, self.settings.context)
        kept = checkpoint_steps(steps.steps) if checkpoints else ()

        def report(step: int, params: small_llama.Params) -> None:
            if checkpoints and step in kept:
                small_llama.save(params, self.settings.model, checkpoints / str(step), files)
            if step % _REPORT_EVERY == 0 or step == steps.steps:
                jax.block_until_ready(params)
                on_step(step, steps.steps)

        params, losses = train_lm(self._apply, params, batches, steps, on_step=report)
        small_llama.save(params, self.settings.model, path, {**files, "README.md": self._card(name, start)})
        return {"first_loss": round(float(losses[0]), 4), "last_loss": round(float(losses[-20:].mean()), 4)}

    def evaluate(self, folder: Path) -> dict[str, list[float]]:
        """Bits that the model in an HF folder needs for each held-out document, by domain."""
        _, params = small_llama.load(folder)
        return {domain: self._bits(params, self.corpus.held_out[domain]) for domain in DOMAINS}

    def facts(self) -> dict[str, str]:
        """Where the numbers come from, for the report."""
        model = self.settings.model
        size = sum(leaf.size for leaf in small_llama.leaves(model))
        return {
            "model": f"Llama, {size:,} parameters: width {model.hidden_size}, "
            f"{model.num_hidden_layers} layers, context {self.settings.context}, "
            f"{model.vocab_size:,} BPE tokens",
            "training text": _sizes(self.corpus.train),
            "held-out text": _sizes(self.corpus.held_out),
            "seed": str(self.seed),
            "versions": f"mergelab {__version__}, jax {jax.__version__}",
        }

    def _card(self, name: str, start: Path | None) -> bytes:
        """The content of a model's `README.md`."""
        facts = self.facts()
        trained = "from scratch on all of it" if start is None else f"from `base` on its {name} alone"
        said = (
            f"{facts['model']}, trained with mergelab {__version__} {trained}. Text that comes with Python "
            f"({facts['training text']}), seed {self.seed}. It shows how merges behave, nothing else."
        )
        known = CardFacts(pipeline_tag="text-generation")
        return short_card(name, "transformers", ["mergelab", "mergelab-quickstart"], known, [said])

    def _bits(self, params: Params, documents: Sequence[TextDocument]) -> list[float]:
        tokens, length = self._encode(documents), self.settings.context
        windows = evaluation_windows(tokens, END_OF_TEXT_ID, length, sum(d.num_bytes for d in documents))
        bits = _nats(self._loss, params, windows) / math.log(2)
        of = np.repeat(np.arange(len(tokens)), [-(-len(ids) // length) for ids in tokens])
        return np.bincount(of, bits, minlength=len(tokens)).round(3).tolist()

    def _encode(self, documents: Sequence[TextDocument]) -> list[list[int]]:
        encodings = self.tokenizer.encode_batch([d.text for d in documents], add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


def _sizes(side: Mapping[str, Sequence[TextDocument]]) -> str:
    sizes = {domain: sum(document.num_bytes for document in documents) for domain, documents in side.items()}
    return ", ".join(f"{domain} {size / 1000:,.0f} kB" for domain, size in sizes.items())
