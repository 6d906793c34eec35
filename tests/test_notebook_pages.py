"""Notebooks as pages of the site: text, code and outputs, and where the outputs are from."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from docs.site.notebooks import NOT_RUN, page_of, read_notebook

DOT = base64.b64encode(b"\x89PNG").decode()


def notebook(outputs: list[dict[str, Any]]) -> dict[str, Any]:
    badge = "[![Open in Colab](https://colab.example/badge.svg)](https://colab.example/a.ipynb)"
    return {
        "cells": [
            {"cell_type": "markdown", "source": ["# Title\n", "\n", badge]},
            {"cell_type": "code", "source": "print('```')", "outputs": outputs},
        ]
    }


def test_text_and_code_are_shown_and_no_picture_of_another_server(tmp_path: Path) -> None:
    page = page_of(notebook([]), "a", tmp_path)
    assert page.startswith("# Title\n\n[Open in Colab](https://colab.example/a.ipynb)")
    assert "````python\nprint('```')\n````" in page and NOT_RUN in page and "badge.svg" not in page


def test_outputs_are_shown_with_the_models_they_are_from(tmp_path: Path) -> None:
    said = "models of the quickstart: base, code (org/a does not exist)\n"
    page = page_of(
        notebook(
            [
                {"output_type": "stream", "name": "stdout", "text": [said, "0.5\n"]},
                {"output_type": "stream", "name": "stderr", "text": "a bar"},
                {"output_type": "display_data", "data": {"image/png": DOT, "text/plain": "<Figure>"}},
                {"output_type": "execute_result", "data": {"text/plain": "(1, 2)"}},
            ]
        ),
        "a",
        tmp_path / "pictures",
    )
    assert "run on a CPU" in page and "(models of the quickstart: base, code)" in page
    assert f"```text\n{said}0.5\n```" in page and "```text\n(1, 2)\n```" in page
    assert "a bar" not in page and "<Figure>" not in page
    assert (
        "](pictures/a-1-2.png)" in page and (tmp_path / "pictures" / "a-1-2.png").read_bytes() == b"\x89PNG"
    )


def test_an_executed_copy_is_shown_unless_it_is_another_notebooks(tmp_path: Path) -> None:
    (tmp_path / "ran").mkdir()
    stored, ran = tmp_path / "a.ipynb", tmp_path / "ran" / "a.ipynb"
    stored.write_text(json.dumps(notebook([])))
    assert read_notebook(stored, None) == read_notebook(stored, tmp_path / "ran") == notebook([])
    done = notebook([{"output_type": "stream", "name": "stdout", "text": "1"}])
    ran.write_text(json.dumps(done))
    assert read_notebook(stored, tmp_path / "ran") == done
    done["cells"][1]["source"] = "print(2)"
    ran.write_text(json.dumps(done))
    with pytest.raises(ValueError, match=r"made from another a\.ipynb"):
        read_notebook(stored, tmp_path / "ran")
