import math

import pytest
import torch
from torch import nn

from sparsedm_compile.noise import VPSDE
from sparsedm_compile.sampling import sample


class GaussianData(nn.Module):
    """The exact noise predictor for data drawn from N(mean, std^2)."""

    def __init__(self, mean: float = 0.5, std: float = 0.3) -> None:
        super().__init__()
        self.mean, self.std, self.calls = mean, std, 0

    def forward(self, x, timesteps):
        self.calls += 1
        process, t = VPSDE(), timesteps.double().unsqueeze(1) / 999
        alpha, sigma = process.alpha(t), process.sigma(t)
        return sigma * (x - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2)


def exact(x: torch.Tensor, model: GaussianData) -> torch.Tensor:
    """Where the probability-flow ODE takes ``x`` at t = 1: it maps one Gaussian onto the other."""
    t = torch.tensor(1.0, dtype=torch.float64)
    alpha, sigma = VPSDE().alpha(t), VPSDE().sigma(t)
    return model.mean + model.std * (x - alpha * model.mean) / torch.sqrt(alpha**2 * model.std**2 + sigma**2)


def test_dpm_solver_follows_the_exact_flow_with_second_order():
    model = GaussianData(std=1.0)
    x = torch.randn(64, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = {steps: (sample(model, x, steps=steps) - exact(x, model)).abs().max().item() for steps in (20, 40, 80)}
    assert errors[20] < 0.1
    assert errors[40] < errors[20] / 3
    assert errors[80] < errors[40] / 3


def test_euler_maruyama_samples_the_data():
    model = GaussianData()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 1, dtype=torch.float64, generator=generator)
    drawn = sample(model, x, solver="euler-maruyama", steps=500, generator=generator)
    assert drawn.mean().item() == pytest.approx(model.mean, abs=0.02)
    assert drawn.std().item() == pytest.approx(model.std, rel=0.05)
    # Stochastic: the samples keep almost nothing of their start, where the ODE keeps their order.
    correlation = torch.corrcoef(torch.cat([x, drawn], 1).T)[0, 1].item()
    assert abs(correlation) < 0.1


@pytest.mark.parametrize("solver", ["dpm-solver++", "euler-maruyama"])
def test_one_call_a_step_without_gradients_and_reproducible(solver):
    model = GaussianData()
    x = torch.randn(4, 3, dtype=torch.float64)

    def draw():
        generator = None if solver == "dpm-solver++" else torch.Generator().manual_seed(1)
        return sample(model, x.requires_grad_(), solver=solver, steps=7, generator=generator)

    first = draw()
    assert model.calls == 7
    assert not first.requires_grad
    assert torch.equal(first, draw())


@pytest.mark.parametrize("solver", ["dpm-solver++", "euler-maruyama"])
def test_clip_changes_only_what_leaves_the_range(solver):
    x = torch.randn(500, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def draw(clip):
        generator = None if solver == "dpm-solver++" else torch.Generator().manual_seed(1)
        return sample(GaussianData(mean=0.0, std=1.0), x, solver=solver, steps=50, clip=clip, generator=generator)

    free, clipped, never = draw(None), draw(1.0), draw(1e6)
    torch.testing.assert_close(free, never, rtol=1e-4, atol=1e-4)
    assert free.abs().max() > 2
    assert clipped.abs().max() < 1.05
    assert clipped.abs().min() < 0.1  # not merely pushed to the ends


def test_condition_is_passed_on():
    class Conditional(nn.Module):
        def forward(self, x, timesteps, y):
            return x - y.unsqueeze(1)

    x = torch.randn(3, 2)
    assert not torch.equal(
        sample(Conditional(), x, torch.zeros(3), steps=3), sample(Conditional(), x, torch.ones(3), steps=3)
    )


def test_errors():
    model, x = GaussianData(), torch.randn(2, 2)
    with pytest.raises(ValueError, match=r"unknown solver 'ddim'; valid are dpm-solver\+\+, euler-maruyama"):
        sample(model, x, solver="ddim")
    with pytest.raises(ValueError, match="steps must be at least 2, got 1"):
        sample(model, x, steps=1)
    with pytest.raises(ValueError, match="clip must be positive, got -1"):
        sample(model, x, clip=-1)
    with pytest.raises(ValueError, match="leave generator out"):
        sample(model, x, generator=torch.Generator())
    assert math.isfinite(sample(model, x, steps=2).sum())
