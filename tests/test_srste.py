import pytest
import torch
from torch import nn

from sparsedm_compile.layers import sparse_layers
from sparsedm_compile.masks import magnitude_mask_naive
from sparsedm_compile.pattern import Pattern
from sparsedm_compile.sparsify import set_pattern, sparsify
from sparsedm_compile.srste import SRSTE

DECAY = 0.03  # far above 2e-4, so that losing the term, or scaling it, cannot hide in rounding


def make_model(pattern="2:4") -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))
    sparsify(model, pattern, policy="all")
    return model


def inputs() -> torch.Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}


def train(make_optimizer, scale: float | None, unscale_first=False, steps=3) -> list[torch.Tensor]:
    model = make_model()
    optimizer = make_optimizer(model.parameters())
    SRSTE(optimizer, model, DECAY)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    for _ in range(steps):
        optimizer.zero_grad()
        scaler.scale(model(inputs()).square().mean()).backward()
        if unscale_first:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        scaler.step(optimizer)
        scaler.update()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:4v4", "4:8"])
def test_closed_form_of_one_sgd_step(pattern):
    model = make_model(pattern)
    before = {name: layer.weight.detach().clone() for name, layer in sparse_layers(model).items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    SRSTE(optimizer, model, DECAY)
    model(inputs()).square().mean().backward()
    plain = {name: layer.weight.grad.clone() for name, layer in sparse_layers(model).items()}
    bias_gradient = model[0].bias.grad.clone()
    optimizer.step()
    for name, layer in sparse_layers(model).items():
        w = before[name].double()
        mask = magnitude_mask_naive(before[name], Pattern.parse(pattern)).double()
        expected = w - 0.1 * (plain[name].double() + DECAY * (1 - mask) * w)
        torch.testing.assert_close(layer.weight.double(), expected, rtol=1e-6, atol=1e-7)
        assert (w - 0.1 * plain[name] - expected).abs().max() > 1e-5  # the term is large enough to be missed
    assert torch.equal(model[0].bias.grad, bias_gradient)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("unscale_first", [False, True], ids=["step", "unscale-clip-step"])
def test_the_loss_scale_does_not_matter(optimizer, unscale_first):
    """Scales are powers of two, so that unscaling is exact and only a wrong factor on the decay can show."""
    reference = train(OPTIMIZERS[optimizer], None)
    for scale in (1.0, 2.0**16):
        scaled = train(OPTIMIZERS[optimizer], scale, unscale_first)
        for got, expected in zip(scaled, reference, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


def test_the_scale_test_can_fail():
    """A decay added inside backward, before unscaling, does depend on the scale."""

    def one_step(scale):
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        model[0].weight.register_hook(lambda g: g + DECAY * model[0].weight.detach())
        scaler.scale(model(inputs()).square().mean()).backward()
        scaler.step(optimizer)
        return model[0].weight.detach()

    assert (one_step(1.0) - one_step(2.0**16)).abs().max() > 1e-5


def test_skipped_step_after_overflow_changes_nothing():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    SRSTE(optimizer, model, DECAY)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    before = model[0].weight.detach().clone()
    (scaler.scale(model(inputs()).square().mean()) * float("inf")).backward()
    scaler.step(optimizer)
    assert torch.equal(model[0].weight, before)


def test_follows_the_current_pattern_and_dense_gets_none():
    model = make_model("2:4")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    SRSTE(optimizer, model, DECAY)
    weight = model[0].weight
    for pattern in ("dense", "1:4", "2:4"):
        set_pattern(model, pattern)
        weight.grad = torch.zeros_like(weight)
        before = weight.detach().clone()
        optimizer.step()
        mask = torch.ones_like(before)
        if pattern != "dense":
            mask = magnitude_mask_naive(before, Pattern.parse(pattern)).float()
        torch.testing.assert_close(before - weight, DECAY * (1 - mask) * before, rtol=1e-5, atol=1e-8)


def test_weight_without_gradient_is_left_alone():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    SRSTE(optimizer, model, DECAY)
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert model[0].weight.grad is None
    assert torch.equal(model[0].weight, before)


def test_shared_weight_decays_once():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    sparsify(model, "2:4", policy="all")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    SRSTE(optimizer, model, DECAY)
    weight = model[0].weight
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    dropped = ~magnitude_mask_naive(before, Pattern(2, 4))
    torch.testing.assert_close(weight.grad[dropped], DECAY * before[dropped])


def test_remove_stops_the_decay():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    srste = SRSTE(optimizer, model, DECAY)
    srste.remove()
    srste.remove()
    model[0].weight.grad = torch.zeros_like(model[0].weight)
    optimizer.step()
    assert not model[0].weight.grad.any()


class NoStep(torch.optim.Optimizer):
    """An optimizer that takes ``grad_scale`` and changes nothing, so that the gradients show what the hook did."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        pass


def test_half_precision_term_does_not_overflow_under_a_large_scale():
    model = make_model().half()
    optimizer = NoStep(model.parameters())
    SRSTE(optimizer, model, 2e-4)
    optimizer.grad_scale = torch.tensor(2.0**18)  # a weight of 1 times this scale is infinite in half precision
    weight = model[0].weight
    weight.data.fill_(1.0)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert weight.grad.max().item() == pytest.approx(2e-4 * 2**18, rel=1e-2)


class TestErrors:
    def test_optimizer_of_another_model(self):
        other = nn.Linear(4, 4)
        with pytest.raises(ValueError, match=r"does not hold the weights of 0, 2 .*model\.parameters\(\)"):
            SRSTE(torch.optim.SGD(other.parameters(), lr=0.1), make_model())

    def test_frozen_layers_need_no_optimizer(self):
        model = make_model()
        model[0].weight.requires_grad_(False)
        SRSTE(torch.optim.SGD(model[2].parameters(), lr=0.1), model)

    def test_dense_model(self):
        model = nn.Linear(4, 4)
        with pytest.raises(ValueError, match="no sparse layers: call sparsify"):
            SRSTE(torch.optim.SGD(model.parameters(), lr=0.1), model)

    @pytest.mark.parametrize("decay", [-1e-4, float("nan"), float("inf")])
    def test_decay(self, decay):
        model = make_model()
        with pytest.raises(ValueError, match="decay must be"):
            SRSTE(torch.optim.SGD(model.parameters(), lr=0.1), model, decay)

    def test_types(self):
        model = make_model()
        with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer, got Sequential"):
            SRSTE(model, model)
        with pytest.raises(TypeError, match=r"torch\.nn\.Module, got str"):
            SRSTE(torch.optim.SGD(model.parameters(), lr=0.1), "model")

    def test_closure(self):
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        SRSTE(optimizer, model)
        with pytest.raises(ValueError, match="closure"):
            optimizer.step(lambda: 0.0)
        with pytest.raises(ValueError, match="closure"):
            optimizer.step(closure=lambda: 0.0)
