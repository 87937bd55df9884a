import itertools
import math
from collections import Counter

import pytest

from sparsedm_compile.pattern import DENSE, Pattern
from sparsedm_compile.schedules import EIGHTHS, HALVED_GROUPS, DrawnPatterns, PatternSchedule, StagedPatterns


def spelled(schedule, steps) -> list[str]:
    return [str(schedule(step)) for step in steps]


class TestStaged:
    def test_the_two_of_sparsedm_switch_every_100_000_steps(self):
        steps = (0, 99_999, 100_000, 200_000, 300_000, 399_999, 400_000, 500_000)
        halved = StagedPatterns.every(100_000, HALVED_GROUPS)
        assert spelled(halved, steps) == ["31:32", "31:32", "15:16", "7:8", "3:4", "3:4", "2:4", "2:4"]
        eighths = StagedPatterns.every(100_000, EIGHTHS)
        assert spelled(eighths, steps) == ["7:8", "7:8", "6:8", "5:8", "4:8", "4:8", "2:4", "2:4"]

    def test_stages_of_any_length(self):
        schedule = StagedPatterns(((0, "dense"), (3, "3:4"), (10, "2:4v2")))
        assert spelled(schedule, (0, 2, 3, 9, 10, 10**9)) == ["dense", "dense", "3:4", "3:4", "2:4v2", "2:4v2"]
        assert schedule.patterns == (DENSE, Pattern(3, 4), Pattern(2, 4, 2))
        assert isinstance(schedule, PatternSchedule)

    @pytest.mark.parametrize(("final", "m"), [("2:4", None), ("2:4", 32), ("1:4", 16), ("4:8v2", None)])
    def test_cosine_is_the_least_n_not_below_the_curve(self, final, m):
        steps, final = 50, Pattern.parse(final)
        schedule = StagedPatterns.cosine(final, steps, m=m)
        m = m or final.m
        for step in range(steps):
            curve = m * (final.density + (1 - final.density) * math.cos(math.pi * step / (2 * steps)) ** 2)
            pattern = schedule(step)
            n = m if pattern.is_dense else pattern.n
            assert curve - 1e-6 <= n < curve + 1
            assert pattern == DENSE or (pattern.m, pattern.v) == (m, final.v)
        assert schedule(0) == DENSE
        assert schedule(steps) == schedule(10**9) == final

    @pytest.mark.parametrize(
        "stages", [(), ((1, "2:4"),), ((0, "3:4"), (0, "2:4")), ((0, "3:4"), (5, "2:4"), (4, "1:4"))]
    )
    def test_stages_that_do_not_rise_from_0(self, stages):
        with pytest.raises(ValueError, match="must start at step 0 and rise, got first steps"):
            StagedPatterns(stages)

    def test_bad_lengths(self):
        with pytest.raises(ValueError, match="at least 1 step, got 0"):
            StagedPatterns.every(0, EIGHTHS)
        with pytest.raises(ValueError, match="sparse pattern in 1 step or more, got 2:4 in 0"):
            StagedPatterns.cosine("2:4", 0)
        with pytest.raises(ValueError, match="got dense in 10"):
            StagedPatterns.cosine("dense", 10)


class TestDrawn:
    def test_all_are_equally_likely_and_independent_of_the_order_of_asking(self):
        schedule = DrawnPatterns(("dense", "2:4", "1:4"), seed=5)
        forward = spelled(schedule, range(3000))
        counts = Counter(forward)
        # Binomial(3000, 1/3) has a standard deviation of 26.
        assert all(abs(counts[name] - 1000) < 5 * 26 for name in ("dense", "2:4", "1:4"))
        assert spelled(schedule, reversed(range(3000))) == forward[::-1]
        pairs = Counter(itertools.pairwise(forward))
        assert min(pairs.values()) > 3000 / 9 - 5 * math.sqrt(3000 * 8 / 81)

    def test_the_seed_matters(self):
        draws = {tuple(spelled(DrawnPatterns(("dense", "2:4"), seed), range(40))) for seed in range(10)}
        assert len(draws) == 10

    @pytest.mark.parametrize("patterns", ["2:4", ()])
    def test_no_sequence(self, patterns):
        with pytest.raises(ValueError, match="patterns must be a sequence"):
            DrawnPatterns(patterns)

    def test_unknown_pattern(self):
        with pytest.raises(ValueError, match="unknown pattern 'sparse'"):
            DrawnPatterns(("dense", "sparse"))
