"""Prompts of a file: one a line, or JSON lines."""

from __future__ import annotations

from pathlib import Path

from mergelab.checkpoints.json_data import parse_json
from mergelab.checkpoints.text_file import read_text
from mergelab.errors import CheckpointError, MergelabError

__all__ = ["read_prompts"]


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file: one a line; in a `.jsonl` file, JSON strings or objects with a `prompt`.

    Raises:
        MergelabError: the file cannot be read as UTF-8, holds no prompts, or a line is not such JSON.
    """
    path = Path(path)
    lines = read_text(path, error=MergelabError).splitlines()
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if path.suffix == ".jsonl":
        prompts = [_from_json(path, number, line) for number, line in numbered]
    else:
        prompts = [line for _, line in numbered]
    if not prompts:
        raise MergelabError(f"{path} holds no prompts; write one on each line.")
    return prompts


def _from_json(path: Path, number: int, line: str) -> str:
    try:
        found = parse_json(line.encode(), str(path))
    except CheckpointError:
        found = None
    if isinstance(found, dict):
        found = found.get("prompt")
    if not isinstance(found, str) or not found:
        raise MergelabError(
            f'{path}, line {number}: {line[:60]!r} is neither a JSON string nor an object with a "prompt"; '
            "correct the line, or name the file .txt for plain lines."
        )
    return found
