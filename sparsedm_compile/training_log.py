"""What a training run reports at each step, as CSV or for TensorBoard, also across an interruption."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from sparsedm_compile.atomic_write import write_atomically


class TrainingLog(Protocol):
    """Where the figures of each step go."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take the figures of ``step``, counted from 1. A run that was resumed repeats the steps it lost."""


class CsvLog:
    """One line a step: ``step`` and the values, by the names of the first line written.

    Args:
        path: of the file; it is kept up to the step that a resumed run goes on from.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._next: int | None = None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if step != self._next:
            self._cut(step, list(values))
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow([step, *values.values()])
        self._next = step + 1

    def _cut(self, step: int, names: list[str]) -> None:
        """Keep the lines before ``step``, and a header."""
        kept = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                kept = [line for line in csv.reader(file) if line and line[0].isdigit() and int(line[0]) < step]

        def rewrite(temporary: Path) -> None:
            with temporary.open("w", newline="") as file:
                csv.writer(file).writerows([["step", *names], *kept])

        write_atomically(self.path, rewrite)


class TensorBoardLog:
    """Scalars for TensorBoard.

    Args:
        folder: of the event files; TensorBoard leaves out what a resumed run repeats.

    Raises:
        ImportError: tensorboard is missing.
    """

    def __init__(self, folder: Path | str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "TensorBoardLog needs tensorboard: pip install 'sparsedm-compile[tensorboard]'"
            ) from error
        self._open = lambda step: SummaryWriter(str(folder), purge_step=step)
        self._writer: SummaryWriter | None = None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is None:
            self._writer = self._open(step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()
