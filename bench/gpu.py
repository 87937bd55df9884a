"""All that a GPU can show, within nine minutes: every kernel against float64, then against dense, then whole models.

    python3 bench/gpu.py [--only checks,convs] [--minutes 9] [--out bench/results]

Runs from a checkout with the Python that has torch and CUDA, installed or not, and fetches nothing. Writes one JSON
file; exits with 1 if a kernel was wrong, with 2 if there is no GPU.
"""

import argparse
import importlib.util
import math
import os
import re
import sys
import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Beyond its limit a section may still be inside one compilation; this long, and what there is gets reported.
_GRACE = 20


def make_importable() -> None:
    """Let a checkout that was never installed be imported, as the package layout in pyproject.toml would."""
    if importlib.util.find_spec("sparsedm_compile") is None:
        package = ROOT / "sparsedm_compile"
        spec = importlib.util.spec_from_file_location(
            "sparsedm_compile", package / "__init__.py", submodule_search_locations=[str(package), str(ROOT)]
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules["sparsedm_compile"] = module
        spec.loader.exec_module(module)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help=f"sections, by comma: {', '.join(SECTIONS)}")
    parser.add_argument("--kernels", default="", help="only these, by comma")
    parser.add_argument("--minutes", type=float, default=8.5, help="limit of the whole run (default 8.5)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    options = parser.parse_args(arguments)
    options.only = [name for name in options.only.split(",") if name]
    options.kernels = [name for name in options.kernels.split(",") if name]
    unknown = sorted(set(options.only) - {*SECTIONS, *_INSIDE})
    if unknown:
        parser.error(f"unknown section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    if options.minutes <= 0:
        parser.error(f"--minutes must be positive, got {options.minutes}")
    return options


#: section -> share of the time
SECTIONS = {"checks": 14, "sanitizer": 12, "linears": 24, "convs": 10, "tiles": 4, "grid": 12, "models": 40}
#: run by other sections in processes of their own
_INSIDE = ("own-checks", "small-checks")


def sections(options: argparse.Namespace, banned: set[str]) -> list:
    """The sections to run. A kernel that was not shown to be right is put into ``banned`` and not timed."""
    import gpu_checks
    import gpu_timing
    from gpu_runner import Section

    names = options.kernels or gpu_checks.sparse_kernels("cuda")
    command = [sys.executable, str(Path(__file__).resolve())]

    def checked(clock):
        banned.update(names)
        verdicts = defaultdict(set)
        for record in gpu_checks.isolated_checks(clock, names, command):
            verdicts[record["kernel"]].add(record["ok"])
            (banned.discard if verdicts[record["kernel"]] == {True} else banned.add)(record["kernel"])
            yield record

    runs: dict[str, Callable] = {
        "checks": checked,
        "sanitizer": lambda clock: gpu_checks.sanitizer(clock, [n for n in names if n not in banned], command),
        "own-checks": lambda clock: gpu_checks.checks(names),
        "small-checks": lambda clock: gpu_checks.checks(names, small=True),
        "models": lambda clock: gpu_timing.models(clock, banned),
    }
    for run in (gpu_timing.linears, gpu_timing.convs, gpu_timing.tiles, gpu_timing.grid):
        runs[run.__name__] = lambda clock, run=run: run(banned)
    return [Section(name, SECTIONS.get(name, 1), runs[name]) for name in options.only or SECTIONS]


def header() -> dict[str, Any]:
    """Machine, versions, command, date."""
    import torch

    from sparsedm_compile.provenance import provenance

    gpu = torch.cuda.get_device_properties(0)
    packages = {}
    for name in ("triton", "cupy", "diffusers"):
        try:
            packages[name] = __import__(name).__version__
        except Exception as error:  # an installed package whose library is missing raises anything
            packages[name] = f"not importable: {type(error).__name__}: {error}"[:200]
    return provenance() | {
        "capability": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu.multi_processor_count,
        "memory_gb": round(gpu.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "cusparselt": torch.backends.cusparselt.version(),
        "packages": packages,
    }


def geometric_mean(numbers: list[float]) -> float:
    """Of positive numbers; NaN of none."""
    return math.exp(sum(map(math.log, numbers)) / len(numbers)) if numbers else math.nan


def summary(outcomes: list) -> list[str]:
    """A few lines for each section, the failures among them."""
    lines = []
    for outcome in outcomes:
        state = f"; {outcome.stopped}" if outcome.stopped else ""
        lines.append(f"{outcome.name}: {len(outcome.records)} done in {outcome.spent_s:.0f} s{state}")
        lines += [f"  {line}" for line in _summaries.get(outcome.name, _gains)(outcome.records)]
    return lines


def _checks(records: list[dict]) -> list[str]:
    by_kernel = defaultdict(list)
    for record in records:
        by_kernel[record.get("kernel", record.get("tool"))].append(record)
    lines = []
    for name, all_of_it in by_kernel.items():
        wrong = [r for r in all_of_it if r["ok"] is False]
        absent = next((r["why"] for r in all_of_it if r["ok"] is None), None)
        right = sum(r["ok"] is True for r in all_of_it)
        lines.append(f"{name}: {right} right, {len(wrong)} wrong" + (f"; not run: {absent}" if absent else ""))
        lines += [f"  WRONG {r.get('layer', '')} x {r.get('input', '')}: {r['why'][:160]}" for r in wrong[:3]]
    return lines


def _gains(records: list[dict]) -> list[str]:
    gains = defaultdict(lambda: defaultdict(list))
    for record in records:
        for name, result in record["times"].items():
            if name != "dense" and math.isfinite(result.get("gain", math.nan)):
                gains[name][record["batch"]].append(result["gain"])
    lines = []
    for name, by_batch in gains.items():
        parts = [f"batch {b}: {geometric_mean(g):.2f} ({min(g):.2f}-{max(g):.2f})" for b, g in by_batch.items()]
        lines.append(f"{name} over dense, geometric mean (range): " + ", ".join(parts))
    return lines


def _tiles(records: list[dict]) -> list[str]:
    lines = []
    for record in records:
        times = {name: result["us"] for name, result in record["times"].items() if "us" in result}
        shown = ", ".join(f"{name} {us:.1f} us" for name, us in times.items())
        lines.append(f"{record['layer']} batch {record['batch']}: {shown}; chosen {record['chosen']}")
    return lines


def _grid(records: list[dict]) -> list[str]:
    gains = [r["times"]["sparse"]["gain"] for r in records if "gain" in r["times"].get("sparse", {})]
    cells = [
        f"{r['patch']}/{r['mlp ratio']}: {r['times'].get('sparse', {}).get('gain', math.nan):.2f}" for r in records
    ]
    if not gains:
        return cells
    return [
        "patch/ratio: " + ", ".join(cells),
        f"geometric mean {geometric_mean(gains):.3f} (SparseDM 1.068), worst {min(gains):.2f}, best {max(gains):.2f}",
    ]


def _models(records: list[dict]) -> list[str]:
    lines = []
    for r in records:
        if "gain" in r:
            ms = ", ".join(f"{name} {value:.2f} ms" for name, value in r["ms"].items())
            wrong = "" if r["ok"] else f"; WRONG, relative error {r['relative error to masked dense']:.1e}"
            lines.append(f"{r['model']} {r['pattern']} batch {r['batch']}: {r['gain']:.2f}x ({ms}){wrong}")
        else:
            lines.append(f"{r['model']} {r['pattern']}: skipped, {r['why']}")
    return lines


_summaries = {
    "checks": _checks,
    "own-checks": _checks,
    "small-checks": _checks,
    "sanitizer": _checks,
    "tiles": _tiles,
    "grid": _grid,
    "models": _models,
}


def main(arguments: list[str] | None = None) -> int:
    """Run it; the exit status."""
    options = parse(arguments)
    try:
        import torch
    except ImportError as error:
        sys.stderr.write(f"gpu: torch cannot be imported: {error}\n")
        return 2
    make_importable()
    try:
        import sparsedm_compile.kernels.ops  # noqa: F401
    except ImportError as error:
        sys.stderr.write(f"gpu: {error}; see the dependencies in pyproject.toml\n")
        return 2
    if not torch.cuda.is_available():
        sys.stderr.write(f"gpu: torch {torch.__version__} sees no CUDA device; nothing was measured\n")
        return 2

    from gpu_runner import Clock, run_sections, write_json

    seconds = options.minutes * 60
    head, banned, latest = header(), set(), []
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"gpu-{re.sub('[^a-z0-9]+', '-', head['gpus'][0].lower())}.json"
    small = options.only == ["small-checks"]  # run inside compute-sanitizer: its report is the parent's

    def save(outcomes: list) -> None:
        latest[:] = outcomes
        if not small:
            write_json(path, head, outcomes)

    def give_up() -> None:
        sys.stdout.write("\n".join([*summary(latest), "stopped: the time limit passed inside one step"]) + "\n")
        sys.stdout.flush()
        os._exit(3)

    watchdog = threading.Timer(seconds + _GRACE, give_up)
    watchdog.daemon = True
    watchdog.start()
    outcomes = run_sections(sections(options, banned), Clock(seconds), save)
    watchdog.cancel()
    lines = [f"{head['gpus'][0]}, torch {torch.__version__}", *summary(outcomes)]
    if not small:
        lines.append(f"written: {path}")
    sys.stdout.write("\n".join(lines) + "\n")
    failed = any(r.get("ok") is False for outcome in outcomes for r in outcome.records)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
