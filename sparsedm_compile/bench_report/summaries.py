"""Means over many rows."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sparsedm_compile.bench_report.results import Row

# Below so many rows of activations dense reads its weights once, as sparse does, and wins: modulation layers of
# transformers, which see one row an image. They are told apart, as no mean over both says anything.
_FEW = 16


def geometric_mean(numbers: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """``exp(sum(w log x) / sum(w))``.

    Raises:
        ValueError: none, or one that is not positive; weights of another number, negative, or all 0.
    """
    weights = [1.0] * len(numbers) if weights is None else weights
    if not numbers or any(number <= 0 for number in numbers):
        raise ValueError(f"geometric_mean takes positive numbers, at least one; got {list(numbers)}")
    if len(weights) != len(numbers) or any(weight < 0 for weight in weights) or not sum(weights):
        raise ValueError(f"geometric_mean: {len(numbers)} numbers need as many weights >= 0, not all 0; got {weights}")
    return math.exp(sum(w * math.log(x) for x, w in zip(numbers, weights, strict=True)) / sum(weights))


def group(row: Row) -> str:
    """``"linear"``, ``"linear, under 16 rows"`` or ``"conv"`` of a row of kind ``layers``; its dtype unless float32."""
    name = "conv"
    if row["op"] == "linear":
        name = "linear" if row["input_rows"] >= _FEW else f"linear, under {_FEW} rows"
    return with_dtype(name, row)


def with_dtype(name: str, row: Row) -> str:
    """``name``, followed by the dtype of ``row`` unless that is float32."""
    return name if row["dtype"] == "float32" else f"{name}, {row['dtype']}"


@dataclass(frozen=True)
class LayerSummary:
    """Ratios of one group of layers at one pattern.

    Attributes:
        shapes: how many.
        mean: geometric mean over the shapes.
        worst, best: of them.
        error: the largest.
    """

    group: str
    pattern: str
    batch: int
    threads: int
    shapes: int
    mean: float
    worst: float
    best: float
    error: float


def summarize_layers(rows: Iterable[Row]) -> list[LayerSummary]:
    """One summary a group, batch, number of threads and pattern, in order of first appearance."""
    grouped: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        grouped[group(row), row["pattern"], row["batch"], row["threads"]].append(row)
    summaries = []
    for key, members in grouped.items():
        ratios, error = [row["ratio"] for row in members], max(row["error"] for row in members)
        summaries.append(LayerSummary(*key, len(members), geometric_mean(ratios), min(ratios), max(ratios), error))
    return summaries


@dataclass(frozen=True)
class LayersOfModel:
    """What the layers of one model gain together, each shape counted as often as the model has it.

    Attributes:
        layers: how many the figures are of; those of shapes that were left out are not among them.
        sparse: dense over sparse time of all measured ones.
        chosen: the same with dense where dense is faster.
    """

    model: str
    pattern: str
    batch: int
    threads: int
    layers: int
    sparse: float
    chosen: float


def summarize_models(rows: Iterable[Row]) -> list[LayersOfModel]:
    """One a model, pattern, batch and number of threads; sums of times, weighted by the number of layers."""
    grouped: dict[tuple, list[tuple[int, Row]]] = defaultdict(list)
    for row in rows:
        for model, count in row["uses"].items():
            grouped[with_dtype(model, row), row["pattern"], row["batch"], row["threads"]].append((count, row))
    summaries = []
    for key, members in grouped.items():
        dense = sum(count * row["dense_ms"] for count, row in members)
        sparse = sum(count * row["dense_ms"] / row["ratio"] for count, row in members)
        chosen = sum(count * row["dense_ms"] / max(row["ratio"], 1.0) for count, row in members)
        layers = sum(count for count, _ in members)
        summaries.append(LayersOfModel(*key, layers, dense / sparse, dense / chosen))
    return summaries
