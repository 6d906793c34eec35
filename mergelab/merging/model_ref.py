"""Model references as recipes write them: `path[@revision][+adapter[@revision]]`."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ModelRef", "parse_model_ref"]


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
        raise ValueError(f"model reference {text!r} has {len(parts) - 1} '+': one LoRA adapter is allowed")
    split = [_revision(part, text) for part in parts]
    path, revision = split[0]
    adapter, adapter_revision = split[1] if len(split) == 2 else (None, None)
    return ModelRef(path, revision, adapter, adapter_revision)


def _revision(part: str, text: str) -> tuple[str, str | None]:
    path, at, revision = part.partition("@")
    if not path.strip() or (at and not revision.strip()):
        raise ValueError(
            f"model reference {text!r} has an empty part: write path, path@revision or path+adapter"
        )
    return path, revision or None
