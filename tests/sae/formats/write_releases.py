"""Makes `mergelab/sae/formats/releases.json`: which repository holds which published SAE.

The facts are those of `pretrained_saes.yaml` in a wheel of sae-lens (MIT license, Joseph Bloom and
contributors): names, repositories, paths, models and the kind of files. Run
`pip download --no-deps sae-lens==6.54.12`, unpack the wheel, and give the YAML file and the version:
`python tests/sae/formats/write_releases.py pretrained_saes.yaml 6.54.12 mergelab/sae/formats/releases.json`.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

_LAYER = re.compile(r"(?:(?<![A-Za-z])(?:[Ll]ayer_?|blocks\.|L)|^l)(\d+)(?!\d)")
_LAST = re.compile(r"(?i)(.*\D)(\d+)(\D*)")
_FOLDED = ("sae_lens", "llama_scope_r1_distill")
"""Kinds whose files do not say by how much the activations were scaled before the SAE read them."""
_OVERRIDES = (
    "dataset_path",
    "hook_name",
    "model_from_pretrained_kwargs",
    "model_name",
    "normalize_activations",
)


def by_layer(name: str, path: str) -> tuple[str, str, int | None]:
    """`blocks.3.x`, `layer_3` -> `blocks.#.x`, `layer_#`, 3."""
    found = _LAYER.search(name)
    if found is None:
        return name, path, None
    number = found[1]

    def marked(text: str) -> str:
        for place in reversed([m for m in _LAYER.finditer(text) if m[1] == number]):
            text = f"{text[: place.start(1)]}#{text[place.end(1) :]}"
        return text

    return checked(name, path, marked(name), marked(path), number)


def by_last(name: str, path: str) -> tuple[str, str, int | None]:
    """`layer_3/average_l0_12` -> `layer_3/average_l0_#`, 12."""
    found, other = _LAST.fullmatch(name), _LAST.fullmatch(path)
    if found is None or other is None or found[2] != other[2]:
        return name, path, None
    return checked(name, path, f"{found[1]}#{found[3]}", f"{other[1]}#{other[3]}", found[2])


def checked(name: str, path: str, short: str, short_path: str, number: str) -> tuple[str, str, int | None]:
    back = (short.replace("#", number), short_path.replace("#", number))
    if back != (name, path) or str(int(number)) != number or "*" in path:
        return name, path, None
    return short, short_path, int(number)


def numbers(found: list[int]) -> str:
    """`[0, 1, 2, 5]` -> `0-2,5`."""
    runs: list[list[int]] = []
    for number in sorted(found):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{a}-{b}" if b > a else str(a) for a, b in runs)


def short_list(saes: list[dict[str, Any]], shorten: Any) -> list[list[str]]:
    groups: dict[tuple[str, str], list[int | None]] = {}
    for sae in saes:
        name, path, number = shorten(str(sae["id"]), str(sae["path"]))
        groups.setdefault((name, path.replace(name, "*") if name else path), []).append(number)
    found = []
    for (name, path), members in groups.items():
        whole = [number for number in members if number is not None]
        found.append([name, path, numbers(whole)] if whole else [name, path])
    return found


def main(source: Path, version: str, out: Path) -> None:
    releases = {}
    for release, said in yaml.load(source.read_text(), Loader=yaml.CSafeLoader).items():
        kind = said.get("conversion_func") or "sae_lens"
        entry: dict[str, Any] = {"repo": said["repo_id"], "model": said["model"], "kind": kind}
        given = {
            key: value for key, value in (said.get("config_overrides") or {}).items() if key in _OVERRIDES
        }
        if given:
            entry["says"] = given
        scales = {
            sae["id"]: sae["norm_scaling_factor"] for sae in said["saes"] if "norm_scaling_factor" in sae
        }
        if kind in _FOLDED and scales:
            entry["scales"] = scales
        lists = [short_list(said["saes"], shorten) for shorten in (by_layer, by_last)]
        entry["saes"] = min(lists, key=lambda one: len(json.dumps(one)))
        releases[release] = entry
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(releases.items()))
    source_said = f"pretrained_saes.yaml of sae-lens {version} (MIT license)"
    out.write_text(f'{{"source": {json.dumps(source_said)}, "releases": {{\n{lines}\n}}}}\n')


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
