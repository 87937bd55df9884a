"""The folder of a recipe's run: what is there already is not made again."""

import json
import shutil
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsedm_compile.atomic_write import write_atomically
from sparsedm_compile.checkpoint import load_sparse, save_sparse
from sparsedm_compile.distributed import on_first_process
from sparsedm_compile.models import UViT
from sparsedm_compile.provenance import provenance
from sparsedm_compile.quality.features import (
    Features,
    classifier_features,
    load_classifier,
    save_classifier,
    train_classifier,
)
from sparsedm_compile.recipes.config import Recipe, RowConfig, TrainConfig
from sparsedm_compile.recipes.data import ImageData
from sparsedm_compile.recipes.rows import Made, create_model, make_row, train_dense
from sparsedm_compile.training_log import CsvLog, TensorBoardLog, TrainingLog


class Workspace:
    """Checkpoints, logs and scores of one recipe below ``folder``, which is made when there is something to keep.

    ``dense.safetensors``, ``rows/<row>.safetensors`` (the plan in their metadata), ``<name>.csv`` (the loss of each
    step; ``<name>.events`` with ``tensorboard``), ``<name>.json`` (how it was made), ``classifier.safetensors``,
    ``scores/`` and, judged by Inception's features, ``scores-fid/``. A run that was cut off lies in ``<name>.run`` and
    goes on from there.
    """

    def __init__(
        self, recipe: Recipe, folder: Path, *, device: torch.device | str = "cpu", tensorboard: bool = False
    ) -> None:
        self.recipe = recipe
        self.folder = folder
        self.device = torch.device(device)
        self._tensorboard = tensorboard

    def dense(self, data: ImageData, *, train: bool, progress: bool = True) -> UViT:
        """The dense model: loaded, or trained if ``train``.

        Raises:
            FileNotFoundError: it was never trained, and ``train`` is False.
            ValueError: it was trained by another recipe than this one.
        """
        path = self.folder / "dense.safetensors"
        if path.exists():
            return self._load(path, data, self._origin(self.recipe.train))
        if not train:
            raise FileNotFoundError(f"{path} does not exist: run 'sparsedm train' with this recipe and folder first")
        path.parent.mkdir(parents=True, exist_ok=True)
        run = self.folder / "dense.run"
        model = create_model(self.recipe, data).to(self.device)
        made = train_dense(self.recipe, model, data, checkpoint_dir=run, log=self._log(path), progress=progress)
        self._keep(made, path, run, self._origin(self.recipe.train))
        return made.model

    def row(self, row: RowConfig, data: ImageData, *, make: bool, progress: bool = True) -> nn.Module:
        """A row's model: loaded, or made if ``make``.

        Raises:
            FileNotFoundError: it was never made, and ``make`` is False.
            ValueError: it was made by another recipe than this one.
        """
        path = self.folder / "rows" / f"{row.file}.safetensors"
        origin = self._origin(self.recipe.finetune if row.train else None, row)
        if path.exists():
            return self._load(path, data, origin)
        if not make:
            raise FileNotFoundError(f"{path} does not exist: run 'sparsedm finetune' with this recipe and folder first")
        dense = self.dense(data, train=False)
        path.parent.mkdir(exist_ok=True)
        run = self.folder / "rows" / f"{row.file}.run"
        made = make_row(self.recipe, row, dense, data, checkpoint_dir=run, log=self._log(path), progress=progress)
        self._keep(made, path, run, origin, freeze=not row.flexible)
        return made.model

    def has(self, row: RowConfig) -> bool:
        """Whether the row was made."""
        return (self.folder / "rows" / f"{row.file}.safetensors").exists()

    def _log(self, path: Path) -> TrainingLog:
        return TensorBoardLog(path.with_suffix(".events")) if self._tensorboard else CsvLog(path.with_suffix(".csv"))

    def _origin(self, training: TrainConfig | None, row: RowConfig | None = None) -> dict[str, Any]:
        """What a model depends on, as JSON gives it back; no training for a row that is only masked.

        A row also depends on the dense model that it was made from, which may have been trained anew since.
        """
        parts = {"data": asdict(self.recipe.data), "model": dict(self.recipe.model), "seed": self.recipe.seed}
        # The row first: a difference in "train" explains that of the training settings, and not the other way round.
        parts["row"] = None if row is None else asdict(row)
        parts["training"] = None if training is None else asdict(training)
        dense = self.folder / "dense.safetensors"
        if row is not None and dense.exists():
            parts["sha256 of dense.safetensors"] = sha256(dense.read_bytes()).hexdigest()
        return json.loads(json.dumps(parts))

    def _load(self, path: Path, data: ImageData, origin: dict[str, Any]) -> UViT:
        made = json.loads(path.with_suffix(".json").read_text())["origin"]
        for part, value in origin.items():
            if part == "training" and value is None:
                continue  # files of earlier versions hold settings here that the row was never trained with
            if made.get(part, value) != value:  # earlier versions did not note the dense model
                raise ValueError(
                    f"{path} was made with {part} = {made[part]}, and now it is {value}: use another folder, "
                    "or delete the file to make it anew"
                )
        model = create_model(self.recipe, data)
        load_sparse(model, path)
        return model.to(self.device).eval()

    def _keep(self, made: Made, path: Path, run: Path, origin: dict[str, Any], freeze: bool = True) -> None:
        notes = {**made.notes, "steps": len(made.losses), "origin": origin, "provenance": provenance()}
        write_json(path.with_suffix(".json"), notes)
        save_sparse(made.model, path, freeze=freeze)  # the row counts as made once this exists
        shutil.rmtree(run, ignore_errors=True)

    def features(self, data: ImageData, *, progress: bool = True) -> Features:
        """The classifier's features, trained at first use on the training images."""
        path = self.folder / "classifier.safetensors"

        def train() -> None:
            if path.exists():
                return
            model = train_classifier(data.train, data.train_labels, seed=self.recipe.seed, progress=progress)
            if not path.exists():  # another run on this folder may have been faster; its classifier counts
                write_atomically(path, lambda partial: save_classifier(model, partial))

        on_first_process(train)
        return classifier_features(load_classifier(path), (data.test, data.test_labels))


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_atomically(path, lambda partial: partial.write_text(json.dumps(value, indent=2) + "\n"))
