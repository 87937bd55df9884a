"""How the gain of sparsity goes with batch, tokens and width, and what is paid for it once and at each call.

    python bench/scaling.py [--only batch,costs] [--seconds 3] [--pack uvit-h/2] [--out bench/results]

Writes results of kind "scaling" (two blocks of a U-ViT, so that a point takes seconds) and of kind "costs".
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

import sparsedm_compile.kernels.ops  # noqa: F401  (registers the operators)
from sparsedm_compile import pack, sparsify
from sparsedm_compile.bench_report import Results, write_results
from sparsedm_compile.bench_report.results import Row
from sparsedm_compile.benchmarking import bench_model
from sparsedm_compile.kernels import get_kernel
from sparsedm_compile.kernels.registry import Kernel, LayerSpec
from sparsedm_compile.models import create_uvit, example_inputs
from sparsedm_compile.pattern import Pattern
from sparsedm_compile.timing import paired_times

PATTERNS = ("2:4", "2:4v4", "1:4v4")
# A U-ViT of 256 tokens and U-ViT-S's width; each sweep changes one of these.
_BASE = {"img_size": 32, "patch_size": 2, "embed_dim": 512, "depth": 2, "num_heads": 8}
#: sweep -> (value, what it changes of the base, batch); tokens are those of the image.
SWEEPS: dict[str, list[tuple[int, dict[str, int], int]]] = {
    "batch": [(batch, {}, batch) for batch in (1, 2, 4, 8, 16)],
    "tokens": [((size // 2) ** 2, {"img_size": size}, 4) for size in (8, 16, 32, 48)],
    "width": [(width, {"embed_dim": width, "num_heads": width // 64}, 4) for width in (128, 256, 512, 1024, 1536)],
}
# Its first call is timed in a process of its own, with caches where it is told to keep them.
_FIRST_CALL = """
import json, sys, time, torch
from sparsedm_compile import sparsify
from sparsedm_compile.model_spec import load_model
backend = sys.argv[1]
torch.set_num_threads(int(sys.argv[2]))
loaded = load_model("uvit-s/2")
if backend == "sparsedm":
    sparsify(loaded.model, "2:4", policy="sparsedm+skip")
compiled = torch.compile(loaded.model, backend=backend)
start = time.perf_counter()
with torch.no_grad():
    compiled(*loaded.inputs)
print(json.dumps(time.perf_counter() - start))
"""


def sweep(name: str, seconds: float) -> Iterator[Row]:
    """A row each value and pattern."""
    for value, changes, batch in SWEEPS[name]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = create_uvit("uvit-s/2", **{**_BASE, **changes}).eval()
        inputs = example_inputs(model, batch)
        report = bench_model(model, inputs, patterns=PATTERNS, policy="sparsedm+skip", seconds=seconds)
        for one in report.patterns:
            yield {
                "sweep": name,
                "at": value,
                "pattern": one.pattern,
                "threads": report.threads,
                "ratio": one.speedup,
                "spread": one.spread,
                "ms": one.ms,
                "dense": report.baseline,
                "dense_ms": report.dense_ms[report.baseline],
                "error": one.relative_error,
            }


def packing(preset: str) -> Iterator[Row]:
    """One weight at every pattern, and every weight of a model."""
    weight = torch.randn(4096, 1024)
    for pattern in PATTERNS:
        spec = LayerSpec("linear", tuple(weight.shape), Pattern.parse(pattern))
        runs = paired_times({"": partial(_cpu_kernel(spec).pack, weight, spec)}, seconds=0.5)[""]
        yield _cost("packing", f"{pattern}, 4096 x 1024", [seconds * 1e9 / weight.numel() for seconds in runs], "ns")
    model = create_uvit(preset).eval()
    weights = sum(parameter.numel() for parameter in model.parameters())
    sparsify(model, "2:4")
    start = time.perf_counter()
    pack(model)
    yield _cost(
        "packing a model", f"{preset}, 2:4, {weights / 1e6:.0f} M parameters", [time.perf_counter() - start], "s"
    )


def overhead() -> Iterator[Row]:
    """A call of a layer so small that its arithmetic takes no time."""
    spec = LayerSpec("linear", (32, 32), Pattern.parse("2:4"))
    x, weight = torch.randn(1, 32), torch.randn(32, 32)
    packed = _cpu_kernel(spec).pack(weight, spec)
    calls: dict[str, Callable[[], Any]] = {
        "F.linear": lambda: F.linear(x, weight),
        "sparsedm::linear": lambda: torch.ops.sparsedm.linear(x, *packed, "cpu", "2:4", [32, 32]),
    }
    count = 1000

    def repeat(run: Callable[[], Any]) -> None:
        for _ in range(count):
            run()

    with torch.inference_mode():
        times = paired_times({name: partial(repeat, run) for name, run in calls.items()}, seconds=1.0)
    for name, runs in times.items():
        yield _cost("a call", f"{name} 32->32 @1", [seconds / count * 1e6 for seconds in runs], "us")


def small_model() -> Iterator[Row]:
    """A model so small that what the backend does around its layers is most of it: guards, looking up weights."""
    model = nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(16, 16), nn.GELU()))).eval()
    sparse, x = copy.deepcopy(model), torch.randn(4, 16)
    sparsify(sparse, "2:4", policy="all")
    compiled = {"inductor": torch.compile(model), "sparsedm": torch.compile(sparse, backend="sparsedm")}
    count = 20

    def repeat(run: Callable[..., Any]) -> None:
        for _ in range(count):
            run(x)

    with torch.no_grad():
        times = paired_times({name: partial(repeat, run) for name, run in compiled.items()}, seconds=2.0)
    for name, runs in times.items():
        yield _cost(
            "a call of a model", f"{name}, 8 linears 16->16 @4", [seconds / count * 1e6 for seconds in runs], "us"
        )


def first_calls() -> Iterator[Row]:
    """U-ViT-S/2 compiled with nothing cached, and once more with what the first run left behind."""
    for backend in ("inductor", "sparsedm"):
        with tempfile.TemporaryDirectory() as caches:
            places = dict.fromkeys(("TORCHINDUCTOR_CACHE_DIR", "SPARSEDM_CACHE_DIR"), caches)
            command = [sys.executable, "-P", "-c", _FIRST_CALL, backend, str(torch.get_num_threads())]
            for state in ("nothing cached", "cached"):
                done = subprocess.run(command, env=os.environ | places, capture_output=True, text=True, check=True)
                seconds = json.loads(done.stdout.splitlines()[-1])
                yield _cost("first call", f"{backend}, uvit-s/2, {state}", [seconds], "s")


def _cpu_kernel(spec: LayerSpec) -> Kernel:
    kernel = get_kernel("cpu")
    refusal = kernel.refusal(spec)  # also what compiles it
    if refusal is not None:
        raise SystemExit(f"the cpu kernel cannot run here: {refusal}")
    return kernel


def _cost(cost: str, of: str, values: list[float], unit: str) -> Row:
    values = sorted(values)
    middle, quarter = values[len(values) // 2], len(values) // 4
    spread = values[-1 - quarter] - values[quarter]
    threads = torch.get_num_threads()
    return {"cost": cost, "of": of, "threads": threads, "value": middle, "spread": spread, "unit": unit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help=f"by comma: {', '.join((*SWEEPS, 'costs'))}")
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing, each point of a sweep")
    parser.add_argument("--pack", default="uvit-h/2", help="the preset that is packed whole")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    chosen = [name for name in options.only.split(",") if name] or [*SWEEPS, "costs"]
    if unknown := set(chosen) - {*SWEEPS, "costs"}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join((*SWEEPS, 'costs'))}")
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    rows: list[Row] = []
    for name in (name for name in SWEEPS if name in chosen):
        with console.status(name):
            rows += sweep(name, options.seconds)
    if rows:
        write_results(options.out / "scaling.json", Results("scaling", rows))
    if "costs" in chosen:
        with console.status("costs"):
            costs = [*overhead(), *small_model(), *packing(options.pack), *first_calls()]
        write_results(options.out / "costs.json", Results("costs", costs))


if __name__ == "__main__":
    main()
