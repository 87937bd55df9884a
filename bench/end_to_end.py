"""Whole models at several patterns against the faster of Inductor and Inductor with freezing, timed in turn.

    python bench/end_to_end.py [--only uvit] [--quick] [--threads 1] [--seconds 30] [--out bench/results]

Writes results of kind "models", one file a case. The weights are random, which changes no time; the errors are real.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import arguments
import torch
from model_list import MODELS
from rich.console import Console

from sparsedm_compile.bench_report import write_results
from sparsedm_compile.bench_report.model_results import model_results
from sparsedm_compile.benchmarking import bench_model

PATTERNS = ("2:4", "2:4v2", "2:4v4", "1:4v4")


@dataclass(frozen=True)
class Case:
    """One model to time.

    Attributes:
        title: what the results' tables call it.
        model: its title in ``MODELS``.
        batch: of the inputs.
        policy: which layers are sparse; ``"sparsedm"`` leaves the skip linears dense, as the paper.
        quick: whether it belongs to the short run.
    """

    title: str
    model: str
    batch: int
    policy: str = "default"
    quick: bool = False


#: Name of the results file -> case.
CASES = {
    "uvit-s-2_batch4": Case("U-ViT-S/2, batch 4, the paper's layers", "U-ViT-S/2", 4, "sparsedm", quick=True),
    "uvit-s-2_batch4_skip": Case("U-ViT-S/2, batch 4, with skip linears", "U-ViT-S/2", 4, "sparsedm+skip"),
    "uvit-s-2_batch1": Case("U-ViT-S/2, batch 1, the paper's layers", "U-ViT-S/2", 1, "sparsedm"),
    "uvit-m-4_batch4": Case("U-ViT-M/4, batch 4, with skip linears", "U-ViT-M/4", 4, "sparsedm+skip"),
    "uvit-l-2_batch1": Case("U-ViT-L/2, batch 1, with skip linears", "U-ViT-L/2", 1, "sparsedm+skip"),
    "ddpm-cifar10_batch4": Case("DDPM UNet 35M (diffusers), batch 4", "DDPM UNet 35M", 4, quick=True),
    "ddpm-sparsedm_batch4": Case("SparseDM's DDPM UNet, batch 4", "SparseDM UNet", 4),
    "dit-xl-2_batch1": Case("DiT-XL/2, batch 1", "DiT-XL/2", 1),
    "sd-1.5-unet_batch1": Case("SD 1.5 UNet, one step, batch 1", "SD 1.5 UNet", 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only cases whose name holds this")
    parser.add_argument("--quick", action="store_true", help="the two small models alone")
    parser.add_argument("--patterns", type=arguments.patterns, default=",".join(PATTERNS))
    parser.add_argument("--threads", type=int, help="of torch; files and titles then name it")
    parser.add_argument("--seconds", type=float, default=30.0, help="of timing, each model")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    chosen = {name: case for name, case in CASES.items() if options.only in name and (case.quick or not options.quick)}
    if not chosen:
        parser.error(f"no case is left; there are {', '.join(CASES)}")
    suffix, told = "", ""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
        suffix, told = f"_threads{options.threads}", f", threads {options.threads}"
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    for name, case in chosen.items():
        torch.manual_seed(0)
        loaded = MODELS[case.model].load(case.batch)
        with console.status(name) as status:
            report = bench_model(
                loaded.model,
                loaded.inputs,
                loaded.kwargs,
                patterns=options.patterns,
                policy=case.policy,
                seconds=options.seconds,
                name=loaded.name,
                progress=lambda step, status=status, name=name: status.update(f"{name}: {step}"),
            )
        sys.stdout.write(f"{report}\n")
        results = model_results(report, name + suffix, case.title + told)
        write_results(options.out / f"{name}{suffix}.json", results)


if __name__ == "__main__":
    main()
