"""Plots of results: ratio of each shape, roofline, waterfall."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsedm_compile.bench_report.results import Results, Row, of_kind
from sparsedm_compile.bench_report.summaries import with_dtype
from sparsedm_compile.bench_report.waterfall import PARTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 120


def draw_plots(results: Sequence[Results], folder: Path) -> list[Path]:
    """Write the plots that ``results`` have data for, as PNG files in ``folder``.

    Returns:
        What was written.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'sparsedm-compile[bench]', or pass --no-plots") from error
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Figure] = {}
    for one in of_kind(results, "layers"):
        settings = ("batch", "threads", "dtype")
        for setting in dict.fromkeys(tuple(row[key] for key in settings) for row in one.rows):
            rows = [row for row in one.rows if tuple(row[key] for key in settings) == setting]
            batch, threads, dtype = setting
            name = f"{Path(one.name).stem}_batch{batch}_threads{threads}"
            name, title = name if dtype == "float32" else f"{name}_{dtype}", f"batch {batch}, {threads} threads"
            figures[f"ratios_{name}"] = _ratios(Figure, rows, with_dtype(title, rows[0]))
            # The peak is that of a product in float32, which is no roof over other dtypes.
            if (peak := one.machine.get(str(threads))) and dtype == "float32":
                figures[f"roofline_{name}"] = _roofline(Figure, rows, peak, title)
    split = [row for one in of_kind(results, "models") for row in one.rows if row.get("waterfall")]
    if split:
        figures["waterfall"] = _waterfall(Figure, split)
    written = []
    for name, figure in figures.items():
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1], dpi=_DPI, bbox_inches="tight")
    return written


def _ratios(new_figure: type, rows: list[Row], title: str) -> "Figure":
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    figure = new_figure(figsize=(8, 1.5 + 0.2 * len(layers)))
    axes = figure.subplots()
    for pattern in dict.fromkeys(row["pattern"] for row in rows):
        chosen = [row for row in rows if row["pattern"] == pattern]
        axes.errorbar(
            [row["ratio"] for row in chosen],
            [layers.index(row["layer"]) for row in chosen],
            xerr=[row["spread"] / 2 for row in chosen],
            fmt="o",
            markersize=4,
            label=pattern,
        )
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks(range(len(layers)), layers, fontsize=7)
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("times faster than the fastest dense")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_title(title)
    axes.legend(fontsize=7)
    axes.grid(axis="x", alpha=0.3)
    return figure


def _roofline(new_figure: type, rows: list[Row], peak: dict[str, float], title: str) -> "Figure":
    figure = new_figure(figsize=(8, 5))
    axes = figure.subplots()
    for pattern in dict.fromkeys(row["pattern"] for row in rows):
        chosen = [row for row in rows if row["pattern"] == pattern]
        intensity = [row["gflops"] * row["ms"] * 1e6 / row["bytes"] for row in chosen]
        axes.scatter(intensity, [row["gflops"] for row in chosen], s=12, label=pattern)
    low, high = axes.get_xlim()
    low = max(low, 0.1)
    points = [low * (high / low) ** (i / 99) for i in range(100)]
    roof = [min(peak["gflops"], peak["gbytes"] * point) for point in points]
    axes.plot(
        points, roof, color="black", label="peak of dense GEMM; of a copy in memory, which layers in cache may exceed"
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs on kept weights a byte of weights, input and output")
    axes.set_ylabel("GFLOP/s on kept weights")
    axes.set_title(title)
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    return figure


def _waterfall(new_figure: type, rows: list[Row]) -> "Figure":
    bars: list[tuple[str, dict[str, Any], float]] = []
    for title in dict.fromkeys(with_dtype(row["title"], row) for row in rows):
        group = [row for row in rows if with_dtype(row["title"], row) == title]
        total = group[0]["dense_ms"]
        bars.append((f"{title}, dense", group[0]["waterfall"]["dense"], total))
        bars += [(f"{title}, {row['pattern']}", row["waterfall"]["sparse"], total) for row in group]
    figure = new_figure(figsize=(8, 1.5 + 0.25 * len(bars)))
    axes = figure.subplots()
    left = [0.0] * len(bars)
    for part in PARTS:
        width = [max(fall[part], 0.0) / total for _, fall, total in bars]
        axes.barh(range(len(bars)), width, left=left, label=part)
        left = [a + b for a, b in zip(left, width, strict=True)]
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("share of the dense time")
    axes.legend(fontsize=7)
    return figure
