"""How much memory a corpus takes on its way to contexts: read whole, and tokenized for some minutes.

Usage: `python -m benchmarks.corpus --work FOLDER [--model FOLDER] [--gigabytes 2] [--tokenize 480]`. Prints a
table; needs `mergelab[data]` for the row of parquet.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).parent.parent
_POINTS = 8


def main() -> None:
    """Writes the corpora, measures each in a process of its own, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for the corpora")
    parser.add_argument(
        "--model", type=Path, help="folder with the tokenizer; without one nothing is tokenized"
    )
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the JSON lines")
    parser.add_argument("--tokenize", type=float, default=480.0, help="CPU seconds of tokenizing")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        _child(given.child[0], Path(given.child[1]), given.model, given.tokenize)
        return
    given.work.mkdir(parents=True, exist_ok=True)
    lines = _written(given.work, "corpus.jsonl", given.gigabytes, _write_lines)
    packed = _written(given.work, "corpus.jsonl.gz", given.gigabytes / 4, _write_packed)
    rows = [("read", lines), ("read", packed)]
    if importlib.util.find_spec("pyarrow") is not None:
        rows.append(("read", _written(given.work, "corpus.parquet", given.gigabytes / 4, _write_parquet)))
    if given.model is not None:
        rows.append(("tokenize", lines))
    print("| | GB of text | CPU s | RSS before | RSS at each eighth of the time, MB | peak | above |")
    print("|---|---:|---:|---:|---|---:|---:|")
    for what, path in rows:
        print(_row(what, path, given), flush=True)


def _row(what: str, path: Path, given: argparse.Namespace) -> str:
    command = [
        sys.executable,
        "-m",
        "benchmarks.corpus",
        "--work",
        str(given.work),
        "--child",
        what,
        str(path),
    ]
    command += ["--tokenize", str(given.tokenize)]
    command += [] if given.model is None else ["--model", str(given.model)]
    done = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    said = json.loads(done.stdout.splitlines()[-1])
    seen = said["rss"]
    points = [seen[len(seen) * n // _POINTS] for n in range(_POINTS)]
    before = said["before"]
    return (
        f"| {what} {path.suffix[1:]} | {said['bytes'] / 1e9:.2f} | {said['seconds']:.0f} | {before} | "
        f"{', '.join(map(str, points))} | {max(seen)} | {max(seen) - before} |"
    )


def _child(what: str, path: Path, model: Path | None, most: float) -> None:
    """Reads or tokenizes a corpus, and prints what it took as JSON."""
    from mergelab.text.corpus import Document, documents

    seen: list[int] = []
    done = [0]

    def counted(read: Iterator[Document]) -> Iterator[Document]:
        last = 0.0
        for document in read:
            pieces = list(document.pieces)
            done[0] += sum(len(piece.encode()) for piece in pieces)
            if time.process_time() - last > 0.2:
                seen.append(_rss())
                last = time.process_time()
            if what == "tokenize" and last > most:
                return
            yield Document(document.place, pieces)

    if what == "tokenize":
        from mergelab.text.contexts import text_contexts
        from mergelab.text.tokenizer import load_tokenizer

        assert model is not None
        tokenizer = load_tokenizer(model)
        tokenizer.encode("warm")
        before = _rss()
        text_contexts(tokenizer, counted(documents(path)), 128)
    else:
        if path.suffix == ".parquet":
            importlib.import_module("pyarrow.parquet")
        before = _rss()
        for _ in counted(documents(path)):
            pass
    seen.append(_rss())
    print(json.dumps({"bytes": done[0], "seconds": time.process_time(), "before": before, "rss": seen}))


def _rss() -> int:
    """Memory of this process in MB, with the mapped files it looks at."""
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) // 1000


def _texts(size: float) -> Iterator[str]:
    """Documents of 200 to 60,000 characters from the modules of the standard library, until `size` bytes."""
    folder = Path(json.__file__).parent.parent
    modules = [path.read_text("utf-8", "ignore") for path in sorted(folder.glob("*.py"))]
    rng = np.random.default_rng(0)
    written = 0
    while written < size:
        module = modules[rng.integers(len(modules))]
        length = int(np.clip(np.exp(rng.normal(7.5, 1.2)), 200, 60_000))
        begin = int(rng.integers(max(len(module) - length, 1)))
        text = f"Document {written}\n\n{module[begin : begin + length]}"
        written += len(text.encode())
        yield text


def _written(folder: Path, name: str, gigabytes: float, write: Callable[[Path, Iterator[str]], None]) -> Path:
    path = folder / name
    if not path.exists():
        write(path, _texts(gigabytes * 1e9))
    return path


def _write_lines(path: Path, texts: Iterator[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text, "source": "stdlib"}) + "\n")


def _write_packed(path: Path, texts: Iterator[str]) -> None:
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=1) as file:
        for text in texts:
            file.write(json.dumps({"text": text}) + "\n")


def _write_parquet(path: Path, texts: Iterator[str]) -> None:
    import pyarrow  # pyright: ignore[reportMissingImports]
    import pyarrow.parquet  # pyright: ignore[reportMissingImports]

    schema = pyarrow.schema([("text", pyarrow.string()), ("source", pyarrow.string())])
    with pyarrow.parquet.ParquetWriter(path, schema) as file:
        rows: list[str] = []
        for text in texts:
            rows.append(text)
            if len(rows) == 20_000:  # some 80 MB: what data sets on the hub have
                file.write_table(pyarrow.table({"text": rows, "source": ["stdlib"] * len(rows)}, schema))
                rows = []
        file.write_table(pyarrow.table({"text": rows, "source": ["stdlib"] * len(rows)}, schema))


if __name__ == "__main__":
    main()
