"""The regression check: two sets of results held against each other."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from sparsedm_compile.bench_report.results import KINDS, Results, Row
from sparsedm_compile.rendering import RichText

# What makes two machines one, as far as their speed goes.
_MACHINE = ("cpu", "vectors", "cores", "gpus")


@dataclass(frozen=True)
class Change:
    """One measurement in both sets: ``change`` is relative, positive for better; ``noise`` is what it may differ by."""

    kind: str
    what: str
    old: float
    new: float
    change: float
    noise: float

    @property
    def regressed(self) -> bool:
        """Whether it got worse by more than noise."""
        return self.change < -self.noise


@dataclass(frozen=True)
class Comparison(RichText):
    """Old against new; prints the table of what regressed.

    Attributes:
        changes: of every measurement that both sets hold.
        only_old, only_new: names of the measurements that one of them lacks.
        machines: the two where they differ, else empty.
        timed_otherwise: names of the measurements that are marked as timed warm in one set alone.
        tolerance: relative.
    """

    changes: tuple[Change, ...]
    only_old: tuple[str, ...]
    only_new: tuple[str, ...]
    machines: tuple[str, ...]
    timed_otherwise: tuple[str, ...]
    tolerance: float

    @property
    def regressions(self) -> tuple[Change, ...]:
        """What got worse, the worst first."""
        return tuple(sorted((one for one in self.changes if one.regressed), key=lambda one: one.change))

    def to_dict(self) -> dict[str, Any]:
        """The fields, and ``"regressions"``, ready for JSON."""
        return {**asdict(self), "regressions": [asdict(one) for one in self.regressions]}

    def __rich__(self) -> Table:
        better = sum(one.change > one.noise for one in self.changes)
        notes = [
            f"{len(self.changes)} measurements in both: {len(self.regressions)} worse, {better} better beyond "
            f"{self.tolerance:.0%} and their spread"
        ]
        for names, where in ((self.only_old, "old"), (self.only_new, "new")):
            if names:
                notes.append(f"only in {where}: {_few(names)}")
        if self.timed_otherwise:
            notes.append(f"timed warm in one of them alone: {_few(self.timed_otherwise)}")
        if self.machines:
            notes.append(f"different machines: {' against '.join(self.machines)}")
        table = Table(title="regressions", caption="; ".join(notes))
        table.add_column("what", overflow="fold")
        for column in ("old", "new", "change", "noise"):
            table.add_column(column, justify="right")
        for one in self.regressions:
            table.add_row(one.what, f"{one.old:.3g}", f"{one.new:.3g}", f"{one.change:+.1%}", f"{one.noise:.1%}")
        return table


def compare(old: Sequence[Results], new: Sequence[Results], *, tolerance: float = 0.03) -> Comparison:
    """Hold every measurement that both sets have against each other.

    A change counts where it exceeds ``tolerance`` plus half of each side's interquartile range (relative to the old
    figure). Ratios are compared, where there are any, not times: they were taken in turn with dense, so that a machine
    that is slower today is no regression. Ratios taken warm (each timed call right after one of the same model) and
    others differ by what the caches hold, whatever the code: ``timed_otherwise`` names such pairs.

    Raises:
        ValueError: ``tolerance`` is negative, or the sets have no measurement in common.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance}")
    before, after = _by_name(old), _by_name(new)
    both = [name for name in before if name in after]
    if not both:
        raise ValueError(f"nothing to compare: {len(before)} old and {len(after)} new measurements have none in common")
    machines = tuple(dict.fromkeys(_machine(results) for results in (*old, *new)))
    return Comparison(
        changes=tuple(_change(name, before[name], after[name], tolerance) for name in both),
        only_old=tuple(name for name in before if name not in after),
        only_new=tuple(name for name in after if name not in before),
        machines=machines if len(machines) > 1 else (),
        timed_otherwise=tuple(name for name in both if _warm(before[name]) != _warm(after[name])),
        tolerance=tolerance,
    )


def _by_name(sets: Sequence[Results]) -> dict[str, tuple[str, Row]]:
    rows = {}
    for results in sets:
        for row in results.rows:
            keys = zip(KINDS[results.kind].keys, results.key(row), strict=True)
            told = (f"{value}" if isinstance(value, str) else f"{key} {value}" for key, value in keys)
            rows[f"{results.kind}: {', '.join(told)}"] = results.kind, row
    return rows


def _change(name: str, old: tuple[str, Row], new: tuple[str, Row], tolerance: float) -> Change:
    kind = KINDS[old[0]]
    before, after = old[1][kind.measure], new[1][kind.measure]
    base = before or after or 1.0  # an error may be 0
    change = (before - after if kind.lower_is_better else after - before) / base
    spread = (old[1]["spread"] + new[1]["spread"]) / 2 / base
    return Change(old[0], name, before, after, change, tolerance + kind.slack + spread)


def _warm(measurement: tuple[str, Row]) -> bool:
    return bool(measurement[1].get("warm", False))


def _few(names: Sequence[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if names[3:] else ''})"


def _machine(results: Results) -> str:
    values = (results.provenance.get(key) for key in _MACHINE)
    return ", ".join(f"{key} {value}" for key, value in zip(_MACHINE, values, strict=True) if value)
