"""Patterns that change during sampling: dense where a step is delicate, sparse where it is not."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from typing import Any

from torch import Tensor, nn

from sparsedm_compile.macs import HasPatterns
from sparsedm_compile.pattern import DENSE, Pattern
from sparsedm_compile.plan import Plan
from sparsedm_compile.planning import Rules
from sparsedm_compile.sparsify import set_pattern, use_pattern

#: What the layers get: one pattern for all, rules for some (the others are dense), or a plan.
LayerPatterns = str | Pattern | Rules | HasPatterns


@dataclass(frozen=True)
class TimestepRange:
    """Times ``start <= time < stop`` and what the layers compute with there.

    Attributes:
        pattern: of every layer that no rule names.
        rules: layer glob or exact name -> pattern.
    """

    start: float
    stop: float
    pattern: Pattern
    rules: Mapping[str, Pattern] = field(hash=False)

    def __str__(self) -> str:
        return f"[{self.start:g}, {self.stop:g})"

    def set_on(self, model: nn.Module) -> Plan:
        """:func:`set_pattern` to the patterns of this range; raises what it raises."""
        return set_pattern(model, self.pattern, rules=self.rules)


class TimestepSchedule:
    """Which pattern a sparsified model has at which time of the noise process.

        schedule = sdm.TimestepSchedule({(0, 200): "dense", (200, 1000): "2:4"})
        images = sdm.sample(model, noise, schedule=schedule)

    Every switch is a :func:`set_pattern`: masks of all ranges come from the same weights, and a compiled model keeps
    one graph for each range, so that switching back recompiles nothing.

    Args:
        ranges: ``(start, stop)`` -> patterns. Ranges are half-open, in the units that the network is called with
            (``VPSDE.time_scale * t``, 0 to 999), in any order. They must start at 0 and leave no gap. Patterns are a
            pattern for every layer that :func:`sparsify` selected, rules (layer -> pattern; what no rule names is
            dense), or a plan, such as that of :func:`plan_for`.

    Attributes:
        ranges: in order of time.

    Raises:
        ValueError: no range, an empty one, a gap, an overlap, or an unknown pattern.
        TypeError: an argument of the wrong type.
    """

    def __init__(self, ranges: Mapping[tuple[float, float], LayerPatterns]) -> None:
        if not isinstance(ranges, Mapping):
            raise TypeError(
                f"TimestepSchedule takes {{(start, stop): pattern}}, such as {{(0, 1000): '2:4'}}, got {ranges!r}"
            )
        if not ranges:
            raise ValueError("TimestepSchedule has no ranges: name at least one, such as {(0, 1000): '2:4'}")
        self.ranges = tuple(sorted((_parse(key, value) for key, value in ranges.items()), key=lambda r: r.start))
        if self.ranges[0].start != 0:
            raise ValueError(f"TimestepSchedule has a gap: it starts with {self.ranges[0]}, not at 0")
        for before, after in zip(self.ranges, self.ranges[1:], strict=False):
            if after.start > before.stop:
                raise ValueError(f"TimestepSchedule has a gap: nothing is said of [{before.stop:g}, {after.start:g})")
            if after.start < before.stop:
                raise ValueError(f"TimestepSchedule has an overlap: {before} and {after}")

    def at(self, timestep: float | Tensor) -> TimestepRange:
        """The range that a time lies in.

        Args:
            timestep: a number or a tensor of one element.

        Raises:
            ValueError: outside of every range.
        """
        time = float(timestep)
        for candidate in self.ranges:
            if candidate.start <= time < candidate.stop:
                return candidate
        last = self.ranges[-1]
        message = f"timestep {time:g} is outside of the schedule, [0, {last.stop:g})"
        # Only a time tells: of a process with time_scale=1, ranges within 0 and 1 are the right ones.
        if last.stop <= 1 < time:
            message += (
                ": ranges are not fractions of the run but in the units that the network is called with, 0 to 999 "
                f"unless the process says otherwise; for {last} write [{1000 * last.start:g}, {1000 * last.stop:g})"
            )
        raise ValueError(message)

    @contextmanager
    def use(self, model: nn.Module) -> Iterator[Callable[[float | Tensor], None]]:
        """A ``with`` block in which the model can follow the schedule; its patterns come back after it, also on error.

        All ranges are tried at the start, so that one which does not fit the model fails before any step. The model
        enters at the last range, where sampling starts. In a pipeline of diffusers, whose callback runs after a step:

            with schedule.use(pipe.unet) as switch:

                def next_pattern(pipe, step, timestep, kwargs):
                    if step + 1 < len(pipe.scheduler.timesteps):
                        switch(pipe.scheduler.timesteps[step + 1])
                    return kwargs

                pipe(prompt, callback_on_step_end=next_pattern)

        Args:
            model: sparsified, compiled or not.

        Yields:
            ``switch(timestep)``, which gives the model the patterns of that time and does nothing if it has them.

        Raises:
            ValueError: the model is not sparse or is packed; rules that do not fit it.
        """
        current = self.ranges[-1]
        with use_pattern(model, current.pattern, rules=current.rules):
            for candidate in self.ranges:
                candidate.set_on(model)

            def switch(timestep: float | Tensor) -> None:
                nonlocal current
                wanted = self.at(timestep)
                if wanted is not current:
                    wanted.set_on(model)
                    current = wanted

            yield switch


def _parse(key: Any, patterns: Any) -> TimestepRange:
    if not isinstance(key, tuple) or len(key) != 2 or not all(isinstance(end, int | float) for end in key):
        raise TypeError(f"TimestepSchedule: a range is a tuple of two numbers such as (0, 200), got {key!r}")
    start, stop = key
    if not start < stop < inf:
        raise ValueError(f"TimestepSchedule: range {key} is empty; it holds start <= time < stop")
    if isinstance(patterns, str | Pattern):
        return TimestepRange(start, stop, Pattern.parse(patterns), {})
    rules = patterns.patterns() if hasattr(patterns, "patterns") else patterns
    if not isinstance(rules, Mapping):
        raise TypeError(
            f"TimestepSchedule: range {key} needs a pattern, rules or a plan, got {type(patterns).__name__}"
        )
    return TimestepRange(start, stop, DENSE, {name: Pattern.parse(pattern) for name, pattern in rules.items()})
