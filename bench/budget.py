"""What a budget's plan promises and what it keeps: damage, loss and time of the demo's model.

    python bench/budget.py --json bench/results/quality/digits_budget.json
    python bench/budget.py --latency 0.6 --json bench/results/quality/digits_latency.json

The U-ViT of ``make demo``. The first compares plans for shares of the MACs, predicted with measured damage, and with
one pattern for all layers at equal MACs; the loss is that of held-out digits, the same noise for every row. The second
compiles a plan for a share of the time and measures it against the dense model: run it alone on the machine.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sparsedm_compile as sdm
from sparsedm_compile.atomic_write import write_atomically
from sparsedm_compile.budget.sensitivity import measure_sensitivity, output_errors
from sparsedm_compile.calibration import CalibrationBatch
from sparsedm_compile.demo.digits import load_digits, load_model
from sparsedm_compile.provenance import provenance
from sparsedm_compile.timing import median_ratio, paired_times

CANDIDATES = ("3:4", "2:4", "1:4", "1:8")
UNIFORM = ("3:4", "2:4", "1:4")
BUDGETS = (0.7, 0.5, 0.4)


@torch.no_grad()
def loss(model: nn.Module, batches: list[CalibrationBatch]) -> float:
    return sum((model(*batch.inputs) - batch.noise).square().mean().item() for batch in batches) / len(batches)


def losses(
    rules: Mapping[str, str], calibration: list[CalibrationBatch], held_out: list[CalibrationBatch]
) -> dict[str, float]:
    """One-shot, and with masks chosen and weights refitted on the calibration data."""
    model = load_model()
    sdm.sparsify(model, rules=rules)
    found = {"loss": loss(model, held_out)}
    sdm.select_masks(model, calibration, progress=False)
    return found | {"loss_selected": loss(model, held_out)}


def macs_rows(calibration: list[CalibrationBatch], held_out: list[CalibrationBatch]) -> Iterator[dict[str, Any]]:
    """One pattern for all layers, and the plan of as many MACs; then plans for round shares."""
    model, inputs = load_model(), tuple(tensor[:1] for tensor in held_out[0].inputs)
    sensitivity = measure_sensitivity(model, calibration, candidates=CANDIDATES)
    dense = sdm.count_macs(model, *inputs).dense
    shares = []
    for pattern in UNIFORM:
        plan = sdm.make_plan(model, pattern)
        shares.append(sdm.count_macs(model, *inputs, plan=plan).sparse / dense)
        (damage,) = output_errors(model, calibration, [plan.patterns()])
        rules = {layer.name: str(layer.pattern) for layer in plan}
        yield {
            "plan": pattern,
            "macs": shares[-1],
            "predicted_damage": sum(sensitivity.damage[name][pattern] for name in plan.patterns()),
            "damage": damage,
        } | losses(rules, calibration, held_out)
    for share in (*shares, *BUDGETS):
        # The count of a plan is exact and the share a float: a hair more than one unit, lest rounding cut it off.
        budget = sdm.plan_for(
            model,
            inputs,
            calibration=calibration,
            macs=min(1.0, share + 0.5 / dense),
            candidates=CANDIDATES,
            sensitivity=sensitivity,
        )
        yield {
            "plan": budget.budget,
            "macs": budget.macs / budget.dense_macs,
            "predicted_damage": budget.predicted_damage,
            "bound": budget.bound,
            "damage": budget.measured_damage,
            "rules": budget.rules,
        } | losses(budget.rules, calibration, held_out)


def latency_row(share: float, batch: int, seconds: float, calibration: list[CalibrationBatch]) -> dict[str, Any]:
    """The plan for ``share`` of the dense time, compiled and timed in turn with the dense model."""
    dense, sparse = load_model(), load_model()
    inputs = torch.randn(batch, 1, 8, 8), torch.full((batch,), 500.0)
    candidates = ("2:4", "2:4v4", "1:4", "1:4v4")
    plan = sdm.plan_for(dense, inputs, calibration=calibration, latency=share, candidates=candidates)
    sdm.sparsify(sparse, rules=plan.rules)
    runs = {name: torch.compile(m, backend="sparsedm") for name, m in (("dense", dense), ("plan", sparse))}
    with torch.no_grad():
        times = paired_times({name: lambda run=run: run(*inputs) for name, run in runs.items()}, seconds=seconds)
    speedup, spread = median_ratio(times["dense"], times["plan"])
    return {
        "plan": plan.budget,
        "batch": batch,
        "threads": torch.get_num_threads(),
        "promised_share": plan.ms / plan.dense_ms,
        "measured_share": 1 / speedup,
        "speedup": speedup,
        "spread": spread,
        "dense_ms": min(times["dense"]) * 1e3,
        "promised_ms": plan.ms,
        "measured_ms": min(times["plan"]) * 1e3,
        "predicted_damage": plan.predicted_damage,
        "damage": plan.measured_damage,
        "rules": plan.rules,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, help="a share of the dense time, such as 0.6, in place of MACs")
    parser.add_argument("--batch", type=int, default=64, help="of the timed model")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    train, test = load_digits()
    calibration = sdm.calibration_set([train], samples=128)
    held_out = sdm.calibration_set([test], samples=500, batch=250, seed=1)
    if options.latency is None:
        result: dict[str, Any] = {"kind": "budget", "dense_loss": loss(load_model(), held_out)}
        result["rows"] = list(macs_rows(calibration, held_out))
    else:
        row = latency_row(options.latency, options.batch, options.seconds, calibration)
        result = {"kind": "latency budget", "rows": [row]}
    result["provenance"] = provenance()
    options.json.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.json, lambda path: path.write_text(json.dumps(result, indent=2) + "\n"))


if __name__ == "__main__":
    main()
