"""The quality report of a recipe: a table, sample grids and the Pareto plot, as JSON and as one HTML file."""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from torch import Tensor

from sparsedm_compile.images import sample_figure
from sparsedm_compile.quality.judge import Score
from sparsedm_compile.rendering import RichText


@dataclass(frozen=True)
class QualityReport(RichText):
    """Rows of one recipe, judged alike.

    Attributes:
        title: of the recipe.
        metric: ``"FD-CNN"`` or ``"FID"``.
        features_sha256, classifier_accuracy: of the feature extractor; see :class:`Features`.
        floor: distance of as many training images to the test images: what a perfect model would get.
        rows: scores, the dense model first.
        speedups: row name -> (median, interquartile range) of dense over sparse time; rows not timed are missing.
        provenance: one entry a figure's source: ``"scores"``, and ``"speed"`` if measured.
    """

    title: str
    metric: str
    features_sha256: str
    classifier_accuracy: float | None
    floor: float
    rows: tuple[Score, ...]
    speedups: Mapping[str, tuple[float, float]]
    provenance: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON."""
        return {
            **{key: value for key, value in vars(self).items() if key not in ("rows", "speedups", "provenance")},
            "rows": [row.to_dict() for row in self.rows],
            "speedups": {name: list(pair) for name, pair in self.speedups.items()},
            "provenance": dict(self.provenance),
        }

    def cells(self) -> list[tuple[str, ...]]:
        """The table, a tuple of strings a row; distances are mean ± standard deviation over seeds, if several."""
        dense = self.rows[0]
        lines = []
        for row in self.rows:
            speed = self.speedups.get(row.name)
            lines.append(
                (
                    row.name,
                    row.pattern,
                    f"{row.macs / 1e6:.1f} M",
                    f"{row.weight_bytes / 1e6:.2f} MB",
                    f"{row.validation_loss:.4f}",
                    f"{row.frechet_mean:.3f}" + (f" ± {row.frechet_spread:.3f}" if len(row.seeds) > 1 else ""),
                    "" if row is dense else f"{100 * (_ratio(row, dense) - 1):+.1f}%",
                    f"{sum(row.kernel) / len(row.kernel):.3f}",
                    "" if speed is None else f"{speed[0]:.2f}x",
                )
            )
        return lines

    @property
    def columns(self) -> tuple[str, ...]:
        """Headings of :meth:`cells`."""
        return ("row", "pattern", "MACs", "weights", "loss", self.metric, "to dense", "kernel", "speed")

    @property
    def caption(self) -> str:
        """How the figures were made, in a line."""
        first = self.rows[0]
        seeds = sorted({len(row.seeds) for row in self.rows})
        classifier = "" if self.classifier_accuracy is None else f" ({self.classifier_accuracy:.1%} accurate)"
        return (
            f"{first.samples} samples for each of {' or '.join(map(str, seeds))} seeds, {first.solver}, {first.steps} "
            f"steps; "
            f"{self.metric} of weights {self.features_sha256[:12]}{classifier}; real images of the training set: "
            f"{self.floor:.3f}"
        )

    def __rich__(self) -> Table:
        table = Table(title=self.title, caption=self.caption)
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="left" if i < 2 else "right")
        for cells in self.cells():
            table.add_row(*cells)
        return table


def _ratio(row: Score, dense: Score) -> float:
    """Of the distances, over the seeds that both were judged with: the same noise for both."""
    common = [seed for seed in row.seeds if seed in dense.seeds]
    ours, theirs = (sum(dict(zip(s.seeds, s.frechet, strict=True))[seed] for seed in common) for s in (row, dense))
    return ours / theirs if common else float("nan")


def render_html(report: QualityReport, samples: Mapping[str, Tensor]) -> str:
    """One HTML file that needs nothing else.

    Args:
        samples: row name -> images ``(N, C, H, W)`` in [-1, 1], made from the same noise for every row.
    """
    from jinja2 import Environment

    template = Environment(autoescape=True, trim_blocks=True).from_string(_TEMPLATE)
    return template.render(
        report=report,
        dates={part: source.get("date", "") for part, source in report.provenance.items()},
        commands={part: source.get("command", "") for part, source in report.provenance.items()},
        machine=next(iter(report.provenance.values()), {}).get("cpu", ""),
        grid=_encoded(sample_figure(samples)),
        pareto=_encoded(pareto_figure(report)),
    )


def pareto_figure(report: QualityReport):
    """Distance over MACs, one point a row, as a matplotlib figure."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for row in report.rows:
        point = row.macs / 1e6, row.frechet_mean
        axes.errorbar(*point, yerr=row.frechet_spread, fmt="o", capsize=3)
        axes.annotate(row.name, point, xytext=(5, 3), textcoords="offset points", fontsize=8)
    axes.axhline(report.floor, color="grey", linestyle=":", label="real training images")
    axes.set(xlabel="MACs of linear and convolution layers [M]", ylabel=report.metric, yscale="log")
    axes.legend()
    return figure


def _encoded(figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()


_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ report.title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
table { border-collapse: collapse; } th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; } img { max-width: 100%; } .small { color: #555; }
</style></head><body>
<h1>{{ report.title }}</h1>
<table><thead><tr>{% for column in report.columns %}<th>{{ column }}</th>{% endfor %}</tr></thead><tbody>
{% for line in report.cells() %}<tr>{% for cell in line %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table>
<p class="small">{{ report.caption }}</p>
<h2>Samples from the same noise</h2><img alt="one row of samples a model" src="data:image/png;base64,{{ grid }}">
<h2>Distance over MACs</h2><img alt="distance over MACs" src="data:image/png;base64,{{ pareto }}">
<h2>Source</h2><ul class="small">
{% for part, command in commands.items() %}<li>{{ part }}: <code>{{ command }}</code>, {{ dates[part] }}</li>
{% endfor %}<li>{{ machine }}</li></ul>
</body></html>
"""
