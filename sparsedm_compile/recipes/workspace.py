"""The folder of a recipe's run: what is there already is not made again."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from sparsedm_compile.checkpoint import load_sparse, save_sparse
from sparsedm_compile.models import UViT
from sparsedm_compile.provenance import provenance
from sparsedm_compile.quality.features import (
    Features,
    classifier_features,
    load_classifier,
    save_classifier,
    train_classifier,
)
from sparsedm_compile.recipes.config import Recipe, RowConfig
from sparsedm_compile.recipes.data import ImageData
from sparsedm_compile.recipes.rows import Made, create_model, make_row, train_dense
from sparsedm_compile.training_log import CsvLog, TensorBoardLog, TrainingLog


class Workspace:
    """Checkpoints, logs and scores of one recipe below ``folder``, which is made if it does not exist.

    ``dense.safetensors``, ``rows/<row>.safetensors`` (the plan in their metadata), ``<name>.csv`` (the loss of each
    step; ``<name>.events`` with ``tensorboard``), ``<name>.json`` (how it was made), ``classifier.safetensors`` and
    ``scores/``. A run that was cut off lies in ``<name>.run`` and goes on from there.
    """

    def __init__(self, recipe: Recipe, folder: Path, *, tensorboard: bool = False) -> None:
        self.recipe = recipe
        self.folder = folder
        self._tensorboard = tensorboard
        for part in ("rows", "scores"):
            (folder / part).mkdir(parents=True, exist_ok=True)

    def dense(self, data: ImageData, *, train: bool, progress: bool = True) -> UViT:
        """The dense model: loaded, or trained if ``train``.

        Raises:
            FileNotFoundError: it was never trained, and ``train`` is False.
        """
        path = self.folder / "dense.safetensors"
        if path.exists():
            model = create_model(self.recipe, data)
            load_sparse(model, path)
            return model.eval()
        if not train:
            raise FileNotFoundError(f"{path} does not exist: run 'sparsedm train' with this recipe and folder first")
        made = train_dense(
            self.recipe, data, checkpoint_dir=self.folder / "dense.run", log=self._log(path), progress=progress
        )
        self._keep(made, path, self.folder / "dense.run")
        return made.model

    def row(self, row: RowConfig, data: ImageData, *, make: bool, progress: bool = True) -> nn.Module:
        """A row's model: loaded, or made if ``make``.

        Raises:
            FileNotFoundError: it was never made, and ``make`` is False.
        """
        path = self.folder / "rows" / f"{row.file}.safetensors"
        if path.exists():
            model = create_model(self.recipe, data)
            load_sparse(model, path)
            return model.eval()
        if not make:
            raise FileNotFoundError(f"{path} does not exist: run 'sparsedm finetune' with this recipe and folder first")
        dense = self.dense(data, train=False)
        run = self.folder / "rows" / f"{row.file}.run"
        made = make_row(self.recipe, row, dense, data, checkpoint_dir=run, log=self._log(path), progress=progress)
        self._keep(made, path, run, freeze=not row.flexible)
        return made.model

    def has(self, row: RowConfig) -> bool:
        """Whether the row was made."""
        return (self.folder / "rows" / f"{row.file}.safetensors").exists()

    def _log(self, path: Path) -> TrainingLog:
        return TensorBoardLog(path.with_suffix(".events")) if self._tensorboard else CsvLog(path.with_suffix(".csv"))

    def _keep(self, made: Made, path: Path, run: Path, freeze: bool = True) -> None:
        write_json(path.with_suffix(".json"), {**made.notes, "steps": len(made.losses), "provenance": provenance()})
        save_sparse(made.model, path, freeze=freeze)  # the row counts as made once this exists
        shutil.rmtree(run, ignore_errors=True)

    def features(self, data: ImageData, *, progress: bool = True) -> Features:
        """The classifier's features, trained at first use on the training images."""
        path = self.folder / "classifier.safetensors"
        if not path.exists():
            model = train_classifier(data.train, data.train_labels, seed=self.recipe.seed, progress=progress)
            save_classifier(model, path)
        return classifier_features(load_classifier(path), (data.test, data.test_labels))


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.replace(path)
