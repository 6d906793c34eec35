"""GGUF files: a model, its configuration and its tokenizer in one file, read and written."""

from typing import TYPE_CHECKING

from mergelab.lazy import lazy_names

if TYPE_CHECKING:
    from mergelab.checkpoints.gguf.model_file import GgufModel, is_gguf, open_gguf
    from mergelab.checkpoints.gguf.write import write_gguf

__all__ = ["GgufModel", "is_gguf", "open_gguf", "write_gguf"]

__getattr__, __dir__ = lazy_names(__name__)
