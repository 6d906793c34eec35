"""Chat templates: a conversation as the one text that a model was trained to continue."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from mergelab.errors import ChatTemplateError, did_you_mean
from mergelab.text.chat_sandbox import Budget, run_template
from mergelab.text.tokenizer import Tokenizer

__all__ = ["Message", "chat_ids", "chat_text", "render_chat", "turn_end_ids"]

# A turn: {"role": "user", "content": "Hello"}, and whatever else a template reads.
Message = Mapping[str, Any]

_MOST_BITS = 10_000  # Python itself writes no longer numbers in decimal


def chat_text(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    template: str = "default",
    **variables: Any,
) -> str:
    """The text of a conversation in a model's own format; encode it with `add_special_tokens=False`.

    Args:
        tokenizer: its templates and special tokens.
        messages: the turns, oldest first.
        add_generation_prompt: end with what begins the assistant's turn.
        template: name of the model's template.
        **variables: more of what the template reads: `tools`, `documents`, `enable_thinking`, `now`, ...

    Raises:
        ChatTemplateError: the model has no such template, or as `render_chat`.
    """
    source = tokenizer.chat_templates.get(template)
    if source is None:
        known = ", ".join(tokenizer.chat_templates) or "none"
        raise ChatTemplateError(
            f"{tokenizer.folder} has no chat template {template!r}"
            f"{did_you_mean(template, tokenizer.chat_templates)} (it has: {known}); give the text itself."
        )
    variables = {**tokenizer.special, **variables}
    return render_chat(source, messages, add_generation_prompt=add_generation_prompt, **variables)


def chat_ids(tokenizer: Tokenizer, messages: Sequence[Message], **options: Any) -> list[int]:
    """The token ids of a conversation, with what begins the assistant's turn; options as of `chat_text`."""
    return tokenizer.encode(chat_text(tokenizer, messages, **options), add_special_tokens=False)


def turn_end_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end an assistant's turn.

    Those that end a text (`Tokenizer.end_ids`), the `eos_token`, and the special token that the model's own
    template writes behind an answer, where it writes one: configurations do not always name all of them.
    """
    found = [*tokenizer.end_ids]
    if (eos := tokenizer.id_of("eos")) is not None:
        found.append(eos)
    answer = "An answer."
    messages = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": answer}]
    try:
        text = chat_text(tokenizer, messages, add_generation_prompt=False)
    except ChatTemplateError:  # a template that is only for other conversations
        text = ""
    if behind := text.rpartition(answer)[2] if answer in text else "":
        first = next(iter(tokenizer.encode(behind, add_special_tokens=False)), None)
        added = tokenizer.backend.get_added_tokens_decoder()
        if first in added and added[first].special:
            found.append(first)
    return tuple(dict.fromkeys(found))


def render_chat(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    now: datetime | None = None,
    budget: Budget | None = None,
    **variables: Any,
) -> str:
    """Renders a template, which may come from anyone: in a child process of bounded time, memory and output.

    Templates find `messages`, `add_generation_prompt`, `variables` (`tools` and `documents` are None by
    default), `raise_exception(message)`, `strftime_now(format)`, and jinja's tests and filters. The process
    is started by the first call (a tenth of a second) and kept for the next ones.

    Args:
        template: jinja.
        messages: the turns, oldest first; they and `variables` are plain JSON data.
        add_generation_prompt: end with what begins the assistant's turn.
        now: the time that `strftime_now` tells; by default that of the call.
        budget: what the rendering may use, by default a `Budget()`.
        **variables: more of what the template reads, such as `bos_token`.

    Raises:
        ChatTemplateError: the template is not valid jinja, refuses the messages, reads what is not there,
            tries what the sandbox forbids, or exceeds the budget; or a variable is not plain data.
    """
    moment = now or datetime.now()
    offset = moment.utcoffset()
    values = {
        "tools": None,
        "documents": None,
        **variables,
        "messages": list(messages),
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        plain = {name: _plain(value, name) for name, value in values.items()}
    except RecursionError:
        raise ChatTemplateError(
            "the chat template cannot be given messages or variables that are nested too deeply, or that "
            "contain themselves; pass plain JSON data."
        ) from None
    told = {
        "time": moment.replace(tzinfo=None).isoformat(),
        "offset": None if offset is None else offset.total_seconds(),
        "zone": moment.tzname() or "",
    }
    return run_template(template, plain, told, budget or Budget())


def _plain(value: Any, place: str) -> Any:
    """A value as plain JSON data, which is what goes to the process that renders.

    Raises:
        ChatTemplateError: it is something else.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral) and int(value).bit_length() <= _MOST_BITS:
        return int(value)
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
        return float(value)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, place) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_plain(item, place) for item in value]
    kind = type(value).__name__
    raise ChatTemplateError(
        f"the chat template cannot be given {place!r}: it holds a {kind} that is not plain JSON data (text, "
        "numbers, lists, and mappings with keys of text); convert it first."
    )
