"""Takes a Python source file apart into the text of its docstrings and its code without them."""

from __future__ import annotations

import ast
import inspect
import io
import tokenize

__all__ = ["docstrings", "stripped_code"]


def docstrings(source: str) -> str:
    """The cleaned docstrings of a module, its classes and functions, in source order, a blank line between.

    Raises:
        SyntaxError: `source` is not Python of the running version.
    """
    return "\n\n".join(inspect.cleandoc(str(node.value)) for node in _docstring_nodes(source))


def stripped_code(source: str) -> str:
    """`source` without docstrings, comments and blank lines; what remains keeps its layout.

    Raises:
        SyntaxError: `source` is not Python of the running version.
    """
    lines = source.split("\n")  # not splitlines(), which also splits at form feeds
    for token in tokenize.generate_tokens(io.StringIO(source + "\n").readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in _docstring_nodes(source):
        first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
        # The columns of a syntax tree count UTF-8 bytes.
        before = lines[first].encode()[: node.col_offset]
        after = lines[last].encode()[node.end_col_offset :]
        lines[first : last + 1] = [(before + after).decode(), *[""] * (last - first)]
    kept = [line.rstrip() for line in lines if line.strip()]
    return "\n".join(kept) + "\n" if kept else ""


def _docstring_nodes(source: str) -> list[ast.Constant]:
    found: list[ast.Constant] = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        match node.body[:1]:
            case [ast.Expr(value=ast.Constant(value=str()) as constant)]:
                found.append(constant)
    return sorted(found, key=lambda constant: constant.lineno)
