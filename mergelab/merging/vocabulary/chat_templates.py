"""The chat template of a merged model: builtin formats, or the inputs' own."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergelab.checkpoints.companions import companion_json
from mergelab.checkpoints.json_data import parse_json_object
from mergelab.checkpoints.source import Checkpoint
from mergelab.checkpoints.text_file import read_text
from mergelab.errors import RecipeError, did_you_mean, quoted
from mergelab.merging.vocabulary.merged_tokenizer import json_bytes

__all__ = ["CHAT_FORMATS", "chat_template_files", "read_chat_template"]


_CHATML = """\
{% for message in messages %}
{{ '<|im_start|>' ~ message['role'] ~ '\\n' ~ message['content'] ~ '<|im_end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}
"""

_LLAMA3 = """\
{{ bos_token }}
{%- for message in messages %}
{{ '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\\n\\n' }}
{{- message['content'] | trim ~ '<|eot_id|>' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

_MISTRAL = """\
{% set turns = namespace(system='', expected='user') %}
{{ bos_token }}
{%- for message in messages %}
{% if loop.first and message['role'] == 'system' %}
{% set turns.system = message['content'] ~ '\\n\\n' %}
{% elif message['role'] != turns.expected %}
{{ raise_exception('user and assistant must take turns after an optional system message') }}
{%- elif message['role'] == 'user' %}
{{ ' [INST] ' ~ turns.system ~ message['content'] ~ ' [/INST]' }}
{%- set turns.system = '' %}
{% set turns.expected = 'assistant' %}
{% else %}
{{ ' ' ~ message['content'] ~ eos_token }}
{%- set turns.expected = 'user' %}
{% endif %}
{% endfor %}
"""

_ALPACA = """\
{% for message in messages %}
{% if message['role'] == 'system' %}
{{ message['content'] | trim ~ '\\n\\n' }}
{%- elif message['role'] == 'user' %}
{{ '### Instruction:\\n' ~ message['content'] | trim ~ '\\n\\n' }}
{%- else %}
{{ '### Response:\\n' ~ message['content'] | trim ~ eos_token ~ '\\n\\n' }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '### Response:\\n' }}
{%- endif %}
"""

_EXAONE = """\
{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}
{{ '[|system|][|endofturn|]\\n' }}
{%- endif %}
{{ '[|' ~ message['role'] ~ '|]' ~ message['content'] }}
{{- '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '[|assistant|]' }}
{%- endif %}
"""

CHAT_FORMATS = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "exaone": _EXAONE,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
}
"""Template by name."""


_MAX_TEMPLATE = 1_000_000


def chat_template_files(
    choice: str,
    models: Mapping[str, Checkpoint],
    base: str | None,
    files: Mapping[str, bytes] | None = None,
) -> dict[str, bytes]:
    """Returns the files that give the merged model its chat template.

    `chat_template.jinja`, and `tokenizer_config.json` where it has a template too: of two that differ, some
    readers take one and some the other. Nothing if `choice` is "auto" and no model has one.

    Args:
        choice: "auto" (the one most models have; on a tie, the base's, then the first), a name in
            `CHAT_FORMATS`, or jinja.
        models: the merged models.
        base: the base model, whose files the output has where `files` has none.
        files: the tokenizer files written otherwise (those of a `VocabularyPlan`).

    Raises:
        RecipeError: an unknown name, or a template that is not valid jinja.
    """
    template = _commonest(models, base) if choice == "auto" else CHAT_FORMATS.get(choice, choice)
    if template is None:
        return {}
    if choice not in CHAT_FORMATS and "{{" not in template and "{%" not in template:
        names = ("auto", *CHAT_FORMATS)
        raise RecipeError(
            f"chat_template: {quoted(choice)} is neither jinja nor a known format"
            f"{did_you_mean(choice, names)}; write one of {', '.join(names)}, or the template itself"
        )
    _check_jinja(template)
    written = {"chat_template.jinja": template.encode("utf-8")}
    config = _tokenizer_config(models, base, files)
    if config.get("chat_template") not in (None, template):
        written["tokenizer_config.json"] = json_bytes({**config, "chat_template": template})
    return written


def read_chat_template(folder: Path) -> str | None:
    """The (default) chat template of a model folder, or None.

    Raises:
        CheckpointError: a file of it is not JSON.
    """
    if os.path.lexists(folder / "chat_template.jinja"):
        return read_text(folder / "chat_template.jinja")
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = companion_json(folder, name).get("chat_template")
        if isinstance(template, list):
            named = [entry for entry in template if isinstance(entry, dict)]
            template = next((e.get("template") for e in named if e.get("name") == "default"), None)
        if isinstance(template, str):
            return template
    return None


def _commonest(models: Mapping[str, Checkpoint], base: str | None) -> str | None:
    names = sorted(models, key=lambda name: name != base)  # stable: the base first, then recipe order
    found = [read_chat_template(models[name].path) for name in names]
    return max(counts, key=counts.__getitem__) if (counts := Counter(t for t in found if t)) else None


def _tokenizer_config(
    models: Mapping[str, Checkpoint], base: str | None, files: Mapping[str, bytes] | None
) -> dict[str, Any]:
    if files is not None:
        raw = files.get("tokenizer_config.json")
        return {} if raw is None else parse_json_object(raw, "tokenizer_config.json")
    return companion_json(models[base or next(iter(models))].path, "tokenizer_config.json")


def _check_jinja(template: str) -> None:
    """Parses a template as its readers will, without compiling or running it."""
    from jinja2 import TemplateSyntaxError

    from mergelab.text.chat_worker import chat_environment

    if len(template) > _MAX_TEMPLATE:
        raise RecipeError(
            f"chat_template: has {len(template):,} characters, more than the {_MAX_TEMPLATE:,} that "
            "any genuine one has; use another"
        )
    try:
        chat_environment().parse(template)
    except TemplateSyntaxError as error:
        fault = f"{error.message} at line {error.lineno}"
    except (RecursionError, MemoryError):
        fault = "it is nested too deeply"
    except (ArithmeticError, ValueError) as error:  # literals that Python does not take
        fault = str(error)
    else:
        return
    raise RecipeError(f"chat_template: not valid jinja: {fault[:500]}; correct it")
