"""A list of measurements under a time limit: which ones are made, and how long each may take."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Case = TypeVar("Case")


@dataclass
class Budget(Generic[Case]):
    """Shares ``seconds`` out over cases, the first ones first.

    A case is taken if what it costs at least fits into what earlier ones leave; what remains in the end goes to all
    that were taken, in equal parts, to be measured for longer. Iterate over :meth:`cases` to run them; those that
    cannot be run are in ``left_out``, as the results file wants them.

    Attributes:
        seconds: for everything.
        cost: seconds that a case takes at least.
        name: of a case, for ``left_out``.
        most: seconds beyond which more timing of one case shows nothing new.
        left_out: filled while the cases run.
    """

    seconds: float
    cost: Callable[[Case], float]
    name: Callable[[Case], str]
    most: float = 1.0
    left_out: list[dict[str, str]] = field(default_factory=list)
    now: Callable[[], float] = time.monotonic

    def cases(self, wanted: Sequence[Case]) -> Iterator[tuple[Case, float]]:
        """Each case that is taken, with seconds to time it for."""
        deadline = self.now() + self.seconds
        taken, left = [], self.seconds
        for case in wanted:
            if self.cost(case) <= left:
                taken.append(case)
                left -= self.cost(case)
            else:
                self._leave_out(case, "does not fit the time limit")
        for done, case in enumerate(taken):
            remaining = deadline - self.now()
            due = sum(self.cost(later) for later in taken[done:])
            if self.cost(case) > remaining:
                self._leave_out(case, "earlier ones took longer than expected")
                continue
            yield case, min(max(remaining - due, 0.0) / (len(taken) - done), self.most)

    def _leave_out(self, case: Case, why: str) -> None:
        self.left_out.append({"what": self.name(case), "why": why})
