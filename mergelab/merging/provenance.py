"""What an output says of its making: `mergelab.json`, digests, and the model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergelab.checkpoints.model_card import card_facts, front_matter
from mergelab.merging.plan.planner import Plan
from mergelab.merging.recipe.recipe_file import recipe_yaml
from mergelab.version import __version__

__all__ = ["model_card", "provenance"]


def provenance(plan: Plan, digests: Mapping[str, str]) -> bytes:
    """The file's content: version, seed, inputs with fingerprints, and a digest of every output tensor."""
    content: dict[str, Any] = {
        "mergelab": __version__,
        "identity": plan.identity,
        "seed": plan.seed,
        "recipe": recipe_yaml(plan.recipe),
        "models": [
            {"model": model.name, "revision": model.revision, "fingerprint": model.fingerprint}
            for model in plan.models
        ],
        "tensors": dict(digests),
    }
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def model_card(
    plan: Plan,
    name: str,
    digests: Mapping[str, str],
    *,
    stages: Sequence[Plan] = (),
) -> str:
    """Returns the card as Markdown with Hugging Face front matter; needs no network and states no date.

    Args:
        plan: the plan of the merge.
        name: the model's name, for the heading.
        digests: the digest of every output tensor's bytes, by name.
        stages: the plans of the recipes it builds on.
    """
    recipe = plan.recipe
    plans = (*stages, plan)
    stage_names = {stage.recipe.name for stage in stages}
    facts = card_facts(_input_folders(plans, stage_names), plan.config)
    summary = (
        f"Merged with mergelab {__version__}: {recipe.merge_method} of {len(plan.models)} models, "
        f"{len(plan.jobs)} tensors, {plan.bytes_out:,} bytes, seed {plan.seed}."
    )
    rows = [
        f"| `{model.name}` | {_cell(model.revision)} | `{model.fingerprint}` |"
        for one in plans
        for model in one.models
        if model.name not in stage_names
    ]
    lines = [
        *front_matter("transformers", ["mergelab", "mergekit", "merge", recipe.merge_method], facts),
        "",
        f"# {name}",
        "",
        summary,
        "",
        "## Recipe",
        "",
        *_fenced(recipe_yaml(recipe), "yaml"),
        "",
        "## Inputs",
        "",
        "| model | revision | fingerprint (SHA-256 of config, headers and first values) |",
        "| --- | --- | --- |",
        *dict.fromkeys(rows),
        "",
        "## Output",
        "",
        f"Plan `{plan.identity}`: the same recipe, inputs, seed and version give the same bytes.",
        "",
    ]
    lines += ["<details><summary>Digest of every tensor (XXH3)</summary>", ""]
    lines += ["| tensor | digest |", "| --- | --- |"]
    lines += [f"| `{tensor}` | `{digest}` |" for tensor, digest in digests.items()]
    lines += ["", "</details>", ""]
    return "\n".join(lines)


def _input_folders(plans: Sequence[Plan], stage_names: set[str | None]) -> list[Path]:
    """The models' folders, each once; without adapters, and results of the plans themselves."""
    models = [model for plan in plans for model in plan.models if model.name not in stage_names]
    return list(dict.fromkeys(model.paths[0] for model in models if model.paths))


def _cell(revision: str | None) -> str:
    return f"`{revision}`" if revision else "local"


def _fenced(text: str, language: str) -> list[str]:
    """A code block whose fence is longer than any run of backticks in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return [f"{fence}{language}", text.rstrip(), fence]
