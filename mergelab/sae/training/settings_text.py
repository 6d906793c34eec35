"""Settings of a training as text: YAML to plain data, and `--set section.key=value`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergelab.checkpoints.yaml_data import MAX_DEPTH, parse_yaml
from mergelab.errors import SAEError, shortened

__all__ = ["plain_data", "plain_settings", "with_override"]


def plain_settings(text: str, source: str = "the configuration") -> Any:
    """The one value of a YAML text as plain data, None if it is empty.

    Raises:
        SAEError: the text is not YAML as configurations have it, or has a second document.
    """
    documents = parse_yaml(text, source, SAEError)
    if len(documents) > 1:
        raise SAEError(f"{source}:{documents[1].line}: a second document begins here; keep one in a file.")
    return documents[0].data if documents else None


def plain_data(value: Any, depth: int = 0) -> Any:
    """Mappings of any kind, and lists of them, as plain dicts and lists.

    Raises:
        SAEError: they are nested too deep.
    """
    if depth > MAX_DEPTH:
        raise SAEError(f"the configuration is nested more than {MAX_DEPTH} levels deep, or contains itself.")
    if isinstance(value, Mapping):
        return {key: plain_data(inner, depth + 1) for key, inner in value.items()}
    return [plain_data(inner, depth + 1) for inner in value] if isinstance(value, list) else value


def with_override(data: dict[str, Any], override: str) -> dict[str, Any]:
    """The settings with one of them changed by `section.key=value`.

    Raises:
        SAEError: it is not of that form.
    """
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise SAEError(f"--set {shortened(override)}: expected section.key=value, such as train.seed=1.")
    changed = dict(data)
    here = changed
    for key in keys[:-1]:
        inner = here.get(key)
        here[key] = dict(inner) if isinstance(inner, dict) else {}
        here = here[key]
    here[keys[-1]] = plain_settings(text, f"--set {shortened(path)}")
    return changed
