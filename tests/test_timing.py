"""Paired timing: order, budget, pairing and the ratio that is read from it."""

import time

import pytest

from sparsedm_compile.timing import median_ratio, paired_times


def test_candidates_run_in_turn_after_a_warm_up() -> None:
    calls: list[str] = []
    times = paired_times(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=0, min_rounds=4, max_rounds=4
    )
    assert {name: len(values) for name, values in times.items()} == {"a": 4, "b": 4}
    assert calls[:4] == ["a", "a", "b", "b"]
    rounds = [set(calls[4 + 2 * i : 6 + 2 * i]) for i in range(4)]
    assert rounds == [{"a", "b"}] * 4
    assert calls[4:] != ["a", "b"] * 4  # the order within a round changes


def test_warm_calls_come_right_before_the_timed_ones() -> None:
    calls: list[str] = []
    candidates = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = paired_times(candidates, seconds=0, min_rounds=2, warm=True)
    assert calls == ["a", "a", "b", "b", *"aabb", *"bbaa"]
    assert {name: len(rounds) for name, rounds in times.items()} == {"a": 2, "b": 2}


def test_the_budget_ends_the_rounds() -> None:
    start = time.perf_counter()
    times = paired_times({"nap": lambda: time.sleep(0.01)}, seconds=0.1)
    assert 3 <= len(times["nap"]) <= 10
    assert time.perf_counter() - start < 2
    assert all(value >= 0.01 for value in times["nap"])


def test_synchronize_is_called_around_each_run() -> None:
    waits: list[int] = []
    paired_times({"a": lambda: None}, seconds=0, min_rounds=3, synchronize=lambda: waits.append(1))
    assert len(waits) == 6


def test_median_ratio_survives_a_drifting_machine() -> None:
    speed = [1, 1, 5, 2, 9, 3, 1]
    fast = [s * 1.0 for s in speed]
    slow = [s * 2.0 for s in speed]
    slow[2] *= 50
    ratio, spread = median_ratio(slow, fast)
    assert ratio == 2
    assert spread == 0


def test_bad_input_is_an_error() -> None:
    with pytest.raises(ValueError, match="candidates is empty"):
        paired_times({})
    with pytest.raises(ValueError, match="got 5 and 2"):
        paired_times({"a": lambda: None}, min_rounds=5, max_rounds=2)
    with pytest.raises(ValueError, match="got 1 and 2 entries"):
        median_ratio([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="got 0 and 0"):
        median_ratio([], [])
