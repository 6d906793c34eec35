"""The front door: what `import mergelab` offers, what it costs, and that the distribution is complete."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import mergelab

HEAVY = ["jax", "flax", "optax", "orbax", "pydantic", "tokenizers", "matplotlib", "numpy", "yaml"]
MODULES = sorted(
    m.name for m in pkgutil.walk_packages(mergelab.__path__, "mergelab.") if "__main__" not in m.name
)


def fresh(program: str) -> str:
    """What a new interpreter prints for `program`."""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return done.stdout


@pytest.mark.parametrize("name", mergelab.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(mergelab, name) is not None
    assert name in dir(mergelab)


def test_an_unknown_name_is_an_attribute_error_with_the_nearest() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'Recipie' \(did you mean 'Recipe'\?\)"):
        _ = mergelab.Recipie
    assert not hasattr(mergelab, "__wrapped__")


@pytest.mark.parametrize("module", ["mergelab", "mergelab.cli.main"])
def test_the_front_doors_import_nothing_heavy(module: str) -> None:
    loaded = fresh(f"import sys, {module}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))").split()
    assert module.split(".")[0] in loaded
    assert not set(HEAVY) & set(loaded)


def test_the_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from mergelab.cli.main import cli\n"
        "cli.main(['--help'], prog_name='mergelab', standalone_mode=False)\n"
        "print('LOADED', *sorted({m.split('.')[0] for m in sys.modules}))"
    )
    loaded = fresh(program).split("LOADED")[1].split()
    assert "click" in loaded
    assert not set(HEAVY) & set(loaded)


def test_the_import_is_quick() -> None:
    """Quick in processor time, which a busy machine does not stretch as it does the clock."""
    program = "import time; t = time.process_time(); import mergelab; print(time.process_time() - t)"
    assert min(float(fresh(program)) for _ in range(5)) < 0.05


def test_every_module_can_be_imported() -> None:
    for name in MODULES:
        importlib.import_module(name)
    assert len(MODULES) > 100


def has_examples(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    assert spec and spec.origin
    return ">>>" in Path(spec.origin).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [name for name in MODULES if has_examples(name)])
def test_the_examples_in_docstrings_are_true(name: str) -> None:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failures, _ = doctest.testmod(importlib.import_module(name), optionflags=flags)
    assert failures == 0


def test_the_package_is_typed(repository: Path) -> None:
    assert (repository / "mergelab" / "py.typed").is_file()
