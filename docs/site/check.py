"""What a built site must not have: links that lead nowhere, and anything that is asked of another server."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        """Addresses that a browser asks for to show the page."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        for name in ("src", "srcset", "poster"):
            if name in found:
                self.loaded.append(found[name])
        if tag == "link" and found.get("rel") not in ("canonical", "author", "copyright"):
            self.loaded.append(found.get("href", ""))


def faults(site: Path) -> Iterator[str]:
    """What is wrong with a built site, one sentence each."""
    pages: dict[Path, _Page] = {}
    for file in sorted(site.rglob("*.html")):
        pages[file] = _Page()
        pages[file].feed(file.read_text(encoding="utf-8"))
    for file, page in pages.items():
        name = file.relative_to(site)
        for address in page.loaded:
            if urlsplit(address).netloc:
                yield f"{name} loads {address} from another server"
        for address in [*page.links, *page.loaded]:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            if not target.exists():
                yield f"{name} leads to {address}, which is not there"
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                yield f"{name} leads to {address}: no such heading"
    for file in site.rglob("*.css"):
        text = file.read_text(encoding="utf-8")
        if "@import" in text or "url(http" in text or "url(//" in text:
            yield f"{file.relative_to(site)} loads something from another server"


def main(arguments: Sequence[str]) -> int:
    found = sorted(set(faults(Path(arguments[0]).resolve())))
    print(
        "\n".join(found[:50]) or "the site leads nowhere else and asks nobody",
        file=sys.stderr if found else None,
    )
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
