"""Small models for planning; tests compare with every plan there is, so there must be few."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsedm_compile.calibration import CalibrationBatch

WIDTH = 32


class Denoiser(nn.Module):
    """Four linears and a convolution, called as a noise predictor; ``head`` is tied to ``tail`` if asked for."""

    def __init__(self, tied=False):
        super().__init__()
        self.embed = nn.Linear(2, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.conv = nn.Conv2d(WIDTH, WIDTH, 1)
        self.tail = nn.Linear(WIDTH, WIDTH)
        if tied:
            self.tail.weight = self.blocks[1].weight
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, timesteps):
        time = timesteps / 999
        h = self.dropout(x + self.embed(torch.stack([time.cos(), time.sin()], 1)))
        for block in self.blocks:
            h = h + F.silu(block(h))
        h = h + self.conv(h[:, :, None, None])[:, :, 0, 0]
        return self.tail(F.silu(h))


@pytest.fixture
def make_model():
    def make(**kwargs):
        torch.manual_seed(0)
        return Denoiser(**kwargs).train()

    return make


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture
def inputs():
    return torch.zeros(2, WIDTH), torch.zeros(2)


@pytest.fixture
def calibration():
    generator = torch.Generator().manual_seed(1)

    def batch(size):
        noise = torch.randn(size, WIDTH, generator=generator)
        return CalibrationBatch((noise + 1, 999 * torch.rand(size, generator=generator)), noise)

    return [batch(8), batch(3)]  # of different sizes: a mean of means would not do


class Unchanged:
    """What must be as before."""

    def __init__(self, model):
        self.model = model
        self.types = {name: (type(module), module.training) for name, module in model.named_modules()}
        self.state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.parameters = [id(parameter) for parameter in model.parameters()]

    def check(self):
        assert {name: (type(m), m.training) for name, m in self.model.named_modules()} == self.types
        assert [id(parameter) for parameter in self.model.parameters()] == self.parameters
        assert all(torch.equal(tensor, self.state[name]) for name, tensor in self.model.state_dict().items())
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in self.model.modules())
        assert not hasattr(self.model, "_sparsedm_plan")


@pytest.fixture
def unchanged(model):
    before = Unchanged(model)
    yield before
    before.check()
