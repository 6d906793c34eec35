"""The front door: what `import mergelab` offers, what it costs, and that the distribution is complete."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import json
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


def is_face(name: str) -> bool:
    """Whether a module is a folder's `__init__` that offers names."""
    spec = importlib.util.find_spec(name)
    return bool(spec and spec.submodule_search_locations and "__all__" in Path(spec.origin or "").read_text())


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


FIRST = """
import json, os, sys
import flax, jax, matplotlib, numpy, optax, orbax.checkpoint, pydantic, tokenizers, tqdm, yaml  # once
for face, name in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        try:
            getattr(__import__(face, fromlist=[name]), name)
        except BaseException as error:
            print(f"from {face} import {name}: {error!r}", flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def first_imports_fail(names: list[tuple[str, str]]) -> str:
    """What fails of `from face import name`, each as the first thing that a process imports of mergelab."""
    asked = [sys.executable, "-W", "ignore", "-c", FIRST, json.dumps(names)]
    return subprocess.run(asked, check=True, capture_output=True, text=True).stdout


def names_of(face: str) -> list[tuple[str, str]]:
    """One name of each file behind a face."""
    module = importlib.import_module(face)
    files = {getattr(getattr(module, name), "__module__", name): name for name in module.__all__}
    return [(face, name) for name in files.values()]


def test_a_name_may_be_the_first_import_of_a_process() -> None:
    """Looking for an attribute that is a file must not import another room halfway through the first."""
    assert not first_imports_fail([("mergelab.sae", "VARIANTS"), ("mergelab.sae", "activation_functions")])
    assert "no attribute" in first_imports_fail([("mergelab.sae", "Nothing")])


@pytest.mark.slow
@pytest.mark.parametrize("face", [name for name in MODULES if name.count(".") < 3 and is_face(name)])
def test_any_file_behind_a_face_may_be_the_first_import(face: str) -> None:
    assert not first_imports_fail(names_of(face))


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
