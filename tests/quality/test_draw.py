import subprocess
import sys

import pytest
import torch
from torch import nn

from sparsedm_compile.noise import VPSDE
from sparsedm_compile.quality.draw import draw
from sparsedm_compile.quality.validation import validation_loss
from sparsedm_compile.sampling import sample


class Shrink(nn.Module):
    """The exact predictor for data that is zero: x_t is sigma times noise."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, x, time):
        self.batches.append(len(x))
        return x / VPSDE().sigma(time / 999).reshape(-1, 1, 1, 1)


class Blend(nn.Module):
    def forward(self, x, time):
        return 0.7 * x.flip(-1)


def test_samples_are_those_of_the_sampler_whatever_the_batch():
    noise = torch.randn(10, 1, 4, 4, generator=torch.Generator().manual_seed(5))
    expected = sample(Blend(), noise, steps=4, clip=1.0).clamp(-1, 1)
    for batch in (10, 4, 3):
        drawn = draw(Blend(), 10, (1, 4, 4), seed=5, steps=4, batch=batch, progress=False)
        assert torch.allclose(drawn, expected, atol=1e-6)


def test_every_batch_has_one_size():
    model = Shrink()
    draw(model, 10, (1, 4, 4), steps=2, batch=4, progress=False)
    assert set(model.batches) == {4}


PROCESS = """
import sys, torch, torch.distributed as dist
from sparsedm_compile.quality.draw import draw
folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
class Model(torch.nn.Module):
    def forward(self, x, time):
        return 0.7 * x.flip(-1)
for solver in ("dpm-solver++", "euler-maruyama"):
    drawn = draw(Model(), 7, (1, 4, 4), seed=5, solver=solver, steps=3, batch=2, progress=False)
    torch.save(drawn, f"{folder}/{solver}-{rank}.pt")
dist.destroy_process_group()
"""


def test_two_processes_draw_what_one_draws(tmp_path):
    processes = [subprocess.Popen([sys.executable, "-c", PROCESS, str(tmp_path), str(rank)]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    for solver in ("dpm-solver++", "euler-maruyama"):
        expected = draw(Blend(), 7, (1, 4, 4), seed=5, solver=solver, steps=3, batch=2, progress=False)
        for rank in range(2):
            assert torch.equal(torch.load(tmp_path / f"{solver}-{rank}.pt"), expected)


def test_stochastic_solver_is_reproducible():
    first, again = (
        draw(Blend(), 6, (1, 4, 4), seed=1, solver="euler-maruyama", steps=3, batch=3, progress=False) for _ in "ab"
    )
    assert torch.equal(first, again)


def test_no_two_batches_or_seeds_share_their_fresh_noise():
    # Data of one point: after many steps a sample depends on the fresh noise alone.
    drawn = [
        draw(Shrink(), 8, (1, 4, 4), seed=seed, solver="euler-maruyama", steps=40, batch=2, progress=False)
        for seed in range(3)
    ]
    flat = torch.cat([images.flatten(1).unflatten(0, (4, 2)).flatten(1) for images in drawn])  # one row a batch
    correlation = torch.corrcoef(flat) - torch.eye(len(flat))
    assert correlation.abs().max() < 0.8  # 32 values: chance reaches 0.6, a shared stream 1.0


def test_validation_loss_of_the_exact_predictor_is_zero_and_of_none_is_one():
    zeros = torch.zeros(64, 1, 8, 8)
    assert validation_loss(Shrink(), zeros, batch=32) < 1e-9
    silent = nn.Module()
    silent.forward = lambda x, time: torch.zeros_like(x)
    assert validation_loss(silent, torch.rand(512, 1, 8, 8), batch=256) == pytest.approx(1, abs=0.03)


def test_errors():
    with pytest.raises(ValueError, match="count and batch must be at least 1, got 0 and 500"):
        draw(Blend(), 0, (1, 4, 4))
    with pytest.raises(ValueError, match="at least one batch of 500 images, got 3"):
        validation_loss(Blend(), torch.zeros(3, 1, 4, 4))
