"""N:M sparsity for pretrained diffusion models: torch.compile passes and sparse kernels that beat dense."""

from sparsedm_compile.backend import sparsedm
from sparsedm_compile.budget import (
    BudgetPlan,
    LatencyTable,
    ParetoCurve,
    Sensitivity,
    measure_latency,
    measure_sensitivity,
    pareto,
    plan_for,
)
from sparsedm_compile.calibration import CalibrationBatch, calibration_set
from sparsedm_compile.checkpoint import load_sparse, save_sparse
from sparsedm_compile.derived import refresh
from sparsedm_compile.ema import EMA
from sparsedm_compile.explain import Explanation, explain
from sparsedm_compile.finetune import distillation_loss, finetune
from sparsedm_compile.fixed_mask import FixedMask
from sparsedm_compile.layers import SparseConv1d, SparseConv2d, SparseConv3d, SparseLinear
from sparsedm_compile.macs import MacsReport, RunMacs, count_macs
from sparsedm_compile.masked_weight import masked_weight
from sparsedm_compile.masks import magnitude_mask
from sparsedm_compile.noise import VPSDE, NoiseProcess, SchedulerProcess
from sparsedm_compile.pack import PackReport, pack
from sparsedm_compile.pattern import Pattern
from sparsedm_compile.permutation import PermutationReport, permute_channels
from sparsedm_compile.plan import LayerInfo, Plan, PlanLayer
from sparsedm_compile.planning import make_plan
from sparsedm_compile.sampling import sample, sampling_times
from sparsedm_compile.schedules import EIGHTHS, HALVED_GROUPS, DrawnPatterns, PatternSchedule, StagedPatterns
from sparsedm_compile.selection import LayerSelection, SelectionReport, select_masks
from sparsedm_compile.sparsify import get_plan, set_pattern, sparsify, use_pattern
from sparsedm_compile.srste import SRSTE
from sparsedm_compile.timestep_schedule import TimestepSchedule
from sparsedm_compile.training import TrainingRecord

__all__ = [
    "EIGHTHS",
    "EMA",
    "HALVED_GROUPS",
    "SRSTE",
    "VPSDE",
    "BudgetPlan",
    "CalibrationBatch",
    "DrawnPatterns",
    "Explanation",
    "FixedMask",
    "LatencyTable",
    "LayerInfo",
    "LayerSelection",
    "MacsReport",
    "NoiseProcess",
    "PackReport",
    "ParetoCurve",
    "Pattern",
    "PatternSchedule",
    "PermutationReport",
    "Plan",
    "PlanLayer",
    "RunMacs",
    "SchedulerProcess",
    "SelectionReport",
    "Sensitivity",
    "SparseConv1d",
    "SparseConv2d",
    "SparseConv3d",
    "SparseLinear",
    "StagedPatterns",
    "TimestepSchedule",
    "TrainingRecord",
    "calibration_set",
    "count_macs",
    "distillation_loss",
    "explain",
    "finetune",
    "get_plan",
    "load_sparse",
    "magnitude_mask",
    "make_plan",
    "masked_weight",
    "measure_latency",
    "measure_sensitivity",
    "pack",
    "pareto",
    "permute_channels",
    "plan_for",
    "refresh",
    "sample",
    "sampling_times",
    "save_sparse",
    "select_masks",
    "set_pattern",
    "sparsedm",
    "sparsify",
    "use_pattern",
]
