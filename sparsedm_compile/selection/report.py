"""What a selection did to each layer's outputs, as data and as a table."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from sparsedm_compile.rendering import RichText, summary_line


@dataclass(frozen=True)
class LayerSelection:
    """One layer.

    Attributes:
        name: of the layer; layers that share a weight have the same figures.
        pattern: its spelling.
        magnitude_error: relative error of the layer's outputs on the calibration data, without the bias, under its
            magnitude mask: ``|X (w - w_masked)^T| / |X w^T|``, Frobenius norms, X what the dense model feeds it.
        error: the same for the weight that it holds now.
        moved: share of the kept weights that the magnitude mask would have dropped.
    """

    name: str
    pattern: str
    magnitude_error: float
    error: float
    moved: float


@dataclass(frozen=True)
class SelectionReport(RichText):
    """What :func:`select_masks` did; iterable by layer, prints as a table.

    Attributes:
        method, refit, damping: as asked for.
        samples: of calibration data.
        layers: each whose pattern is not dense, in registration order.
    """

    method: str
    refit: bool
    damping: float
    samples: int
    layers: tuple[LayerSelection, ...]

    def __iter__(self) -> Iterator[LayerSelection]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON; ``layers`` holds a dict for each."""
        return asdict(self)

    def __rich__(self) -> Table:
        better = sum(layer.error < layer.magnitude_error for layer in self.layers)
        how = f"{self.method}{', refitted' if self.refit else ''}, {self.samples} samples"
        table = Table(
            title=f"mask selection: {how}",
            caption=summary_line(better, len(self.layers), "layers with a smaller output error than by magnitude"),
        )
        table.add_column("layer", overflow="fold")
        table.add_column("pattern")
        for column in ("error by magnitude", "error now", "moved"):
            table.add_column(column, justify="right")
        for layer in self.layers:
            errors = f"{layer.magnitude_error:.4f}", f"{layer.error:.4f}", f"{layer.moved:.1%}"
            table.add_row(layer.name or "(model)", layer.pattern, *errors)
        return table
