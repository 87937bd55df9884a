"""Sections of a measurement under one time limit: what was done when time is up is kept, the rest is named."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Skipped(Exception):
    """A section cannot run here; the message says what is missing."""


class Clock:
    """Seconds left until a deadline."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._deadline = now() + seconds

    def left(self) -> float:
        """May be negative."""
        return self._deadline - self._now()

    def part(self, seconds: float) -> "Clock":
        """A clock for a part of the work, which ends no later than this one."""
        return Clock(min(seconds, self.left()), self._now)


@dataclass
class Section:
    """One part of the measurement.

    Attributes:
        run: yields records as they are made; once its clock is used up it is asked for no more.
        share: of the time that is left when it starts, against the shares of the sections behind it.
    """

    name: str
    share: float
    run: Callable[[Clock], Iterator[Record]]


@dataclass
class Outcome:
    """What became of a section; ``stopped`` says why not everything was done, None if all was."""

    name: str
    budget_s: float
    spent_s: float = 0.0
    stopped: str | None = None
    records: list[Record] = field(default_factory=list)


def run_sections(sections: list[Section], clock: Clock, save: Callable[[list[Outcome]], None]) -> list[Outcome]:
    """Run the sections in order; time that one leaves goes to those behind it.

    A section that raises is recorded with its error, and the next one runs. ``save`` is called after every record, so
    that a run which is killed leaves what it had.
    """
    outcomes: list[Outcome] = []
    for i, section in enumerate(sections):
        share = section.share / sum(s.share for s in sections[i:])
        part = clock.part(max(clock.left(), 0.0) * share)
        outcome = Outcome(section.name, round(max(part.left(), 0.0), 1))
        outcomes.append(outcome)
        before = clock.left()
        try:
            if part.left() <= 0:
                raise Skipped("no time was left")
            for record in section.run(part):
                outcome.records.append(record)
                save(outcomes)
                if part.left() <= 0:
                    outcome.stopped = "its time was up"
                    break
        except Skipped as reason:
            outcome.stopped = f"skipped: {reason}"
        except Exception as error:  # one section's failure must not cost the others
            outcome.stopped = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        outcome.spent_s = round(before - clock.left(), 1)
        save(outcomes)
    return outcomes


def write_json(path: Path, header: dict[str, Any], outcomes: list[Outcome]) -> None:
    """Write the report, replacing an earlier one in one step."""
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(header | {"sections": [asdict(o) for o in outcomes]}, indent=1) + "\n")
    temporary.replace(path)
