"""Hyper-parameters for every operator, shared by the tests that hold for all of them."""

from __future__ import annotations

import dataclasses
from typing import Any

from mergelab import operators as ops

CASES: dict[str, tuple[str, int, bool, dict[str, Any]]] = {
    # id: (operator, models besides the base, with a base, hyper-parameters)
    "linear": ("linear", 3, False, {"weight": [0.5, 0.3, 0.4]}),
    "linear_raw": ("linear", 3, False, {"weight": [0.5, 0.3, -0.4], "normalize": False}),
    "uniform": ("uniform", 3, False, {}),
    "wise_ft": ("wise_ft", 1, True, {"alpha": 1.3}),
    "slerp": ("slerp", 1, True, {"t": 0.3}),
    "nuslerp": ("nuslerp", 2, False, {"weight": [0.7, 0.5]}),
    "nuslerp_base": ("nuslerp", 2, True, {"weight": [1, 3]}),
    "nuslerp_row": ("nuslerp", 2, False, {"weight": [0.7, 0.5], "nuslerp_flatten": False}),
    "nuslerp_column": (
        "nuslerp",
        2,
        False,
        {"weight": [0.7, 0.5], "nuslerp_flatten": False, "nuslerp_row_wise": True},
    ),
    "multislerp": ("multislerp", 3, False, {"weight": [1, 2, 1]}),
    "multislerp_base": ("multislerp", 3, True, {"weight": [1, 2, 1]}),
    "karcher": ("karcher", 3, False, {}),
    "passthrough": ("passthrough", 1, False, {"scale": 0.5}),
    "model_stock": ("model_stock", 3, True, {}),
    "model_stock_filter": ("model_stock", 3, True, {"filter_wise": True}),
    "task_arithmetic": ("task_arithmetic", 3, True, {"weight": [0.5, 0.3, -0.4], "lambda_": 0.7}),
    "ties": ("ties", 3, True, {"weight": [1.0, 0.5, 0.25], "density": [0.5, 0.3, 0.7]}),
    "ties_rescale": ("ties", 2, True, {"weight": [1.0, 0.5], "density": 0.4, "rescale": True}),
    "ties_count": ("ties", 3, True, {"weight": 1.0, "density": 0.4, "elect": "count", "tie": "skip"}),
    "ties_tree": ("ties", 3, True, {"weight": 1.0, "density": 0.2, "scope": "tree", "tie": "majority"}),
    "dare_linear": ("dare_linear", 3, True, {"weight": [0.5, 0.3, 0.4], "density": [0.5, 0.7, 0.3]}),
    "dare_paper": ("dare_linear", 2, True, {"weight": 0.5, "density": 0.25, "rescale_by": "density"}),
    "dare_ties": ("dare_ties", 3, True, {"weight": [0.5, 0.3, 0.4], "density": [0.5, 0.7, 0.3]}),
    "dare_draws": ("dare_linear", 3, True, {"weight": 0.5, "density": 0.4, "draws": 5}),
    "della_draws": ("della", 2, True, {"weight": [0.5, 0.3], "density": 0.5, "draws": 3}),
    "della": ("della", 3, True, {"weight": [0.5, 0.3, 0.4], "density": [0.5, 0.7, 0.3], "epsilon": 0.1}),
    "della_linear": ("della_linear", 2, True, {"weight": 0.5, "density": 0.5}),
    "breadcrumbs": ("breadcrumbs", 3, True, {"weight": [0.5, 0.3, 0.4], "density": 0.7, "gamma": 0.05}),
    "breadcrumbs_ties": ("breadcrumbs_ties", 2, True, {"weight": [0.5, 0.3], "density": [0.7, 0.9]}),
    "sce": ("sce", 3, True, {}),
    "sce_topk": ("sce", 3, True, {"select_topk": 0.3}),
    "nearswap": ("nearswap", 1, True, {"t": 0.5}),
    "arcee_fusion": ("arcee_fusion", 1, True, {}),
    "ram": ("ram", 3, True, {"epsilon": 0.8}),
    "tsv_m": ("tsv_m", 3, True, {"lambda_": 0.7}),
    "iso_c": ("iso_c", 3, True, {"lambda_": 0.7}),
    "iso_cts": ("iso_cts", 3, True, {"lambda_": 0.7, "common_space_fraction": 0.5}),
    "wudi": ("wudi", 3, True, {"lambda_": 0.7}),
    "wudi_gradient": ("wudi", 2, True, {"solver": "gradient", "steps": 3}),
    "magmax": ("magmax", 3, True, {}),
    "consensus": ("consensus", 3, True, {"mask_lambda": 0.6, "agree": 2}),
    "emr": ("emr", 3, True, {}),
    "emr_task": ("emr", 3, True, {"task": 1}),
    "pcb": ("pcb", 3, True, {"ratio": 0.4, "lambda_": 1.2}),
    "pcb_tensor": ("pcb", 3, True, {"ratio": 0.4, "scope": "tensor"}),
    "lines": ("lines", 3, True, {"beta": 0.7, "weight": [0.5, 0.3, -0.4]}),
    "star": ("star", 3, True, {"eta": 0.6}),
    "svc": ("svc", 3, True, {"weight": [0.5, 0.3, 0.4], "alpha": 0.5}),
    "darex": ("darex", 3, True, {"weight": [0.5, 0.3, 0.4], "q": 0.7, "density": [0.5, 0.7, 0.3]}),
    "opcm": ("opcm", 3, True, {"alpha": 0.4}),
    "knots": ("knots", 3, True, {"weight": [1.0, 0.5, 0.7], "density": 0.6}),
    "core_space": ("core_space", 3, True, {"density": 0.6}),
    "core_space_tsv": ("core_space", 2, True, {"method": "tsv_m"}),
    "regmean": ("regmean", 3, False, {"off_diagonal": 0.9}),
    "regmean_pp": ("regmean_pp", 3, False, {"off_diagonal": 0.9}),
    "fisher": ("fisher", 3, True, {"weight": [1.0, 0.5, 2.0], "floor": 0.1}),
    "ramplus_tl": ("ramplus_tl", 3, True, {"epsilon": 0.8, "r": 0.2, "alpha": 0.3}),
}

# One case of each way through the operators: those that the light suite runs where a case takes long.
LIGHT = (
    "linear", "wise_ft", "slerp", "nuslerp", "nuslerp_row", "multislerp", "karcher", "passthrough",
    "model_stock", "task_arithmetic", "ties", "ties_tree", "dare_ties", "della_linear", "breadcrumbs",
    "sce_topk", "nearswap", "arcee_fusion", "ram", "ramplus_tl",
)  # fmt: skip


def build(case: str) -> tuple[ops.Merge, int, bool]:
    """The merge of a case, how many models it takes, and whether a base.

    What takes statistics is built to do without: these tests are about the models, and statistics have their
    own in `test_statistics.py`.
    """
    name, models, with_base, hyper_parameters = CASES[case]
    merge = ops.OPERATORS[name](**hyper_parameters)
    if merge.inputs.statistics is not None:
        merge = dataclasses.replace(merge, inputs=dataclasses.replace(merge.inputs, statistics=None))
    return merge, models, with_base
