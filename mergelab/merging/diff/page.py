"""A comparison as tables, a figure and a page."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.merging.diff.comparison import ModelDiff, TensorDiff
from mergelab.merging.diff.measures import Relations
from mergelab.merging.diff.pairs import layer_of
from mergelab.merging.diff.samples import DENSITIES, EDGES
from mergelab.report.curves import Panel, curves_figure
from mergelab.report.heatmap import heatmap_figure
from mergelab.report.sections import Section, render_sections

__all__ = ["diff_files", "layer_rows", "tensor_rows", "verdict"]

_MOST_ROWS = 40


def number(value: float | None, digits: int = 3) -> str:
    """A number as a reader wants it; `-` where there is none."""
    if value is None:
        return "-"
    return f"{value:.{digits}g}" if value and not 1e-3 <= abs(value) < 1e4 else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """A fraction in percent, with three digits."""
    return "-" if value is None else "0 %" if value == 0 else f"{100 * value:.3g} %"


def angle(value: float | None) -> str:
    """Degrees."""
    return "-" if value is None else f"{value:.3g}°"


def _columns(relations: Relations, conflict: Sequence[float]) -> tuple[list[str], list[str]]:
    first = relations.first
    if len(relations.tasks) < 2:
        ratio, same = number(first.norm_ratio, 4), percent(relations.unchanged)
        return ["change", "angle", "norm ratio", "unchanged"], [
            percent(first.relative_change), angle(first.angle), ratio, same
        ]  # fmt: skip
    known = [cosine for _, _, cosine in relations.task_cosines if cosine is not None]
    mean = None if not known else float(np.mean(known))
    header = [
        "A to B",
        *(f"|{task.model[-16:]}|" for task in relations.tasks),
        "task cosine",
        "conflict at 0.2",
    ]
    return header, [
        percent(first.relative_change),
        *(percent(task.relative) for task in relations.tasks),
        "-" if mean is None else f"{round(mean, 3) + 0:.3f}",
        percent(conflict[DENSITIES.index(0.2)] if conflict else None),
    ]


def layer_rows(diff: ModelDiff) -> tuple[list[str], list[list[str]]]:
    """Header and rows: layers, then all tensors together."""
    rows: list[list[str]] = []
    for layer in diff.layers:
        rows.append([layer.layer, *_columns(layer.relations, layer.sign_conflict)[1]])
    every = [tensor for tensor in diff.tensors if tensor.sign_conflict]
    whole: tuple[float, ...] = ()
    if every:
        weights = [float(tensor.relations.entries) for tensor in every]
        whole = tuple(np.average([t.sign_conflict for t in every], axis=0, weights=weights).tolist())
    header, cells = _columns(diff.total, whole)
    return ["layer", *header], [*rows, ["all tensors", *cells]]


def tensor_rows(tensors: Sequence[TensorDiff], most: int = _MOST_ROWS) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the tensors that changed most."""
    changed = sorted(tensors, key=lambda t: -(t.relations.first.relative_change or 0.0))[:most]
    header: list[str] = ["tensor"]
    rows: list[list[str]] = []
    spectral = any(tensor.spectra for tensor in changed)
    for tensor in changed:
        names, cells = _columns(tensor.relations, tensor.sign_conflict)
        header = ["tensor", *names, "below 1e-3"]
        row = [tensor.name, *cells, percent(tensor.relations.small)]
        if spectral:
            header += ["effective rank", "90 % of energy in"]
            found = next(iter(tensor.spectra.values()), None)
            row += (
                ["-", "-"]
                if found is None
                else [f"{found.effective_rank:.0f} of {found.rank}", str(found.rank_90)]
            )
        rows.append(row)
    return header, rows


def verdict(diff: ModelDiff) -> list[str]:
    """What a reader should know first, one sentence each."""
    first = diff.total.first
    equal = "" if not diff.total.equal else ": all values are equal"
    found = [
        f"{first.model} differs from {first.other} by {percent(first.relative_change)} of its norm, at "
        f"an angle of {angle(first.angle)}; {percent(diff.total.unchanged)} of {diff.total.entries:,} "
        f"weights are unchanged{equal}."
    ]
    descent = diff.descent
    if diff.base is None:
        found.append(f"No base: {'; '.join(descent.reasons)}.")
    elif not descent.given:
        found.append(f"{diff.base} looks like the base: {'; '.join(descent.reasons)}.")
    else:
        found += [f"{reason[0].upper()}{reason[1:]}." for reason in descent.reasons]
    found += [f"Doubt: {doubt}." for doubt in descent.doubts]
    if first.cosine is not None and first.cosine < 0.25:
        found.append("Their weights are unrelated: a merge of them is meaningless.")
    for name, count in diff.total.nonfinite.items():
        found.append(f"{name} holds {count:,} NaN or infinite values.")
    for each in diff.settings:
        tokens = [
            f"{count:,} tokens {what}"
            for count, what in (
                (each.only, f"that {each.other} lacks"),
                (each.lost, "fewer"),
                (each.moved, "with other ids"),
            )
            if count
        ]
        if tokens:
            found.append(f"{each.model} has {', '.join(tokens)}.")
        if each.chat_template not in ("equal", "none"):
            found.append(f"The chat template of {each.model} and {each.other}: {each.chat_template}.")
        found += [
            f"{s.key} is {s.value!r} in {each.model} and {s.other!r} in {each.other}."
            for s in each.settings[:12]
        ]
    for model, names in diff.lacking.items():
        found.append(f"{model} alone has {len(names)} tensor(s), such as {names[0]}.")
    found += [f"{note[0].upper()}{note[1:]}." for note in diff.notes]
    if (text := diff.on_text) is not None:
        found += _of_text(text)
    return found


def _of_text(text: Any) -> list[str]:
    first, second = text.models
    found: list[str] = []
    if text.kl is not None:
        found.append(
            f"On {text.tokens:,} tokens KL({second} || {first}) is {number(text.kl)} nats per token, and "
            f"both put the same token first after {percent(text.agreement)}."
        )
    if text.losses is not None:
        found.append(f"Losses: {text.losses[0]:.4f} and {text.losses[1]:.4f} nats per token.")
    if text.barrier is not None:
        found.append(f"The loss on the line between them rises {number(text.barrier)} nats above its ends.")
    if text.flatness is not None and text.losses is not None:
        found.append(
            f"Random changes of the same norm add {number(text.flatness)} nats to the loss of {second}, the "
            f"true one {number(text.losses[0] - text.losses[1])}."
        )
    return [*found, *(f"{note[0].upper()}{note[1:]}." for note in text.notes)]


def diff_files(diff: ModelDiff) -> dict[str, bytes]:
    """Contents of `diff.json`, `figure.png` and `page.html`, by name."""
    from io import BytesIO

    image = BytesIO()
    curves_figure(_panels(diff)).savefig(image, format="png", dpi=150, facecolor="white")
    data = json.dumps(diff.as_data(), indent=2, allow_nan=False) + "\n"
    return {"diff.json": data.encode(), "figure.png": image.getvalue(), "page.html": _page(diff).encode()}


def _page(diff: ModelDiff) -> str:
    first = diff.total.first
    layers, tensors = layer_rows(diff), tensor_rows(diff.tensors)
    sections = [
        Section("", verdict(diff)),
        Section("Over the layers", (), curves_figure(_panels(diff)), "Curves of the change over the layers."),
    ]
    if (grid := _grid(diff)) is not None:
        values, rows, columns = grid
        figure = heatmap_figure(values, rows, columns, scale="change, % of the norm")
        sections.append(Section("Every tensor of every layer", (), figure, "Relative change of each tensor."))
    sections += [
        Section("Layers", (), None, "", *layers),
        Section("Tensors that changed most", (), None, "", *tensors),
    ]
    if diff.moved_rows:
        moved = [
            [repr(r.token) if r.token else str(r.row), r.tensor, percent(r.relative_change)]
            for r in diff.moved_rows
        ]
        sections.append(
            Section("Tokens whose rows moved most", (), None, "", ["token", "tensor", "change"], moved)
        )
    sections.append(Section("What the numbers are", _EXPLAINED))
    return render_sections(f"{Path(first.model).name} against {Path(first.other).name}", sections)


_EXPLAINED = (
    "Change: |A - B| / |B| of the weights as vectors, exact over all entries. Angle: between A and B. Norm "
    "ratio: |A| / |B|. Unchanged: entries that are exactly equal. Names between bars: norms of task "
    "vectors, of the base's norm.",
    "Conflict: of the entries that at least two task vectors keep when each is trimmed to its largest "
    "fifth, the fraction in which their signs disagree; task cosine: mean over the pairs of task vectors. "
    "Histograms and conflicts are of 65,536 entries of each tensor.",
)


def _panels(diff: ModelDiff) -> list[Panel]:
    across = list(range(len(diff.layers)))
    panels: list[Panel] = []
    if diff.layers:
        tasks = [task.model for task in diff.layers[0].relations.tasks]
        if len(tasks) > 1:
            curves = {
                Path(name).name: (across, [100 * (x.relations.tasks[i].relative or 0) for x in diff.layers])
                for i, name in enumerate(tasks)
            }
        else:
            heights = [layer.relations.first.relative_change for layer in diff.layers]
            curves = {"change": (across, [None if h is None else 100 * h for h in heights])}
        panels.append(Panel("Change of each layer, % of its norm", "layer", curves))
        ratios = [layer.relations.first.norm_ratio for layer in diff.layers]
        panels.append(Panel("Norm ratio", "layer", {"ratio": (across, ratios)}, from_zero=False))
        if diff.layers[0].relations.task_cosines:
            curves = {
                f"{Path(a).name}, {Path(b).name}": (
                    across,
                    [layer.relations.task_cosines[i][2] for layer in diff.layers],
                )
                for i, (a, b, _) in enumerate(diff.layers[0].relations.task_cosines)
            }
            panels.append(Panel("Cosine of task vectors", "layer", curves, from_zero=False))
    known = [tensor for tensor in diff.tensors if tensor.histogram]
    if known:
        weights = [float(tensor.relations.entries) for tensor in known]
        shares = np.average([tensor.histogram for tensor in known], axis=0, weights=weights)
        middle = [1.5 * edge for edge in EDGES[1:]]
        heights = [100 * float(share) for share in shares[1:]]
        panels.append(
            Panel("Size of the changes, % of the entries", "|change|, bins of a factor of 2",
                  {"share": (middle, heights)}, log_across=True)
        )  # fmt: skip
    conflicting = [tensor for tensor in diff.tensors if tensor.sign_conflict]
    if conflicting:
        weights = [float(tensor.relations.entries) for tensor in conflicting]
        shares = np.average([tensor.sign_conflict for tensor in conflicting], axis=0, weights=weights)
        panels.append(
            Panel("Sign conflict, %", "density of the trimmed task vectors",
                  {"conflict": (list(DENSITIES), [100 * float(s) for s in shares])}, log_across=True)
        )  # fmt: skip
    if (text := diff.on_text) is not None:
        places = list(range(len(text.layers)))
        panels.append(
            Panel("Activations", "block", {
                "relative change": (places, [layer.relative_change for layer in text.layers]),
                "1 - CKA": (places, [1 - layer.cka for layer in text.layers]),
            })
        )  # fmt: skip
        if text.line:
            alphas, losses = zip(*text.line, strict=True)
            panels.append(
                Panel("Loss between the models, nats per token", "from the second to the first",
                      {"loss": (alphas, losses)}, from_zero=False)
            )  # fmt: skip
    return panels


def _grid(diff: ModelDiff) -> tuple[np.ndarray, list[str], list[str]] | None:
    """Relative changes in percent: `[layers, kinds]`."""
    places = [(tensor, place) for tensor in diff.tensors if (place := layer_of(tensor.name)) is not None]
    rows = [layer.layer for layer in diff.layers]
    columns = list(dict.fromkeys(place[1] for _, place in places))
    if not rows or len(columns) > 64:
        return None
    values = np.zeros((len(rows), len(columns)))
    for tensor, (layer, kind) in places:
        values[rows.index(layer), columns.index(kind)] = 100 * (tensor.relations.first.relative_change or 0.0)
    return values, rows, [re.sub(r"\.weight$", "", column) for column in columns]
