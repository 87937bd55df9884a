import pytest
import torch
from torch import nn

from sparsedm_compile.fixed_mask import FixedMask
from sparsedm_compile.layers import sparse_layers
from sparsedm_compile.masks import magnitude_mask_naive
from sparsedm_compile.pattern import Pattern
from sparsedm_compile.sparsify import set_pattern, sparsify


def make_model(pattern="2:4") -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))
    sparsify(model, pattern, policy="all")
    return model


def inputs() -> torch.Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


def step(model, optimizer) -> None:
    optimizer.zero_grad()
    (model(inputs()) - 1).square().mean().backward()
    optimizer.step()


def masks(model, pattern) -> dict[str, torch.Tensor]:
    return {n: magnitude_mask_naive(layer.weight, Pattern.parse(pattern)) for n, layer in sparse_layers(model).items()}


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.3),  # so large that any mask that could change would
    "sgd": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("pattern", ["2:4", "1:4v2"])
def test_equals_training_a_dense_model_multiplied_by_the_mask(optimizer, pattern):
    """Against the same network written as x (W * M)^T, trained by the same optimizer on W."""
    model = make_model(pattern)
    kept = masks(model, pattern)
    reference = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    optimizers = OPTIMIZERS[optimizer](model.parameters()), OPTIMIZERS[optimizer](reference)
    FixedMask(optimizers[0], model)
    with torch.no_grad():
        for weight, mask in zip(reference[::2], kept.values(), strict=True):
            weight.mul_(mask)
    for _ in range(10):
        step(model, optimizers[0])
        optimizers[1].zero_grad()
        w1, b1, w2, b2 = reference
        m1, m2 = kept.values()
        hidden = nn.functional.gelu(nn.functional.linear(inputs(), w1 * m1, b1))
        (nn.functional.linear(hidden, w2 * m2, b2) - 1).square().mean().backward()
        optimizers[1].step()
    for ours, theirs in zip(model.parameters(), reference, strict=True):
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-5, atol=1e-6)
    for name, layer in sparse_layers(model).items():
        assert torch.equal(layer.weight != 0, kept[name])


def test_ste_would_have_changed_the_mask():
    """The training above is strong enough to move a mask that is free."""
    model = make_model()
    before = masks(model, "2:4")
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    for _ in range(10):
        step(model, optimizer)
    assert any(not torch.equal(before[name], mask) for name, mask in masks(model, "2:4").items())


def test_momentum_from_before_does_not_bring_weights_back():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer)
    kept = masks(model, "2:4")
    FixedMask(optimizer, model)
    step(model, optimizer)
    for name, layer in sparse_layers(model).items():
        assert not layer.weight[~kept[name]].any()


def test_dense_layers_and_biases_are_left_alone():
    model = make_model()
    set_pattern(model, "2:4", rules={"2": "dense"})
    before = model[2].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    FixedMask(optimizer, model)
    assert torch.equal(model[2].weight, before)
    step(model, optimizer)
    assert (model[2].weight != before).all()


def test_remove_lets_go():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fixed = FixedMask(optimizer, model)
    fixed.remove()
    fixed.remove()
    step(model, optimizer)
    assert model[0].weight.count_nonzero() > model[0].weight.numel() // 2


def test_state_carries_the_masks_over():
    """Also where a kept weight is zero, which no look at the weights could tell from a dropped one."""
    model, twin = make_model(), make_model()
    fixed = FixedMask(torch.optim.SGD(model.parameters(), lr=0.1), model)
    with torch.no_grad():
        twin[0].weight.copy_(twin[0].weight.flip(1))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    other = FixedMask(optimizer, twin)
    assert not torch.equal(other.state_dict()["0"], fixed.state_dict()["0"])
    with torch.no_grad():
        model[0].weight.zero_()
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(fixed.state_dict())
    step(twin, optimizer)
    # The gradient of zero weights is not zero, so every weight may move that is kept.
    assert torch.equal(twin[2].weight == 0, fixed.state_dict()["2"])


class TestErrors:
    def test_optimizer_of_another_model(self):
        model = make_model()
        before = model[0].weight.detach().clone()
        with pytest.raises(ValueError, match=r"FixedMask: the optimizer does not hold the weights of 0, 2"):
            FixedMask(torch.optim.SGD(nn.Linear(4, 4).parameters(), lr=0.1), model)
        assert torch.equal(model[0].weight, before)

    def test_dense_model(self):
        model = make_model()
        set_pattern(model, "dense")
        with pytest.raises(ValueError, match="every trained layer is at 'dense'"):
            FixedMask(torch.optim.SGD(model.parameters(), lr=0.1), model)

    def test_types(self):
        with pytest.raises(TypeError, match=r"FixedMask takes a torch\.optim\.Optimizer, got str"):
            FixedMask("sgd", make_model())
