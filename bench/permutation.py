"""What channel permutation does to one-shot pruning: U-ViT, DiT and UNet2DModel, trained on digits.

    python bench/permutation.py --json digits_permutation.json

Trains the small DiT and UNet2DModel of diffusers for each seed, a minute of one core each (kept in ``--models``), takes
the demo's U-ViT as it is, and measures the denoising loss on held-out digits, the same noise for every row: dense, and
pruned without any training, with channels in the order at hand, reordered by magnitude, and with calibration data.
"""

import argparse
import copy
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sparsedm_compile as sdm
from sparsedm_compile.atomic_write import write_atomically
from sparsedm_compile.calibration import CalibrationBatch
from sparsedm_compile.demo.digits import load_labelled_digits, load_model
from sparsedm_compile.pretraining import pretrain
from sparsedm_compile.provenance import provenance


def dit() -> nn.Module:
    """0.39 million parameters: 16 tokens of width 64, 4 blocks, conditioned on the digit."""
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=1, num_layers=4, sample_size=8, patch_size=2,
        num_embeds_ada_norm=10, norm_num_groups=8,
    )  # fmt: skip


def unet() -> nn.Module:
    """0.70 million parameters, 32 and 64 channels at 8 x 8 and 4 x 4 pixels, with attention at the latter."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(32, 64),
        norm_num_groups=8, attention_head_dim=16,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


#: Name -> (the untrained model, steps of 128 images, whether it takes labels).
TRAINED: dict[str, tuple[Callable[[], nn.Module], int, bool]] = {"dit": (dit, 1500, True), "unet": (unet, 600, False)}


def trained(name: str, seed: int, folder: Path) -> nn.Module:
    """The model of this seed, read from ``folder`` or trained and kept there."""
    create, steps, labelled = TRAINED[name]
    torch.manual_seed(seed)
    model, path = create(), folder / f"{name}-{seed}.safetensors"
    if not path.exists():
        images, labels, *_ = load_labelled_digits()
        data = TensorDataset(images, labels) if labelled else images
        order = torch.Generator().manual_seed(seed)
        loader = DataLoader(data, 128, shuffle=True, drop_last=True, generator=order)
        pretrain(
            model, loader, steps=steps, learning_rate=1e-3, ema_decay=0.99, seed=seed,
            checkpoint_dir=folder / f"{name}-{seed}.run", checkpoint_every=100,
        )  # fmt: skip
        save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, path)
    model.load_state_dict(load_file(path))
    return model.eval()


#: How channels are ordered before pruning.
ORDERS = ("at hand", "magnitude", "calibration")


@torch.no_grad()
def loss(model: nn.Module, batches: list[CalibrationBatch]) -> float:
    def squares(batch: CalibrationBatch) -> float:
        answer = model(*batch.inputs)
        return (getattr(answer, "sample", answer) - batch.noise).square().mean().item()

    return sum(map(squares, batches)) / len(batches)


def row(
    dense: nn.Module, pattern: str, order: str, calibration: list[CalibrationBatch], held_out: list[CalibrationBatch]
) -> dict[str, Any]:
    """Prune a copy of ``dense``: by magnitude, and with masks chosen and weights refitted on the calibration data."""
    model, result = copy.deepcopy(dense), {"pattern": pattern, "order": order}
    if order != "at hand":
        example = [tensor[:2] for tensor in calibration[0].inputs]
        given = {"calibration": calibration} if order == "calibration" else {}
        report = sdm.permute_channels(model, *example, pattern=pattern, **given)
        result |= {"difference": report.difference, "kept_before": report.kept_before, "kept": report.kept_after}
        if given:
            result |= {"damage_before": report.damage_before, "damage": report.damage_after}
    sdm.sparsify(model, pattern)
    result["loss"] = loss(model, held_out)
    sdm.select_masks(model, calibration, progress=False)
    return result | {"loss_selected": loss(model, held_out)}


def models(folder: Path, seeds: int) -> Iterator[tuple[str, int, bool, Callable[[], nn.Module]]]:
    """Name, seed, whether it takes labels, and how to get it."""
    yield "uvit", 0, False, load_model
    for name, (_, _, labelled) in TRAINED.items():
        for seed in range(seeds):
            yield name, seed, labelled, functools.partial(trained, name, seed, folder)


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per model, pattern and order: means over seeds, and the change of the one-shot loss at each seed."""
    found = []
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for one in rows:
        groups.setdefault((one["model"], one["pattern"], one["order"]), []).append(one)
    for (model, pattern, order), members in groups.items():
        at_hand = {one["seed"]: one for one in groups.get((model, pattern, "at hand"), ())}
        line = {"model": model, "pattern": pattern, "order": order, "seeds": len(members)}
        for key in ("dense", "loss", "loss_selected"):
            line[key] = mean(one[key] for one in members)
            if key != "dense" and order != "at hand":
                line[f"{key}_change"] = [one[key] / at_hand[one["seed"]][key] - 1 for one in members]
        if order != "at hand":
            line["kept_gain"] = mean(one["kept"] - one["kept_before"] for one in members)
        found.append(line)
    return found


def earlier(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of a file that is to go on, and the provenance of each run; a row's ``run`` is its place in the latter.

    Raises:
        ValueError: rows that do not say of which run they are.
    """
    if not path.exists():
        return [], []
    content = json.loads(path.read_text())
    if "runs" not in content:
        raise ValueError(f"{path} does not say which run each row comes from: give a new file to --json")
    return content["rows"], content["runs"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pattern", action="append", help="repeatable; 2:4 and 2:4v4 unless given")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", type=Path, default=Path("build/permutation"), help="trained models are kept here")
    parser.add_argument("--json", type=Path, required=True, help="rows that are there already are kept, with their run")
    options = parser.parse_args()
    options.models.mkdir(parents=True, exist_ok=True)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    images, labels, test, test_labels = load_labelled_digits()
    patterns = options.pattern or ["2:4", "2:4v4"]
    rows, runs = earlier(options.json)
    runs.append(provenance() | {"arguments": {"patterns": patterns, "seeds": options.seeds}})
    done = {(one["model"], one["seed"], one["pattern"], one["order"]) for one in rows}
    for name, seed, labelled, load in models(options.models, options.seeds):
        wanted = [
            (pattern, order) for pattern in patterns for order in ORDERS if (name, seed, pattern, order) not in done
        ]
        if not wanted:
            continue
        model = load()
        calibration = sdm.calibration_set([(images, labels) if labelled else images], samples=128)
        held_out = [(test, test_labels) if labelled else test]
        held_out = sdm.calibration_set(held_out, samples=500, batch=250, seed=1)
        dense = loss(model, held_out)
        for pattern, order in wanted:
            measured = row(model, pattern, order, calibration, held_out)
            rows.append({"model": name, "seed": seed, "run": len(runs) - 1, "dense": dense} | measured)
            result = {"kind": "permutation", "summary": summary(rows), "rows": rows, "runs": runs}
            write_atomically(options.json, lambda path, result=result: path.write_text(json.dumps(result, indent=2)))


if __name__ == "__main__":
    main()
