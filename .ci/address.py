"""Where the repository is published, in one place, and every link that repeats it.

    python .ci/address.py                 says which links lead elsewhere; status 1 if any do
    python .ci/address.py OWNER/NAME      writes the name into [project.urls] and into every link

Links are badges, git installs, pages of the repository, raw files, container images and the site. What they
must agree with is `Repository` in [project.urls] of pyproject.toml.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

SUFFIXES = {".md", ".toml", ".cff", ".yml", ".yaml", ".ipynb", ".py", ".json", ".cpu", ".cuda"}
FOLDERS = (
    ".ci",
    ".github",
    "benchmarks",
    "colab",
    "conda",
    "configs",
    "docker",
    "docs",
    "examples",
    "mergelab",
)
HOSTS = r"github\.com|colab\.research\.google\.com/github|raw\.githubusercontent\.com|ghcr\.io"


def files(root: Path) -> list[Path]:
    """The files of a checkout that may name the repository."""
    found = [file for file in root.iterdir() if file.is_file()]
    for folder in FOLDERS:
        found += [file for file in (root / folder).rglob("*") if file.is_file()]
    return sorted(file for file in found if file.suffix in SUFFIXES and "__pycache__" not in file.parts)


def address(root: Path) -> str:
    """`OWNER/NAME` of [project.urls]."""
    urls = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    return urls["Repository"].removeprefix("https://github.com/")


def links(name: str) -> re.Pattern[str]:
    """Links to a repository of that name, whoever owns it: the parts before, of the owner, and after."""
    name = re.escape(name)
    end = r"(?![\w-])"
    # The part before, the owner, what stands between owner and name, the name.
    return re.compile(
        rf"(?P<before>(?:{HOSTS})/)(?P<owner>[\w.-]+)(?P<between>/)(?P<name>{name}){end}"
        rf"|(?P<scheme>https://)(?P<site>[\w-]+)(?P<domain>\.github\.io/)(?P<path>{name}){end}"
    )


def disagreeing(root: Path) -> list[str]:
    """`file: link` of every link that names another owner."""
    owner, name = address(root).split("/")
    return [
        f"{file.relative_to(root)}: {match[0]}"
        for file in files(root)
        for match in links(name).finditer(file.read_text(encoding="utf-8"))
        if (match["owner"] or match["site"]) != owner
    ]


def rename(root: Path, new: str) -> int:
    """Writes the new name wherever the old one stands; returns the number of links."""
    owner, name = new.split("/")
    pattern, count = links(address(root).split("/")[1]), 0

    def renamed(match: re.Match[str]) -> str:
        if match["owner"]:
            return f"{match['before']}{owner}{match['between']}{name}"
        return f"{match['scheme']}{owner}{match['domain']}{name}"

    for file in files(root):
        text, found = pattern.subn(renamed, file.read_text(encoding="utf-8"))
        if found:
            file.write_text(text, encoding="utf-8")
            count += found
    return count


def main(arguments: list[str]) -> int:
    root = Path(__file__).resolve().parent.parent
    if not arguments:
        wrong = disagreeing(root)
        print("\n".join(wrong) or f"every link leads to {address(root)}")
        return int(bool(wrong))
    if len(arguments) > 1 or not re.fullmatch(r"[\w-]+/[\w.-]+", arguments[0]):
        print(__doc__, file=sys.stderr)
        return 2
    print(f"{rename(root, arguments[0])} links lead to {arguments[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
