"""Whole models at several patterns against the faster of Inductor and Inductor with freezing, timed in turn.

    python bench/end_to_end.py [--only uvit-s/2] [--threads 1] [--seconds 15] [--out bench/results]

Writes one JSON a model. The weights are random, which changes no time; the errors are real.
"""

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console

from sparsedm_compile.benchmarking import bench_model
from sparsedm_compile.model_spec import load_model

# name of the file -> (model, batch, policy). Memory: bench_model holds the weights up to three times per pattern.
CASES = {
    "uvit-s-2_batch4": ("uvit-s/2", 4, "sparsedm+skip"),
    "uvit-s-2_batch1": ("uvit-s/2", 1, "sparsedm+skip"),
}
PATTERNS = ("2:4", "2:4v2", "2:4v4", "1:4v4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only models whose name holds this")
    parser.add_argument("--patterns", default=",".join(PATTERNS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=15.0, help="of timing, each model")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    for name, (model, batch, policy) in CASES.items():
        if options.only not in model:
            continue
        torch.manual_seed(0)
        loaded = load_model(model, batch=batch)
        with console.status(model) as status:
            report = bench_model(
                loaded.model,
                loaded.inputs,
                loaded.kwargs,
                patterns=options.patterns.split(","),
                policy=policy,
                seconds=options.seconds,
                name=loaded.name,
                progress=lambda step, status=status, model=model: status.update(f"{model}: {step}"),
            )
        console.print(report)
        (options.out / f"{name}.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n")


if __name__ == "__main__":
    main()
