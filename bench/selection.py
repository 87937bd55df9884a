"""What mask selection and channel permutation save before any training: one-shot losses of the demo's model.

    python bench/selection.py --json bench/results/quality/digits_selection.json

The U-ViT of ``make demo`` on held-out digits; denoising loss, the same noise for every row. A few minutes of one core.
"""

import argparse
import copy
import json
from pathlib import Path

import torch

import sparsedm_compile as sdm
from sparsedm_compile.calibration import CalibrationBatch
from sparsedm_compile.demo.digits import load_digits, load_model
from sparsedm_compile.provenance import provenance

METHODS = ("magnitude", "wanda", "sparsegpt")
POLICY = "sparsedm"


@torch.no_grad()
def loss(model: torch.nn.Module, batches: list[CalibrationBatch]) -> float:
    return sum((model(*batch.inputs) - batch.noise).square().mean().item() for batch in batches) / len(batches)


def rows(pattern: str, calibration: list[CalibrationBatch], held_out: list[CalibrationBatch]):
    for permuted in (False, True):
        dense = load_model()
        if permuted:
            inputs = (tensor[:2] for tensor in calibration[0].inputs)
            sdm.permute_channels(dense, *inputs, pattern=pattern, policy=POLICY)
        for method in METHODS:
            for refit in (False, True):
                model = copy.deepcopy(dense)
                sdm.sparsify(model, pattern, policy=POLICY)
                sdm.select_masks(model, calibration, method, refit=refit, progress=False)
                yield {
                    "pattern": pattern,
                    "permuted": permuted,
                    "method": method,
                    "refit": refit,
                    "loss": loss(model, held_out),
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pattern", action="append", help="repeatable; 2:4, 2:4v4 and 1:4 unless given")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    train, test = load_digits()
    calibration = sdm.calibration_set([train])
    held_out = sdm.calibration_set([test], samples=500, batch=250, seed=1)
    result = {
        "kind": "selection",
        "dense": loss(load_model(), held_out),
        "rows": [
            row
            for pattern in options.pattern or ("2:4", "2:4v4", "1:4")
            for row in rows(pattern, calibration, held_out)
        ],
        "provenance": provenance(),
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
