"""A jinja environment for templates from strangers: no effects, no way out, bounded time and size.

`jinja2`'s immutable sandbox keeps a template from attributes and methods that reach the interpreter or change
its arguments; it does not keep it from looping for ever or from filling the memory. Here every loop pass,
macro, call and filter is counted, and every value measured, against a `Budget`.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from mergelab.errors import ChatTemplateError

__all__ = ["Budget", "ChatEnvironment", "compile_chat_template"]

# Filters without effects whose results are no longer than a small multiple of what they are given.
_FILTERS = frozenset(
    {"abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float"}
    | {"groupby", "indent", "int", "items", "join", "last", "length", "list", "lower", "map"}
    | {"max", "min", "reject", "rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr"}
    | {"sort", "string", "sum", "title", "trim", "unique", "upper"}
)
# Widths that blow up a format string: long ones, and those that an argument gives.
_WIDTH = re.compile(r"\d{5}|%[^%a-zA-Z]*\*|:[^}]*\{")
_FORBIDDEN_METHODS = frozenset({"expandtabs", "translate"})
_MAX_BITS = 4096
_MAX_EXPONENT = 64


@dataclass
class Budget:
    """What one rendering may still use.

    Attributes:
        steps: loop passes, macro calls, calls and filters.
        characters: written in all; no single value may be larger either.
        elements: of one value, nested ones counted as often as they appear.
        seconds: of the thread's processor time, in case the steps are slow ones.
    """

    steps: int = 300_000
    characters: int = 16_000_000
    elements: int = 1_000_000
    seconds: float = 10.0
    _limit: int = field(init=False)
    _end: float = field(init=False)

    def __post_init__(self) -> None:
        self._limit = self.characters
        self._end = time.thread_time() + self.seconds

    def step(self) -> None:
        """Counts a step.

        Raises:
            ChatTemplateError: no steps, or no time, are left.
        """
        self.steps -= 1
        if self.steps < 0 or time.thread_time() > self._end:
            raise ChatTemplateError(
                "the chat template does not end (it ran out of its steps or seconds); use another template."
            )

    def write(self, size: int) -> None:
        """Counts written characters.

        Raises:
            ChatTemplateError: more than the budget has left.
        """
        self.characters -= size
        if self.characters < 0:
            self.refuse()

    def measure(self, *values: object) -> int:
        """The number of characters and elements in values, nested ones counted as often as they appear.

        Raises:
            ChatTemplateError: more than the budget allows one value.
        """
        total, elements, waiting = 0, 0, list(values)
        while waiting:
            value = waiting.pop()
            elements += 1
            if isinstance(value, str | bytes):
                total += len(value)
            elif isinstance(value, Mapping):
                waiting.extend(value.keys())
                waiting.extend(value.values())
            elif isinstance(value, list | tuple | set | frozenset):
                waiting.extend(value)
            elif isinstance(value, int) and value.bit_length() > _MAX_BITS:
                self.refuse()
            if total > self._limit or elements + len(waiting) > self.elements:
                self.refuse()
        return total + elements

    def allow(self, size: int) -> None:
        """Refuses a value before it is made.

        Raises:
            ChatTemplateError: it would be larger than the budget began with.
        """
        if size > self._limit:
            self.refuse()

    def refuse(self) -> NoReturn:
        """Raises `ChatTemplateError`: a value is too large, or nobody could say how large."""
        raise ChatTemplateError(
            f"the chat template makes more than {self._limit} characters; use another template, or shorter "
            "messages."
        )


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The environment of one rendering: jinja's immutable sandbox, and a budget.

    Args:
        budget: what the rendering may use.
        filters: more filters by name; they are measured too.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, budget: Budget, filters: Mapping[str, Callable[..., Any]] | None = None) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        self.budget = budget
        kept = {name: f for name, f in self.filters.items() if name in _FILTERS} | dict(filters or {})
        self.filters = {name: _measured(name, f, budget) for name, f in kept.items()}
        del self.globals["lipsum"]

    def tick(self) -> bool:
        """Counts a loop pass or a macro; True, so that it can stand in a condition."""
        self.budget.step()
        return True

    def emit(self, value: object) -> str:
        """The text of a value that the template writes, counted."""
        self.budget.measure(value)
        text = str(value)
        self.budget.write(len(text))
        return text

    def joined(self, *values: object) -> str:
        """`a ~ b ~ ...`, measured first."""
        self.budget.measure(*values)
        return "".join(map(str, values))

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.budget.step()
        self.budget.measure(args, kwargs)
        method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            _check_method(self.budget, owner, getattr(method, "__name__", ""), (*args, *kwargs.values()))
        result = super().call(context, obj, *args, **kwargs)
        self.budget.measure(result)
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        sizes = self.budget.measure(left), self.budget.measure(right)
        for value, size, times in ((left, sizes[0], right), (right, sizes[1], left)):
            if operator == "*" and isinstance(value, str | list | tuple) and isinstance(times, int):
                self.budget.allow(size * times)
        if operator == "**" and not (isinstance(right, int | float) and abs(right) <= _MAX_EXPONENT):
            self.budget.refuse()
        if operator == "%" and isinstance(left, str) and _WIDTH.search(left):
            self.budget.refuse()
        result = super().call_binop(context, operator, left, right)
        self.budget.measure(result)
        return result


@functools.lru_cache(maxsize=32)
def compile_chat_template(template: str, filters: frozenset[str] = frozenset()) -> CodeType:
    """Compiles a template, with the counting put in; make it one with `Template.from_code`.

    Raises:
        jinja2.TemplateSyntaxError: it is not valid jinja, or uses a filter that is not offered.
    """
    environment = ChatEnvironment(Budget(), dict.fromkeys(filters, str))
    counted = _Counting().visit(environment.parse(template))
    return environment.compile(counted)


def _measured(name: str, function: Callable[..., Any], budget: Budget) -> Callable[..., Any]:
    # wraps() also copies the marks that tell jinja which filters take the environment or the context.
    @functools.wraps(function)
    def measured(*args: Any, **kwargs: Any) -> Any:
        budget.step()
        ours = (Context, ImmutableSandboxedEnvironment, nodes.EvalContext)
        values = [a for a in (*args, *kwargs.values()) if not isinstance(a, ours)]
        if name in ("replace", "join", "indent") and values:
            sizes = [v if isinstance(v, int) else budget.measure(v) for v in values]
            budget.allow(sizes[0] * max([4, *sizes[1:]]))
        budget.measure(*values)
        result = function(*args, **kwargs)
        budget.measure(result)
        return result

    return measured


def _check_method(budget: Budget, owner: str, name: str, args: tuple[Any, ...]) -> None:
    """Refuses string methods whose results may be far larger than their arguments, before they run."""
    longest = max((a if isinstance(a, int) else budget.measure(a) for a in args), default=0)
    if name in ("replace", "join"):
        budget.allow((len(owner) + 1) * longest)
    elif name in _FORBIDDEN_METHODS or (name.startswith("format") and _WIDTH.search(owner)):
        budget.refuse()
    else:  # widths
        budget.allow(longest)


class _Counting(NodeTransformer):
    """Puts the environment's `tick`, `emit` and `joined` into a parsed template."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)  # changes it in place
        if node.test is not None:
            node.test = nodes.And(_own("tick"), node.test)
        return self._begin(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        self.generic_visit(node)
        return self._begin(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.CallBlock:
        self.generic_visit(node)
        return self._begin(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return _own("joined", *node.nodes)

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        self.generic_visit(node)
        written = (nodes.Const(n.data) if isinstance(n, nodes.TemplateData) else n for n in node.nodes)
        node.nodes = [_own("emit", value) for value in written]
        return node

    def _begin(self, node: Any) -> Any:
        node.body.insert(0, nodes.ExprStmt(_own("tick")))
        return node


def _own(name: str, *args: nodes.Expr) -> nodes.Call:
    """A call of a method of the environment, which a template has no name for."""
    return nodes.Call(nodes.EnvironmentAttribute(name), list(args), [], None, None)


class _Generation(Extension):
    """`{% generation %}`: marks what the assistant wrote; rendered as what it holds."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)
