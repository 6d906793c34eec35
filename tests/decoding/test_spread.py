"""Generation on meshes: rows are split, padding is in no result, and the tokens are those of one device."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mergelab.decoding import Temperature, generate, greedy, pad_prompts, sample, stop_at
from mergelab.decoding.generation import begin_padded
from mergelab.decoding.spread import spread_of
from mergelab.errors import MeshError
from mergelab.models.load import load_model
from mergelab.models.model import Model, Params
from mergelab.models.table import get_leaf, tree_from_leaves
from mergelab.sharding import make_mesh, named_sharding
from tests.decoding.tiny import tiny

PROMPTS = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10], [11]]


@pytest.fixture(scope="module")
def llama() -> tuple[Model, Params]:
    return tiny("llama")


def laid(loaded: tuple[Model, Params], sizes: dict[str, int]) -> Params:
    model, params = loaded
    mesh = make_mesh(sizes)
    return tree_from_leaves(
        {
            leaf: jax.device_put(get_leaf(params, leaf), named_sharding(mesh, leaf.shape, leaf.axes))
            for leaf in model.table()
        }
    )


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 8},
        *(
            pytest.param(m, marks=pytest.mark.slow)
            for m in ({"data": 2, "tensor": 4}, {"data": 2, "fsdp": 4})
        ),
    ],
    ids=str,
)
def test_uneven_rows_are_split_and_give_the_tokens_of_one_device(
    llama: tuple[Model, Params], sizes: dict[str, int]
) -> None:
    model, params = llama
    split = laid(llama, sizes)
    options = {
        "max_new_tokens": 6,
        "samples": 3,
        "sampler": sample(Temperature(1.5)),
        "stop": stop_at([3, 4, 5, 6, 7, 8]),
        "log_probs": True,
        "capture": "blocks.1.resid_post",
    }
    alone, spread = (generate(model, p, *pad_prompts(PROMPTS), **options) for p in (params, split))
    assert spread.rows() == alone.rows() and len(set(map(str, alone.rows()))) > 10
    assert spread.finished.tolist() == alone.finished.tolist() and alone.finished.any()
    for ours, theirs in (
        (spread.log_probs, alone.log_probs),
        (spread.captured["blocks.1.resid_post"], alone.captured["blocks.1.resid_post"]),
    ):
        assert ours is not None and theirs is not None and ours.shape == theirs.shape
        largest = np.abs(np.asarray(theirs)).max()
        assert np.abs(np.asarray(ours) - np.asarray(theirs)).max() < 5e-6 * largest

    shared = {name: options[name] for name in ("max_new_tokens", "stop", "log_probs", "capture")}
    begun, rows = begin_padded(model, split, *pad_prompts(PROMPTS), **shared)
    padded, parts = (8, 8) if sizes == {"data": 8} else (6, 2)
    assert rows is not None and (rows.rows, rows.padded) == (5, padded)
    assert begun.finished.tolist() == [False] * 5 + [True] * (padded - 5)
    for part in (*begun.cache.keys, *begun.cache.values, begun.seen, begun.tokens):
        assert part.sharding.shard_shape(part.shape)[0] == padded // parts


def test_rows_are_split_over_fsdp_once_each_device_has_one(llama: tuple[Model, Params]) -> None:
    split = laid(llama, {"data": 2, "fsdp": 4})
    found = {rows: spread_of(split, rows, pad=True) for rows in (1, 5, 8, 9)}
    described = {rows: (s.axes, s.padded) for rows, s in found.items() if s is not None}
    both = ("data", "fsdp")
    assert described == {1: (("data",), 2), 5: (("data",), 6), 8: (both, 8), 9: (both, 16)}
    unpadded = {rows: spread_of(split, rows, pad=False) for rows in (3, 6, 16)}
    assert [s.axes for s in unpadded.values() if s] == [(), ("data",), both]
    alone = spread_of(laid(llama, {"fsdp": 8}), 3, pad=True)
    assert alone is not None and (alone.axes, alone.padded) == ((), 3)
    assert spread_of(llama[1], 5, pad=True) is None


def test_axes_over_which_nothing_is_split_are_refused_before_anything_is_read() -> None:
    with pytest.raises(MeshError, match=r"'model', over which nothing is split; .* data, fsdp and tensor"):
        load_model("nowhere", mesh=make_mesh({"model": 8}))


@pytest.mark.slow
def test_a_row_that_is_alone_is_the_one_of_one_device(llama: tuple[Model, Params]) -> None:
    model, params = llama
    options = {"max_new_tokens": 4, "sampler": greedy()}
    one = generate(model, laid(llama, {"data": 2, "tensor": 4}), [[1, 2, 3]], **options)
    assert one.rows() == generate(model, params, [[1, 2, 3]], **options).rows()
