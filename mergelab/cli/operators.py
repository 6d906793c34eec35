"""`mergelab operators`: what every named operator computes, needs and takes."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from mergelab.errors import OperatorError, did_you_mean

if TYPE_CHECKING:
    from mergelab.operators.declare import HyperParameter, Operator

__all__ = ["command"]

_BASE = {"required": "required", "optional": "optional", "as_input": "one more input"}

_STATISTICS = {
    "gram": "- statistics of each model: Gram matrices of its inputs",
    "merged_gram": "- statistics of each model: Gram matrices of its inputs behind merged layers",
    "fisher": "- statistics of each model: diagonal Fishers",
}

_MARKDOWN_HEAD = """\
# Named operators

What a recipe's `merge_method` and `mergelab.operators` can name. Written by `mergelab operators --markdown`;
a test keeps it current. *Models* counts the inputs besides the base; parameters in *italics* are set per
model, the others once for the merge; a parameter without a default is required. What each did with three
siblings of a language model, with eight tasks, and how fast: [measured operators](measured_operators.md).
"""


@click.command("operators")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the declarations as JSON.")
@click.option("--markdown", is_flag=True, help="Print the page docs/operators.md.")
def command(name: str | None, as_json: bool, markdown: bool) -> None:
    """List the merge operators, or explain one with its parameters.

    \b
    Examples:
      mergelab operators
      mergelab operators ties
      mergelab operators dare_ties --json
    """
    from mergelab.operators import OPERATORS

    chosen = _choose(OPERATORS, name)
    if as_json:
        click.echo(json.dumps([_declaration(operator) for operator in chosen.values()], indent=2))
    elif markdown:
        click.echo("\n".join([_MARKDOWN_HEAD, *map(_markdown, chosen.values())]), nl=False)
    elif name is None:
        width = max(map(len, chosen))
        for operator in chosen.values():
            click.echo(f"{operator.name:<{width}}  {operator.summary}")
    else:
        click.echo(_explain(chosen[name]))


def _choose(operators: Mapping[str, Operator], name: str | None) -> Mapping[str, Operator]:
    if name is None:
        return operators
    if name not in operators:
        raise OperatorError(
            f"there is no operator {name!r}{did_you_mean(name, operators)}; "
            f"`mergelab operators` lists all {len(operators)}"
        )
    return {name: operators[name]}


def _models(operator: Operator) -> str:
    low, high = operator.min_models, operator.max_models
    return f"{low} or more" if high is None else str(low) if low == high else f"{low} to {high}"


def _default(parameter: HyperParameter) -> str:
    default = parameter.default
    if isinstance(default, bool):
        return str(default).lower()
    return "none" if default is None else str(default) if isinstance(default, str) else f"{default:g}"


def _range(parameter: HyperParameter) -> str:
    low, high = parameter.low, parameter.high
    if low == float("-inf") and high == float("inf"):
        return ""
    if high == float("inf"):
        return f"at least {low:g}"
    return f"at most {high:g}" if low == float("-inf") else f"{low:g} to {high:g}"


def _explain(operator: Operator) -> str:
    lines = [
        f"{operator.name}: {operator.summary}",
        "",
        *(f"  {line}".rstrip() for paragraph in _details(operator) for line in (*paragraph.split("\n"), "")),
        f"  base model  {_BASE[operator.base]}",
        f"  models      {_models(operator)} besides the base",
        *([] if operator.statistics is None else [f"  statistics  {operator.statistics}, of each model"]),
        f"  reference   {operator.reference}",
        *([f"  helps       {operator.helps}"] if operator.helps else []),
    ]
    width = max((len(p.name) for p in operator.parameters), default=0)
    if operator.parameters:
        lines += ["", "  parameters"]
    for p in operator.parameters:
        facts = [
            p.type.__name__,
            "per model" if p.per_model else "",
            _range(p),
            "required" if p.required else f"default {_default(p)}",
        ]
        lines.append(f"    {p.name:<{width}}  {', '.join(fact for fact in facts if fact)}")
    return "\n".join(lines)


def _details(operator: Operator) -> list[str]:
    """The paragraphs of an operator's docstring after its summary, without what it raises."""
    text = inspect.cleandoc(operator.build.__doc__ or "").partition("\n\nRaises:")[0]
    return text.split("\n\n")[1:]


def _markdown(operator: Operator) -> str:
    parameters = [
        (f"*{p.name}*" if p.per_model else p.name) + ("" if p.required else f" = {_default(p)}")
        for p in operator.parameters
    ]
    return "\n".join(
        [
            f"## {operator.name}",
            "",
            operator.summary,
            "",
            *(line for paragraph in _details(operator) for line in (paragraph, "")),
            f"- base model: {_BASE[operator.base]}; models: {_models(operator)}",
            f"- parameters: {', '.join(parameters) or 'none'}",
            *([] if operator.statistics is None else [_STATISTICS[operator.statistics]]),
            f"- reference: {operator.reference}",
            *([f"- for: {operator.helps}"] if operator.helps else []),
            "",
        ]
    )


def _declaration(operator: Operator) -> dict[str, Any]:
    return {
        "name": operator.name,
        "summary": operator.summary,
        "base": operator.base,
        "min_models": operator.min_models,
        "max_models": operator.max_models,
        "reference": operator.reference,
        "helps": operator.helps,
        **({} if operator.statistics is None else {"statistics": operator.statistics}),
        "parameters": [
            {
                "name": p.name,
                "type": p.type.__name__,
                "per_model": p.per_model,
                "required": p.required,
                **({} if p.required else {"default": p.default}),
                **({} if _range(p) == "" else {"range": _range(p)}),
            }
            for p in operator.parameters
        ],
    }
