"""``plan_for``: the per-layer plan of least predicted damage within a budget of MACs or of time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import ceil, floor, fsum, inf
from numbers import Real
from typing import Any

from torch import nn

from sparsedm_compile.budget.budget_plan import BudgetPlan, PlannedLayer
from sparsedm_compile.budget.choices import Choice, layer_choices
from sparsedm_compile.budget.latency import LatencyTable, measure_latency
from sparsedm_compile.budget.sensitivity import Sensitivity, check_calibration, measure_sensitivity, output_errors
from sparsedm_compile.budget.solve import solve
from sparsedm_compile.calibration import CalibrationBatch
from sparsedm_compile.macs import ATTENTION, count_macs
from sparsedm_compile.pattern import Pattern
from sparsedm_compile.planning import Rules, named_modules, unwrap
from sparsedm_compile.policy import LayerPolicy

# Times are compared in whole nanoseconds, so that a budget is kept exactly; no timing is finer than that.
_NS_PER_MS = 10**6


@dataclass(frozen=True)
class Problem:
    """A model with all that was measured of it: what every plan of it is chosen from and described by.

    Attributes:
        model: dense.
        calibration: what the damage of a whole plan is measured on.
        choices: the decisions.
        macs: dense MACs of each layer.
        latency: None where only MACs are budgeted.
        sensitivity: of each choice.
    """

    model: nn.Module
    calibration: Sequence[CalibrationBatch]
    choices: tuple[Choice, ...]
    macs: Mapping[str, int]
    latency: LatencyTable | None
    sensitivity: Sensitivity = field(default_factory=lambda: Sensitivity({}))

    @property
    def dense_cost(self) -> int:
        """Of the dense model: nanoseconds where there are times, else MACs."""
        return sum(self.macs.values()) if self.latency is None else round(self.latency.dense_ms * _NS_PER_MS)

    @property
    def costs(self) -> list[list[int]]:
        """What each option of each choice adds to the dense cost; 0 for dense, negative for what saves."""
        if self.latency is not None:
            return [[-round(ms * _NS_PER_MS) for ms in self.latency.savings(choice)] for choice in self.choices]
        return [
            [
                sum(_macs_at(self.macs[name], option) - self.macs[name] for name in choice.names)
                for option in choice.options
            ]
            for choice in self.choices
        ]

    @property
    def least_cost(self) -> int:
        """Of the cheapest plan."""
        return self.dense_cost + sum(min(options) for options in self.costs)

    def best(self, budget: int, spelled: str) -> BudgetPlan:
        """The plan of least predicted damage that costs at most ``budget``, which must be reachable."""
        damages = [self.sensitivity.of(choice) for choice in self.choices]
        solution = solve(damages, self.costs, budget - self.dense_cost)
        pairs = zip(self.choices, solution.chosen, strict=True)
        return self.describe({c.name: c.options[k] for c, k in pairs}, spelled, solution.bound)

    def describe(self, chosen: Mapping[str, Pattern], budget: str, bound: float | None) -> BudgetPlan:
        """Measure a plan and put it into words.

        Args:
            chosen: first layer of each choice -> one of its options.
        """
        rows: dict[str, PlannedLayer] = {}
        damages = []
        for choice in self.choices:
            pattern = chosen[choice.name]
            damages.append(self.sensitivity.of(choice)[choice.options.index(pattern)])
            for name in choice.names:
                rows[name] = PlannedLayer(
                    name,
                    str(pattern),
                    damages[-1] if name == choice.name else 0.0,
                    self.macs[name],
                    _macs_at(self.macs[name], pattern),
                    *(None, None) if self.latency is None else self.latency.of(name, pattern),
                )
        sparse = {name: Pattern.parse(row.pattern) for name, row in rows.items() if row.pattern != "dense"}
        (measured,) = output_errors(self.model, self.calibration, [sparse])
        order = [name for name, _ in named_modules(self.model) if name in rows]
        saved = fsum((row.dense_ms or 0) - (row.ms or 0) for row in rows.values())
        return BudgetPlan(
            layers=tuple(rows[name] for name in order),
            budget=budget,
            predicted_damage=fsum(damages),
            bound=bound,
            measured_damage=measured,
            dense_macs=sum(self.macs.values()),
            macs=sum(row.macs for row in rows.values()),
            dense_ms=None if self.latency is None else self.latency.dense_ms,
            ms=None if self.latency is None else self.latency.dense_ms - saved,
        )


def pose_problem(
    model: nn.Module,
    inputs: Sequence[Any],
    calibration: Sequence[CalibrationBatch],
    candidates: Sequence["str | Pattern"],
    policy: str | LayerPolicy,
    rules: Rules | None,
    latency: LatencyTable | bool,
) -> Problem:
    """Check the arguments of :func:`plan_for` and measure all but the sensitivity, which takes longest.

    Args:
        latency: a table, or whether to measure one.
    """
    choices = layer_choices(model, candidates, policy, rules)
    check_calibration(calibration)
    if isinstance(inputs, str) or not isinstance(inputs, Sequence):
        raise TypeError(f"inputs must be a tuple, of what the model is called with; got {type(inputs).__name__}")
    macs = dict.fromkeys((name for choice in choices for name in choice.names), 0)
    names = zip(unwrap(model).named_modules(), named_modules(unwrap(model)), strict=True)
    by_path = {path: name for (path, _), (name, _) in names}
    for row in count_macs(model, *inputs).layers:
        if row.kind != ATTENTION:
            macs[by_path[row.name]] += row.dense
    if latency is True:
        latency = measure_latency(model, inputs, candidates=candidates, policy=policy, rules=rules)
    return Problem(unwrap(model), calibration, choices, macs, latency or None)


def plan_for(
    model: nn.Module,
    inputs: Sequence[Any],
    *,
    calibration: Sequence[CalibrationBatch],
    macs: float | None = None,
    latency_ms: float | None = None,
    latency: float | None = None,
    candidates: Sequence["str | Pattern"] = ("2:4", "1:4"),
    policy: str | LayerPolicy = "default",
    rules: Rules | None = None,
    sensitivity: Sensitivity | None = None,
    latency_table: LatencyTable | None = None,
    progress: bool = False,
) -> BudgetPlan:
    """The pattern of each layer that harms the model least within a budget, which exactly one argument gives.

    The harm of each pattern of each layer is measured, one layer at a time (:func:`measure_sensitivity`), and the harm
    of a plan predicted as the sum over its layers. That is a first-order prediction: exact where the errors that layers
    cause are uncorrelated, too low where they add up or later layers amplify them (by a factor of 2 to 3 on this
    package's digits model, at 40 to 70% of the MACs). The plan is the proven optimum of the prediction; what it really
    does is measured and stands beside it.

        calibration = calibration_set(loader)
        plan = sdm.plan_for(model, inputs, calibration=calibration, macs=0.5, candidates=["2:4", "1:4"])
        sdm.sparsify(model, rules=plan.rules)

    Args:
        model: dense, called as ``model(*inputs)``; left as it was.
        inputs: of one call. MACs and times are counted for it; their share hardly depends on the batch.
        calibration: batches over the times of the noise process.
        macs: at most this share of the dense MACs of all linear and convolution layers, as
            :func:`sparsedm_compile.count_macs` counts them; above 0, at most 1.
        latency_ms: at most so many milliseconds for one call of the compiled model.
        latency: at most this share of the measured time of the compiled dense model; above 0, at most 1.
        candidates: patterns to choose from; any layer may also stay dense.
        policy: which layers may be sparse, as in :func:`sparsedm_compile.sparsify`.
        rules: layer glob or exact name -> the one pattern that it gets, or ``"dense"``.
        sensitivity: from :func:`measure_sensitivity` for the same arguments, so that it need not be measured again.
        latency_table: likewise, from :func:`measure_latency`.
        progress: show a progress bar.

    Returns:
        The plan, with predicted and measured damage, MACs and, for a latency budget, times.

    Raises:
        ValueError: not exactly one budget, or one out of range; a budget that no plan meets (the message names the
            nearest); no sparse candidate, an unknown one, or none that any layer takes; the model is sparse or packed
            already; no calibration batches; inputs that do not fit the model; a table of other layers or candidates.
        TypeError: an argument of the wrong type.
    """
    name, value = _one_budget({"macs": macs, "latency_ms": latency_ms, "latency": latency})
    table = latency_table if latency_table is not None else True
    problem = pose_problem(model, inputs, calibration, candidates, policy, rules, name != "macs" and table)
    whole = _NS_PER_MS if name == "latency_ms" else problem.dense_cost
    budget = floor(value * whole)
    if budget < problem.least_cost:
        raise ValueError(_unreachable(problem, name, value, Fraction(problem.least_cost, whole)))
    if sensitivity is None:
        sensitivity = measure_sensitivity(
            model, calibration, candidates=candidates, policy=policy, rules=rules, progress=progress
        )
    return replace(problem, sensitivity=sensitivity).best(budget, f"{name}={float(value):g}")


def _macs_at(dense: int, pattern: Pattern) -> int:
    return dense * pattern.n // pattern.m


def _one_budget(budgets: Mapping[str, float | None]) -> tuple[str, Fraction]:
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        got = ", ".join(f"{name}={value}" for name, value in given.items()) or "none"
        raise ValueError(f"give exactly one budget, macs=..., latency_ms=... or latency=...; got {got}")
    ((name, value),) = given.items()
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 < value < inf or (name != "latency_ms" and value > 1):
        asked = "milliseconds, above 0" if name == "latency_ms" else "a share of the dense model, above 0 and at most 1"
        raise ValueError(f"{name}={value}: a budget is {asked}")
    return name, Fraction(str(value))  # 0.3 means three tenths, which no float is


def _unreachable(problem: Problem, name: str, value: Fraction, least: Fraction) -> str:
    least_cost, dense_cost = problem.least_cost, problem.dense_cost
    if problem.latency is None:
        amounts = f"{least_cost:,} of {dense_cost:,} MACs"
    else:
        amounts = f"{least_cost / _NS_PER_MS:.4g} of {dense_cost / _NS_PER_MS:.4g} ms"
    nearest = ceil(least * 10**4) / 10**4
    options = dict.fromkeys(str(o) for choice in problem.choices for o in choice.options if not o.is_dense)
    return (
        f"no plan of {', '.join(options)} meets {name}={float(value):g}: the nearest is {name}={nearest} "
        f"({amounts}); ask for that, name sparser candidates, or let policy and rules select more layers"
    )
