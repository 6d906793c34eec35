"""Text to tokens to batches: corpora, tokenizers, chat templates, contexts of a fixed length."""

from typing import TYPE_CHECKING

from mergelab.lazy import lazy_names

if TYPE_CHECKING:
    from mergelab.text.chat import Message, chat_ids, chat_text, render_chat, turn_end_ids
    from mergelab.text.contexts import TextContexts, text_contexts
    from mergelab.text.corpus import Document, TextOptions, documents
    from mergelab.text.kept_contexts import Share, corpus_contexts, lane_contexts
    from mergelab.text.packing import (
        Contexts,
        EvaluationWindows,
        evaluation_windows,
        pack_stream,
        pack_whole,
        random_windows,
        token_stream,
    )
    from mergelab.text.prompt_file import read_prompts
    from mergelab.text.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "Contexts",
    "Document",
    "EvaluationWindows",
    "Message",
    "Share",
    "TextContexts",
    "TextOptions",
    "Tokenizer",
    "chat_ids",
    "chat_text",
    "corpus_contexts",
    "documents",
    "evaluation_windows",
    "lane_contexts",
    "load_tokenizer",
    "pack_stream",
    "pack_whole",
    "random_windows",
    "read_prompts",
    "render_chat",
    "text_contexts",
    "token_stream",
    "turn_end_ids",
]

__getattr__, __dir__ = lazy_names(__name__)
