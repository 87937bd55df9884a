"""Timing of candidates against each other, on machines whose speed drifts."""

import statistics
import time
from collections.abc import Callable


def paired_times(
    candidates: dict[str, Callable[[], object]],
    *,
    seconds: float = 0.2,
    min_rounds: int = 3,
    max_rounds: int = 1000,
    warm: bool = False,
    synchronize: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Time callables in turn, round after round, so that each sees the same weather.

    A shared machine's speed changes by tens of percent within seconds. Times of one round are taken side by side, so
    their ratios stay true; compare candidates with :func:`median_ratio`, never by times of different rounds.

    Args:
        candidates: name -> callable without arguments. Each runs twice, untimed, before the first round.
        seconds: budget for the timed rounds; the round under way when it is spent is finished.
        min_rounds: run at least so many rounds, whatever the budget.
        max_rounds: run at most so many.
        warm: call each once, untimed, right before every timed call. A model is called step after step in sampling and
            finds in the caches what its own last call left there, not what another model did.
        synchronize: called before every clock reading, for asynchronous devices (``torch.cuda.synchronize``).

    Returns:
        name -> seconds of each round; the lists are of equal length, and entries of one position belong together.

    Raises:
        ValueError: no candidates, or not ``1 <= min_rounds <= max_rounds``.
    """
    if not candidates:
        raise ValueError("paired_times: candidates is empty; pass at least one callable")
    if not 1 <= min_rounds <= max_rounds:
        raise ValueError(f"paired_times: need 1 <= min_rounds <= max_rounds, got {min_rounds} and {max_rounds}")
    wait = synchronize or (lambda: None)
    for run in candidates.values():
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates.items())
    deadline = time.perf_counter() + seconds
    rounds = 0
    while rounds < min_rounds or (rounds < max_rounds and time.perf_counter() < deadline):
        for name, run in order:
            if warm:
                run()
            wait()
            start = time.perf_counter()
            run()
            wait()
            times[name].append(time.perf_counter() - start)
        order.append(order.pop(0))  # nobody always runs in the cache that the same other one left behind
        rounds += 1
    return times


def median_ratio(slow: list[float], fast: list[float]) -> tuple[float, float]:
    """How many times faster ``fast`` is: the median of the rounds' ratios, and their interquartile range.

    Args:
        slow, fast: two lists out of one :func:`paired_times` result.

    Raises:
        ValueError: lists of different lengths, or empty ones.
    """
    if len(slow) != len(fast) or not slow:
        raise ValueError(f"median_ratio: need two equally long lists of times, got {len(slow)} and {len(fast)} entries")
    ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
    quarter = len(ratios) // 4
    return statistics.median(ratios), ratios[-1 - quarter] - ratios[quarter]
