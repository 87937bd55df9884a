"""N:M sparsity for pretrained diffusion models: torch.compile passes and sparse kernels that beat dense."""

from sparsedm_compile.backend import sparsedm
from sparsedm_compile.derived import refresh
from sparsedm_compile.explain import Explanation, explain
from sparsedm_compile.layers import SparseConv2d, SparseLinear
from sparsedm_compile.macs import MacsReport, count_macs
from sparsedm_compile.masked_weight import masked_weight
from sparsedm_compile.masks import magnitude_mask
from sparsedm_compile.pack import PackReport, pack
from sparsedm_compile.pattern import Pattern
from sparsedm_compile.plan import LayerInfo, Plan, PlanLayer
from sparsedm_compile.planning import make_plan
from sparsedm_compile.sparsify import get_plan, set_pattern, sparsify, use_pattern

__all__ = [
    "Explanation",
    "LayerInfo",
    "MacsReport",
    "PackReport",
    "Pattern",
    "Plan",
    "PlanLayer",
    "SparseConv2d",
    "SparseLinear",
    "count_macs",
    "explain",
    "get_plan",
    "magnitude_mask",
    "make_plan",
    "masked_weight",
    "pack",
    "refresh",
    "set_pattern",
    "sparsedm",
    "sparsify",
    "use_pattern",
]
