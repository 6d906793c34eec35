"""The site and the pages that commands write, in a real browser: two widths, light and dark, by keyboard."""

from __future__ import annotations

import functools
import http.server
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.browser

SITE = (
    *("index.html", "docs/installation.html", "api/index.html", "api/mergelab.sae.html", "api/mergelab.html"),
    *("gallery/index.html", "docs/operators.html", "commands/index.html", "benchmarks/README.html"),
    *("colab/merging.html", "colab/steering.html"),
    *("docs/solve.html", "docs/limits.html", "search.html"),
)
WRITTEN = (
    *("q/report.html", "features.html", "diff/page.html", "explained/explanation.html"),
    "solved/traces.html",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as CI builds it: with warnings as errors."""
    out = tmp_path_factory.mktemp("site")
    build = ["bash", str(REPOSITORY / "docs" / "build.sh"), str(out)]
    path = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(out)}
    done = subprocess.run(build, capture_output=True, text=True, env=path, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages that commands write, of the smallest models."""
    folder = tmp_path_factory.mktemp("written")
    tasks = folder / "tasks.jsonl"
    tasks.write_text("".join(f'{{"prompt": "{n} + 1 =", "answer": "{n + 1}"}}\n' for n in range(4)))
    base, held_out = "q/models/base", "q/held-out.txt"
    for line in (
        "quickstart --preset tiny --out q",
        f"sae features q/sae --model {base} --text {held_out} --out features.html --latents 40",
        f"diff {base} q/models/code q/models/prose --out diff",
        f"explain q/recipes/linear.yaml --base {base} --sae q/sae --text {held_out} --out explained",
        f"solve {base} tasks.jsonl --method vote --samples 2 --budget 8 --out solved",
    ):
        command = [sys.executable, "-m", "mergelab", *line.split()]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{line}: {done.stderr}"
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert chromium, "no Chromium: install the package chromium to try the pages in a browser"
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def served(site: Path) -> Iterator[str]:
    """The address at which the site is served, as its readers get it."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def faults(browser: Any, address: str, width: int, dark: bool) -> list[str]:
    """What is wrong with a page: errors of the console, requests to others, sideways scroll, low contrast."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light"
    )
    page, found = context.new_page(), []
    page.on("console", lambda m: found.append(f"console: {m.text}") if m.type == "error" else None)
    page.on("pageerror", lambda error: found.append(f"error: {error}"))
    page.on(
        "request",
        lambda r: (
            found.append(f"asks {r.url}")
            if r.url.startswith("http") and not r.url.startswith("http://127.0.0.1")
            else None
        ),
    )
    page.goto(address, wait_until="load")
    page.wait_for_timeout(200)
    wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    if wide > 0:
        found.append(f"scrolls sideways by {wide} pixels: {page.evaluate(WIDEST)}")
    if (contrast := page.evaluate(CONTRAST)) < 4.5:
        found.append(f"text has a contrast of {contrast:.1f}")
    context.close()
    return found


WIDEST = """() => [...document.querySelectorAll('body *')].filter(
  e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1
).slice(0, 5).map(e => e.tagName + '.' + e.className + ' ' + e.textContent.slice(0, 40)).join(' | ')"""

CONTRAST = """() => {
  const luminance = color => {
    const [r, g, b] = color.match(/[\\d.]+/g).map(Number).map(
      c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = element => {
    for (let e = element; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if (color !== 'transparent' && !/, 0\\)$/.test(color)) return color;
    }
    return matchMedia('(prefers-color-scheme: dark)').matches ? 'rgb(18, 18, 18)' : 'rgb(255, 255, 255)';
  };
  const text = document.querySelector('article p, main p, body p') || document.body;
  const [a, b] = [luminance(getComputedStyle(text).color), luminance(ground(text))].sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
}"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_pages_of_the_site_are_sound(browser: Any, served: str, width: int, dark: bool) -> None:
    wrong = {name: found for name in SITE if (found := faults(browser, f"{served}/{name}", width, dark))}
    assert wrong == {}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_pages_that_commands_write_are_sound(browser: Any, written: Path, width: int, dark: bool) -> None:
    addresses = {name: (written / name).as_uri() for name in WRITTEN}
    assert all((written / name).is_file() for name in WRITTEN)
    wrong = {name: found for name, at in addresses.items() if (found := faults(browser, at, width, dark))}
    assert wrong == {}


def test_a_faulty_page_would_be_seen(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(
        "<body><p style='color:#888;background:#999'>a</p><div style='width:3000px'>b</div>"
        "<script>throw 1</script><img src='https://example.invalid/x.png'></body>"
    )
    found = " ".join(faults(browser, (tmp_path / "page.html").as_uri(), 390, False))
    assert all(word in found for word in ("error: ", "asks https://example.invalid", "sideways", "contrast"))


def reached(page: Any, most: int = 400) -> set[str]:
    """What the tabulator key reaches."""
    found: set[str] = set()
    for _ in range(most):
        page.keyboard.press("Tab")
        what = page.evaluate(
            "(() => { const e = document.activeElement; return e === document.body ? '' : "
            "[e.tagName, e.getAttribute('href') || e.name || e.textContent.trim().slice(0, 30)].join(' ') "
            "})()"
        )
        if not what or (what in found and len(found) > 30):
            break
        found.add(what)
    return found


def test_the_keyboard_reaches_search_and_pages(browser: Any, served: str) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(f"{served}/index.html")
    found = reached(page)
    assert any(what.startswith("INPUT q") for what in found)
    assert {"A docs/installation.html", "A gallery/index.html", "A api/index.html"} <= found
    page.close()


def test_the_keyboard_reaches_a_features_pages_search(browser: Any, written: Path) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto((written / "features.html").as_uri())
    assert any(what.startswith("INPUT") for what in reached(page, 20))
    page.close()


def test_a_search_finds_a_function_and_a_page(browser: Any, served: str) -> None:
    page = browser.new_page()
    page.goto(f"{served}/search.html?q=load_sae")
    page.wait_for_selector("#search-results li a", timeout=20_000)
    links = page.eval_on_selector_all("#search-results li a", "all => all.map(a => a.href)")
    assert any("api/mergelab.sae.html" in link for link in links)
    page.close()


def test_every_public_name_is_described_once(site: Path) -> None:
    import importlib

    inventory = (site / "objects.inv").read_bytes()
    import zlib

    lines = zlib.decompress(inventory.split(b"zlib.\n", 1)[1]).decode().splitlines()
    described = {line.split(" ")[0].rpartition(".")[2] for line in lines if " py:" in line}
    for face in ("mergelab", "mergelab.sae", "mergelab.merging", "mergelab.interp", "mergelab.operators"):
        assert {*importlib.import_module(face).__all__} - described - {"errors", "sharding", "trees"} == set()
