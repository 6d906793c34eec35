"""Records what mergekit makes of the recipes in `recipes/` and the models of `models.py`, in the small form.

    python -m tests.goldens.record path/to/mergekit-yaml [WHOLE]

mergekit is 0.1.5. `WHOLE` is a folder for the models and the whole outputs, laid out as MERGELAB_GOLDENS
expects it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.goldens.models import HERE, write_models
from tests.goldens.recording import digest, load, small
from tests.merging.test_recipe_goldens import EXACT

# What the files of a case hold besides the weights; the tokenizer's where a recipe makes a new one.
FILES = ("config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json")


def statistics(delta: np.ndarray) -> dict[str, float]:
    d = delta.astype(np.float64).ravel()
    return {
        "n": d.size,
        "zero_frac": float(np.mean(d == 0)),
        "l1": float(np.abs(d).sum()),
        "l2": float(np.sqrt((d**2).sum())),
        "mean": float(d.mean()),
        "max": float(np.abs(d).max()),
    }


def run(program: str, case: Path, folder: Path) -> None:
    options = json.loads((case / "options.json").read_text()) if (case / "options.json").exists() else {}
    command = [program, str(case / "config.yaml"), str(folder), "--allow-crimes", "--no-write-model-card"]
    command += [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    subprocess.run([*command, "--quiet"], cwd=case.parent.parent, check=True)


def main(program: str, whole: Path) -> None:
    shutil.copytree(HERE / "recipes", whole / "recipes", dirs_exist_ok=True)
    for name in ("op_goldens.json", "op_goldens.safetensors", "spectral.npz"):
        shutil.copy(HERE / name, whole / name)
    write_models(whole / "models")
    outputs: dict[str, dict[str, np.ndarray]] = {}
    base = load(whole / "models" / "llama-base" / "model.safetensors")
    for case in sorted((whole / "recipes").iterdir()):
        out = whole / "out"
        run(program, case, out)
        merged = load(out / "model.safetensors")
        kept = HERE / "recipes" / case.name
        for name in FILES:
            if (kept / name).exists():
                shutil.copy(out / name, case / name)
                shutil.copy(out / name, kept / name)
        if (kept / "stats.json").exists():
            stats = {name: statistics(value - base[name]) for name, value in merged.items()}
            for folder in (case, kept):
                (folder / "stats.json").write_text(json.dumps(stats, indent=0) + "\n")
        if (case / "SAME_AS").exists():
            same = (case / "SAME_AS").read_text().strip()
            assert digest(merged) == digest(load(whole / "recipes" / same / "model.safetensors")), case.name
        else:
            shutil.copy(out / "model.safetensors", case)
            if not (kept / "stats.json").exists():
                outputs[case.name] = merged
        shutil.rmtree(out)
    index, arrays = small(outputs, set(EXACT))
    index["models"] = {
        folder.name: digest({k: v for f in folder.glob("*.safetensors") for k, v in load(f).items()})
        for folder in sorted((whole / "models").iterdir())
    }
    (HERE / "outputs.json").write_text(json.dumps(index, indent=1) + "\n")
    np.savez_compressed(HERE / "outputs.npz", **arrays)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else temporary).resolve())
