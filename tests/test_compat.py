"""One name for what versions of jax call differently."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from mergelab.compat import enable_x64, register_dataclass


@pytest.mark.parametrize("on", [True, False])
def test_64_bits_are_switched_for_a_while(on: bool) -> None:
    with enable_x64(not on), enable_x64(on):
        assert jnp.asarray(1.5).dtype == (jnp.float64 if on else jnp.float32)
    assert jnp.asarray(1.5).dtype == jnp.float32


def test_a_jax_without_the_name_has_it_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(jax, "enable_x64", raising=False)
    asked: list[bool] = []

    @contextlib.contextmanager
    def switch(on: bool):
        asked.append(on)
        yield

    monkeypatch.setattr(importlib.import_module("jax.experimental"), "enable_x64", switch, raising=False)
    with enable_x64(True):
        assert asked == [True]


def scaling(factor: int) -> type[Any]:
    """A dataclass with one leaf, and what it makes of it."""

    @register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Scaling:
        value: float
        note: str = dataclasses.field(default="", metadata={"static": True})

        def __call__(self) -> Any:
            return self.value * factor

    return Scaling


def test_a_function_of_many_dataclasses_runs_the_program_of_each() -> None:
    @jax.jit
    def call(scale: Any) -> jax.Array:
        return jnp.asarray(scale())

    kinds = [scaling(factor) for factor in range(60)]
    assert [int(call(kind(1.0))) for kind in kinds] == list(range(60))
    assert [int(call(kind(2.0))) for kind in kinds] == list(range(0, 120, 2))


def test_structures_of_dataclasses_are_of_one_type_and_name_their_fields() -> None:
    first, second = scaling(1), scaling(2)
    structure = jax.tree.structure(first(1.0))
    assert structure == jax.tree.structure(first(2.0))
    assert structure not in (jax.tree.structure(second(1.0)), jax.tree.structure(first(1.0, "noted")))
    assert jax.tree.map(lambda x: x + 1, first(1.0, "noted")) == first(2.0, "noted")
    ((path, leaf),) = jax.tree_util.tree_leaves_with_path(first(1.0))
    assert (jax.tree_util.keystr(path), leaf) == (".value", 1.0)
