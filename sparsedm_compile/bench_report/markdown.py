"""Results as Markdown: the README's table, and a page of everything."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sparsedm_compile.bench_report.results import Results, Row, of_kind
from sparsedm_compile.bench_report.summaries import geometric_mean, summarize_layers, summarize_models, with_dtype
from sparsedm_compile.bench_report.waterfall import PARTS

OPENING, CLOSING = "<!-- results -->", "<!-- /results -->"
# Agreement that is asked of what explain tells and what a model takes.
_AGREEMENT = 0.15
# Of what was left out for one reason, so many are named.
_NAMED = 5


def replace_between_markers(text: str, block: str) -> str:
    """``text`` with ``block`` between ``<!-- results -->`` and ``<!-- /results -->``; all else stays as it is.

    Raises:
        ValueError: not exactly one of each marker, in this order.
    """
    counts = text.count(OPENING), text.count(CLOSING)
    before, _, rest = text.partition(OPENING)
    _, _, after = rest.partition(CLOSING)
    if counts != (1, 1) or CLOSING in before:
        raise ValueError(
            f"need one {OPENING} and one {CLOSING} behind it, each on a line of its own; found {counts[0]} and "
            f"{counts[1]}" + (" in the wrong order" if counts == (1, 1) else "")
        )
    return f"{before}{OPENING}\n{block.strip()}\n{CLOSING}{after}"


def readme_block(results: Sequence[Results]) -> str:
    """Whole models, a row each, and geometric means over the layer shapes; each with what it was measured on.

    Raises:
        ValueError: neither models nor layers among ``results``.
    """
    models, layers = of_kind(results, "models"), of_kind(results, "layers")
    if not models and not layers:
        raise ValueError("no results of kind 'models' or 'layers'; python bench/end_to_end.py measures models")
    parts = []
    if models:
        parts += [f"Whole forward passes: {_measured_on(models)}.", _model_table(models)]
    if layers:
        parts += [f"Single layers, geometric mean over shapes (worst): {_measured_on(layers)}.", _mean_table(layers)]
    return "\n\n".join(parts)


def page(results: Sequence[Results], plots: Sequence[Path] = ()) -> str:
    """Every result as one Markdown page.

    Args:
        plots: pictures, relative to the page.
    """
    sections = ["# Benchmark results"]
    for kind, write in _SECTIONS.items():
        chosen = of_kind(results, kind)
        if chosen:
            sections += [*write(chosen), *_left_out(chosen), *_provenance(chosen)]
    if plots:
        sections.append("## Plots")
        sections += [f"![{plot.stem}]({plot.as_posix()})" for plot in plots]
    return "\n\n".join(sections) + "\n"


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows)


def ratio(row: Row) -> str:
    """``"1.57 ± 0.01"``: the median and half the interquartile range."""
    return f"{row['ratio']:.2f} ± {row['spread'] / 2:.2f}"


def _ms(value: float) -> str:
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _rows(results: Iterable[Results]) -> list[Row]:
    return [row for one in results for row in one.rows]


def _ordered(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _measured_on(results: Sequence[Results]) -> str:
    """``"float32, 2 threads, AMD EPYC (AVX512), 2 cores, torch 2.13.0+cpu, 2026-11-24"``; several where they differ."""
    told = []
    for one in results:
        p, threads = one.provenance, " and ".join(map(str, sorted({row["threads"] for row in one.rows})))
        dtypes = "/".join(sorted({row.get("dtype", "float32") for row in one.rows}))
        machine = f"{p['cpu']} ({p['vectors']}), {p['cores']} cores"
        plural = "" if threads == "1" else "s"
        told.append(f"{dtypes}, {threads} thread{plural}, {machine}, torch {p['versions']['torch']}, {p['date'][:10]}")
    return "; ".join(_ordered(told))


def _model_table(models: Sequence[Results]) -> str:
    patterns = _ordered(row["pattern"] for row in _rows(models))
    lines = []
    for results in models:
        for case, threads in _ordered((row["case"], row["threads"]) for row in results.rows):
            rows = {r["pattern"]: r for r in results.rows if (r["case"], r["threads"]) == (case, threads)}
            first = next(iter(rows.values()))
            cells = [ratio(rows[pattern]) if pattern in rows else "" for pattern in patterns]
            lines.append([with_dtype(first["title"], first), _ms(first["dense_ms"]), *cells, f"`{results.name}`"])
    return table(["model", "dense", *patterns, "file in `bench/results/`"], lines)


def _mean_table(layers: Sequence[Results]) -> str:
    summaries = summarize_layers(_rows(layers))
    patterns = _ordered(one.pattern for one in summaries)
    lines = []
    for group, batch, threads in _ordered((one.group, one.batch, one.threads) for one in summaries):
        found = {s.pattern: s for s in summaries if (s.group, s.batch, s.threads) == (group, batch, threads)}
        cells = [f"{found[p].mean:.2f} ({found[p].worst:.2f})" if p in found else "" for p in patterns]
        shapes = str(max(one.shapes for one in found.values()))
        lines.append([group, str(batch), str(threads), shapes, *cells])
    return table(["layers", "batch", "threads", "shapes", *patterns], lines)


def _models(models: Sequence[Results]) -> list[str]:
    rows = _rows(models)
    parts = [
        "## Whole models",
        "Dense is the faster of Inductor and Inductor with freezing; ± half the interquartile range of paired ratios.",
        _model_table(models),
    ]
    details = [
        [
            with_dtype(row["title"], row),
            row["pattern"],
            _ms(row["ms"]),
            row["dense"],
            f"{row['error']:.1e}",
            ", ".join(f"{count} {name}" for name, count in row.get("kernels", {}).items()),
            f"{row['compile_seconds']:.1f} s" if row.get("compile_seconds") is not None else "",
        ]
        for row in rows
    ]
    header = ["model", "pattern", "time", "fastest dense", "relative error", "layers by kernel", "first call"]
    parts.append(table(header, details))
    split = [row for row in rows if row.get("waterfall")]
    if split:
        parts += ["### Where the time goes", _waterfall_note(), _waterfalls(split), *_agreement(split)]
    return parts


def _waterfall_note() -> str:
    return (
        "Milliseconds. Layers: dense as profiled in the model's graph, sparse as the same times what explain says that "
        "the kernel takes of the dense operator's time (on a GPU both as explain tells them). Attention timed alone. "
        "Other: what these leave of the measured total (norms, activations, memory traffic between layers)."
    )


def _waterfalls(rows: Sequence[Row]) -> str:
    lines = []
    for title in _ordered(with_dtype(row["title"], row) for row in rows):
        group = [row for row in rows if with_dtype(row["title"], row) == title]
        falls = [("dense", group[0]["waterfall"]["dense"], group[0]["dense_ms"])]
        falls += [(row["pattern"], row["waterfall"]["sparse"], row["ms"]) for row in group]
        for name, fall, total in falls:
            lines.append([title, name, *(f"{fall[part]:.1f}" for part in PARTS), f"{total:.1f}"])
    return table(["model", "pattern", *PARTS, "total"], lines)


def _agreement(rows: Sequence[Row]) -> list[str]:
    """Whether the layers' times, as ``explain`` tells them, say what the whole model gains."""
    lines = []
    for row in rows:
        title, off = with_dtype(row["title"], row), row["explained_ms"] / row["ms"] - 1
        verdict = "within" if abs(off) <= _AGREEMENT else "**beyond**"
        lines.append([title, row["pattern"], _ms(row["ms"]), _ms(row["explained_ms"]), f"{off:+.0%}", verdict])
    header = ["model", "pattern", "measured", "explained", "off", f"{_AGREEMENT:.0%}"]
    return [
        "Explained: the dense total, with each layer's time in the dense graph scaled by what explain says that the "
        "kernel that ran it takes of the dense operator's time, less what fusing activations and residuals saves.",
        table(header, lines),
    ]


def _layers(layers: Sequence[Results]) -> list[str]:
    rows = _rows(layers)
    parts = [
        "## Single layers",
        "Ratios are the fastest dense (F.linear, MKL- and oneDNN-prepacked; convolutions NCHW and "
        "NHWC, plain and prepacked) over the sparse kernel: geometric mean over shapes (worst).",
        _mean_table(layers),
    ]
    peaks = [
        [results.name, threads, f"{peak['gflops']:.0f}", f"{peak['gbytes']:.1f}"]
        for results in layers
        for threads, peak in results.machine.items()
    ]
    if peaks:
        parts.append(table(["file", "threads", "peak GFLOP/s (GEMM)", "GB/s (copy)"], peaks))
    sums = [
        [s.model, str(s.batch), str(s.threads), s.pattern, str(s.layers), f"{s.sparse:.2f}", f"{s.chosen:.2f}"]
        for s in summarize_models(rows)
    ]
    header = ["model", "batch", "threads", "pattern", "layers", "all sparse", "faster of both"]
    parts += [
        "### By model",
        "Summed times of a model's measured layers, each shape as often as the model has it.",
        table(header, sums),
    ]
    lines = [
        [
            with_dtype(row["layer"], row),
            str(row["batch"]),
            str(row["threads"]),
            row["pattern"],
            ratio(row),
            row["dense"],
            f"{row['dense_ms']:.3g}",
            f"{row['gflops']:.0f}",
            "" if row.get("peak_share") is None else f"{row['peak_share']:.0%}",
            f"{row['error']:.0e}",
        ]
        for row in rows
    ]
    header = ["layer", "batch", "threads", "pattern", "ratio", "dense", "dense ms", "GFLOP/s", "of peak", "error"]
    return [*parts, "### By shape", "GFLOP/s count kept weights alone.", table(header, lines)]


def _scaling(scaling: Sequence[Results]) -> list[str]:
    lines = [
        [row["sweep"], str(row["at"]), str(row["threads"]), row["pattern"], _ms(row["dense_ms"]), ratio(row)]
        for row in _rows(scaling)
    ]
    return ["## Scaling", table(["over", "at", "threads", "pattern", "dense", "ratio"], lines)]


def _costs(costs: Sequence[Results]) -> list[str]:
    lines = [[row["cost"], row["of"], str(row["threads"]), f"{row['value']:.3g} {row['unit']}"] for row in _rows(costs)]
    return ["## Costs", table(["cost", "of", "threads", ""], lines)]


def _fidelity(fidelity: Sequence[Results]) -> list[str]:
    rows = _rows(fidelity)
    lines = []
    for case, dtype, pattern in _ordered((row["case"], row["dtype"], row["pattern"]) for row in rows):
        group = [row for row in rows if (row["case"], row["dtype"], row["pattern"]) == (case, dtype, pattern)]
        worst = max(group, key=lambda row: row["error"])
        mean = geometric_mean([max(row["error"], 1e-12) for row in group])
        dense = geometric_mean([max(row["dense_error"], 1e-12) for row in group])
        line = [case, dtype, pattern, str(len(group)), f"{mean:.1e}", f"{worst['error']:.1e}", worst["layer"]]
        lines.append([*line, f"{dense:.1e}"])
    header = ["case", "dtype", "pattern", "outputs", "mean", "largest", "of", "dense, mean"]
    note = (
        "Norm of the error over norm of the output, against masked dense in float64; last column: masked dense in the "
        "same dtype, against the same."
    )
    return ["## Fidelity", note, table(header, lines)]


_SECTIONS = {"models": _models, "layers": _layers, "scaling": _scaling, "costs": _costs, "fidelity": _fidelity}


def _left_out(results: Sequence[Results]) -> list[str]:
    """A line a reason; the files name every measurement."""
    by_reason: dict[str, list[str]] = {}
    for one in results:
        for gap in one.left_out:
            by_reason.setdefault(gap["why"], []).append(gap["what"])
    lines = []
    for why, names in by_reason.items():
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        lines.append(f"- {why}: {'; '.join(names[:_NAMED])}{more}")
    return ["Left out:", "\n".join(lines)] if lines else []


def _provenance(results: Sequence[Results]) -> list[str]:
    lines = []
    for one in results:
        p = one.provenance
        load = "" if p.get("load") is None else f", load {p['load']}"
        versions = ", ".join(f"{name} {version}" for name, version in p["versions"].items())
        lines.append(
            f"- `{one.name}`: `{p['command']}`, {p['date']}, {p['cpu']} ({p['vectors']}), "
            f"{p['cores']} cores{load}, {versions}"
        )
    return ["Measured by:", "\n".join(lines)]
