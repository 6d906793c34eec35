"""The gallery of operators: formula, reference, a picture of what each does, and what it measured."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import matplotlib
import numpy as np

from mergelab import operators as ops
from mergelab.errors import OperatorError
from mergelab.operators import OPERATORS

matplotlib.use("Agg")

SIDE = 48
"""Points along each axis of a picture; one entry of a tensor each."""
MEASURED = ("docs/measured_operators.md", "benchmarks/siblings.md")
"""Pages with a table whose rows begin with an operator's name; the first that there is counts."""

_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    **{
        name: {"density": 0.5}
        for name in ("ties", "dare_linear", "dare_ties", "della", "della_linear", "darex")
    },
    **{name: {"density": 0.6, "gamma": 0.1} for name in ("breadcrumbs", "breadcrumbs_ties")},
    **{name: {"t": 0.5} for name in ("slerp", "nearswap")},
    "wise_ft": {"alpha": 0.5},
    "passthrough": {"scale": 0.5},
    "sce": {"select_topk": 0.5},
}
"""Hyper-parameters at which an operator shows what it is; others have their defaults, and weights of 1."""


def toy() -> tuple[np.ndarray, np.ndarray]:
    """Two task vectors of `SIDE * SIDE` entries: every pair of changes from -1 to 1, one to each entry."""
    a, b = np.meshgrid(np.linspace(-1, 1, SIDE), np.linspace(-1, 1, SIDE))
    return a.astype(np.float32), b.astype(np.float32)


def built(name: str) -> tuple[Any, dict[str, Any]]:
    """An operator at the settings of its picture."""
    operator = OPERATORS[name]
    given = dict(_SETTINGS.get(name, {}))
    for parameter in operator.parameters:
        if parameter.name == "weight" and parameter.keyword not in given:
            given[parameter.keyword] = 1.0
        elif parameter.required and parameter.keyword not in given:
            given[parameter.keyword] = 0.5
    merge = operator(**given)
    if (
        operator.statistics is not None
    ):  # what it does without them is their mean; the text says what they are for
        merge = dataclasses.replace(merge, inputs=dataclasses.replace(merge.inputs, statistics=None))
    return merge, given


def merged(name: str) -> np.ndarray:
    """What an operator makes of each pair of changes, less the base: [SIDE, SIDE]."""
    operator = OPERATORS[name]
    merge, _ = built(name)
    a, b = toy()
    base = np.full_like(a, 1.0)  # far enough from 0 that angles are small
    models = [{"w": jnp.asarray(base + delta)} for delta in (a, b)]
    if operator.max_models == 1 and operator.base == "required":  # the base is the second model
        return np.asarray(merge([models[0]], base=models[1])["w"]) - base
    if operator.max_models == 1:
        return np.asarray(merge([models[0]])["w"]) - base
    try:
        merge.check(len(models), True)
    except OperatorError:  # averages, which treat all models alike
        return np.asarray(merge(models)["w"]) - base
    return np.asarray(merge(models, base={"w": jnp.asarray(base)})["w"]) - base


def draw(values: np.ndarray, path: Path) -> None:
    """One picture: the merged change by the changes of the two models."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.7, 2.5), dpi=110, layout="constrained")
    axes = figure.subplots()
    limit = float(max(np.nanmax(np.abs(values)), 1e-6))
    shown = axes.imshow(
        values, origin="lower", extent=(-1, 1, -1, 1), cmap="RdBu_r", vmin=-limit, vmax=limit,
        interpolation="nearest",
    )  # fmt: skip
    axes.set_xlabel("change in model A", fontsize=8)
    axes.set_ylabel("change in model B", fontsize=8)
    axes.tick_params(labelsize=7)
    figure.colorbar(shown, ax=axes, shrink=0.85).ax.tick_params(labelsize=7)
    figure.savefig(path)


def measured(repository: Path) -> tuple[str, list[str], dict[str, list[str]]]:
    """The page with measured rows, the columns of its table, and the rows by operator."""
    for page in MEASURED:
        path = repository / page
        if not path.is_file():
            continue
        lines = [line for line in path.read_text("utf-8").splitlines() if line.startswith("| ")]
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        rows: dict[str, list[str]] = {}
        for row in cells:
            name = re.match(r"[`*]*(\w+)", row[0])
            if name and name[1] in OPERATORS:
                rows.setdefault(name[1], row)
        if rows:
            header = next(row for row in cells if len(row) == len(next(iter(rows.values()))))
            return page, header, rows
    return "", [], {}


def _entry(
    name: str, given: Mapping[str, Any], row: Sequence[str] | None, header: Sequence[str]
) -> list[str]:
    operator = OPERATORS[name]
    settings = ", ".join(f"`{key.rstrip('_')}` {value}" for key, value in given.items()) or "defaults"
    lines = [f"## {name}", "", f"![What {name} makes of two changes]({name}.png)", ""]
    lines += [operator.summary, ""]
    lines += [f"- Reference: {operator.reference}"]
    lines += [f"- Good for: {operator.helps}"] if operator.helps else []
    lines += [f"- In the picture: {settings}"]
    lines += [f"- Parameters and defaults: [{name}](../docs/operators.md#{name})", ""]
    if row is not None:
        kept = [(h, c) for h, c in zip(header, row, strict=True) if c and c != "-"]
        lines += ["| " + " | ".join(h for h, _ in kept) + " |", "|" + "---|" * len(kept)]
        lines += ["| " + " | ".join(c for _, c in kept) + " |", ""]
    return lines


def write_gallery(folder: Path, repository: Path) -> None:
    """Writes `index.md` and a picture of each operator."""
    folder.mkdir(parents=True, exist_ok=True)
    page, header, rows = measured(repository)
    lines = [
        "# Operator gallery",
        "",
        "Two models and their base, in a toy that one can see. Each point of a picture is one parameter: "
        "its place says how much model A (to the right) and model B (upwards) have changed it, from -1 to "
        "1, and its color how much the merge changes it, red up and blue down. An average is a slope along "
        "the diagonal. Where a picture is white, the merge keeps the base. The operators that make these "
        "pictures are those that merge checkpoints.",
        "",
        f"Measured rows come from [{page}](../{page}), which says on which models and texts." if page else "",
        "",
        "Operators of whole matrices look at singular vectors, of which the toy has one in each model: their "
        "pictures say little. Those that take statistics of data are drawn without them.",
        "",
    ]
    for name in OPERATORS:
        values = merged(name)
        draw(values, folder / f"{name}.png")
        lines += _entry(name, built(name)[1], rows.get(name), header)
    (folder / "index.md").write_text("\n".join(lines), encoding="utf-8")


__all__ = ["built", "draw", "measured", "merged", "ops", "toy", "write_gallery"]
