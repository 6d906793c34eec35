"""One name for what versions of jax call differently."""

from __future__ import annotations

import contextlib
import importlib

import jax
import jax.numpy as jnp
import pytest

from mergelab.compat import enable_x64


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
