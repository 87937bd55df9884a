"""Trains a tiny model in processes that are killed at random moments, goes on to the end, and tells what came of it.

A script and no test: it forks, so it must be a process without threads. ``killed_training.py FOLDER KILLS SEED`` prints
one JSON object.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sparsedm_compile.finetune import finetune
from sparsedm_compile.sparsify import sparsify

STEPS_BETWEEN_KILLS = 6


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.drop, self.out = nn.Linear(16, 64), nn.Dropout(0.1), nn.Linear(64, 16)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        hidden = self.into(x.flatten(1)) + timesteps.unsqueeze(1) / 999
        return self.out(self.drop(torch.tanh(hidden))).view_as(x)


def run(steps: int, folder: Path | None) -> tuple[list[float], dict[str, Tensor]]:
    """Start the run anew, as a user would: it goes on from what is in the folder."""
    torch.manual_seed(0)
    model = Denoiser()
    sparsify(model, "2:4", policy="all")
    data = torch.randn(40, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    batches = DataLoader(data, 8, shuffle=True, generator=torch.Generator().manual_seed(2))
    patterns = ["dense", "2:4", "1:4"]
    options = {"patterns": patterns, "learning_rate": 1e-3, "checkpoint_every": 1, "progress": False}
    record = finetune(model, None, batches, steps=steps, checkpoint_dir=folder, **options)
    return record.losses, model.state_dict()


def saved_step(folder: Path) -> int:
    manifest = folder / "manifest.json"
    return json.loads(manifest.read_text())["step"] if manifest.exists() else 0


def main() -> None:
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    draw = random.Random(seed)
    steps = STEPS_BETWEEN_KILLS * (kills + 2)
    killed, while_writing = [], 0
    for kill in range(kills):
        child = os.fork()
        if child == 0:
            run(steps, folder)
            os._exit(0)
        while saved_step(folder) < STEPS_BETWEEN_KILLS * kill:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            killed.append(saved_step(folder))
            while_writing += any(folder.glob(".*.partial"))
    losses, weights = run(steps, folder)
    expected_losses, expected = run(steps, None)
    equal = losses == expected_losses and all(torch.equal(weights[name], expected[name]) for name in expected)
    print(json.dumps({"killed_at": killed, "while_writing": while_writing, "steps": len(losses), "equal": equal}))  # noqa: T201


if __name__ == "__main__":
    main()
