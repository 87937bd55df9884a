"""Plans within a budget: measured sensitivity and latency of every layer, solved exactly."""

from sparsedm_compile.budget.budget_plan import BudgetPlan, PlannedLayer
from sparsedm_compile.budget.latency import LatencyTable, measure_latency
from sparsedm_compile.budget.pareto_curve import ParetoCurve, pareto
from sparsedm_compile.budget.planner import plan_for
from sparsedm_compile.budget.sensitivity import Sensitivity, measure_sensitivity

__all__ = [
    "BudgetPlan",
    "LatencyTable",
    "ParetoCurve",
    "PlannedLayer",
    "Sensitivity",
    "measure_latency",
    "measure_sensitivity",
    "pareto",
    "plan_for",
]
