"""The knapsack against trying every plan."""

import itertools
import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparsedm_compile.budget.solve import solve


def brute_force(damages, costs, budget):
    """The least damage of all plans within the budget."""
    plans = itertools.product(*(range(len(options)) for options in costs))
    within = (plan for plan in plans if sum(options[k] for options, k in zip(costs, plan, strict=True)) <= budget)
    return min(sum(options[k] for options, k in zip(damages, plan, strict=True)) for plan in within)


@st.composite
def instances(draw):
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    unit = draw(st.sampled_from([1, 257 * 512, 10**9]))
    damage, cost = st.floats(0, 1), st.integers(-20, 20).map(lambda cost: cost * unit)
    damages, costs = ([draw(st.lists(kind, min_size=n, max_size=n)) for n in sizes] for kind in (damage, cost))
    spare = draw(st.integers(0, 60)) * unit + draw(st.integers(0, unit - 1))
    return damages, costs, sum(map(min, costs)) + spare


@settings(max_examples=60, deadline=None)
@given(instances())
@example(([[5e-324]], [[0]], 0))  # the least number above 0: scaled up, it is still finite
@example(([[0.0, 0.0]], [[1, 0]], 1))
def test_finds_what_trying_every_plan_finds(instance):
    damages, costs, budget = instance
    solution = solve(damages, costs, budget)
    assert sum(options[k] for options, k in zip(costs, solution.chosen, strict=True)) <= budget
    assert solution.damage == pytest.approx(
        sum(options[k] for options, k in zip(damages, solution.chosen, strict=True)), abs=1e-15
    )
    assert solution.damage == pytest.approx(brute_force(damages, costs, budget), rel=1e-9, abs=1e-12)
    assert solution.bound <= solution.damage
    assert solution.bound == pytest.approx(solution.damage, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("magnitude", [10**6, 10**9])
def test_the_budget_holds_to_the_unit(magnitude):
    # Plans that miss the budget by one in a billion are within HiGHS's tolerances, and must not be taken.
    for seed in range(25):
        rng = random.Random(seed)
        near = [[magnitude * rng.randint(1, 3) + rng.randint(-3, 3) for _ in range(2)] + [1] for _ in range(5)]
        damages = [[rng.random() for _ in options] for options in near]
        budget = max(sum(map(min, near)), sum(map(rng.choice, near)) - rng.randint(0, 2))
        solution = solve(damages, near, budget)
        assert sum(options[k] for options, k in zip(near, solution.chosen, strict=True)) <= budget
        assert solution.damage == pytest.approx(brute_force(damages, near, budget), rel=1e-9)


def test_small_damages_are_told_apart():
    # HiGHS alone is content with an absolute gap of 1e-6.
    damages = [[0.0, 3e-9 + k * 1e-10] for k in range(10)]
    costs = [[1, 0]] * 10
    assert solve(damages, costs, 9).chosen == (1, *[0] * 9)
    assert solve(damages, costs, 9).damage == 3e-9


def test_nothing_to_choose_and_no_damage():
    assert solve([[0.5], [0.25]], [[3], [4]], 7).damage == 0.75
    assert solve([[0.0, 0.0]], [[5, 1]], 1).chosen == (1,)


def test_an_impossible_budget():
    with pytest.raises(ValueError, match="no plan costs 4 or less: the cheapest costs 5"):
        solve([[0, 1], [0, 1]], [[9, 2], [9, 3]], 4)
