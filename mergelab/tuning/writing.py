"""A fine-tuned model or adapter as a folder, with `finetune.json` and a card that say what was done."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mergelab.checkpoints.companion_files import donor_files
from mergelab.checkpoints.model_card import card_facts, portable_name, short_card
from mergelab.checkpoints.output_target import MARKER
from mergelab.checkpoints.peft import adapter_config
from mergelab.checkpoints.publish import WorkFolder
from mergelab.models.save import save_model, save_params
from mergelab.models.table import Leaf
from mergelab.tuning.in_memory import LoraRecord
from mergelab.tuning.lora import Factors
from mergelab.tuning.training import Record, Tuning
from mergelab.version import __version__

__all__ = ["RECORD", "Facts", "save_adapter", "write_tuned"]

RECORD = "finetune.json"
"""File of a fine-tuned folder that says how it was made, and with which losses."""

_STEM, _PREFIX = "adapter_model", "base_model.model."


@dataclass(frozen=True)
class Facts:
    """What a folder says of how it was made.

    Attributes:
        model: path of the model that was trained.
        base: how files name it: its id on the hub, or its path.
        texts: names of the files that were learned.
        held_out: names of the files that were judged; empty for a share of those.
        teacher: name of the teacher, or None.
        identity: SHA-256 of all that decides the content.
    """

    model: Path
    base: str
    texts: tuple[str, ...]
    held_out: tuple[str, ...]
    teacher: str | None
    identity: str


def save_adapter(
    record: LoraRecord, path: str | Path | WorkFolder, *, base: str | Path = "", overwrite: bool = False
) -> Path:
    """Writes learned factors as a PEFT folder.

    Args:
        record: what a fine-tuning with LoRA returned.
        path: a folder that is empty or does not exist.
        base: path or hub id of the model they belong to, for `adapter_config.json`.
        overwrite: replace a folder that mergelab wrote.

    Raises:
        OutputError: the folder cannot be written.
    """
    return _write_adapter(record.factors, record.trained, path, str(base), {}, "", overwrite=overwrite)


def _write_adapter(
    factors: Factors,
    trained: Any,
    path: str | Path | WorkFolder,
    base: str,
    files: Mapping[str, bytes],
    identity: str,
    *,
    overwrite: bool = False,
) -> Path:
    table = []
    for module in factors.modules:
        for part, array in trained[module.name].items():
            name = f"{_PREFIX}{module.name}.lora_{part}.weight"
            table.append(Leaf((module.name, part), name, array.shape))
    modules = {leaf.hf_name.rpartition(".")[0] for leaf in factors.model.standard().table()}
    config = adapter_config(
        dict.fromkeys((module.name for module in factors.modules), factors.settings.rank),
        (),
        modules,
        base=base,
        model_config=factors.model.hf_config,
        fan_in_fan_out=not all(module.transposed for module in factors.modules),
        with_biases=False,
        keeps_tie=False,
    )
    config["lora_alpha"] = factors.settings.numerator
    return save_params(
        trained,
        table,
        path,
        files={"adapter_config.json": _text(config), **files},
        shard_bytes=1 << 62,  # PEFT reads adapters of one file
        overwrite=overwrite,
        stem=_STEM,
        identity=identity,
        metadata={"format": "pt"},
    )


def write_tuned(
    tuning: Tuning, params: Any, trained: Any, record: Record, facts: Facts, work: WorkFolder
) -> Path:
    """Writes and publishes the folder: a model, or an adapter where factors were trained.

    Args:
        tuning: the fine-tuning.
        params: the tuned parameters; not read where factors were trained.
        trained: what was trained.
        record: what happened.
        facts: what the folder says of its inputs.
        work: the work folder, entered.

    Raises:
        OutputError: it cannot be written.
    """
    said = described(tuning, record, facts)
    marker = {"mergelab": __version__, "identity": facts.identity}
    files = {RECORD: _text(said), MARKER: _text(marker), "README.md": _card(tuning, said, facts)}
    if tuning.factors is not None:
        return _write_adapter(tuning.factors, trained, work, facts.base, files, facts.identity)
    files = {**donor_files(facts.model, None), **files}
    return save_model(tuning.loss.model, params, work, files=files, identity=facts.identity)


def described(tuning: Tuning, record: Record, facts: Facts) -> dict[str, Any]:
    """`finetune.json` as plain data."""
    settings, learned, judged = tuning.settings, tuning.learned, tuning.judged
    context = int(learned.tokens.shape[1])
    steps = tuning.optimizer.steps
    return {
        "mergelab": __version__,
        "model": portable_name(facts.base),
        "texts": [portable_name(name) for name in facts.texts],
        "held_out_texts": [portable_name(name) for name in facts.held_out],
        "teacher": None if facts.teacher is None else portable_name(facts.teacher),
        "settings": {**asdict(settings), "learning_rate": settings.peak, "context": context},
        "modules": [] if tuning.factors is None else [module.name for module in tuning.factors.modules],
        "roles": learned.roles,
        "steps": steps,
        "tokens": steps * settings.batch * settings.accumulate * context,
        "contexts": len(learned.tokens),
        "held_out_contexts": 0 if judged is None else len(judged.tokens),
        "held_out_targets": 0 if judged is None else judged.targets,
        "held_out_loss": {"before": record.before, "after": record.after},
        "history": {"steps": record.steps, "held_out": record.held_out},
    }


def _card(tuning: Tuning, said: Mapping[str, Any], facts: Facts) -> bytes:
    settings, factors = tuning.settings, tuning.factors
    base, texts = portable_name(facts.base), ", ".join(f"`{name}`" for name in said["texts"])
    what = (
        "all of its parameters"
        if factors is None
        else f"LoRA factors of rank {factors.settings.rank} (alpha {factors.settings.numerator:g}) of "
        f"{len(factors.modules)} modules"
    )
    paragraphs = [
        f"`{base}`, fine-tuned with mergelab {__version__} on {texts}: {what}, {said['steps']:,} steps of "
        f"{settings.optimizer} ({said['tokens']:,} tokens in contexts of {said['settings']['context']}), "
        f"peak learning rate {settings.peak:g}, seed {settings.seed}."
    ]
    if facts.teacher is not None:
        teacher = portable_name(facts.teacher)
        paragraphs.append(f"Kept near to `{teacher}` by KL divergence of weight {settings.kl:g}.")
    if tuning.judged is not None:
        before, after = record_pair(said)
        paragraphs.append(
            f"Loss on {said['held_out_targets']:,} held-out tokens: {before:.4f} nats a token before, "
            f"{after:.4f} after. {RECORD} has the loss of every step."
        )
    name = f"{'LoRA adapter for ' if factors is not None else ''}{base}, fine-tuned"
    library, tags = ("transformers", ["mergelab"]) if factors is None else ("peft", ["mergelab", "lora"])
    return short_card(name, library, tags, card_facts([facts.model]), paragraphs)


def record_pair(said: Mapping[str, Any]) -> tuple[float, float]:
    """Held-out loss before and after, of what `described` gives."""
    losses = said["held_out_loss"]
    return losses["before"], losses["after"]


def _text(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
