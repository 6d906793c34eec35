"""The merge algebra: pure functions on pytrees that turn several models into one.

    >>> from mergelab import operators as ops
    >>> merge = ops.ties(weight=[1.0, 0.5], density=0.2)
    >>> merged = merge([model_a, model_b], base=base)                         # doctest: +SKIP

A named operator is called with hyper-parameters and gives a `Merge`; a `Merge` is called with models. Or
compose your own: `ops.chain(ops.Trim(0.2), ops.ElectSign(), ops.DisjointMean())`.
"""

from mergelab.operators.algebra import Reduction, Stage, algebraic
from mergelab.operators.compose import Merge, chain
from mergelab.operators.declare import REQUIRED, Operator, Parameter, PerModel, Range, operator
from mergelab.operators.named.arcee_fusion import arcee_fusion
from mergelab.operators.named.breadcrumbs import breadcrumbs, breadcrumbs_ties
from mergelab.operators.named.dare import dare_linear, dare_ties
from mergelab.operators.named.della import della, della_linear
from mergelab.operators.named.karcher import karcher
from mergelab.operators.named.linear import linear, uniform, wise_ft
from mergelab.operators.named.model_stock import model_stock
from mergelab.operators.named.multislerp import multislerp
from mergelab.operators.named.nearswap import nearswap
from mergelab.operators.named.nuslerp import nuslerp
from mergelab.operators.named.passthrough import passthrough
from mergelab.operators.named.ram import ram, ramplus_tl
from mergelab.operators.named.sce import sce
from mergelab.operators.named.slerp import slerp
from mergelab.operators.named.task_arithmetic import task_arithmetic
from mergelab.operators.named.ties import ties
from mergelab.operators.reductions.weighted import DisjointMean, Mean, WeightedSum
from mergelab.operators.stages.drop import Drop, MagPrune
from mergelab.operators.stages.elect import ElectSign
from mergelab.operators.stages.rescale import RescaleL1
from mergelab.operators.stages.trim import MaskTails, Trim

OPERATORS: dict[str, Operator] = {
    op.name: op
    for op in (
        linear,
        uniform,
        wise_ft,
        slerp,
        nuslerp,
        multislerp,
        karcher,
        passthrough,
        model_stock,
        task_arithmetic,
        ties,
        dare_linear,
        dare_ties,
        della,
        della_linear,
        breadcrumbs,
        breadcrumbs_ties,
        sce,
        nearswap,
        arcee_fusion,
        ram,
        ramplus_tl,
    )
}

__all__ = [
    "OPERATORS",
    "REQUIRED",
    "DisjointMean",
    "Drop",
    "ElectSign",
    "MagPrune",
    "MaskTails",
    "Mean",
    "Merge",
    "Operator",
    "Parameter",
    "PerModel",
    "Range",
    "Reduction",
    "RescaleL1",
    "Stage",
    "Trim",
    "WeightedSum",
    "algebraic",
    "arcee_fusion",
    "breadcrumbs",
    "breadcrumbs_ties",
    "chain",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "karcher",
    "linear",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "operator",
    "passthrough",
    "ram",
    "ramplus_tl",
    "sce",
    "slerp",
    "task_arithmetic",
    "ties",
    "uniform",
    "wise_ft",
]
