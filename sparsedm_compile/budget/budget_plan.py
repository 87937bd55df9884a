"""A plan that keeps to a budget, with what was predicted and measured of it."""

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from sparsedm_compile.pattern import Pattern
from sparsedm_compile.rendering import RichText, milliseconds, summary_line


@dataclass(frozen=True)
class PlannedLayer:
    """One layer of the plan.

    Attributes:
        name: of the layer.
        pattern: its spelling.
        damage: mean squared change of the predicted noise when this layer alone has its pattern. Layers that share a
            weight are masked together, and the first of them carries the damage.
        dense_macs, macs: MACs in one call of the model, dense and with zeros skipped.
        dense_ms, ms: milliseconds in one call of the model, dense and at the pattern; None where not measured.
    """

    name: str
    pattern: str
    damage: float
    dense_macs: int
    macs: int
    dense_ms: float | None
    ms: float | None


@dataclass(frozen=True)
class BudgetPlan(RichText):
    """A pattern for each layer; prints as a table. ``sparsify(model, rules=plan.rules)`` applies it.

    Attributes:
        layers: every linear and convolution layer, in model order.
        budget: what the plan keeps to, such as ``"macs=0.5"``.
        predicted_damage: the sum of the layers' damages, a first-order prediction: it leaves out how errors of
            different layers add up or cancel.
        bound: no plan of these candidates within the budget is predicted less damage; None for a plan that was given,
            not searched.
        measured_damage: of the whole plan, on the same calibration batches.
        dense_macs, macs: of all linear and convolution layers, in one call of the model.
        dense_ms: measured milliseconds of the whole dense model; None where no latency was asked for.
        ms: predicted of the plan: dense_ms less what each layer saves.
    """

    layers: tuple[PlannedLayer, ...]
    budget: str
    predicted_damage: float
    bound: float | None
    measured_damage: float
    dense_macs: int
    macs: int
    dense_ms: float | None = None
    ms: float | None = None

    @property
    def rules(self) -> dict[str, str]:
        """Layer -> pattern, of every layer: for ``sparsify``, ``set_pattern`` and ``use_pattern``."""
        return {layer.name: layer.pattern for layer in self.layers}

    def patterns(self) -> dict[str, Pattern]:
        """Layer -> pattern, of the sparse layers alone: what ``count_macs(model, *inputs, plan=plan)`` asks for."""
        return {name: Pattern.parse(pattern) for name, pattern in self.rules.items() if pattern != "dense"}

    @property
    def gap(self) -> float | None:
        """How far the predicted damage may lie above the least possible, relative to it; 0 for a proven optimum."""
        if self.bound is None:
            return None
        return (self.predicted_damage - self.bound) / self.predicted_damage if self.predicted_damage else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The fields by name and the gap, ready for JSON."""
        return {**asdict(self), "gap": self.gap}

    def __rich__(self) -> Table:
        sparse = summary_line(len(self.patterns()), len(self.layers), "layers sparse")
        caption = f"{sparse}; MACs {self.macs / self.dense_macs:.1%} of dense"
        if self.ms is not None and self.dense_ms is not None:
            caption += f"; {self.ms:.3f} ms predicted, dense {self.dense_ms:.3f} ms"
        caption += f"; damage {self.predicted_damage:.4g} predicted, {self.measured_damage:.4g} measured"
        if self.gap is not None:
            caption += f"; at most {self.gap:.1%} above the least predicted"
        table = Table(title=f"plan for {self.budget}", caption=caption)
        for column in ("layer", "pattern"):
            table.add_column(column, overflow="fold")
        timed = self.ms is not None
        for column in ("damage", "share of MACs", *(("ms", "dense ms") if timed else ())):
            table.add_column(column, justify="right")
        for layer in self.layers:
            table.add_row(
                layer.name or "(model)",
                layer.pattern,
                f"{layer.damage:.3g}" if layer.damage else "",
                f"{layer.macs / self.dense_macs:.2%}",
                *((milliseconds(layer.ms), milliseconds(layer.dense_ms)) if timed else ()),
            )
        return table
