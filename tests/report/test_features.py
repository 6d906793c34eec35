"""The features page holds what it was given; a real browser finds and sorts it, and node runs its script."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergelab.report.pages import render_features
from mergelab.sae.features.explanations import LatentExplanation, Match, Pattern
from mergelab.sae.features.gallery import Gallery, page_data
from mergelab.sae.features.logit_effects import LogitEffects
from mergelab.sae.features.survey import Activity, Example, Survey

WORDS = ["</script>", " return", " the", "\n", " élan", " def", "<b>x</b>", " cat"]


def _gallery(latents: int = 3, length: int = 6, examples: int = 2) -> Gallery:
    rng = np.random.default_rng(0)
    numbers = np.arange(latents) * 2
    n = 2 * latents
    peak = 1.0 + rng.random(n).astype(np.float32)
    found: dict[int, list[Example]] = {}
    for latent in numbers.tolist():
        found[latent] = []
        for k in range(examples):
            tokens = (*rng.integers(2, len(WORDS), length - 1).tolist(), 1 if latent == 2 else 7)
            codes = (*([0.0] * (length - 1)), float(peak[latent]) * (1 - 0.1 * k))
            found[latent].append(Example(latent * examples + k, tokens, codes))
    alike = np.full((latents, 1), 0.25)
    happened = Activity(
        numbers, rng.integers(0, 9, (latents, 5)), peak[numbers] / 2, np.roll(numbers, 1)[:, None], alike
    )
    tokens, values = np.tile([4, 0], (latents, 1)), np.tile([2.0, 1.0], (latents, 1))
    effects = LogitEffects(
        numbers, tokens, values, tokens[:, ::-1], -values, np.ones((latents, 3)), np.ones((latents, 4))
    )
    patterns = (Pattern((5, None, 1), 1.0), Pattern((5, 1), 1.0, (None, 2)))
    explained = {2: (LatentExplanation(2, patterns), Match(0.5, float("nan"), 3))}
    return Gallery(
        "blocks.0.resid_post", Survey(99, rng.random(n), peak, found), happened, effects, explained
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "features.html"
    text = render_features(
        page_data(_gallery(), WORDS.__getitem__), title="A <title>", facts={"model": "m & n"}
    )
    path.write_text(text, encoding="utf-8")
    return path


def _data(page: Path) -> dict[str, Any]:
    text = page.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_the_page_holds_the_gallery_and_nothing_from_elsewhere(page: Path) -> None:
    text, data = page.read_text(encoding="utf-8"), _data(page)
    assert data == json.loads(json.dumps(page_data(_gallery(), WORDS.__getitem__)))
    assert "A &lt;title&gt;" in text and "m &amp; n" in text
    assert text.count("</script>") == 2 and "<b>x</b>" not in text
    assert not re.search(r"""(src|srcset)=|href=["']http|@import|url\(""", text)
    feature = data["features"][1]
    assert feature["i"] == 2 and feature["precision"] == 0.5 and feature["recall"] is None
    assert [marks for _, marks in feature["examples"]] == [[5, 99], [5, 89]]
    assert data["words"][str(data["contexts"]["4"][5])] == " return"
    assert feature["patterns"] == [[[5, None, 1], []], [[5, 1], [None, 2]]]


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert found, "no Chromium: install the package chromium to try the page in a browser"
    return found


def _open(browser: str, page: Path, address: str, folder: Path) -> str:
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}"]
    url = f"{page.as_uri()}{address}"
    done = subprocess.run(
        [*command, "--virtual-time-budget=5000", "--dump-dom", url],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.browser
def test_a_browser_finds_and_sorts(browser: str, page: Path, tmp_path: Path) -> None:
    peak = _gallery().survey.peak

    def shown(address: str) -> list[int]:
        text = _open(browser, page, address, tmp_path)
        assert "data-ready" in text
        return [int(n) for n in re.findall(r'<article data-latent="(\d+)"', text)]

    assert shown("") == sorted([0, 2, 4], key=lambda latent: -peak[latent])
    assert shown("#q=RETURN&sort=i") == [2]
    assert shown("#latent=4") == [4]
    assert shown("#q=nowhere") == []
    text = _open(browser, page, "#q=cat&sort=i", tmp_path)
    assert re.findall(r'<article data-latent="(\d+)"', text) == ["0", "4"] and "2 of 3 latents" in text
    body = html.unescape(text[text.index("<article") : text.index("<noscript")])
    assert " élan 2" in body and "density" in body and "active with" in body


@pytest.mark.browser
def test_thousands_of_latents_are_quick(browser: str, tmp_path: Path) -> None:
    page = tmp_path / "many.html"
    gallery = _gallery(latents=4000, length=64, examples=6)
    page.write_text(
        render_features(page_data(gallery, WORDS.__getitem__), title="many", facts={}), encoding="utf-8"
    )
    assert page.stat().st_size < 12_000_000
    text = _open(browser, page, "#q=return&sort=density", tmp_path / "profile")
    ready, search = (float(re.search(rf'data-{name}="([\d.]+)"', text)[1]) for name in ("ready", "search"))  # type: ignore[index]
    assert text.count("<article") == 1 and search <= ready < 20_000  # ms; a loaded machine is slow


@pytest.mark.browser
def test_the_script_alone_finds_and_sorts(page: Path, repository: Path, tmp_path: Path) -> None:
    node = shutil.which("node")
    assert node, "no node: install Node.js to run the page's script without a browser"
    script = (repository / "mergelab" / "report" / "templates" / "features.js").read_text(encoding="utf-8")
    calls = """
    const data = JSON.parse(require("fs").readFileSync(process.argv[2], "utf-8"));
    const texts = data.features.map((f) => searchable(data, f));
    const ask = (q, sort) => found(data, texts, q, sort).map((f) => f.i);
    console.log(JSON.stringify([ask("return", "i"), ask("#4", "peak"), ask("", "precision"), ask("", "i"),
      readAddress("#latent=7&sort=nonsense"), activations(data.features[0], 0, 6),
      data.features[1].patterns.map((pattern) => pattern_text(data, pattern)),
      shown("a\\n\\t" + " ".repeat(12) + "b   c"), [0.1968, 0.00012345, 12.7, 1234].map(digits)]));
    """
    (tmp_path / "run.js").write_text(script + calls, encoding="utf-8")
    (tmp_path / "data.json").write_text(json.dumps(_data(page)), encoding="utf-8")
    done = subprocess.run(
        [node, tmp_path / "run.js", tmp_path / "data.json"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    by_text, by_number, by_precision, by_i, address, values, patterns, *texts = json.loads(done.stdout)
    assert by_text == [2] and by_number == [4] and by_precision == [2, 0, 4] and by_i == [0, 2, 4]
    assert address == {"q": "#7", "sort": "peak"} and values == [0, 0, 0, 0, 0, 1]
    assert patterns == [" def∗ return", " def⟦ return⟧∗ the"]
    assert texts == ["a↵→␣×12 b   c", ["0.2", "0.00012", "13", "1200"]]
