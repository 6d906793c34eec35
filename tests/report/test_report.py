"""Tables, figure and page draw the numbers they are given, and mark the right ones."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import pytest

from mergelab.report.comparison import (
    figure_files,
    in_reading_order,
    kept_cells,
    score_cells,
    score_figure,
    svg,
)
from mergelab.report.pages import render_page
from mergelab.report.tables import html_table, markdown_table, text_table


@dataclass(frozen=True)
class Score:
    name: str
    kind: str
    bits: dict[str, float]
    retained: dict[str, float | None]
    change: dict[str, Any] | None = None

    @property
    def mean(self) -> float:
        return sum(self.bits.values()) / len(self.bits)


@dataclass(frozen=True)
class Comparison:
    domains: tuple[str, ...]
    scores: tuple[Score, ...]
    verdict: tuple[str, ...]
    facts: dict[str, str]
    seconds: dict[str, float]
    features: dict[str, Any]


CHANGE = {"value": -0.8, "interval": [-0.9, -0.71], "p": 0.001}
RESULTS = Comparison(
    domains=("code", "prose"),
    scores=(
        Score("worse", "merge", {"code": 1.9, "prose": 2.9}, {"code": 0.1, "prose": None}),
        Score("better <b>", "merge", {"code": 1.2, "prose": 2.2}, {"code": 0.8, "prose": -0.5}, CHANGE),
        Score("code", "specialist", {"code": 1.0, "prose": 3.5}, {"code": 1.0, "prose": 0.0}),
        Score("base", "base", {"code": 2.0, "prose": 3.0}, {"code": 0.0, "prose": 0.0}),
    ),
    verdict=("One helped & one did not.",),
    facts={"seed": "0"},
    seconds={"train base": 1.25, "merge": 2.0},
    features={
        "figures": {
            "site": "blocks.1.resid_post",
            "latents": 64,
            "k": 4,
            "nmse": 0.25,
            "l0": 4.0,
            "alive": 1.0,
        },
        "latents": [
            {"latent": 7, "density": 0.01, "examples": [[("if", 0.1), (" <x>", 1.0), ("\n" + 8 * " ", 0.5)]]}
        ],
    },
)


def test_rows_stand_in_reading_order_with_the_best_of_each_column_marked() -> None:
    assert [s.name for s in in_reading_order(RESULTS)] == ["base", "code", "better <b>", "worse"]
    header, rows = score_cells(RESULTS)
    assert header == ["model", "code", "prose", "mean", "mean - base [95 %]"]
    assert rows[1] == ["code", "1.000*", "3.500 ", "2.250 ", ""]
    assert rows[2] == ["better <b>", "1.200 ", "2.200*", "1.700*", "-0.800 [-0.900, -0.710]"]
    assert sum(cell.endswith("*") for row in rows for cell in row) == 3
    assert kept_cells(RESULTS)[1] == [["better <b>", "80%", "-50%"], ["worse", "10%", "-"]]


def test_text_tables_are_aligned() -> None:
    table = text_table(["model", "x"], [["a", "10.0"], ["longer", "9.5"]], rules_before=(1,))
    assert table.splitlines() == [
        "model      x",
        "------  ----",
        "a       10.0",
        "------  ----",
        "longer   9.5",
    ]
    with pytest.raises(ValueError, match="argument"):
        text_table(["model", "x"], [["a", "1", "too many"]])


def test_html_tables_show_markup_as_text() -> None:
    table = html_table(["m", "x"], [["<b>&", "1"], ["b", "2"]])
    tree = ElementTree.fromstring(table)
    assert [["".join(cell.itertext()) for cell in row] for row in tree.iter("tr")] == [
        ["m", "x"],
        ["<b>&", "1"],
        ["b", "2"],
    ]
    assert tree.find(".//b") is None


def test_markdown_tables_escape_their_separator() -> None:
    assert markdown_table(["m"], [["a|b"]]).splitlines()[-1] == r"| a\|b |"


def test_the_figure_shows_every_score_at_its_place() -> None:
    figure = score_figure(RESULTS)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["code", "prose", "mean"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()][2] == "better <b>"
    for ax, column in zip(figure.axes[:2], RESULTS.domains, strict=True):
        drawn = sorted(
            float(line.get_xdata()[0]) for line in ax.lines if line.get_marker() not in ("None", "")
        )
        assert drawn == sorted(s.bits[column] for s in RESULTS.scores)
    best = [text.get_text() for ax in figure.axes for text in ax.texts]
    assert best == ["1.000", "2.200", "1.700"]


def test_figures_are_files_that_repeat_to_the_byte() -> None:
    files = figure_files(RESULTS)
    assert set(files) == {"figure.png", "figure.svg"} and files["figure.png"].startswith(b"\x89PNG")
    assert files["figure.svg"].decode() == svg(score_figure(RESULTS))
    assert svg(score_figure(RESULTS)) != svg(score_figure(RESULTS, dark=True))


def test_the_page_escapes_text_marks_the_best_and_loads_nothing() -> None:
    page = render_page(RESULTS, "A <title>", {"better": "weight: 1 # <i>"})
    assert "A &lt;title&gt;" in page and "better &lt;b&gt;" in page and "# &lt;i&gt;" in page
    assert "One helped &amp; one did not." in page
    assert re.findall(r'class="best">([\d.]+)<', page) == ["1.000", "2.200", "1.700"]
    assert page.index(">base<") < page.index(">code</th>\n<td") < page.index(">worse<")
    assert "3 s in all" in page and "<td>-0.800 [-0.900, -0.710]</td>" in page
    assert '<span style="--s: 0.10">if</span><span style="--s: 1.00"> &lt;x&gt;</span>' in page
    assert '<span style="--s: 0.50">↵␣×8 </span></p>' in page
    assert "normalized MSE 0.250" in page
    assert not re.search(r"""(src|href|srcset)=["'](?!data:)|@import|url\(|<script""", page)
