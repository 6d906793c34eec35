"""The merge algebra: pure functions on pytrees that turn several models into one.

    >>> from mergelab import operators as ops
    >>> merge = ops.ties(weight=[1.0, 0.5], density=0.2)
    >>> merged = merge([model_a, model_b], base=base)                         # doctest: +SKIP

A named operator is called with hyper-parameters and gives a `Merge`; a `Merge` is called with models. Or
compose your own: `ops.chain(ops.Trim(0.2), ops.ElectSign(), ops.DisjointMean())`.
"""

from mergelab.operators.algebra import Reduction, Stage, algebraic
from mergelab.operators.compose import Merge, chain
from mergelab.operators.declare import (
    REQUIRED,
    HyperParameter,
    OneOfModels,
    Operator,
    PerModel,
    Range,
    operator,
)
from mergelab.operators.named.arcee_fusion import arcee_fusion
from mergelab.operators.named.consensus import ConsensusSum, consensus
from mergelab.operators.named.dare import dare_linear, dare_ties, della, della_linear
from mergelab.operators.named.darex import darex
from mergelab.operators.named.emr import ElectMaskRescale, emr
from mergelab.operators.named.fisher import FisherMean, fisher
from mergelab.operators.named.iso_c import Isotropic, iso_c
from mergelab.operators.named.iso_cts import CommonAndTaskSpecific, iso_cts
from mergelab.operators.named.knots import CoreSpace, SharedColumns, core_space, knots
from mergelab.operators.named.linear import linear, passthrough, uniform, wise_ft
from mergelab.operators.named.lines import DepthScaled, depth_scaled, lines
from mergelab.operators.named.magmax import LargestMagnitude, magmax
from mergelab.operators.named.model_stock import model_stock
from mergelab.operators.named.nearswap import nearswap
from mergelab.operators.named.opcm import OrthogonalSequence, opcm
from mergelab.operators.named.pcb import CompetitionBalance, pcb
from mergelab.operators.named.ram import ram, ramplus_tl
from mergelab.operators.named.regmean import RegressionMean, regmean
from mergelab.operators.named.regmean_pp import regmean_pp
from mergelab.operators.named.sce import sce
from mergelab.operators.named.spherical import karcher, multislerp, nuslerp, slerp
from mergelab.operators.named.star import TruncateSpectrum, star
from mergelab.operators.named.svc import CalibratedSum, svc
from mergelab.operators.named.task_vectors import breadcrumbs, breadcrumbs_ties, task_arithmetic, ties
from mergelab.operators.named.tsv_m import TaskSingularVectors, tsv_m
from mergelab.operators.named.wudi import LeastInterference, wudi
from mergelab.operators.reductions import DisjointMean, Mean, WeightedSum
from mergelab.operators.stages import Drop, ElectSign, MagPrune, MaskTails, RescaleL1, Trim

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
        tsv_m,
        iso_c,
        iso_cts,
        wudi,
        magmax,
        consensus,
        emr,
        pcb,
        lines,
        star,
        svc,
        darex,
        opcm,
        knots,
        core_space,
        regmean,
        regmean_pp,
        fisher,
    )
}

__all__ = [
    "OPERATORS",
    "REQUIRED",
    "CalibratedSum",
    "CommonAndTaskSpecific",
    "CompetitionBalance",
    "ConsensusSum",
    "CoreSpace",
    "DepthScaled",
    "DisjointMean",
    "Drop",
    "ElectMaskRescale",
    "ElectSign",
    "FisherMean",
    "HyperParameter",
    "Isotropic",
    "LargestMagnitude",
    "LeastInterference",
    "MagPrune",
    "MaskTails",
    "Mean",
    "Merge",
    "OneOfModels",
    "Operator",
    "OrthogonalSequence",
    "PerModel",
    "Range",
    "Reduction",
    "RegressionMean",
    "RescaleL1",
    "SharedColumns",
    "Stage",
    "TaskSingularVectors",
    "Trim",
    "TruncateSpectrum",
    "WeightedSum",
    "algebraic",
    "arcee_fusion",
    "breadcrumbs",
    "breadcrumbs_ties",
    "chain",
    "consensus",
    "core_space",
    "dare_linear",
    "dare_ties",
    "darex",
    "della",
    "della_linear",
    "depth_scaled",
    "emr",
    "fisher",
    "iso_c",
    "iso_cts",
    "karcher",
    "knots",
    "linear",
    "lines",
    "magmax",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "opcm",
    "operator",
    "passthrough",
    "pcb",
    "ram",
    "ramplus_tl",
    "regmean",
    "regmean_pp",
    "sce",
    "slerp",
    "star",
    "svc",
    "task_arithmetic",
    "ties",
    "tsv_m",
    "uniform",
    "wise_ft",
    "wudi",
]
