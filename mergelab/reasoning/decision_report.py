"""The page of a traced decision: sentences, figures and tables, of the data alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mergelab.report.curves import Panel, curves_figure
from mergelab.report.heatmap import heatmap_figure
from mergelab.report.pages import visible
from mergelab.report.sections import Section, render_sections

__all__ = ["decision_sections", "render_decision"]

Data = Mapping[str, Any]


def render_decision(data: Data) -> str:
    """The page, in one HTML file.

    Args:
        data: what `DecisionTrace.to_json` gives.
    """
    first, second = data["names"]
    return render_sections(
        f"{_shown(data['tokens'][0])}: where {first} and {second} part", decision_sections(data)
    )


def decision_sections(data: Data) -> list[Section]:
    """The parts of the page, from the top."""
    found = [*_prompts(data), _layers(data), _positions(data), _attribution(data)]
    if data["values"] is not None:
        found.append(_values(data))
    for kind in ("weight_swaps", "activation_swaps"):
        if data[kind] is not None:
            found.append(_swaps(data, data[kind]))
    return [*found, _paths(data), _words(data)]


def _prompts(data: Data) -> Iterator[Section]:
    first, second = data["names"]
    rows = [
        [
            visible(one["prompt"]),
            visible(one["answer"][:60]),
            *(
                f"{length}{'' if end else '+'}"
                for length, end in zip(one["lengths"], one["ended"], strict=True)
            ),
        ]
        for one in data["prompts"]
    ]
    said = f"{first} ends its answer before {second} on {data['parted']} of {data['tried']} prompts tried."
    if not data["parted"]:
        said += " None parts them, so what follows is of prompts that do not."
    yield Section("Prompts", [said], header=["prompt", f"answer of {first}", first, second], rows=rows)
    table = data["endings"]
    end, lengths, chosen = (np.array(table[name]) for name in ("end", "lengths", "chosen"))
    rows = [
        [
            visible(ending) or "(as it is)",
            *(f"{end[m, :, n].mean():.3f}" for m in (0, 1)),
            *(f"{lengths[m, :, n].mean():.1f}" for m in (0, 1)),
            *(
                f"{np.exp(chosen[m, :, n, t]).mean():.3f}"
                for t in range(1, len(data["tokens"]))
                for m in (0, 1)
            ),
        ]
        for n, ending in enumerate(table["endings"])
    ]
    others = [f"P({_shown(token)}) {name}" for token in data["tokens"][1:] for name in data["names"]]
    header = ["ending", f"P(end) {first}", f"P(end) {second}", f"tokens {first}", f"tokens {second}", *others]
    yield Section(
        "Endings",
        ["Means over the prompts: the first model's answer with each ending behind it, and what follows."],
        header=header,
        rows=rows,
    )


def _layers(data: Data) -> Section:
    one, other = (np.array(model["log_probs"])[:, :, -1] for model in data["layers"])
    panels = [
        Panel(
            f"log P({_shown(token)}), read off each layer",
            "blocks done",
            {
                name: (list(range(values.shape[1])), values[..., number].mean(axis=0).tolist())
                for name, values in zip(data["names"], (one, other), strict=True)
            },
            from_zero=False,
        )
        for number, token in enumerate(data["tokens"])
    ]
    said = (
        [_parting(data, number) for number in range(len(data["tokens"]))] if one.shape == other.shape else []
    )
    return Section("Layers", said, curves_figure(panels), "Log-probabilities over layers in both models.")


def _parting(data: Data, number: int) -> str:
    """The layer behind which half of the difference is there and stays."""
    one, other = (np.array(model["logits"])[:, :, -1, number].mean(axis=0) for model in data["layers"])
    apart = other - one
    there = apart * np.sign(apart[-1]) >= 0.5 * abs(apart[-1])
    layer = len(there) - int(np.argmin(there[::-1])) if not there.all() else 0
    return (
        f"{_shown(data['tokens'][number])}: the logits end {apart[-1]:+.2f} apart; at least half of "
        f"it is there from {data['layers'][0]['sites'][layer]} on."
    )


def _positions(data: Data) -> Section:
    one, other = (np.array(model["logits"])[..., 0].mean(axis=0) for model in data["layers"])
    alike = one.shape == other.shape
    count = other.shape[1]
    figure = heatmap_figure(
        other - one if alike else other,
        data["layers"][1]["sites"],
        [str(n - count) for n in range(count)],
        scale="logit, second less first" if alike else "logit, second",
    )
    return Section(
        "Positions",
        [f"The logit of {_shown(data['tokens'][0])} over layers and the last positions (means)."],
        figure,
        "Heat map over layers and positions.",
    )


def _attribution(data: Data) -> Section:
    parts = np.array(data["attribution"]["parts"])
    change = (parts[1] - parts[0]).mean(axis=0)
    names, rows = data["attribution"]["names"], []
    for place in np.argsort(-np.abs(change[:, 0]), kind="stable")[:12].tolist():
        rows.append([names[place], *(f"{value:+.3f}" for value in change[place])])
    rows.append(["sum of all", *(f"{value:+.3f}" for value in change.sum(axis=0))])
    return Section(
        "What adds to the logits",
        ["Second less first, mean over the prompts: the largest parts of the end, and the sum of all."],
        header=["part", *map(_shown, data["tokens"])],
        rows=rows,
    )


def _values(data: Data) -> Section:
    table = data["values"]
    rows = [
        [
            _shown(one["token"]),
            f"{one['layer']}.{one['neuron']}",
            *("-" if value is None else f"{value:+.3f}" for value in one["contributions"]),
            f"{table['random'][one['token']]:.3f}",
            visible(" ".join(one["tokens"])),
        ]
        for one in table["promoters"]
    ]
    return Section(
        "Value vectors",
        ["Neurons that promote a token more in the second model; random: the strongest along random ones."],
        header=["token", "neuron", *data["names"], "random", "points to"],
        rows=rows,
    )


def _swaps(data: Data, table: Data) -> Section:
    tokens = data["tokens"]
    panels = []
    for number, token in enumerate(tokens):
        places = list(range(len(table["parts"])))
        curves = {
            name: (places, np.array(table[name])[:, number].tolist())
            for name in ("single", "cumulative", "random")
        }
        flat = (places, [table["first"][number]] * len(places))
        panels.append(
            Panel(f"log P({_shown(token)})", "part swapped", {**curves, "first": flat}, from_zero=False)
        )
    said = [_enough(table, number, _shown(token)) for number, token in enumerate(tokens)]
    kind = "weights" if table["by"] == "weights" else "what is added to the last token"
    title = f"Blocks of {data['names'][1]} in {data['names'][0]}, by {kind}"
    return Section(title, said, curves_figure(panels), "Log-probabilities with parts swapped.")


def _enough(table: Data, number: int, token: str) -> str:
    single, first, second = (np.array(table[name]) for name in ("single", "first", "second"))
    change = second[number] - first[number]
    towards = (single[:, number] - first[number]) * np.sign(change)
    best = [table["parts"][n] for n in np.argsort(-towards, kind="stable")[:3].tolist()]
    reached = (np.array(table["fewest"])[number] - first[number]) * np.sign(change) >= 0.5 * abs(change)
    few = int(np.argmax(reached)) + 1 if reached.any() else len(reached)
    verdict = "enough" if reached.any() else "not enough"
    return (
        f"{token}: {first[number]:.2f} in the first, {second[number]:.2f} with all parts. By themselves "
        f"{', '.join(best)} move it furthest; the {few} strongest together are {verdict} for half of it."
    )


def _paths(data: Data) -> Section:
    paths = data["paths"]
    direct, bigram = np.array(paths["direct"]), np.array(paths["bigram"])
    rows = [
        [
            _shown(_text(data, token)),
            *(
                f"{table[m, n, t]:.1f}"
                for t in range(len(data["tokens"]))
                for table in (direct, bigram)
                for m in (0, 1)
            ),
        ]
        for n, token in enumerate(paths["tokens"])
    ]
    header = ["behind"]
    for token in data["tokens"]:
        header += [f"{_shown(token)} {kind} {n}" for kind in ("direct", "bigram") for n in (1, 2)]
    said = "Log-probabilities of the direct path, embedding to logits, and of the model on that token alone."
    return Section("Bigrams", [said], header=header, rows=rows)


def _words(data: Data) -> Section:
    rows = []
    for number, (name, one) in enumerate(zip(data["names"], data["sums"], strict=True)):
        terms = [
            f"{weight:+.2f} {_shown(_text(data, token))}"
            for token, weight in zip(one["terms"], one["weights"], strict=True)
        ]
        controls = f"random {one['random']:.0%}, other tokens {one['others']:.0%}"
        rows.append(
            [f"{_shown(data['tokens'][0])} in {name}", " ".join(terms), f"{one['explained']:.0%}", controls]
        )
        for analogy in data["analogies"]:
            plus, minus, other = map(_shown, analogy["terms"])
            near = [_shown(_text(data, token)) for token in analogy["nearest"][number]]
            best, random = analogy["cosines"][number][0], analogy["random"][number]
            rows.append(
                [
                    f"{plus} - {minus} + {other} in {name}",
                    " ".join(near),
                    f"{best:.2f}",
                    f"random {random:.2f}",
                ]
            )
    said = "The end as a sum of other output embeddings, what it explains, and analogies with cosines."
    return Section("Embeddings", [said], header=["", "tokens", "score", "controls"], rows=rows)


def _text(data: Data, token: int) -> str:
    return data["texts"][str(token)]


def _shown(text: str) -> str:
    shown = visible(text)
    return f"'{shown}'" if text != text.strip() or not shown.isprintable() else shown
