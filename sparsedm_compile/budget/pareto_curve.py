"""The Pareto curve: the least damage at each budget, beside the plans that give every layer one pattern."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any, Literal

from rich.table import Table
from torch import nn

from sparsedm_compile.budget.budget_plan import BudgetPlan
from sparsedm_compile.budget.latency import LatencyTable
from sparsedm_compile.budget.planner import Problem, pose_problem
from sparsedm_compile.budget.sensitivity import Sensitivity, measure_sensitivity
from sparsedm_compile.calibration import CalibrationBatch
from sparsedm_compile.pattern import DENSE, Pattern
from sparsedm_compile.planning import Rules
from sparsedm_compile.policy import LayerPolicy
from sparsedm_compile.rendering import RichText, milliseconds

Budget = Literal["macs", "latency"]


@dataclass(frozen=True)
class ParetoCurve(RichText):
    """Plans from the cheapest to the dense model; prints as a table.

    Attributes:
        budget: what was limited, ``"macs"`` or ``"latency"``.
        plans: of least predicted damage, the cheapest first; a plan that serves several budgets appears once.
        uniform: candidate -> the plan that gives it to every layer that can take it, for comparison.
    """

    budget: Budget
    plans: tuple[BudgetPlan, ...]
    uniform: Mapping[str, BudgetPlan]

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON."""
        return {
            "budget": self.budget,
            "plans": [plan.to_dict() for plan in self.plans],
            "uniform": {pattern: plan.to_dict() for pattern, plan in self.uniform.items()},
        }

    def share(self, plan: BudgetPlan) -> float:
        """MACs or milliseconds of ``plan``, as a share of the dense model's."""
        if self.budget == "macs":
            return plan.macs / plan.dense_macs
        return plan.ms / plan.dense_ms

    def plot(self, path: Path | str) -> None:
        """Draw damage, measured and predicted, over MACs or time; the format is that of the suffix of ``path``.

        Raises:
            ImportError: matplotlib is missing.
        """
        try:
            from matplotlib.figure import Figure  # without pyplot: no window, no global state
        except ImportError as error:
            raise ImportError("the plot needs matplotlib: pip install matplotlib") from error

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axis = figure.subplots()
        shares = [self.share(plan) for plan in self.plans]
        axis.plot(shares, [plan.measured_damage for plan in self.plans], "o-", label="planned, measured")
        axis.plot(shares, [plan.predicted_damage for plan in self.plans], "--", label="planned, predicted")
        for pattern, plan in self.uniform.items():
            axis.plot(self.share(plan), plan.measured_damage, "x", label=f"uniform {pattern}, measured")
        what = "MACs of linear and convolution layers" if self.budget == "macs" else "predicted time"
        axis.set(xlabel=f"{what}, share of dense", ylabel="mean squared change of the predicted noise", ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend()
        figure.savefig(path, dpi=120)

    def __rich__(self) -> Table:
        table = Table(title=f"Pareto curve over {self.budget}")
        table.add_column("plan")
        for column in ("MACs", "ms", "predicted damage", "measured damage"):
            table.add_column(column, justify="right")
        for plan in (*self.plans, *self.uniform.values()):
            damages = f"{plan.predicted_damage:.4g}", f"{plan.measured_damage:.4g}"
            table.add_row(plan.budget, f"{plan.macs / plan.dense_macs:.1%}", milliseconds(plan.ms), *damages)
        return table


def pareto(
    model: nn.Module,
    inputs: Sequence[Any],
    *,
    calibration: Sequence[CalibrationBatch],
    budget: Budget = "macs",
    points: int = 9,
    candidates: Sequence["str | Pattern"] = ("2:4", "1:4"),
    policy: str | LayerPolicy = "default",
    rules: Rules | None = None,
    sensitivity: Sensitivity | None = None,
    latency_table: LatencyTable | None = None,
    progress: bool = False,
) -> ParetoCurve:
    """Plans for evenly spaced budgets, from the cheapest plan to the dense model, out of one sensitivity table.

    Args:
        budget: what to limit.
        points: how many budgets, at least 2.
        The others are those of :func:`sparsedm_compile.plan_for`.

    Raises:
        ValueError: an unknown budget, fewer than 2 points, and what ``plan_for`` refuses.
        TypeError: an argument of the wrong type.
    """
    if budget not in ("macs", "latency"):
        raise ValueError(f"unknown budget {budget!r}: 'macs' or 'latency'")
    if points < 2:
        raise ValueError(f"points must be at least 2, the cheapest plan and the dense model; got {points}")
    table = latency_table if latency_table is not None else True
    problem = pose_problem(model, inputs, calibration, candidates, policy, rules, budget == "latency" and table)
    if sensitivity is None:
        sensitivity = measure_sensitivity(
            model, calibration, candidates=candidates, policy=policy, rules=rules, progress=progress
        )
    problem = replace(problem, sensitivity=sensitivity)
    least, dense = problem.least_cost, problem.dense_cost
    plans: dict[tuple, BudgetPlan] = {}
    for point in range(points):
        cost = floor(least + Fraction(point, points - 1) * (dense - least))
        plan = problem.best(cost, f"{budget}={cost / dense:.4g}")
        plans.setdefault(tuple(plan.rules.items()), plan)
    uniform = {
        str(pattern): _uniform(problem, pattern) for pattern in map(Pattern.parse, candidates) if pattern != DENSE
    }
    return ParetoCurve(budget, tuple(plans.values()), uniform)


def _uniform(problem: Problem, pattern: Pattern) -> BudgetPlan:
    chosen = {choice.name: pattern if pattern in choice.options else choice.options[0] for choice in problem.choices}
    return problem.describe(chosen, f"uniform {pattern}", None)
