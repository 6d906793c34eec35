"""Whole processes from their start to the first token: seconds, and memory of their own against the weights.

    python -m benchmarks.world_parts.first_token MODEL.gguf float32    # the process of transformers

mergelab's is its command, `mergelab generate MODEL.gguf --prompt TEXT --max-new-tokens 1`: once with nothing
compiled before, and once with the programs that the command keeps.
"""

from __future__ import annotations

import importlib
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.process import Measured, measure

__all__ = ["rows"]

PROMPT = "The capital of Japan is"
_REPOSITORY = Path(__file__).resolve().parent.parent.parent
_COMMAND = "from mergelab.cli.main import main; main()"


def rows(model: Path, work: Path, weights: Mapping[str, int], turns: int) -> list[tuple[str, str, str, str]]:
    """Rows of a section: what, mergelab, transformers, their ratio.

    Args:
        model: a GGUF file.
        work: a folder for compiled programs.
        weights: bytes of the weights as loaded, by dtype.
        turns: number of runs, of which the medians count.
    """
    found = []
    for dtype, held in weights.items():
        runs: dict[str, list[Measured]] = {"cold": [], "warm": [], "theirs": []}
        for turn in range(turns):
            place = {"JAX_COMPILATION_CACHE_DIR": str(work / f"programs-{dtype}-{turn}")}
            arguments = ["--prompt", PROMPT, "--max-new-tokens", "1", "--greedy", "--dtype", dtype]
            ours = [sys.executable, "-c", _COMMAND, "generate", str(model), *arguments]
            runs["cold"].append(_run(ours, work, place))
            runs["warm"].append(_run(ours, work, place))
            runs["theirs"].append(_run([sys.executable, "-m", __spec__.name, str(model), dtype], work))
        answers = {run.stdout.strip() for kind in runs.values() for run in kind}
        assert len(answers) == 1, f"the first tokens differ: {answers}"
        seconds = {kind: statistics.median(run.seconds for run in kinds) for kind, kinds in runs.items()}
        peaks = {kind: max(run.peak_anonymous for run in kinds) / held for kind, kinds in runs.items()}
        for kind, said in (("cold", "nothing compiled before"), ("warm", "programs kept")):
            a, b = seconds[kind], seconds["theirs"]
            found.append(
                (f"a process up to its first token, {dtype}, {said}", f"{a:.2f}", f"{b:.2f}", f"{a / b:.2f}")
            )
            a, b = peaks[kind], peaks["theirs"]
            found.append(
                (f"its memory / the weights ({held / 1e6:.0f} MB)", f"{a:.2f}", f"{b:.2f}", f"{a / b:.2f}")
            )
    return found


def _run(command: Sequence[str], work: Path, more: Mapping[str, str] | None = None) -> Measured:
    quiet = {"PYTHONPATH": str(_REPOSITORY), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    return measure(command, cwd=work, env={**os.environ, **quiet, **(more or {})})


def main() -> None:
    """Prints the token that transformers finds."""
    path, dtype = Path(sys.argv[1]), sys.argv[2]
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=getattr(torch, dtype)
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ids = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        new = model.generate(**ids, do_sample=False, max_new_tokens=1)
    print(tokenizer.decode(new[0, ids["input_ids"].shape[1] :]))


if __name__ == "__main__":
    main()
