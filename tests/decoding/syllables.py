"""A tokenizer for the tiny models: 61 syllables, every fourth of which begins a word."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from mergelab.text.tokenizer import Tokenizer

PIECES = [f"{'▁' if i % 4 == 0 else ''}{'bcdfghjklmnpr'[i // 5]}{'aeiou'[i % 5]}" for i in range(61)]


def syllables() -> Tokenizer:
    """The tokenizer; it has no special tokens, and no text ends by itself."""
    backend = Backend(models.WordLevel({piece: i for i, piece in enumerate(PIECES)}, PIECES[0]))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("▁?[a-z]{2}"), "isolated")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    return Tokenizer(backend, {}, (), {}, Path("folder"))
