"""The sources of the site in one folder: the pages of the repository, and those that programs write."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from docs.site.commands import write_commands
from docs.site.gallery import write_gallery
from docs.site.notebooks import page_of, read_notebook
from docs.site.reference import Reference, write_reference

REPOSITORY = Path(__file__).resolve().parent.parent.parent
HERE = Path(__file__).resolve().parent

SECTIONS: Mapping[str, Sequence[str]] = {
    "Start": ("docs/installation", "docs/first_run", "examples/README", "docs/coming_from", "docs/limits"),
    "Merge": (
        *("docs/recipes", "docs/operators", "gallery/index", "docs/measured_operators"),
        *("docs/verdict", "docs/diff", "docs/explain"),
        *("docs/soups", "docs/tokenizers", "docs/merging_science"),
    ),
    "Models": (
        *("docs/models", "docs/loading", "docs/generation", "docs/decoding", "docs/solve", "docs/finetune"),
        *("docs/rewards", "docs/streaming", "docs/pods"),
    ),
    "Features": (
        *("docs/sae", "docs/sae_evaluation", "docs/activations", "docs/sites", "docs/interp"),
        *("docs/trace_decision", "docs/abliteration"),
    ),
    "Notebooks": (
        *("colab/README", "colab/merging", "colab/verdict", "colab/explain", "colab/models", "colab/sae"),
        *("colab/sae_evaluation", "colab/steering", "colab/test_time"),
    ),
    "Reference": ("api/index", "commands/index", "docs/command_line"),
    "Project": (*("benchmarks/README", "docs/architecture", "CONTRIBUTING", "CHANGELOG", "SECURITY"),),
}
"""Pages by the heading they stand under; those that nobody lists stand under "More"."""

PAGES = (
    *("*.md", "docs/*.md", "benchmarks/*.md", "colab/*.md", "colab/*.ipynb", "examples/*.md"),
    "configs/recipes/*.md",
)
GENERATED = ("api/index", "commands/index", "gallery/index")


def collected() -> list[Path]:
    """The pages of the repository, relative to it."""
    return sorted(path.relative_to(REPOSITORY) for pattern in PAGES for path in REPOSITORY.glob(pattern))


def repository_url() -> str:
    """The address of the repository, of [project.urls]."""
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)["project"]["urls"]["Repository"]


def blocks(text: str) -> Iterable[tuple[bool, str]]:
    """The parts of a page: whether each is a block of code (fenced or indented), and its text."""
    code = re.compile(r"^(```|~~~).*?^\1[ \t]*$|(?<=\n)\n(?:(?:    |\t)[^\n]*\n|\n(?=    ))+", re.M | re.S)
    place = 0
    for match in code.finditer(text):
        yield False, text[place : match.start()]
        yield True, match[0]
        place = match.end()
    yield False, text[place:]


class Pages:
    """The pages of the repository as the site has them: links go to pages, or to files of the repository."""

    def __init__(self, url: str, out: Path, executed: Path | None) -> None:
        self.url, self.out, self.executed = url, out, executed
        self.names = collected()
        self.pictures: set[Path] = set()

    def staged(self, path: Path) -> Path:
        """Where a page or a picture stands in the site."""
        if path == Path("README.md"):
            return Path("index.md")
        return path.with_suffix(".md") if path.suffix == ".ipynb" else path

    def target(self, page: Path, target: str, image: bool) -> str:
        """A link of a page as the site has it."""
        if re.match(r"[a-z]+:|#", target):
            return target
        path, hash_, anchor = target.partition("#")
        found = Path(os.path.normpath(page.parent / path))
        if image and (REPOSITORY / found).is_file():  # what notebooks drew stands beside them already
            self.pictures.add(found)
        if image or found in self.names:
            start = self.staged(page).parent
            return os.path.relpath(self.staged(found), start).replace(os.sep, "/") + hash_ + anchor
        kind = "tree" if (REPOSITORY / found).is_dir() else "blob"
        return f"{self.url}/{kind}/main/{found.as_posix()}{hash_}{anchor}"

    def text(self, page: Path) -> str:
        """The text of a page, with links that lead somewhere within the site."""
        if page.suffix == ".ipynb":
            notebook = read_notebook(REPOSITORY / page, self.executed)
            text = page_of(notebook, page.stem, self.out / page.parent / "pictures")
        else:
            text = (REPOSITORY / page).read_text(encoding="utf-8")
        if page == Path("README.md"):  # badges are pictures of other servers
            text = re.sub(r"^\[!\[.*\n", "", text, flags=re.M)
        link = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\]\()([^)\s]+)(\))")

        def moved(match: re.Match[str]) -> str:
            return match[1] + self.target(page, match[2], match[1].startswith("!")) + match[3]

        return "".join(part if code else link.sub(moved, part) for code, part in blocks(text))


def contents(names: Sequence[str]) -> str:
    """The tables of contents of the front page, one for each section."""
    listed = {name for pages in SECTIONS.values() for name in pages}
    more = sorted(set(names) - listed - {"index"})
    sections = {**SECTIONS, **({"More": tuple(more)} if more else {})}
    tables = [
        "\n".join(["```{toctree}", ":hidden:", f":caption: {heading}", "", *pages, "```"])
        for heading, pages in sections.items()
    ]
    return "\n\n" + "\n\n".join(tables) + "\n"


def main(arguments: Sequence[str]) -> None:
    out = Path(arguments[0])
    executed = os.environ.get("NOTEBOOKS")
    pages = Pages(repository_url(), out, Path(executed) if executed else None)
    reference = Reference(REPOSITORY)
    names = []
    for page in pages.names:
        staged = out / pages.staged(page)
        staged.parent.mkdir(parents=True, exist_ok=True)
        staged.write_text(reference.with_links(pages.text(page)), encoding="utf-8")
        names.append(str(pages.staged(page).with_suffix("")))
    for picture in pages.pictures:
        (out / picture).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / picture, out / picture)
    write_reference(reference, out / "api")
    write_commands(out / "commands")
    write_gallery(out / "gallery", REPOSITORY)
    index = out / "index.md"
    index.write_text(index.read_text(encoding="utf-8") + contents(names), encoding="utf-8")
    shutil.copyfile(HERE / "conf.py", out / "conf.py")
    shutil.copytree(HERE / "_static", out / "_static", dirs_exist_ok=True)


if __name__ == "__main__":
    main(sys.argv[1:])
