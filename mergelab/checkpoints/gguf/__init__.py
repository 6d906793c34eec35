"""GGUF files: a model, its configuration and its tokenizer in one file, read and written."""
