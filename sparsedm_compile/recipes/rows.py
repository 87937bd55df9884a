"""Making the models of a recipe: the dense one, and each row from it."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sparsedm_compile.budget import plan_for
from sparsedm_compile.calibration import CalibrationBatch, calibration_set
from sparsedm_compile.finetune import finetune
from sparsedm_compile.models import UViT
from sparsedm_compile.permutation import permute_channels
from sparsedm_compile.pretraining import pretrain
from sparsedm_compile.recipes.config import Recipe, RowConfig, TrainConfig
from sparsedm_compile.recipes.data import ImageData
from sparsedm_compile.selection import select_masks
from sparsedm_compile.sparsify import sparsify
from sparsedm_compile.training_log import TrainingLog

_CALIBRATION_SAMPLES = 256


@dataclass(frozen=True)
class Made:
    """A model and how it was made.

    Attributes:
        losses: one a step; empty for a row that is not trained.
        notes: what mask selection, permutation and budget reported, ready for JSON.
    """

    model: nn.Module
    losses: list[float]
    notes: dict[str, Any]


def train_dense(
    recipe: Recipe,
    model: nn.Module,
    data: ImageData,
    *,
    checkpoint_dir: Path | None = None,
    log: TrainingLog | None = None,
    progress: bool = True,
) -> Made:
    """Train the dense model of a recipe in place.

    Args:
        model: from :func:`create_model`, on the device to train on.
        checkpoint_dir: where the run is saved now and then, and resumed from.
        log: told the figures of each step.

    Raises:
        ValueError, FloatingPointError: see :func:`pretrain`.
    """
    record = pretrain(
        model,
        _batches(data.train, recipe.train, recipe.seed),
        **_training(recipe.train),
        seed=recipe.seed,
        checkpoint_dir=checkpoint_dir,
        log=log,
        progress=progress,
    )
    return Made(model.eval(), record.losses, {})


def create_model(recipe: Recipe, data: ImageData) -> UViT:
    """The recipe's model with random weights, fixed by its seed.

    Raises:
        ValueError: arguments that U-ViT does not take, images of another shape, or a model that wants labels.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        try:
            model = UViT(**recipe.model)
        except TypeError as error:
            raise ValueError(f"recipe {recipe.name}, table [model]: {error}") from error
    if model.num_classes > 0:
        raise ValueError(
            f"recipe {recipe.name}: num_classes = {model.num_classes} makes a model that wants labels, and recipes "
            "train and judge without: leave it out"
        )
    wanted, found = (model.in_chans, model.img_size, model.img_size), tuple(data.train.shape[1:])
    if wanted != found:
        raise ValueError(f"recipe {recipe.name}: the model takes images of shape {wanted}, the data has {found}")
    return model


def make_row(
    recipe: Recipe,
    row: RowConfig,
    dense: nn.Module,
    data: ImageData,
    *,
    checkpoint_dir: Path | None = None,
    log: TrainingLog | None = None,
    progress: bool = True,
) -> Made:
    """Make one row from the dense model, which is left as it was.

    In this order: channels permuted, patterns chosen for the budget, masks put on and chosen, fine-tuning with every
    row's data in the same order. The teacher is the dense model.
    """
    model = copy.deepcopy(dense)
    device = next(model.parameters()).device
    inputs = data.train[:1].to(device), torch.full((1,), 500.0, device=device)
    rules: Mapping[str, str] = row.rules
    notes: dict[str, Any] = {}
    if row.permute:
        report = permute_channels(
            model, *inputs, pattern=row.pattern, policy=row.policy, rules=row.rules, seed=recipe.seed
        )
        notes["permutation"] = report.to_dict()
    if row.macs is not None:
        budget = plan_for(
            model,
            inputs,
            calibration=_calibration(recipe, data, device),
            macs=row.macs,
            candidates=list(row.candidates),
            policy=row.policy,
            rules=row.rules,
        )
        rules, notes["budget"] = budget.rules, budget.to_dict()
    sparsify(model, row.pattern, policy=row.policy, rules=rules)
    if row.select != "magnitude":
        notes["selection"] = select_masks(model, _calibration(recipe, data, device), method=row.select).to_dict()
    losses: list[float] = []
    if row.train:
        teacher = dense if row.teacher else None
        losses = finetune(
            model,
            teacher,
            _batches(data.train, recipe.finetune, recipe.seed + 1),
            **_training(recipe.finetune) | ({} if row.steps is None else {"steps": row.steps}),
            **({} if row.teacher or row.flexible else {"distillation_weight": 0.0}),
            **({"patterns": list(row.flexible)} if row.flexible else {}),
            **({"srste_decay": 0.0} if row.mask != "sr-ste" else {}),
            fixed_mask=row.mask == "fixed",
            seed=recipe.seed + 1,
            checkpoint_dir=checkpoint_dir,
            log=log,
            progress=progress,
        ).losses
    return Made(model.eval(), losses, notes)


def _training(config: TrainConfig) -> dict[str, Any]:
    return {
        "steps": config.steps,
        "learning_rate": config.learning_rate,
        "weight_decay": config.weight_decay,
        "warmup_steps": config.warmup_steps,
        "ema_decay": config.ema_decay,
        "amp": config.amp or None,
    }


def _batches(images: Tensor, config: TrainConfig, seed: int) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(images, config.batch, shuffle=True, drop_last=True, generator=generator)


def _calibration(recipe: Recipe, data: ImageData, device: torch.device) -> list[CalibrationBatch]:
    batches = _batches(data.train, recipe.finetune, recipe.seed + 2)
    made = calibration_set(batches, samples=_CALIBRATION_SAMPLES, seed=recipe.seed + 2)
    return [CalibrationBatch(tuple(t.to(device) for t in batch.inputs), batch.noise.to(device)) for batch in made]
