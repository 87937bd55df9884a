"""What a permutation achieved: what could move, what could not and why, what the masks keep."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.console import Group
from rich.table import Table

from sparsedm_compile.rendering import RichText


@dataclass(frozen=True)
class LayerKept:
    """A sparse layer and the share of its magnitude that its mask keeps, ``sum |W * mask| / sum |W|``.

    Attributes:
        name: of the layer.
        pattern: its spelling.
        magnitude: ``sum |W|``, which no permutation changes.
        before: the share kept before.
        after: the share kept now.
    """

    name: str
    pattern: str
    magnitude: float
    before: float
    after: float


@dataclass(frozen=True)
class AxisReport:
    """Parameter dimensions that permute together.

    Attributes:
        members: ``"name[dim]"`` of each.
        channels: independent channels along them; a concatenation counts each part's.
        free: channels that could trade places with another.
        moved: channels that did.
        pinned: reason -> number of channels that it kept in place.
    """

    members: tuple[str, ...]
    channels: int
    free: int
    moved: int
    pinned: dict[str, int]


@dataclass(frozen=True)
class PermutationReport(RichText):
    """The result of :func:`permute_channels`. Prints as two tables.

    Attributes:
        axes: every axis along which a mask chooses, in graph order.
        layers: every sparse layer, in model order.
        difference: of the outputs before and after, relative: ``||after - before|| / ||before||``, the worst tensor's.
        unused: parameters that the call did not use; they were not permuted, so other calls that do use them must not
            share a permuted axis with them.
        damage_before, damage_after: mean squared change of the output on the calibration data when every layer is
            pruned by magnitude; None without such data.
    """

    axes: tuple[AxisReport, ...]
    layers: tuple[LayerKept, ...]
    difference: float
    unused: tuple[str, ...]
    damage_before: float | None = None
    damage_after: float | None = None

    @property
    def kept_before(self) -> float:
        """The share of all sparse layers' magnitude that the masks kept before."""
        return self._share([layer.before for layer in self.layers])

    @property
    def kept_after(self) -> float:
        """The share that they keep now."""
        return self._share([layer.after for layer in self.layers])

    def _share(self, shares: Sequence[float]) -> float:
        total = sum(layer.magnitude for layer in self.layers)
        kept = sum(share * layer.magnitude for share, layer in zip(shares, self.layers, strict=True))
        return kept / total if total else 0.0

    def to_dict(self) -> dict:
        """All of it, ready for JSON."""
        return {"kept_before": self.kept_before, "kept_after": self.kept_after} | asdict(self)

    def __rich__(self) -> Group:
        axes = Table(title="axes", caption=f"outputs differ by a relative {self.difference:.1e}")
        for column in ("axis", "with", "channels", "free", "moved", "why not all"):
            axes.add_column(column, overflow="fold")
        for axis in self.axes:
            first, others = axis.members[0], len(axis.members) - 1
            why = "; ".join(f"{count}: {reason}" for reason, count in axis.pinned.items())
            axes.add_row(
                first, f"{others} more" if others else "", str(axis.channels), str(axis.free), str(axis.moved), why
            )
        kept = Table(title="kept magnitude", caption=f"in all {self.kept_before:.2%} -> {self.kept_after:.2%}")
        for column in ("layer", "pattern", "before", "after"):
            kept.add_column(column, overflow="fold")
        for layer in self.layers:
            kept.add_row(layer.name or "(model)", layer.pattern, f"{layer.before:.2%}", f"{layer.after:.2%}")
        parts = [axes, kept]
        if self.damage_before is not None:
            parts.append(f"damage of pruning on calibration data: {self.damage_before:.4g} -> {self.damage_after:.4g}")
        if self.unused:
            parts.append(f"not used by this call, not permuted: {', '.join(self.unused)}")
        return Group(*parts)
