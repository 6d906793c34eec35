"""Three kinds of text that every environment with mergelab in it has: Python sources, C headers, licenses."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

__all__ = ["DOMAINS", "PASSAGE", "write_texts"]

DOMAINS = ("python", "c headers", "licenses")
PASSAGE = 500
"""Characters of one held-out document."""


def write_texts(folder: Path, *, train: int, held_out: int) -> dict[str, tuple[Path, Path]]:
    """Writes, for each domain, JSON lines to train on and to judge on; no file is in both.

    Args:
        folder: where to.
        train: characters to train on, of each domain.
        held_out: passages to judge on, each of another file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for domain in DOMAINS:
        # Many packages hold the same file.
        texts = sorted({(path.name, path.stat().st_size): path for path in _files(domain)}.values())
        order = np.random.default_rng(0).permutation(len(texts))
        readable = (text for place in order if len(text := _read(texts[place])) >= 2 * PASSAGE)
        judged = [
            text[len(text) // 2 :][:PASSAGE] for _, text in zip(range(held_out), readable, strict=False)
        ]
        if len(judged) < held_out:
            raise ValueError(f"only {len(judged)} files of {domain!r} are here; {held_out} are needed")
        learned: list[str] = []
        for text in readable:
            if sum(map(len, learned)) >= train:
                break
            learned.append(text[:4000])
        name = domain.replace(" ", "-")
        found[domain] = (folder / f"{name}.train.jsonl", folder / f"{name}.held-out.jsonl")
        for path, documents in zip(found[domain], (learned, judged), strict=True):
            path.write_text(
                "".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8"
            )
    return found


def _files(domain: str) -> Iterator[Path]:
    paths = {name: Path(place) for name, place in sysconfig.get_paths().items()}
    packages = paths["purelib"]
    if domain == "python":
        yield from paths["stdlib"].glob("*.py")
    elif domain == "c headers":
        yield from paths["include"].rglob("*.h")
        yield from packages.rglob("*.h")
    else:
        for pattern in ("LICENSE*", "COPYING*", "NOTICE*"):
            yield from packages.glob(f"*.dist-info/**/{pattern}")


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
