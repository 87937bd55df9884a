"""The parts of ``finetune`` in a loop of accelerate's: what it computes is what ``finetune`` computes."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import sparsedm_compile as sdm

accelerate = pytest.importorskip("accelerate")

STEPS = 6


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x, timesteps):
        hidden = self.into(x.flatten(1)) + timesteps.unsqueeze(1) / 999
        return self.out(torch.tanh(hidden)).view_as(x)


@pytest.fixture
def pair():
    torch.manual_seed(0)
    teacher = Denoiser()
    student = copy.deepcopy(teacher)
    sdm.sparsify(student, "2:4", policy="all")
    return student, teacher


def loader():
    data = torch.randn(12, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    return DataLoader(data, 4, shuffle=True, generator=torch.Generator().manual_seed(2))


def finetune_with_accelerate(student, teacher, patterns=None):
    """What a user of accelerate writes."""
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2, weight_decay=0.03)
    ema, srste = sdm.EMA(student, 0.9), sdm.SRSTE(optimizer, student, decay=0.1)
    student, optimizer, batches = accelerator.prepare(student, optimizer, loader())
    process, generator = sdm.VPSDE(), torch.Generator(accelerator.device).manual_seed(0)
    losses = []
    while len(losses) < STEPS:
        for clean in batches:
            if patterns is not None:
                sdm.set_pattern(student, patterns(len(losses)))
            t = process.sample_times(len(clean), device=clean.device, generator=generator)
            noise = torch.randn(clean.shape, device=clean.device, generator=generator)
            x_t = process.perturb(clean, t, noise)
            with torch.no_grad():
                taught = process.predict_noise(teacher, x_t, t)
            loss = sdm.distillation_loss(process.predict_noise(student, x_t, t), noise, taught)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ema.update(student)
            losses.append(loss.item())
    srste.remove()
    ema.copy_to(student)
    return losses


@pytest.mark.parametrize("patterns", [None, sdm.StagedPatterns(((0, "3:4"), (2, "2:4")))])
def test_the_loop_is_finetune(pair, patterns):
    student, teacher = pair
    expected = copy.deepcopy(student)
    options = {"learning_rate": 1e-2, "warmup_steps": 0, "ema_decay": 0.9, "srste_decay": 0.1, "progress": False}
    record = sdm.finetune(expected, teacher, loader(), steps=STEPS, patterns=patterns, **options)
    assert finetune_with_accelerate(student, teacher, patterns) == pytest.approx(record.losses, rel=1e-6)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], tensor)
