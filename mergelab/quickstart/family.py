"""The quickstart's model family: a base trained on all domains, a specialist per domain, and their scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from mergelab.quickstart import small_llama
from mergelab.quickstart.bpe import END_OF_TEXT_ID, tokenizer_files, train_bpe
from mergelab.quickstart.corpus import DOMAINS, Corpus, Document
from mergelab.quickstart.evaluate import bits_per_byte, summed_loss
from mergelab.quickstart.settings import QuickstartSettings
from mergelab.quickstart.train import train_lm
from mergelab.text.packing import evaluation_windows, random_windows, token_stream
from mergelab.version import __version__

__all__ = ["Family", "checkpoint_steps", "fresh_params", "train_tokenizer"]

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


class Family:
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
        small_llama.save(params, self.settings.model, path, files)
        return {"first_loss": round(float(losses[0]), 4), "last_loss": round(float(losses[-20:].mean()), 4)}

    def evaluate(self, folder: Path) -> dict[str, float]:
        """Bits per byte of the model in an HF folder on every domain's held-out text."""
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

    def _bits(self, params: dict[str, Any], documents: Sequence[Document]) -> float:
        num_bytes = sum(document.num_bytes for document in documents)
        tokens = self._encode(documents)
        windows = evaluation_windows(tokens, END_OF_TEXT_ID, self.settings.context, num_bytes)
        return bits_per_byte(self._loss, params, windows)

    def _encode(self, documents: Sequence[Document]) -> list[list[int]]:
        encodings = self.tokenizer.encode_batch([d.text for d in documents], add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


def _sizes(side: Mapping[str, Sequence[Document]]) -> str:
    sizes = {domain: sum(document.num_bytes for document in documents) for domain, documents in side.items()}
    return ", ".join(f"{domain} {size / 1000:,.0f} kB" for domain, size in sizes.items())
