"""Benchmark results: their files, where the time of a model goes, tables and plots, and what became slower."""

from sparsedm_compile.bench_report.compare import Comparison, compare
from sparsedm_compile.bench_report.markdown import page, readme_block, replace_between_markers
from sparsedm_compile.bench_report.results import KINDS, Results, read_results, write_results

__all__ = [
    "KINDS",
    "Comparison",
    "Results",
    "compare",
    "page",
    "read_results",
    "readme_block",
    "replace_between_markers",
    "write_results",
]
