"""What the pages say is true: links lead somewhere, recipes parse, the front page's Python runs."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

from mergelab.errors import RecipeError
from mergelab.merging.recipe.recipe_file import parse_recipe
from mergelab.sae.training.config import load_config

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md"), *REPOSITORY.glob("benchmarks/*.md")]
)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def broken_links(page: Path, text: str) -> list[str]:
    """Relative links and images of a Markdown page that lead to no file or heading."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, heading = target.partition("#")
        file = (page.parent / path) if path else page
        if not file.exists() or (heading and heading not in headings(file.read_text(encoding="utf-8"))):
            broken.append(target)
    return broken


def headings(text: str) -> set[str]:
    """The anchors that a page's headings get: lower case, punctuation dropped, spaces to hyphens."""
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


RECIPES = [
    (page.name, n, yaml)
    for page in PAGES
    for n, yaml in enumerate(fenced(page.read_text("utf-8"), "yaml"))
    if not yaml.startswith("sae:")
]
TRAININGS = [
    text for page in PAGES for text in fenced(page.read_text("utf-8"), "yaml") if text.startswith("sae:")
]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


def test_a_broken_link_would_be_seen() -> None:
    page = REPOSITORY / "README.md"
    text = (
        "[a](nowhere.md) [b](README.md#no-such-heading) [c](https://example.org) [d](README.md#two-commands)"
    )
    assert broken_links(page, text) == ["nowhere.md", "README.md#no-such-heading"]


@pytest.mark.parametrize(("page", "number", "text"), RECIPES, ids=[f"{page}-{n}" for page, n, _ in RECIPES])
def test_the_recipes_in_the_pages_are_valid(page: str, number: int, text: str) -> None:
    recipe = parse_recipe(text, source=page)
    assert recipe.model_texts()
    with pytest.raises(RecipeError, match="merge_metod"):
        parse_recipe(text.replace("merge_method", "merge_metod"), source=page)


@pytest.mark.parametrize("text", TRAININGS)
def test_the_trainings_in_the_pages_are_valid(text: str, tmp_path: Path) -> None:
    file = tmp_path / "sae.yaml"
    file.write_text(text)
    assert load_config(file).train.build().steps > 0


def test_the_python_examples_of_the_front_page_are_true() -> None:
    failures, count = doctest.testfile(
        str(REPOSITORY / "README.md"), module_relative=False, optionflags=FLAGS
    )
    assert count >= 5
    assert failures == 0
