"""Faces of packages: a name loads the file that holds it when it is first used.

A face imports its names under `if TYPE_CHECKING:`, where type checkers, editors and readers find them, lists
them in `__all__`, and ends in

    __getattr__, __dir__ = lazy_names(__name__)

which makes those same imports at run time, one by one, as names are asked for. (Python 3.15 has a statement
for this, PEP 810.) A name that is also the name of its file must be imported at once instead: importing the
file later would put the module in its place.
"""

from __future__ import annotations

import sys
from importlib import import_module

TYPE_CHECKING = False  # that of `typing`, which takes longer to import than all the rest
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["lazy_names"]


def lazy_names(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package that imports its names under `if TYPE_CHECKING:`.

    Args:
        package: the package's `__name__`.

    Returns:
        A function that loads a name, keeps it in the package, and raises `AttributeError` for one that the
        package does not have, with what mergelab calls it (`mergelab.names_elsewhere`) or the nearest name;
        and a function that lists the names of `__all__`.
    """
    module = sys.modules[package]
    places: dict[str, tuple[str, str]] = {}

    def __getattr__(name: str) -> Any:
        if name.startswith("_"):  # what Python itself and notebooks look for
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if not places:
            places.update(_typed_imports(module))
        if name not in places:
            from importlib.util import find_spec

            # `from package import file` asks for an attribute before it imports the file.
            said = "" if find_spec(f"{package}.{name}") else hint(name)
            raise AttributeError(f"module {package!r} has no attribute {name!r}{said}")
        parent, attribute = places[name]
        # `from mergelab import sae` names a package, which is an attribute only once it is imported.
        found = (
            import_module(f"{parent}.{attribute}")
            if parent == package
            else getattr(import_module(parent), attribute)
        )
        setattr(module, name, found)
        return found

    def hint(name: str) -> str:
        from mergelab.errors import did_you_mean
        from mergelab.names_elsewhere import advice

        if said := advice(name):
            return said
        for room in (room for room, (parent, _) in places.items() if parent == package):
            if name in _listed(f"{package}.{room}"):
                return f"; write {package}.{room}.{name}"
        return did_you_mean(name, __dir__())

    def __dir__() -> list[str]:
        return sorted(module.__all__)

    return __getattr__, __dir__


def _listed(module: str) -> list[str]:
    """`__all__` of a module, read from its source: what only looks for a name loads nothing."""
    import ast
    from importlib.util import find_spec

    spec = find_spec(module)
    source = getattr(spec and spec.loader, "get_source", lambda name: None)(module) or ""
    return [
        name
        for statement in ast.parse(source).body
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__"
        for name in ast.literal_eval(statement.value)
    ]


def _typed_imports(module: Any) -> dict[str, tuple[str, str]]:
    """Name -> the module it is imported from and its name there, of the imports under `if TYPE_CHECKING:`."""
    import ast

    guarded = (
        statement
        for branch in ast.parse(module.__spec__.loader.get_source(module.__name__)).body
        if isinstance(branch, ast.If)
        and isinstance(branch.test, ast.Name)
        and branch.test.id == "TYPE_CHECKING"
        for statement in branch.body
    )
    return {
        alias.asname or alias.name: (statement.module or "", alias.name)
        for statement in guarded
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
