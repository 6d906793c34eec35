"""Makes `saelens.safetensors` and `saelens_hooks.json`: what SAELens makes of files of `saelens_cases.py`.

Run where sae-lens 6.54.12 is installed, with a folder that holds sae-lens 5.11.0 for what version 6 refuses
(`pip install --no-deps --target FOLDER sae-lens==5.11.0`):
`python tests/sae/formats/record_saelens.py FOLDER`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from saelens_cases import Case, cases, inputs, tensors_of, whitening
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).parent


def _written(case: Case, folder: Path) -> Path:
    folder.mkdir()
    save_file(tensors_of(case), folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(dict(case.cfg)))
    return folder


def _ask(case: Case, folder: Path) -> tuple[torch.Tensor, torch.Tensor, str | None]:
    import sae_lens

    x = torch.tensor(inputs())
    if case.heads:
        x = x.reshape(len(x), case.heads, -1)
    if case.by == "5":
        sae = sae_lens.SAE.load_from_pretrained(str(folder))
        hook = sae.cfg.hook_name
    elif case.by == "train":
        trained = sae_lens.TrainingSAE.load_from_disk(folder)
        trained.save_inference_model(folder / "finished")
        sae = sae_lens.SAE.load_from_disk(folder / "finished")
        hook = case.cfg["metadata"]["hook_name"]
    else:
        sae = sae_lens.SAE.load_from_disk(folder)
        hook = sae.cfg.metadata.hook_name
        if case.factor is not None:
            sae.fold_activation_norm_scaling_factor(case.factor)
        if case.whitens:
            held = {name: torch.tensor(value) for name, value in whitening().items()}
            sae.fold_activation_whitening(held["mean"], held["matrix"], held["inverse_matrix"])
    with torch.no_grad():
        codes = sae.encode(x)
        out = sae(x)
    return codes, out.reshape(len(out), -1), hook


def _record(names: list[str], out: Path) -> None:
    found, hooks = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            case = cases()[name]
            codes, reconstructed, hooks[name] = _ask(case, _written(case, Path(scratch) / name))
            found[f"{name}/codes"] = np.ascontiguousarray(codes.numpy(), np.float32)
            found[f"{name}/out"] = np.ascontiguousarray(reconstructed.numpy(), np.float32)
    save_file(found, out)
    out.with_suffix(".json").write_text(json.dumps(hooks))


def main() -> None:
    """Asks both versions, each in a process of its own, and puts their answers together."""
    if len(sys.argv) > 2:
        _record(sys.argv[2].split(","), Path(sys.argv[1]))
        return
    arrays, hooks = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        for version, path in (("6", str(HERE)), ("5", f"{sys.argv[1]}:{HERE}")):
            names = [name for name, case in cases().items() if (case.by == "5") == (version == "5")]
            out = Path(scratch) / f"{version}.safetensors"
            command = [sys.executable, __file__, str(out), ",".join(names)]
            subprocess.run(command, check=True, env={"PYTHONPATH": path, "HOME": scratch, "PATH": "/usr/bin"})
            arrays |= load_file(out)
            hooks |= json.loads(out.with_suffix(".json").read_text())
    save_file(arrays, HERE / "saelens.safetensors")
    (HERE / "saelens_hooks.json").write_text(json.dumps(dict(sorted(hooks.items())), indent=0) + "\n")


if __name__ == "__main__":
    main()
