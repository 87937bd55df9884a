"""The multiple-choice knapsack: one option for each choice, of least damage within a budget, solved exactly."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from math import fsum, gcd

import numpy as np

# HiGHS also stops at an absolute gap of 1e-6, which scipy does not expose: damages are scaled until that means nothing.
_LARGEST_DAMAGE = 1e6
# HiGHS's presolve is off: with costs above 1e5 it loses plans that meet the budget to the unit (3 of 150 instances
# against brute force, none without it). 300 choices of 6 options then take a second in place of a tenth.
_OPTIONS = {"mip_rel_gap": 0, "presolve": False}


@dataclass(frozen=True)
class Solution:
    """A plan and the proof of how good it is.

    Attributes:
        chosen: for each choice the index of its option.
        damage: the sum over the chosen options.
        bound: no plan within the budget has less damage than this.
    """

    chosen: tuple[int, ...]
    damage: float
    bound: float


def solve(damages: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: int) -> Solution:
    """Choose one option of each choice so that the sum of damages is least and the sum of costs at most ``budget``.

    Costs are integers, so that "within the budget" is exact. Inside HiGHS it is not: with costs of 1e8, an option taken
    to 0.999999 counts as taken and hides a hundred units. Each answer is therefore checked in integers, and one that
    breaks the budget is cut off by a cover inequality (not all choices may cost as much as they do there), which no
    plan within the budget violates.

    Args:
        damages: for each choice the damage of each option, 0 or more.
        costs: of the same shape.
        budget: the largest sum of costs.

    Raises:
        ValueError: even the cheapest options exceed the budget; the message gives their sum.

    Sources: Kellerer, Pferschy, Pisinger, "Knapsack Problems" (2004), chapter 11; branch and bound by HiGHS, through
    ``scipy.optimize.milp``, with a relative gap of 0.
    """
    # Here, since it takes a third as long to import as torch does, and only planning needs it.
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    cheapest = [min(options) for options in costs]
    spare = budget - sum(cheapest)
    if spare < 0:
        raise ValueError(f"no plan costs {budget} or less: the cheapest costs {sum(cheapest)}")
    extra = [[cost - least for cost in options] for options, least in zip(costs, cheapest, strict=True)]
    # A common factor, such as the tokens of a transformer, only makes numbers large.
    unit = reduce(gcd, (cost for options in extra for cost in options)) or 1
    owner = np.repeat(np.arange(len(extra)), [len(options) for options in extra])
    starts = np.searchsorted(owner, np.arange(1, len(extra)))
    weights = np.array([damage for options in damages for damage in options], np.float64)
    largest = weights.max() or 1.0
    one_each = csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    sizes = np.array([[cost // unit for options in extra for cost in options]], np.float64)
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(sizes, ub=spare // unit)]
    while True:
        result = milp(
            weights / largest * _LARGEST_DAMAGE,  # in this order: a quotient of the two overflows for the least damages
            integrality=np.ones(len(owner)),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options=_OPTIONS,
        )
        if result.x is None:
            raise RuntimeError(f"HiGHS found no plan although one exists: {result.message}")
        chosen = tuple(int(options.argmax()) for options in np.split(result.x, starts))
        spent = [options[k] for options, k in zip(extra, chosen, strict=True)]
        if sum(spent) <= spare:
            damage = fsum(options[k] for options, k in zip(damages, chosen, strict=True))
            return Solution(chosen, damage, min(damage, float(result.mip_dual_bound / _LARGEST_DAMAGE * largest)))
        as_costly = [cost >= spent[i] for i, options in enumerate(extra) for cost in options]
        constraints.append(LinearConstraint(np.array([as_costly], np.float64), ub=len(extra) - 1))
