"""Operators declare all about themselves, none is forgotten, and what they do not declare is refused."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mergelab.operators.named as named
from mergelab import operators as ops
from mergelab.errors import OperatorError
from mergelab.operators import OPERATORS, REQUIRED, Operator
from tests.operators.cases import CASES

WEIGHT = {"weight": REQUIRED}
TASK_VECTORS = {**WEIGHT, "density": 1.0, "int8_mask": False, "lambda": 1.0}
SUM = {**TASK_VECTORS, "normalize": False, "rescale": False}
DROP = {**TASK_VECTORS, "normalize": False, "rescale": True}

# mergekit's table: base, fewest and most models besides the base, defaults; the per-model parameters below
MERGEKIT: dict[str, tuple[str, int, int | None, dict[str, Any]]] = {
    "linear": ("as_input", 1, None, {**WEIGHT, "normalize": True}),
    "slerp": ("required", 1, 1, {"t": REQUIRED}),
    "nuslerp": ("optional", 2, 2, {**WEIGHT, "nuslerp_row_wise": False, "nuslerp_flatten": True}),
    "multislerp": ("optional", 1, None, {**WEIGHT, "normalize_weights": True, "eps": 1e-8}),
    "karcher": ("as_input", 1, None, {"max_iter": 10, "tol": 1e-5}),
    "passthrough": ("as_input", 1, 1, {"scale": None}),
    "model_stock": ("required", 2, None, {"filter_wise": False}),
    "task_arithmetic": ("required", 0, None, SUM),
    "ties": ("required", 0, None, {**SUM, "normalize": True}),
    "dare_linear": ("required", 0, None, DROP),
    "dare_ties": ("required", 0, None, DROP),
    "della": ("required", 0, None, {**DROP, "normalize": True, "epsilon": 0.15}),
    "della_linear": ("required", 0, None, {**DROP, "epsilon": 0.15}),
    "breadcrumbs": ("required", 0, None, {**SUM, "gamma": 0.01}),
    "breadcrumbs_ties": ("required", 0, None, {**SUM, "gamma": 0.01}),
    "sce": ("required", 0, None, {"int8_mask": False, "select_topk": 1.0}),
    "nearswap": ("required", 1, 1, {"t": REQUIRED}),
    "arcee_fusion": ("required", 1, 1, {}),
    "ram": ("required", 0, None, {"epsilon": 1e-5}),
    "ramplus_tl": ("required", 0, None, {"r": 0.1, "alpha": 0.2, "epsilon": 1e-5}),
}

PAPER_FORMS = {
    "ties": {"scope", "elect", "tie"},
    "dare_linear": {"rescale_by"},
    "dare_ties": {"rescale_by"},
}
DRAWS = {"dare_linear", "dare_ties", "della", "della_linear"}


def defined() -> Iterator[tuple[str, Operator]]:
    """Every operator that a module of `operators/named` defines."""
    for module in pkgutil.iter_modules(named.__path__):
        for name, value in vars(importlib.import_module(f"{named.__name__}.{module.name}")).items():
            if isinstance(value, Operator):
                yield name, value


def test_every_operator_that_is_defined_is_registered_exported_and_tested() -> None:
    found = dict(defined())
    assert found == OPERATORS
    assert found.keys() <= set(ops.__all__)
    assert {getattr(ops, name) is operator for name, operator in found.items()} == {True}
    assert {name for name, *_ in CASES.values()} == OPERATORS.keys()


@pytest.mark.parametrize("name", MERGEKIT)
def test_the_declaration_is_mergekits(name: str) -> None:
    operator = OPERATORS[name]
    base, fewest, most, defaults = MERGEKIT[name]
    assert (operator.base, operator.min_models, operator.max_models) == (base, fewest, most)
    own = PAPER_FORMS.get(name, set()) | ({"draws"} if name in DRAWS else set())
    ours = {p.name: p.default for p in operator.parameters if p.name not in own}
    assert ours == defaults
    per_model = {p.name for p in operator.parameters if p.per_model}
    takes_epsilon_per_model = {"epsilon"} if name.startswith("della") else set()
    assert per_model == (defaults.keys() & {"weight", "density", "gamma"}) | takes_epsilon_per_model


@pytest.mark.parametrize("name", PAPER_FORMS)
def test_paper_forms_are_shared_words_with_mergekits_dialect_as_default(name: str) -> None:
    for parameter in OPERATORS[name].parameters:
        if parameter.name in PAPER_FORMS[name]:
            assert not parameter.per_model and parameter.default == parameter.choices[0]


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_every_operator_says_what_it_is_and_where_it_comes_from(operator: Operator) -> None:
    assert operator.summary.endswith((".", "`.")) and len(operator.summary) < 120
    assert operator.reference
    assert all(p.type in (float, int, bool, str) for p in operator.parameters)
    assert all(p.default is REQUIRED or p.default is None or p.optional or isinstance(p.default, p.type)
               for p in operator.parameters)  # fmt: skip


def test_recipe_names_drop_the_underscore_that_python_needs() -> None:
    parameter = ops.ties.parameter("lambda")
    assert parameter is not None and parameter.keyword == "lambda_"
    assert ops.ties.parameter("lambda_") is None


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("ties", {"weight": 1.0, "densty": 0.2}, r"'densty' \(did you mean 'density'\?\); it takes"),
        ("ties", {"weight": 1.0, "lambda": 0.2}, r"'lambda' \(did you mean 'lambda_'\?\)"),
        ("arcee_fusion", {"t": 0.2}, "'t'; it takes none"),
        ("slerp", {}, "parameter 't' has no default; pass `t=...`"),
        ("ties", {"weight": 1.0, "elect": "counts"}, r"one of 'sum', 'count' \(did you mean 'count'\?\)"),
        ("ties", {"weight": 1.0, "scope": None}, "one of 'tensor', 'tree'"),
        ("ties", {"weight": 1.0, "density": [0.2, -0.1]}, "'density' is .* between 0 and inf"),
        ("breadcrumbs", {"weight": 1.0, "gamma": 1.5}, "'gamma' is 1.5, but it must lie between 0 and 1"),
        ("linear", {"weight": [1.0, float("nan")]}, "'weight' is .*nan"),
        ("linear", {"weight": "heavy"}, "'heavy', but it must be a number, or a sequence"),
        ("linear", {"weight": [1.0, float("inf")]}, "'weight' is .*inf.* must be finite"),
        ("slerp", {"t": None}, "it must be a number"),
        ("sce", {"select_topk": np.float32(2)}, "between 0 and 1"),
        ("della", {"weight": 1.0, "density": 0.5, "epsilon": [0.1, 0.5]}, "with epsilon 0.5 leaves"),
        ("della", {"weight": 1.0, "density": jnp.float32(0.9)}, r"leaves .*epsilon below 0\.1"),
    ],
)  # fmt: skip
def test_wrong_hyper_parameters_are_refused(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(OperatorError, match=f"^{name}: .*{message}") as caught:
        OPERATORS[name](**arguments)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_none_is_a_scale_and_traced_values_are_not_looked_at() -> None:
    x = {"t": jnp.arange(3.0)}
    np.testing.assert_array_equal(ops.passthrough(scale=None)([x])["t"], x["t"])
    beyond = jax.jit(lambda t: ops.slerp(t=t)([x], x))(1.5)
    np.testing.assert_allclose(beyond["t"], x["t"], rtol=1e-6)


@pytest.mark.parametrize("case", [c for c, (_, n, *_) in CASES.items() if n > 1])
def test_one_value_too_few_or_too_many_is_refused_by_name(case: str) -> None:
    name, models, with_base, arguments = CASES[case]
    base, *trees = [{"t": np.zeros(2, np.float32) + i} for i in range(models + 1)]
    for parameter in OPERATORS[name].parameters:
        unused = (name, parameter.name) == ("task_arithmetic", "density")  # accepted, and trims nothing
        if not parameter.per_model or unused:
            continue
        fine = arguments.get(parameter.keyword, 0.1 if parameter.required else parameter.default)
        one = fine[0] if isinstance(fine, list) else fine
        for count in (models - 1, models + 1):
            for values in ([one] * count, np.full(count, one), jnp.full(count, one)):
                merge = OPERATORS[name](**{**arguments, parameter.keyword: values})
                message = rf"^{name}: parameter '{parameter.name}' has {count} value\(s\) for {models} model"
                with pytest.raises(OperatorError, match=message):
                    merge(trees, base if with_base else None)


def test_composed_merges_count_their_values_too() -> None:
    base, *trees = [{"t": np.zeros(2, np.float32) + i} for i in range(4)]
    merge = ops.chain(ops.RescaleL1(ops.Trim((0.2, 0.3))), ops.ElectSign(), ops.DisjointMean())
    with pytest.raises(OperatorError, match=r"this merge: parameter 'density' has 2 value.* for 3 model"):
        merge(trees, base)
    with pytest.raises(OperatorError, match="'weight' has 4"):
        jax.jit(lambda w: ops.chain(ops.WeightedSum(w))(trees, base))(jnp.ones(4))


@pytest.mark.parametrize("case", CASES)
def test_the_number_of_models_and_the_base_are_checked(case: str) -> None:
    name, models, with_base, arguments = CASES[case]
    operator, merge = OPERATORS[name], OPERATORS[name](**arguments)
    tree = {"t": np.ones(2, np.float32)}
    if operator.base == "required":
        with pytest.raises(OperatorError, match="relative to a base model"):
            merge([tree] * models)
    if operator.base == "as_input":
        with pytest.raises(OperatorError, match="pass the base among"):
            merge([tree] * models, tree)
    if operator.max_models is not None:
        with pytest.raises(OperatorError, match=f"{name} merges exactly {operator.max_models} .*got"):
            merge([tree] * (operator.max_models + 1), tree if with_base else None)
    if operator.min_models:
        with pytest.raises(OperatorError, match=f"{name} merges .*got {operator.min_models - 1}"):
            merge([tree] * (operator.min_models - 1), tree if with_base else None)


def test_planning_and_streaming_know_no_operator_by_name() -> None:
    merging = Path(ops.__file__).parent.parent / "merging"
    files = [*(merging / "plan").glob("*.py"), *(merging / "engine").glob("*.py")]
    assert len(files) > 10
    named_here = {
        (file.name, node.value)
        for file in files
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Constant) and node.value in OPERATORS
    }
    assert named_here == set()


def test_integer_tensors_are_treated_as_the_operator_declares() -> None:
    def mean() -> ops.Merge:
        """The mean."""
        return ops.uniform()

    models = [{"ids": np.arange(3)}, {"ids": np.arange(3) + 1}]
    first = ops.operator(base="as_input", reference="none", integers="first")(mean)
    np.testing.assert_array_equal(first()(models)["ids"], np.arange(3))
    with pytest.raises(OperatorError, match="differs between models"):
        ops.operator(base="as_input", reference="none")(mean)()(models)


def test_a_copy_is_declared_and_not_guessed() -> None:
    assert ops.passthrough.copies({}) and ops.passthrough.copies({"scale": [None]})
    assert not ops.passthrough.copies({"scale": 1.0})
    assert not ops.uniform.copies({})
