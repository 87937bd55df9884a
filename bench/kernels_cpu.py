"""The sparse CPU kernel against the fastest of several dense ones, on every layer shape of the models on the list.

    python bench/kernels_cpu.py [--minutes 5] [--only flux] [--op conv2d] [--batches 1,4] [--threads 1,2]
                                [--dtypes float32,bfloat16] [--out FILE]

Writes results of kind "layers". A ratio is dense time over sparse time, the median over rounds that ran both in turn.
"""

import argparse
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median

import arguments
import torch
import torch.nn.functional as F
from dense_rivals import dense_rivals
from model_list import MODELS
from peak import measure_peak
from rich.console import Console
from rich.progress import track
from rich.table import Table
from shapes import LayerShape, all_shapes
from time_budget import Budget
from torch import Tensor

from sparsedm_compile.bench_report import Results, write_results
from sparsedm_compile.bench_report.results import Row
from sparsedm_compile.bench_report.summaries import summarize_layers
from sparsedm_compile.dtypes import dtype_name
from sparsedm_compile.kernels import get_kernel
from sparsedm_compile.kernels.registry import Epilogue, LayerSpec
from sparsedm_compile.masks import magnitude_mask
from sparsedm_compile.timing import median_ratio, paired_times

PATTERNS = ("2:4", "2:4v2", "2:4v4", "1:4", "1:4v4", "1:8v4", "4:8")
# Of an output, so much is held against float64: rows of a linear's input, channels of a convolution's output.
_CHECKED_ROWS, _CHECKED_CHANNELS = 128, 16
_ROUNDS = 3


@dataclass(frozen=True)
class Case:
    """One layer to time, all patterns at once."""

    shape: LayerShape
    uses: Mapping[str, int]
    batch: int
    threads: int
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        return f"{self.shape.name}, batch {self.batch}, threads {self.threads}, {dtype_name(self.dtype)}"


def cases(
    shapes: Mapping[LayerShape, Mapping[str, int]],
    batches: Iterable[int],
    threads: Iterable[int],
    dtypes: Iterable[torch.dtype] = (torch.float32,),
) -> list[Case]:
    """Every shape at every setting. Models take turns, each with the shape first in which it spends most MACs, so that
    a limit on time leaves out what matters least.
    """
    models = dict.fromkeys(model for uses in shapes.values() for model in uses)
    rank: dict[LayerShape, int] = {}
    for model in models:
        own = [shape for shape in shapes if model in shapes[shape]]
        own.sort(key=lambda shape: -shape.macs * shapes[shape][model])
        for place, shape in enumerate(own):
            rank[shape] = min(place, rank.get(shape, place))
    ordered = sorted(shapes, key=rank.__getitem__)
    settings = list(product(batches, threads, dtypes))
    return [Case(shape, shapes[shape], *setting) for shape in ordered for setting in settings]


def expected_seconds(case: Case, patterns: Iterable[str], gflops: float) -> float:
    """What a case takes at least: warm-up and rounds at the machine's peak, packing, and the check."""
    kept = sum(case.shape.spec(p).pattern.n / case.shape.spec(p).pattern.m for p in patterns)
    calls = (_ROUNDS + 3) * (4 + kept)
    return 0.05 + 2e-7 * math.prod(case.shape.weight_shape) + calls * 2 * case.shape.macs * case.batch / (gflops * 1e9)


def relative_error(spec: LayerSpec, x: Tensor, masked: Tensor, out: Tensor) -> float:
    """Largest error over largest output, of a part of the output, against float64."""
    if spec.op == "linear":
        exact = x[:_CHECKED_ROWS].double() @ masked.double().T
        return ((out[:_CHECKED_ROWS].double() - exact).abs().max() / exact.abs().max()).item()
    few = masked[:_CHECKED_CHANNELS].double()
    exact = F.conv2d(x[:1].double(), few, None, spec.stride, spec.padding, spec.dilation)
    return ((out[:1, :_CHECKED_CHANNELS] - exact).abs().max() / exact.abs().max()).item()


def measure(case: Case, patterns: Iterable[str], seconds: float, gflops: float | None) -> tuple[list[Row], list[str]]:
    """A row each pattern that the kernel takes, and why it does not take the others."""
    torch.set_num_threads(case.threads)
    kernel, shape = get_kernel("cpu"), case.shape
    x = torch.randn(shape.input_shape(case.batch)).to(case.dtype)
    weight = (torch.randn(shape.weight_shape) / math.sqrt(math.prod(shape.weight_shape[1:]))).to(case.dtype)
    dense = dense_rivals(shape.spec("dense", case.dtype), x, weight)
    candidates, rows, refusals = dict(dense), [], []
    with torch.inference_mode():
        for pattern in patterns:
            spec = shape.spec(pattern, case.dtype)
            refusal = kernel.refusal(spec)
            if refusal is not None:
                refusals.append(f"{pattern}: {refusal}")
                continue
            packed = kernel.pack(weight, spec)
            run = kernel.conv if spec.op == "conv2d" else kernel.linear
            candidates[pattern] = lambda run=run, packed=packed, spec=spec: run(x, *packed, spec, Epilogue())
            out = candidates[pattern]()
            error = relative_error(spec, x, weight * magnitude_mask(weight, spec.pattern), out)
            moved = x.nbytes + out.nbytes + sum(tensor.nbytes for tensor in packed)
            rows.append({"pattern": pattern, "error": error, "bytes": moved})
        times = paired_times(candidates, seconds=seconds, min_rounds=_ROUNDS)
    best = min(dense, key=lambda name: median(times[name]))
    flops, dense_seconds = 2 * shape.macs * case.batch, median(times[best])
    for row in rows:
        pattern = shape.spec(row["pattern"]).pattern
        ratio, spread = median_ratio(times[best], times[row["pattern"]])
        rate = flops * pattern.n / pattern.m / median(times[row["pattern"]]) / 1e9
        row |= {
            "layer": shape.name,
            "op": shape.op,
            "batch": case.batch,
            "threads": case.threads,
            "dtype": dtype_name(case.dtype),
            "input_rows": x.shape[0] if shape.op == "linear" else case.batch * math.prod(shape.size),
            "ratio": ratio,
            "spread": spread,
            "ms": median(times[row["pattern"]]) * 1e3,
            "dense": best,
            "dense_ms": dense_seconds * 1e3,
            "gflops": rate,
            "dense_gflops": flops / dense_seconds / 1e9,
            "peak_share": rate / gflops if gflops and case.dtype == torch.float32 else None,
            "rounds": len(times[best]),
            "uses": dict(case.uses),
        }
    return rows, refusals


def summary(rows: list[Row]) -> Table:
    """Geometric means over the shapes."""
    table = Table("layers", "batch", "threads", "pattern", "shapes", "geometric mean", "worst", "best", "error")
    for one in summarize_layers(rows):
        ratios = (f"{ratio:.2f}" for ratio in (one.mean, one.worst, one.best))
        settings = (one.group, str(one.batch), str(one.threads), one.pattern, str(one.shapes))
        table.add_row(*settings, *ratios, f"{one.error:.0e}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="limit; what does not fit is left out and named")
    parser.add_argument("--only", default="", help="only models whose title holds this")
    parser.add_argument("--match", default="", help="only layers whose name holds this")
    parser.add_argument("--op", choices=("linear", "conv2d"))
    parser.add_argument("--patterns", type=arguments.patterns, default=",".join(PATTERNS))
    parser.add_argument("--batches", type=arguments.counts, default="4,1")
    parser.add_argument("--threads", type=arguments.counts, default=f"{torch.get_num_threads()},1")
    parser.add_argument("--dtypes", type=arguments.dtypes, default="float32", help=", ".join(arguments.DTYPES))
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing each layer, at most")
    default = str(Path(__file__).parent / "results" / "layers.json")
    parser.add_argument("--out", type=arguments.file_to_write, default=default)
    options = parser.parse_args()
    torch.manual_seed(0)
    console = Console()
    shapes = {
        shape: uses
        for shape, uses in all_shapes(options.only).items()
        if options.match in shape.name and options.op in (None, shape.op)
    }
    if not shapes:
        parser.error(f"no layer is left; models are {', '.join(MODELS)}, and python bench/shapes.py lists layers")
    machine: dict[str, dict[str, float]] = {}
    for n in options.threads:
        torch.set_num_threads(n)
        machine[str(n)] = measure_peak()
    budget = Budget(
        options.minutes * 60,
        cost=lambda case: expected_seconds(case, options.patterns, machine[str(case.threads)]["gflops"]),
        name=lambda case: case.name,
        most=options.seconds,
    )
    wanted = cases(shapes, options.batches, options.threads, options.dtypes)
    rows, left_out = [], []
    for case, seconds in track(budget.cases(wanted), "timing", total=len(wanted), console=console, transient=True):
        measured, refusals = measure(case, options.patterns, seconds, machine[str(case.threads)]["gflops"])
        rows += measured
        left_out += [{"what": case.name, "why": refusal} for refusal in refusals]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_results(options.out, Results("layers", rows, machine=machine, left_out=[*left_out, *budget.left_out]))
    console.print(summary(rows))
    console.print(f"{len(wanted) - len(budget.left_out)} of {len(wanted)} measured; the rest is named in {options.out}")


if __name__ == "__main__":
    main()
