"""One definition, run eagerly, under `jit`, `vmap` and `grad`, and on eight devices: the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mergelab import operators as ops
from mergelab.errors import OperatorError
from mergelab.operators.measures import Sum
from tests.compilation import AS_USERS
from tests.operators.cases import CASES, LIGHT, build
from tests.slow import slow_except

SHAPE = (16, 24)
Tree = Any

# Sums are float64 where arrays are concrete; under a user's trace there is only float32, whose sums over
# some hundred elements are good to a few 1e-7 of their size.
FLOAT32_SUMS = {"rtol": 1e-5, "atol": 1e-5}


def trees(count: int, seed: int = 0, dtype: Any = np.float32) -> list[Tree]:
    """The base and its siblings, half as far from it as it is from zero."""
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(SHAPE)
    every = [base, *(base + 0.5 * rng.standard_normal(SHAPE) for _ in range(count - 1))]
    return [{"block": {"w": x.astype(dtype)}} for x in every]


def models_of(case: str, dtype: Any = np.float32) -> tuple[ops.Merge, list[Tree], Tree]:
    merge, count, with_base = build(case)
    base, *models = trees(count + 1, dtype=dtype)
    return merge, models, base if with_base else None


def sums_floats(merge: ops.Merge) -> bool:
    """Whether some result depends on a sum over many elements: then the order of additions shows.

    A merge of whole tensors (by their singular vectors) is nothing but such sums; `exp` and `tanh` are too.
    """
    transcendental = isinstance(merge.reduce, ops.CompetitionBalance)
    return transcendental or merge.grain == "tensor" or any(isinstance(d, Sum) for _, _, d in merge.steps())


def assert_same(found: Tree, expected: Tree, exactly: bool) -> None:
    found, expected = jax.tree.map(np.asarray, (found, expected))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        if exactly:
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, **FLOAT32_SUMS)


@pytest.mark.parametrize("case", slow_except(LIGHT, CASES))
def test_jit_gives_what_eager_gives(case: str) -> None:
    merge, models, base = models_of(case)
    eager = merge(models, base, seed=5)
    jitted = jax.jit(lambda m, b: merge(m, b, seed=5), compiler_options=AS_USERS)(models, base)
    assert_same(jitted, eager, exactly=not sums_floats(merge))


def test_a_merge_itself_can_be_jitted() -> None:
    merge, models, base = models_of("ties")
    assert_same(jax.jit(merge)(models, base), merge(models, base), exactly=False)


@pytest.mark.parametrize("case", slow_except(LIGHT, CASES))
def test_eight_devices_give_what_one_gives(case: str) -> None:
    assert len(jax.devices()) == 8
    merge, models, base = models_of(case)
    alone = merge(models, base, seed=5)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))
    sharding = NamedSharding(mesh, PartitionSpec("data", "model"))
    sharded = merge(
        jax.device_put(models, sharding), None if base is None else jax.device_put(base, sharding), seed=5
    )
    assert sharded["block"]["w"].sharding.is_equivalent_to(sharding, 2)
    # Partial sums are float64 and differ in order only; what they become is rounded to float32.
    exactly = not sums_floats(merge)
    assert_same(sharded, alone, exactly=exactly)


COEFFICIENTS: dict[str, tuple[str, Callable[[Any], ops.Merge], list[Any]]] = {
    # id: a case with the models wanted, the merge as a function of the coefficient, values of it
    "wise_ft.alpha": ("wise_ft", lambda a: ops.wise_ft(alpha=a), [0.2, 0.7, 1.4]),
    "slerp.t": ("slerp", lambda t: ops.slerp(t=t), [0.2, 0.5, 0.9]),
    "nearswap.t": ("nearswap", lambda t: ops.nearswap(t=t), [0.11, 0.2, 0.3]),
    "linear.weight": ("linear", lambda w: ops.linear(weight=w), [[0.5, 0.3, 0.2], [1.0, 2.0, 0.5]]),
    "linear.weight_list": ("uniform", lambda w: ops.linear(weight=[w, 1.0, 2.0]), [0.5, 3.0]),
    "nuslerp.weight": ("nuslerp", lambda w: ops.nuslerp(weight=w), [[0.5, 0.3], [1.0, 2.0]]),
    "multislerp.weight": (
        "multislerp_base",
        lambda w: ops.multislerp(weight=w),
        [[0.5, 0.3, 0.2], [1.0, 2.0, 0.5]],
    ),
    "task_arithmetic.lambda": (
        "task_arithmetic",
        lambda s: ops.task_arithmetic(weight=0.4, lambda_=s),
        [0.3, 1.1],
    ),
    "ties.weight": (
        "ties",
        lambda w: ops.ties(weight=w, density=[0.5, 0.3, 0.7]),
        [[0.5, 0.3, 0.2], [1.0, 0.9, 0.5]],
    ),
    "dare_ties.lambda": (
        "dare_ties",
        lambda s: ops.dare_ties(weight=0.5, density=0.5, lambda_=s),
        [0.3, 1.1],
    ),
    "breadcrumbs.weight": (
        "breadcrumbs",
        lambda w: ops.breadcrumbs(weight=w, density=0.6),
        [[0.5, 0.3, 0.2]] * 2,
    ),
    "della_linear.weight": (
        "della_linear",
        lambda w: ops.della_linear(weight=w, density=0.5),
        [[0.5, 0.3]] * 2,
    ),
    "ramplus_tl.r": ("ramplus_tl", lambda r: ops.ramplus_tl(r=r, epsilon=0.3), [0.1, 0.4]),
    "passthrough.scale": ("passthrough", lambda s: ops.passthrough(scale=s), [0.1, 0.4]),
}


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_vmap_over_a_coefficient_is_a_loop_over_it(name: str) -> None:
    case, make, values = COEFFICIENTS[name]
    _, models, base = models_of(case)
    swept = jax.vmap(lambda c: make(c)(models, base, seed=5))(jnp.asarray(values, jnp.float32))
    for i, value in enumerate(values):
        one = make(value)(models, base, seed=5)
        assert_same(jax.tree.map(lambda x, i=i: x[i], swept), one, exactly=False)


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_gradients_are_the_slopes_of_the_result(name: str) -> None:
    case, make, values = COEFFICIENTS[name]
    _, models, base = models_of(case)
    direction = np.random.default_rng(1).standard_normal(SHAPE)

    @jax.jit
    def merged(c: Any, models: list[Tree], base: Tree) -> jax.Array:
        return make(c)(models, base, seed=5)["block"]["w"]

    def score(c: Any) -> jax.Array:
        return jnp.vdot(jnp.square(merged(c, models, base)), direction.astype(np.float32))

    at = np.asarray(values[0], np.float32)
    gradient = np.asarray(jax.grad(score)(at)).reshape(-1)
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0.1
    step = 3e-4  # so small that no sign is elected anew within it
    for i in range(gradient.size):
        nudge = np.zeros(gradient.size, np.float32)
        nudge[i] = step
        above, below = (
            np.asarray(merged(at + sign * nudge.reshape(at.shape), models, base), np.float64)
            for sign in (1, -1)
        )
        slope = np.vdot((above - below) * (above + below), direction) / (2 * step)
        np.testing.assert_allclose(gradient[i], slope, rtol=1e-2, atol=2e-2)


def test_density_and_topk_may_be_swept_too() -> None:
    _, models, base = models_of("ties")
    densities = [0.0, 0.1, 0.7, 1.0]
    swept = jax.vmap(lambda d: ops.ties(weight=1.0, density=d)(models, base))(
        jnp.asarray(densities, jnp.float32)
    )
    topk = jax.vmap(lambda k: ops.sce(select_topk=k)(models, base))(jnp.asarray(densities, jnp.float32))
    for i, density in enumerate(densities):
        if (
            density
        ):  # a traced density of 0 keeps max(1, 0) entries: only a number can say that nothing is kept
            one = ops.ties(weight=1.0, density=density)(models, base)
            assert_same(jax.tree.map(lambda x, i=i: x[i], swept), one, exactly=True)
        assert_same(
            jax.tree.map(lambda x, i=i: x[i], topk), ops.sce(select_topk=density)(models, base), exactly=False
        )


def test_a_flat_dict_gives_what_the_nested_tree_gives() -> None:
    merge, models, base = models_of("dare_ties")
    flat = [{"block.w": t["block"]["w"]} for t in (*models, base)]
    nested = merge(models, base)
    found = merge(flat[:-1], flat[-1])
    np.testing.assert_array_equal(found["block.w"], nested["block"]["w"])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_the_result_has_the_promoted_dtype_or_the_one_asked_for(dtype: Any) -> None:
    merge, models, base = models_of("task_arithmetic", dtype)
    in_float32 = merge([jax.tree.map(lambda x: x.astype(np.float32), m) for m in models],
                       jax.tree.map(lambda x: x.astype(np.float32), base))  # fmt: skip
    assert_same(merge(models, base), jax.tree.map(lambda x: x.astype(dtype), in_float32), exactly=True)
    assert_same(merge(models, base, dtype=np.float32), in_float32, exactly=True)
    mixed = merge([models[0], *(jax.tree.map(lambda x: x.astype(np.float32), m) for m in models[1:])], base)
    assert_same(mixed, in_float32, exactly=True)


def test_scalars_empty_and_integer_leaves_pass_through_a_merge() -> None:
    tree = {"scalar": np.float32(1), "empty": np.zeros((0, 3), np.float32), "ids": np.arange(3)}
    other = {**tree, "scalar": np.float32(3)}
    merge = ops.ties(weight=1.0, density=0.5)
    out = merge([other, tree], tree)
    assert (out["scalar"].shape, float(out["scalar"])) == ((), 3.0)
    assert out["empty"].shape == (0, 3)
    np.testing.assert_array_equal(out["ids"], tree["ids"])


def test_trees_of_different_models_are_refused_by_tensor_name() -> None:
    tree = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(2, np.float32)}
    merge = ops.uniform()
    with pytest.raises(OperatorError, match=r"model 1 does not have the same tensors.*'b'"):
        merge([tree, {"a": tree["a"]}])
    with pytest.raises(OperatorError, match=r"'a' has shape \(2, 3\) in model 0 but \(3, 2\) in model 1"):
        merge([tree, {**tree, "a": tree["a"].T}])
    with pytest.raises(OperatorError, match="at least 1 model"):
        merge([])


def test_a_wrong_result_would_be_seen() -> None:
    merge, models, base = models_of("ties")
    out = merge(models, base)
    swapped = merge(models[::-1], base)
    with pytest.raises(AssertionError):
        assert_same(swapped, out, exactly=False)
    with pytest.raises(AssertionError):
        assert_same(jax.tree.map(lambda x: x + 1e-6, out), out, exactly=True)
