"""Strict YAML for recipes: plain data with line numbers, no tags, no duplicate keys, no alias bombs."""

from __future__ import annotations

from mergelab.checkpoints.yaml_data import Document, parse_yaml
from mergelab.errors import RecipeError

__all__ = ["Document", "parse_documents"]


def parse_documents(text: str, source: str = "recipe") -> list[Document]:
    """Parses every document of a recipe; see `mergelab.checkpoints.yaml_data.parse_yaml`.

    Raises:
        RecipeError: faulty YAML; every sentence begins with `source` and a line.
    """
    return parse_yaml(text, source, RecipeError)
