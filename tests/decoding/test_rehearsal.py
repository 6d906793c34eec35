"""What is compiled beside the loading is all that a generation runs, and takes no memory of its own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.checkpoints.buffers import aligned_zeros
from mergelab.decoding import Memory, complete, greedy, rehearsal, stop_at
from mergelab.models.families import model_from_config
from mergelab.models.table import tree_from_leaves
from tests.decoding.tiny import CONFIGS


class Letters:
    """As much of a tokenizer as `complete` asks for."""

    end_ids = (2,)

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + number % 26) for number in ids)


@pytest.mark.parametrize("turns", [False, True])
def test_a_generation_compiles_nothing_anew(
    turns: bool, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    # A width of its own for each case, so that nothing is compiled already.
    model = model_from_config(
        {**CONFIGS["llama"], "num_hidden_layers": 3, "intermediate_size": 52 + 4 * turns}
    )
    half = np.dtype(jnp.bfloat16)
    shapes = tree_from_leaves({leaf: jax.ShapeDtypeStruct(leaf.shape, half) for leaf in model.table()})
    asked: dict[str, Any] = {"max_new_tokens": 3, "sampler": greedy(), "key": 7}
    jax.config.update("jax_log_compiles", True)  # in every thread, unlike `jax.log_compiles`
    request.addfinalizer(lambda: jax.config.update("jax_log_compiles", False))
    with rehearsal.rehearsing(model, shapes, 5, stop=stop_at([2]), turns=turns, **asked):
        params = jax.tree.map(lambda leaf: jax.device_put(np.ones(leaf.shape, leaf.dtype)), shapes)
    assert caplog.text.count("XLA compilation of jit(run)") == 5
    caplog.clear()
    letters: Any = Letters()
    memory = Memory() if turns else None
    (found,) = complete(model, params, letters, [[3, 1, 4, 1, 5]], memory=memory, **asked)
    assert len(found.token_ids) == 3 and "XLA compilation" not in caplog.text


def test_a_fault_is_left_to_the_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_from_config(CONFIGS["llama"])
    tried: list[int] = []

    def broken(*arguments: object, **options: object) -> None:
        tried.append(1)
        raise RuntimeError("no room")

    monkeypatch.setattr(rehearsal, "unread", broken)
    monkeypatch.setattr(rehearsal, "start", broken)
    shapes = tree_from_leaves({leaf: jax.ShapeDtypeStruct(leaf.shape, np.float32) for leaf in model.table()})
    with rehearsal.rehearsing(model, shapes, 5, max_new_tokens=3, sampler=greedy(), stop=stop_at()):
        pass
    assert tried == [1, 1]


def test_zeros_take_no_memory() -> None:
    zeros = aligned_zeros((1 << 20, 64), np.dtype(np.float32))
    assert zeros.ctypes.data % 64 == 0 and not zeros[::4096].any()
    array = jax.device_put(zeros, may_alias=True)
    assert array.unsafe_buffer_pointer() == zeros.ctypes.data
