import pytest
import torch
from torch import nn

from sparsedm_compile.ema import EMA
from sparsedm_compile.sparsify import sparsify


def linear(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(8, 4)


def test_starts_from_the_dense_weights_of_a_sparse_model():
    model = nn.Sequential(linear())
    sparsify(model, "2:4", policy="all")
    dense = model[0].weight.detach().clone()
    ema = EMA(model)
    assert dense.count_nonzero() == dense.numel()
    assert torch.equal(ema.shadow["0.weight"], dense)
    with torch.no_grad():
        model[0].weight.zero_()
    assert torch.equal(ema.shadow["0.weight"], dense)  # a copy, not the parameter
    ema.copy_to(model)
    assert torch.equal(model[0].weight, dense)
    # Masked where it is used.
    assert torch.autograd.functional.jacobian(model, torch.zeros(8)).count_nonzero() == dense.numel() // 2


@pytest.mark.parametrize("warmup", [False, True])
def test_closed_form(warmup):
    model = linear()
    trajectory = [model.weight.detach().double().clone()]
    ema = EMA(model, 0.9, warmup=warmup)
    expected = trajectory[0]
    for k in range(1, 101):
        with torch.no_grad():
            model.weight.add_(torch.randn(4, 8))
        ema.update(model)
        decay = min(0.9, (1 + k) / (10 + k)) if warmup else 0.9
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
    torch.testing.assert_close(ema.shadow["weight"].double(), expected, rtol=1e-5, atol=1e-5)


def test_without_warmup_a_short_run_stays_at_its_start():
    model = linear()
    start = model.weight.detach().clone()
    plain, warm = EMA(model, warmup=False), EMA(model)
    with torch.no_grad():
        model.weight.add_(1)
    for _ in range(100):
        plain.update(model)
        warm.update(model)
    assert (plain.shadow["weight"] - start).abs().max() < 0.02
    assert (warm.shadow["weight"] - start).abs().min() > 0.99


def test_half_precision_models_are_averaged_in_float32():
    model = linear().bfloat16()
    start = model.weight.detach().float()
    ema = EMA(model, 0.9999, warmup=False)
    with torch.no_grad():
        model.weight.add_(1)
    for _ in range(10):
        ema.update(model)
    moved = (ema.shadow["weight"] - start).mean().item()
    assert moved == pytest.approx(1 - 0.9999**10, rel=0.05)
    ema.copy_to(model)
    assert model.weight.dtype == torch.bfloat16


def test_errors():
    with pytest.raises(ValueError, match=r"decay must be at least 0 and below 1, got 1\.0"):
        EMA(linear(), 1.0)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got dict"):
        EMA({})
    with pytest.raises(ValueError, match="ReLU has no parameters"):
        EMA(nn.ReLU())
    ema = EMA(linear())
    with pytest.raises(ValueError, match="'bias' differs"):
        ema.update(nn.Linear(8, 5))
    with pytest.raises(ValueError, match=r"'0\.bias' differs"):
        ema.copy_to(nn.Sequential(linear()))
