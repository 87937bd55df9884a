"""Which pattern each step of a fine-tuning trains: one after another, by a cosine, or drawn at random."""

import itertools
import math
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from sparsedm_compile.pattern import DENSE, Pattern

#: SparseDM's first progressive baseline: groups are halved, one weight fewer each time; 100,000 steps a stage there.
HALVED_GROUPS = ("31:32", "15:16", "7:8", "3:4", "2:4")
#: SparseDM's second progressive baseline: one weight of eight fewer each time; 100,000 steps a stage there.
EIGHTHS = ("7:8", "6:8", "5:8", "4:8", "2:4")


@runtime_checkable
class PatternSchedule(Protocol):
    """Step number, from 0, to the pattern that every selected layer trains at.

    A function of the step alone, so that a resumed run and every process of a distributed one agree without a word.
    Its ``repr`` tells one schedule from another.
    """

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """All patterns that can occur."""

    def __call__(self, step: int) -> Pattern:
        """The pattern of ``step``."""


@dataclass(frozen=True)
class StagedPatterns:
    """One pattern after another; the last one stays.

    Args:
        stages: ``(first step, pattern)``, from step 0 on, in rising order.

    Raises:
        ValueError: no stage, a first step other than 0, or steps that do not rise.
    """

    stages: tuple[tuple[int, Pattern], ...]

    def __post_init__(self) -> None:
        stages = tuple((step, Pattern.parse(pattern)) for step, pattern in self.stages)
        firsts = [step for step, _ in stages]
        if not firsts or firsts[0] != 0 or any(a >= b for a, b in itertools.pairwise(firsts)):
            raise ValueError(f"stages must start at step 0 and rise, got first steps {firsts}")
        object.__setattr__(self, "stages", stages)

    @classmethod
    def every(cls, steps: int, patterns: Sequence["str | Pattern"]) -> "StagedPatterns":
        """``patterns`` in turn, ``steps`` each: ``StagedPatterns.every(100_000, HALVED_GROUPS)`` is SparseDM's."""
        if steps < 1:
            raise ValueError(f"a stage must last at least 1 step, got {steps}")
        return cls(tuple((i * steps, pattern) for i, pattern in enumerate(patterns)))

    @classmethod
    def cosine(cls, final: "str | Pattern", steps: int, *, m: int | None = None) -> "StagedPatterns":
        """Lower the density from 1 to that of ``final`` along half a cosine over ``steps``; then ``final`` itself.

        Args:
            final: what is trained from ``steps`` on.
            steps: length of the descent.
            m: group size on the way, that of ``final`` unless given; 32 makes the descent of a 2:4 fine. A layer whose
                width it does not divide stays dense until the end.

        Raises:
            ValueError: ``final`` is dense, or ``steps`` is below 1.
        """
        final = Pattern.parse(final)
        if final.is_dense or steps < 1:
            raise ValueError(f"a cosine leads to a sparse pattern in 1 step or more, got {final} in {steps}")
        m = final.m if m is None else m
        stages: list[tuple[int, Pattern]] = []
        for step in range(steps):
            density = final.density + (1 - final.density) * (1 + math.cos(math.pi * step / steps)) / 2
            n = math.ceil(m * density - 1e-9)  # never sparser than the curve, rounding aside
            pattern = DENSE if n >= m else Pattern(n, m, final.v)
            if not stages or stages[-1][1] != pattern:
                stages.append((step, pattern))
        if stages[-1][1] != final:
            stages.append((steps, final))
        return cls(tuple(stages))

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        return tuple(pattern for _, pattern in self.stages)

    def __call__(self, step: int) -> Pattern:
        return self.stages[bisect_right(self.stages, step, key=lambda stage: stage[0]) - 1][1]


@dataclass(frozen=True)
class DrawnPatterns:
    """A pattern drawn at random for each step, all equally likely, so that one checkpoint serves every one of them.

    Magnitude masks of one group size are nested, 1:4 inside 2:4 inside dense, so the patterns train shared weights.

    Args:
        patterns: what to draw from; one listed twice is drawn twice as often.
        seed: of the draws.

    Raises:
        ValueError: no pattern, or an unknown one.

    Source: slimmable networks (arXiv 1812.08928) train several widths of one network alike.
    """

    patterns: tuple[Pattern, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.patterns, str) or not self.patterns:
            raise ValueError(f"patterns must be a sequence such as ['dense', '2:4'], got {self.patterns!r}")
        object.__setattr__(self, "patterns", tuple(Pattern.parse(pattern) for pattern in self.patterns))

    def __call__(self, step: int) -> Pattern:
        return random.Random(f"{self.seed}/{step}").choice(self.patterns)
