"""Sparse CPU kernels against the best of several dense ones, layer by layer, timed in turn.

    python bench/kernels_cpu.py [--threads 1] [--patterns 2:4,2:4v4] [--only conv] [--seconds 1] [--json out.json]

A ratio is dense time over sparse time, the median over rounds, against the fastest dense candidate of that layer.
"""

import argparse
import json
import logging
import math
import platform
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from sparsedm_compile.kernels.cpu.kernel import CpuKernel
from sparsedm_compile.kernels.registry import Epilogue, LayerSpec
from sparsedm_compile.masks import magnitude_mask
from sparsedm_compile.pattern import Pattern
from sparsedm_compile.timing import median_ratio, paired_times

# (name, tokens, in, out). U-ViT: qkv, proj, fc1, fc2 at batch 4 and 1; SD 1.5: feed-forward and cross-attention.
LINEARS = [
    *(
        (f"u-vit {size} {layer}", tokens, d * a, d * b)
        for size, d in (("S", 512), ("M", 768), ("L", 1024), ("H", 1152))
        for layer, a, b in (("qkv", 1, 3), ("proj", 1, 1), ("fc1", 1, 4), ("fc2", 4, 1))
        for tokens in (1028, 257)
    ),
    ("sd 320 q", 4096, 320, 320),
    ("sd 320 ff", 4096, 320, 2560),
    ("sd 640 ff out", 1024, 2560, 640),
    ("sd 1280 q", 256, 1280, 1280),
    ("sd text k", 77, 768, 1280),
]
# (name, batch, C_in, C_out, H = W, kernel, stride)
CONVS = [
    ("3x3 128@32", 4, 128, 128, 32, 3, 1),
    ("3x3 256@16", 4, 256, 256, 16, 3, 1),
    ("3x3 320@64", 1, 320, 320, 64, 3, 1),
    ("3x3 640@32", 1, 640, 640, 32, 3, 1),
    ("3x3 1280@16", 1, 1280, 1280, 16, 3, 1),
    ("1x1 320@64", 1, 320, 320, 64, 1, 1),
    ("1x1 1280@16", 1, 1280, 1280, 16, 1, 1),
    ("3x3/2 128@32", 4, 128, 128, 32, 3, 2),
    ("3x3/2 320@64", 1, 320, 320, 64, 3, 2),
]
PATTERNS = ["2:4", "2:4v2", "2:4v4", "1:4", "1:4v4"]


def optional(candidates: dict[str, Callable[[], Tensor]], name: str, make: Callable[[], Callable[[], Tensor]]) -> None:
    """Add a dense candidate that not every build of torch has; its absence weakens the baseline, so it is told."""
    try:
        run = make()
        run()
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        logging.warning("no dense candidate %r: %s", name, str(error).partition("\n")[0])
        return
    candidates[name] = run


def dense_linears(x: Tensor, weight: Tensor) -> dict[str, Callable[[], Tensor]]:
    candidates: dict[str, Callable[[], Tensor]] = {"F.linear": lambda: F.linear(x, weight)}

    def mkl() -> Callable[[], Tensor]:
        packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, x.shape[0])
        return lambda: torch.ops.mkl._mkl_linear(x, packed, weight, None, x.shape[0])

    def onednn() -> Callable[[], Tensor]:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0])
        return lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")

    optional(candidates, "mkl packed", mkl)
    optional(candidates, "onednn packed", onednn)
    return candidates


def dense_convs(x: Tensor, weight: Tensor, stride: int, padding: int) -> dict[str, Callable[[], Tensor]]:
    x_last = x.contiguous(memory_format=torch.channels_last)
    weight_last = weight.contiguous(memory_format=torch.channels_last)
    candidates: dict[str, Callable[[], Tensor]] = {
        "nchw": lambda: F.conv2d(x, weight, None, stride, padding),
        "nhwc": lambda: F.conv2d(x_last, weight_last, None, stride, padding),
    }

    def onednn(image: Tensor) -> Callable[[], Tensor]:
        sizes = [padding] * 2, [stride] * 2, [1, 1]
        packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *sizes, 1, list(image.shape))
        return lambda: torch.ops.mkldnn._convolution_pointwise(image, packed, None, *sizes, 1, "none", [], "")

    optional(candidates, "nchw packed", lambda: onednn(x))
    optional(candidates, "nhwc packed", lambda: onednn(x_last))
    return candidates


def measure(spec: LayerSpec, x: Tensor, patterns: list[str], seconds: float) -> dict:
    """Times of one layer: every dense candidate, and the kernel at every pattern."""
    kernel = CpuKernel()
    weight = torch.randn(spec.weight_shape) / math.sqrt(math.prod(spec.weight_shape[1:]))
    is_conv = spec.op == "conv2d"
    dense = dense_convs(x, weight, spec.stride[0], spec.padding[0]) if is_conv else dense_linears(x, weight)
    candidates, errors = dict(dense), {}
    for spelling in patterns:
        pattern = Pattern.parse(spelling)
        layer = LayerSpec(spec.op, spec.weight_shape, pattern, stride=spec.stride, padding=spec.padding)
        refusal = kernel.refusal(layer)
        if refusal is not None:
            raise SystemExit(f"{spec.op} {spec.weight_shape} at {pattern}: {refusal}")
        packed = kernel.pack(weight, layer)
        run = kernel.conv2d if is_conv else kernel.linear
        candidates[spelling] = lambda run=run, packed=packed, layer=layer: run(x, *packed, layer, Epilogue())
        masked = (weight * magnitude_mask(weight, pattern)).double()
        exact = F.conv2d(x.double(), masked, None, spec.stride, spec.padding) if is_conv else x.double() @ masked.T
        errors[spelling] = ((candidates[spelling]() - exact).abs().max() / exact.abs().max()).item()
    with torch.inference_mode():
        times = paired_times(candidates, seconds=seconds)
    best = min(dense, key=lambda name: sorted(times[name])[len(times[name]) // 2])
    flops = 2 * exact.numel() * math.prod(spec.weight_shape[1:])
    seconds_dense = sorted(times[best])[len(times[best]) // 2]
    ratios = {spelling: median_ratio(times[best], times[spelling]) for spelling in patterns}
    return {
        "dense": best,
        "dense_ms": seconds_dense * 1e3,
        "dense_gflops": flops / seconds_dense / 1e9,
        "rounds": len(times[best]),
        "ratio": {spelling: ratio for spelling, (ratio, _) in ratios.items()},
        "spread": {spelling: spread for spelling, (_, spread) in ratios.items()},
        "error": errors,
    }


def layers(only: str) -> list[tuple[str, LayerSpec, Tensor]]:
    """(name, spec, input) of every layer on the list; the pattern is filled in later."""
    dense = Pattern.parse("dense")
    found = []
    if only != "conv":
        for name, tokens, width, out in LINEARS:
            spec = LayerSpec("linear", (out, width), dense)
            found.append((f"{name} {tokens}x{width}x{out}", spec, torch.randn(tokens, width)))
    if only != "linear":
        for name, batch, width, out, size, kernel, stride in CONVS:
            shape, padding = (out, width, kernel, kernel), (kernel // 2, kernel // 2)
            spec = LayerSpec("conv2d", shape, dense, stride=(stride, stride), padding=padding)
            found.append((f"{name} b{batch}", spec, torch.randn(batch, width, size, size)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--patterns", default=",".join(PATTERNS))
    parser.add_argument("--only", choices=["linear", "conv", "all"], default="all")
    parser.add_argument("--match", default="", help="only layers whose name holds this")
    parser.add_argument("--seconds", type=float, default=1.0, help="budget for each layer")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    patterns = options.patterns.split(",")
    console = Console()
    results: dict[str, dict] = {}
    chosen = [layer for layer in layers(options.only) if options.match in layer[0]]
    for name, spec, x in track(chosen, "timing", console=console, transient=True):
        results[name] = {"op": spec.op, **measure(spec, x, patterns, options.seconds)}

    table = Table("layer", "dense", "ms", "GFLOP/s", *patterns, "error", title=f"{options.threads} threads")
    for name, row in results.items():
        cells = [f"{row['ratio'][p]:.2f}±{row['spread'][p] / 2:.2f}" for p in patterns]
        error = max(row["error"].values())
        table.add_row(
            name, row["dense"], f"{row['dense_ms']:.2f}", f"{row['dense_gflops']:.0f}", *cells, f"{error:.0e}"
        )
    summary = {}
    for op in dict.fromkeys(row["op"] for row in results.values()):
        ratios = {p: [row["ratio"][p] for row in results.values() if row["op"] == op] for p in patterns}
        summary[op] = {
            p: {"geometric_mean": math.exp(sum(map(math.log, r)) / len(r)), "min": min(r)} for p, r in ratios.items()
        }
        table.add_section()
        table.add_row(
            f"{op}: geometric mean", "", "", "", *(f"{s['geometric_mean']:.2f}" for s in summary[op].values())
        )
        table.add_row(f"{op}: worst", "", "", "", *(f"{s['min']:.2f}" for s in summary[op].values()))
    console.print(table)
    if options.json:
        machine = {"cpu": platform.processor() or platform.machine(), "threads": options.threads}
        options.json.write_text(json.dumps({"machine": machine, "layers": results, "summary": summary}, indent=1))


if __name__ == "__main__":
    main()
