"""The report of :func:`sparsedm_compile.benchmarking.bench_model` as rows of kind ``models``."""

from sparsedm_compile.bench_report.results import Results
from sparsedm_compile.bench_report.waterfall import waterfall
from sparsedm_compile.benchmarking import BenchReport


def model_results(report: BenchReport, case: str, title: str) -> Results:
    """One row a pattern.

    Args:
        case: what tells this measurement from others of the same kind.
        title: of its row in a table, such as ``"U-ViT-S/2, batch 4"``.
    """
    dense_ms = report.dense_ms[report.baseline]
    rows = []
    for one in report.patterns:
        row = {
            "case": case,
            "title": title,
            "model": report.model,
            "shapes": report.shapes,
            "dtype": report.dtype,
            "policy": report.policy,
            "threads": report.threads,
            "pattern": one.pattern,
            "ratio": one.speedup,
            "spread": one.spread,
            "ms": one.ms,
            "dense": report.baseline,
            "dense_ms": dense_ms,
            "all_dense_ms": report.dense_ms,
            "rounds": report.rounds,
            "warm": True,  # each timed call follows one of the same model
            "error": one.relative_error,
            "dense_macs": report.dense_macs,
            "macs": one.macs,
            "attention_macs": report.attention_macs,
            "kernels": one.kernels,
            "least_gain": one.least_gain,
            "graphs": one.graphs,
            "compile_seconds": one.compile_seconds,
            "waterfall": {
                "dense": waterfall(dense_ms, one.dense_layer_ms, report.attention_ms),
                "sparse": waterfall(one.ms, one.layer_ms, report.attention_ms),
            },
            "fused_ms": one.fused_ms,
            "explained_ms": one.explained_ms(dense_ms),
        }
        rows.append(row)
    return Results("models", rows, report.provenance)
