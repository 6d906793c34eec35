"""Model references as recipes write them: `path[@revision][+adapter[@revision]]`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergelab.errors import quoted

__all__ = ["ModelRef", "model_ref_text", "parse_model_ref"]


@dataclass(frozen=True)
class ModelRef:
    """A model, and the LoRA adapter to add to it.

    Attributes:
        path: a folder, a file, a hub id, or the name of another document of the recipe.
        revision: the hub revision of `path`.
        adapter: the LoRA adapter's folder or hub id.
        adapter_revision: the hub revision of `adapter`.
    """

    path: str
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None

    def __str__(self) -> str:
        text = self.path + (f"@{self.revision}" if self.revision else "")
        if self.adapter is None:
            return text
        return f"{text}+{self.adapter}" + (f"@{self.adapter_revision}" if self.adapter_revision else "")


def parse_model_ref(text: str) -> ModelRef:
    """Splits a reference into its parts.

    Raises:
        ValueError: an empty part, or more than one adapter.
    """
    parts = text.split("+")
    if len(parts) > 2:
        found = f"{quoted(text)} has {len(parts) - 1} '+'"
        raise ValueError(f"model reference {found}: one LoRA adapter is allowed")
    split = [_revision(part, text) for part in parts]
    path, revision = split[0]
    adapter, adapter_revision = split[1] if len(split) == 2 else (None, None)
    return ModelRef(path, revision, adapter, adapter_revision)


def model_ref_text(value: Any) -> Any:
    """Writes mergekit's long form of a reference as text; other values are returned as they are.

    The long form is `{model: PART, lora: PART}` with parts `{path: ..., revision: ...}` or texts.

    Raises:
        ValueError: a mapping of other keys.
    """
    if not isinstance(value, Mapping):
        return value
    unknown = sorted({str(key) for key, found in value.items() if found is not None} - {"model", "lora"})
    if unknown or value.get("model") is None:
        what = f"has the key {quoted(unknown[0])}" if unknown else "names no model"
        raise ValueError(
            f"the model reference {what}: write path, path@revision or path+adapter, or a mapping with the "
            "keys 'model' and 'lora'"
        )
    return "+".join(_part_text(value[name]) for name in ("model", "lora") if value.get(name) is not None)


def _part_text(part: Any) -> str:
    if isinstance(part, str):
        return part
    if (
        not isinstance(part, Mapping)
        or set(part) - {"path", "revision"}
        or not isinstance(part.get("path"), str)
        or not isinstance(part.get("revision") or "", str)
    ):
        raise ValueError(
            "a part of a model reference is a text, or a mapping with the keys 'path' and 'revision'"
        )
    return part["path"] + (f"@{part['revision']}" if part.get("revision") else "")


def _revision(part: str, text: str) -> tuple[str, str | None]:
    path, at, revision = part.partition("@")
    if not path.strip() or (at and not revision.strip()):
        raise ValueError(
            f"model reference {quoted(text)} has an empty part: write path, path@revision or path+adapter"
        )
    return path, revision or None
