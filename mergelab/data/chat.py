"""Chat templates: a conversation as the one text that a model was trained to continue."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError

from mergelab.data.chat_sandbox import Budget, ChatEnvironment, compile_chat_template
from mergelab.data.tokenizer import Tokenizer
from mergelab.errors import ChatTemplateError, did_you_mean

__all__ = ["Message", "chat_text", "render_chat"]

# A turn: {"role": "user", "content": "Hello"}, and whatever else a template reads.
Message = Mapping[str, Any]


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
        template: which of the model's templates.
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


def render_chat(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    now: datetime | None = None,
    budget: Budget | None = None,
    **variables: Any,
) -> str:
    """Renders a template, which may come from anyone: sandboxed, without effects, in bounded time and size.

    Templates find `messages`, `add_generation_prompt`, `variables` (`tools` and `documents` are None by
    default), `raise_exception(message)`, `strftime_now(format)`, and jinja's tests and harmless filters.

    Args:
        template: jinja.
        messages: the turns, oldest first.
        add_generation_prompt: end with what begins the assistant's turn.
        now: the time that `strftime_now` tells; by default that of the call.
        budget: what the rendering may use, by default a `Budget()`; it is used up.
        **variables: more of what the template reads, such as `bos_token`.

    Raises:
        ChatTemplateError: the template is not valid jinja, refuses the messages, reads what is not there,
            tries what the sandbox forbids, or exceeds the budget.
    """

    def raise_exception(message: object) -> None:
        raise ChatTemplateError(f"the chat template refuses these messages: {str(message)[:500]}")

    def strftime_now(format: str) -> str:
        return (now or datetime.now()).strftime(format)

    try:
        # Deep templates recurse in the parser, endless macros in the interpreter.
        code = compile_chat_template(template, frozenset({"tojson"}))
        environment = ChatEnvironment(budget or Budget(), {"tojson": _to_json})
        environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
        compiled = Template.from_code(environment, code, environment.globals)
        return compiled.render(
            {
                "tools": None,
                "documents": None,
                **variables,
                "messages": list(messages),
                "add_generation_prompt": add_generation_prompt,
            }
        )
    except TemplateSyntaxError as error:
        message = f"the chat template is not valid jinja: {error.message} at line {error.lineno}; correct it."
    except TemplateError as error:
        message = f"the chat template cannot be rendered: {error}; give it what it reads, or use another."
    except (RecursionError, MemoryError):
        message = "the chat template is nested too deeply, or makes too much text; use another template."
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        kind = type(error).__name__
        message = f"the chat template fails on these messages ({kind}: {str(error)[:500]}); correct either."
    raise ChatTemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, where jinja's own filter escapes what HTML would read as markup."""
    if indent is not None and not 0 <= int(indent) <= 16:
        raise ValueError("tojson indents by 0 to 16 spaces")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
