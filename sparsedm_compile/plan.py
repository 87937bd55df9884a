"""The plan: which layer runs at which pattern, and why a layer stays dense."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.table import Table

from sparsedm_compile.pattern import DENSE, Pattern
from sparsedm_compile.rendering import RichText, summary_line


@dataclass(frozen=True)
class LayerInfo:
    """What a policy may know of a layer.

    Attributes:
        name: qualified name in the model; empty for the model itself.
        kind: ``"linear"``, ``"conv1d"``, ``"conv2d"``, ``"conv3d"``, or the class of a layer that cannot be sparse.
        weight_shape: ``(out, in)`` or ``(C_out, C_in / groups, *kernel)``.
        groups: of a convolution.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    groups: int = 1


@dataclass(frozen=True)
class PlanLayer(LayerInfo):
    """A layer with its pattern.

    Attributes:
        pattern: what it computes with.
        reason: why it is dense; empty for a sparse layer.
        switchable: whether policy or rules selected it, so that ``set_pattern`` may change its pattern later, also
            where this one does not fit its shape.
    """

    pattern: Pattern = DENSE
    reason: str = ""
    switchable: bool = False


class Plan(RichText):
    """Layer name -> pattern, with the reason for each layer left dense. Iterable by layer, prints as a table."""

    def __init__(self, layers: Sequence[PlanLayer]) -> None:
        self.layers = tuple(layers)
        self._by_name = {layer.name: layer for layer in self.layers}

    def __iter__(self) -> Iterator[PlanLayer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> PlanLayer:
        return self._by_name[name]

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.layers == other.layers

    __hash__ = None

    def patterns(self) -> dict[str, Pattern]:
        """Name -> pattern of the sparse layers alone."""
        return {layer.name: layer.pattern for layer in self.layers if not layer.pattern.is_dense}

    def to_dict(self) -> dict[str, dict]:
        """Name -> ``{"kind", "shape", "pattern", "reason"}``, ready for JSON."""
        return {
            layer.name: {
                "kind": layer.kind,
                "shape": list(layer.weight_shape),
                "pattern": str(layer.pattern),
                "reason": layer.reason,
            }
            for layer in self.layers
        }

    def __rich__(self) -> Table:
        sparse = self.patterns()
        table = Table(title="plan", caption=summary_line(len(sparse), len(self.layers), "layers sparse"))
        for column in ("layer", "kind", "shape", "pattern", "why dense"):
            table.add_column(column, overflow="fold")
        for layer in self.layers:
            shape = " x ".join(map(str, layer.weight_shape))
            table.add_row(layer.name or "(model)", layer.kind, shape, str(layer.pattern), layer.reason)
        return table
