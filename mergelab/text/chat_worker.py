"""The child process in which chat templates run, started by `chat_sandbox`; it imports nothing of ours.

It reads requests from its standard input and answers on its standard output, a line of JSON each, until its
input ends. Before a template is compiled the operating system is told how much memory and processor time it
may take, so that no construct of jinja or Python has to be judged beforehand.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    # Isolated from the user's environment and folders, this process is told where jinja lies.
    sys.path.extend(sys.argv[1:])

import functools
import json
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

try:
    import resource
except ImportError:  # Windows: the parent's clock is the limit
    resource = None

__all__ = ["chat_environment", "main"]

_FIXED = {"RLIMIT_CORE": 0, "RLIMIT_FSIZE": 0, "RLIMIT_NOFILE": 3, "RLIMIT_NPROC": 0}
"""Limits for good: no core file, nothing written, no file or process opened besides the three pipes."""

_WARM_UP = (
    r"{{ 'a\n\N{BULLET}' | wordwrap(1) }}{{ 'é'.encode() | pprint }}{{ strftime_now('%c') }}",
    "{{ none_such.attribute.of_it }}",
)
"""Templates that make jinja and Python import all that they import only when it is called for."""

_NOT_OFFERED = ("attr", "random")
"""Filters of jinja that reach for attributes by name, or give another text each time."""


class _Refusal(Exception):
    """The template called `raise_exception`."""


class _TooLong(Exception):
    """The template has written more characters than it may."""


class _Generation(Extension):
    """`{% generation %}`: marks what the assistant wrote; rendered as what it holds."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def chat_environment() -> ImmutableSandboxedEnvironment:
    """Jinja as chat templates are written for: transformers' whitespace, loop controls and `tojson`."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    for name in _NOT_OFFERED:
        del environment.filters[name]
    del environment.globals["lipsum"]
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, where jinja's own filter escapes what HTML would read as markup."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


_QUIET: Mapping[str, Any] = {
    "variables": {},
    "now": {"time": "2000-01-01", "offset": None, "zone": ""},
    "seconds": 60.0,
    "characters": 1_000,
    "memory": 512_000_000,
}
"""What a request says besides its template."""


@functools.lru_cache(maxsize=32)
def _compiled(template: str) -> Template:
    environment = chat_environment()
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(template)


def _raise_exception(message: object) -> None:
    raise _Refusal(str(message)[:500])


def _strftime_now(now: Mapping[str, Any]) -> Callable[[str], str]:
    """The function that tells the caller's time."""
    moment = datetime.fromisoformat(now["time"])
    if now["offset"] is not None:
        moment = moment.replace(tzinfo=timezone(timedelta(seconds=now["offset"]), now["zone"]))
    return moment.strftime


def _rendered(request: Mapping[str, Any]) -> str:
    template = _compiled(request["template"])
    values = {"strftime_now": _strftime_now(request["now"]), **request["variables"]}
    pieces, left = [], request["characters"]
    for piece in template.generate(values):
        left -= len(piece)
        if left < 0:
            raise _TooLong
        pieces.append(piece)
    return "".join(pieces)


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """The text, or what kind of fault there was, with its words."""
    try:
        _limit(request["seconds"], request["memory"])
        return {"text": _rendered(request)}
    except _Refusal as error:
        return {"fault": "refusal", "words": str(error)}
    except _TooLong:
        return {"fault": "characters", "words": ""}
    except TemplateSyntaxError as error:
        return {"fault": "syntax", "words": f"{str(error.message)[:500]} at line {error.lineno}"}
    except TemplateError as error:
        return {"fault": "template", "words": str(error)[:500]}
    except MemoryError:
        return {"fault": "memory", "words": ""}
    except RecursionError:
        return {"fault": "depth", "words": ""}
    except Exception as error:  # what a template makes Python raise is the template's fault, whatever it is
        return {"fault": "error", "words": f"{type(error).__name__}: {str(error)[:500]}"}


def _limit(seconds: float, memory: int) -> None:
    """Bounds what this process takes from now on, where the operating system can."""
    if resource is None:
        return
    for name, value in (("RLIMIT_CPU", int(time.process_time() + seconds) + 1), ("RLIMIT_AS", memory)):
        _set_limit(name, value, lasting=False)


def _set_limit(name: str, value: int, *, lasting: bool) -> None:
    kind = getattr(resource, name, None)
    if resource is None or kind is None:
        return
    try:
        _, most = resource.getrlimit(kind)
        if most != resource.RLIM_INFINITY:
            value = min(value, most)
        resource.setrlimit(kind, (value, value if lasting else most))
    except (ValueError, OSError):  # a limit that this system does not take, as RLIMIT_AS on macOS
        pass


def main() -> None:
    """Answers requests until the input ends."""
    for template in _WARM_UP:
        _answer({**_QUIET, "template": template})
    for name, value in _FIXED.items():
        _set_limit(name, value, lasting=True)
    out = sys.stdout.buffer
    out.write(b"ready\n")
    out.flush()
    for line in sys.stdin.buffer:
        answer = json.dumps(_answer(json.loads(line)), ensure_ascii=False)
        out.write(answer.encode("utf-8", "surrogatepass") + b"\n")
        out.flush()


if __name__ == "__main__":
    main()
