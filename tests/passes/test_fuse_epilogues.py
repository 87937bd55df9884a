"""fuse_epilogues: activation and residual into the layer, only where that changes nothing."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from torch import nn

import sparsedm_compile as sdm
from sparsedm_compile.kernels import get_kernel
from sparsedm_compile.kernels.registry import LayerSpec
from sparsedm_compile.passes import find_layers, insert_masks, swap_kernels
from sparsedm_compile.passes.fuse_epilogues import fuse_epilogues
from sparsedm_compile.pattern import Pattern

PASSES = [find_layers, insert_masks, swap_kernels, fuse_epilogues]
pytestmark = pytest.mark.skipif(
    get_kernel("cpu").refusal(LayerSpec("linear", (32, 32), Pattern(2, 4))) is not None, reason="no compiler"
)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = nn.Linear(32, 32).eval()
    sdm.sparsify(layer, "2:4")
    return layer


@pytest.fixture
def conv():
    torch.manual_seed(0)
    conv = nn.Conv2d(32, 32, 3, padding=1).eval()
    sdm.sparsify(conv, "2:4")
    return conv


X = torch.randn(4, 5, 32, generator=torch.Generator().manual_seed(0))


def check(lower, function, x=X):
    want = None
    with torch.no_grad():
        want = function(x)
    lowering, output = lower(function, [x], PASSES, kernel="cpu")
    torch.testing.assert_close(output, want, rtol=1e-5, atol=1e-5)
    return lowering


FUSED = {
    "gelu": (lambda f, x: F.gelu(f(x)), {"activation": "gelu"}),
    "gelu_tanh": (lambda f, x: F.gelu(f(x), approximate="tanh"), {"activation": "gelu_tanh"}),
    "silu": (lambda f, x: F.silu(f(x)), {"activation": "silu"}),
    "residual": (lambda f, x: x + f(x), {"residual"}),
    "residual on the right": (lambda f, x: f(x) + x, {"residual"}),
    "torch.add": (lambda f, x: torch.add(x, f(x)), {"residual"}),
    "both": (lambda f, x: F.silu(f(x)) + x, {"activation": "silu", "residual": ...}),
    "residual made later": (lambda f, x: (lambda y: y + x.sin())(f(x)), {"residual"}),
}


@pytest.mark.parametrize("case", FUSED)
def test_fuses(lower, targets, layer, case):
    function, want = FUSED[case]
    lowering = check(lower, lambda x: function(layer, x))
    node = lowering.layers[0].node
    assert set(node.kwargs) == set(want)
    if isinstance(want, dict):
        assert node.kwargs.get("activation") == want["activation"]
    assert not {"gelu", "silu", "add"} & set(targets(lowering))


def test_fuses_into_convolutions(lower, targets, conv):
    lowering = check(lower, lambda x: x + F.silu(conv(x)), torch.randn(2, 32, 6, 6))
    assert targets(lowering) == ["conv.default"]


@pytest.fixture
def gated():
    torch.manual_seed(0)
    layer = nn.Linear(32, 256).eval()
    sdm.sparsify(layer, "2:4")
    return layer


def halves(f, x, **kwargs):
    return torch.chunk(f(x), 2, **kwargs)


GATED = {
    "method": lambda f, x: (lambda v, g: v * F.gelu(g))(*f(x).chunk(2, dim=-1)),
    "function": lambda f, x: (lambda v, g: v * F.gelu(g))(*halves(f, x, dim=2)),
    "gate first in the product": lambda f, x: (lambda v, g: torch.mul(F.gelu(g), v))(*halves(f, x, dim=-1)),
    "silu behind it": lambda f, x: F.silu((lambda v, g: v * F.gelu(g))(*halves(f, x, dim=-1))),
    "gelu behind it": lambda f, x: F.gelu((lambda v, g: v * F.gelu(g))(*halves(f, x, dim=-1))),
    "residual behind it": lambda f, x: x.repeat(1, 1, 4) + (lambda v, g: v * F.gelu(g))(*halves(f, x, dim=-1)),
}
NOT_GATED = {
    "first half activated": lambda f, x: (lambda v, g: F.gelu(v) * g)(*halves(f, x, dim=-1)),
    "tanh": lambda f, x: (lambda v, g: v * F.gelu(g, approximate="tanh"))(*halves(f, x, dim=-1)),
    "halves of the tokens": lambda f, x: (lambda v, g: v * F.gelu(g))(*halves(f, x, dim=0)),
    "four parts": lambda f, x: (lambda v, g, *_: v * F.gelu(g))(*torch.chunk(f(x), 4, dim=-1)),
    "gate used again": lambda f, x: (lambda v, g: v * F.gelu(g) + g)(*halves(f, x, dim=-1)),
    "value used again": lambda f, x: (lambda v, g: v * F.gelu(g) + v)(*halves(f, x, dim=-1)),
    "gelu used again": lambda f, x: (lambda v, g: v * g + g)(*(lambda v, g: (v, F.gelu(g)))(*halves(f, x, dim=-1))),
    "value alone": lambda f, x: halves(f, x, dim=-1)[0],
    "sum of halves": lambda f, x: (lambda v, g: v + F.gelu(g))(*halves(f, x, dim=-1)),
    "gate by itself": lambda f, x: (lambda v, g: F.gelu(g) * F.gelu(g))(*halves(f, x, dim=-1)),
}


@pytest.mark.parametrize("case", GATED)
def test_fuses_gates(lower, targets, gated, case):
    lowering = check(lower, lambda x: GATED[case](gated, x))
    assert lowering.layers[0].node.kwargs["activation"] == "geglu"
    assert not {"chunk", "mul"} & set(targets(lowering))


@pytest.mark.parametrize("case", NOT_GATED)
def test_leaves_other_gates_alone(lower, gated, case):
    lowering = check(lower, lambda x: NOT_GATED[case](gated, x))
    assert not lowering.layers[0].node.kwargs


def test_a_width_that_the_kernel_does_not_gate(lower, layer):
    lowering = check(lower, lambda x: (lambda v, g: v * F.gelu(g))(*layer(x).chunk(2, dim=-1)))
    assert not lowering.layers[0].node.kwargs


def test_geglu_of_diffusers(lower, targets):
    torch.manual_seed(0)
    model = FeedForward(32, activation_fn="geglu").eval()
    sdm.sparsify(model, "2:4", policy="all")
    lowering = check(lower, model)
    assert [name for name in targets(lowering) if name != "dropout"] == ["linear.default", "linear.default"]


def test_chains_of_layers(lower, targets):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)).eval()
    sdm.sparsify(model, "2:4")
    lowering = check(lower, lambda x: x + model(x))
    assert targets(lowering) == ["linear.default", "linear.default"]


NOT_FUSED = {
    "another use": lambda f, x: (lambda y: F.gelu(y) + y.mean())(f(x)),
    "used twice in one sum": lambda f, x: (lambda y: y + y)(f(x)),
    "broadcast": lambda f, x: f(x) + x[:, :1],
    "broadcast the layer": lambda f, x: f(x[:, :1]) + x,
    "scalar": lambda f, x: f(x) + 1.0,
    "alpha": lambda f, x: torch.add(x, f(x), alpha=2),
    "another activation": lambda f, x: F.relu(f(x)),
    "another dtype": lambda f, x: f(x) + x.double(),
    "in-place activation": lambda f, x: F.silu(f(x), inplace=True),
    "in-place add": lambda f, x: (lambda y: y.add_(x))(f(x)),
    "subtraction": lambda f, x: x - f(x),
}


@pytest.mark.parametrize("case", NOT_FUSED)
def test_leaves_alone(lower, layer, case):
    lowering = check(lower, lambda x: NOT_FUSED[case](layer, x))
    assert not lowering.layers[0].node.kwargs


def test_returning_the_layers_output_as_well(lower, layer):
    _, (raw, fused) = lower(lambda x: (lambda y: (y, F.gelu(y)))(layer(x)), [X], PASSES, kernel="cpu")
    with torch.no_grad():
        torch.testing.assert_close(raw, layer(X), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(fused, F.gelu(layer(X)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "mutate", [lambda x: x.mul_(3), lambda x: x.__setitem__(0, 7.0), lambda x: F.relu(x, inplace=True)]
)
def test_an_input_changed_between_layer_and_epilogue(lower, layer, mutate):
    # Fusing moves the layer behind the change of its input.
    def function(x):
        x = x.clone()
        y = layer(x)
        mutate(x)
        return F.gelu(y) + x

    check(lower, function)


def test_augmented_assignment_of_the_input(lower, layer):
    def function(x):
        x = x.clone()
        y = layer(x)
        x += 1
        return F.gelu(y) + x

    check(lower, function)


@pytest.mark.parametrize("kernel", ["reference", "onednn", "dense"])
def test_every_kernel_gives_the_same(lower, layer, kernel):
    def function(x):
        return x + F.silu(layer(x))

    _, output = lower(function, [X], PASSES, kernel=kernel)
    with torch.no_grad():
        torch.testing.assert_close(output, function(X), rtol=1e-5, atol=1e-5)


def test_packed_models(lower, targets, layer):
    with torch.no_grad():
        want = X + F.gelu(layer(X))
    sdm.pack(layer)
    _, output = lower(lambda x: x + F.gelu(layer(x)), [X], PASSES)
    torch.testing.assert_close(output, want, rtol=1e-5, atol=1e-5)
