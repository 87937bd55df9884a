"""Whole models at several patterns against the faster of Inductor and Inductor with freezing, timed in turn.

    python bench/end_to_end.py [--only uvit] [--threads 1] [--seconds 30] [--out bench/results]

Writes one JSON a case. The weights are random, which changes no time; the errors are real.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from rich.console import Console

from sparsedm_compile.benchmarking import bench_model
from sparsedm_compile.model_spec import load_model

CONFIGS = Path(__file__).parent / "configs"
# Name of the result file -> model, its config, batch, policy; "sparsedm" leaves the skip linears dense, as the paper.
CASES = {
    "uvit-s-2_batch4": ("uvit-s/2", None, 4, "sparsedm"),
    "uvit-s-2_batch4_skip": ("uvit-s/2", None, 4, "sparsedm+skip"),
    "uvit-s-2_batch1": ("uvit-s/2", None, 1, "sparsedm"),
    "ddpm-cifar10_batch4": ("diffusers:UNet2DModel", CONFIGS / "ddpm-cifar10.json", 4, "default"),
}
PATTERNS = ("2:4", "2:4v2", "2:4v4", "1:4v4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only cases whose name holds this")
    parser.add_argument("--patterns", default=",".join(PATTERNS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=30.0, help="of timing, each model")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    for name, (model, config, batch, policy) in CASES.items():
        if options.only not in name:
            continue
        torch.manual_seed(0)
        loaded = load_model(model, batch=batch, config=config)
        with console.status(name) as status:
            report = bench_model(
                loaded.model,
                loaded.inputs,
                loaded.kwargs,
                patterns=options.patterns.split(","),
                policy=policy,
                seconds=options.seconds,
                name=loaded.name,
                progress=lambda step, status=status, name=name: status.update(f"{name}: {step}"),
            )
        sys.stdout.write(f"{report}\n")
        (options.out / f"{name}.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n")


if __name__ == "__main__":
    main()
