"""find_layers: every linear and convolution of the graph with its constants; nothing else."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsedm_compile as sdm
from sparsedm_compile.passes import find_layers
from sparsedm_compile.pattern import Pattern

CONVS = {
    "plain": ({}, ((1, 1), (0, 0), (1, 1), 1), ""),
    "all": ({"stride": 2, "padding": 1, "dilation": 2, "groups": 2}, ((2, 2), (1, 1), (2, 2), 2), ""),
    "pairs": ({"stride": (2, 1), "padding": (0, 1), "dilation": (1, 2)}, ((2, 1), (0, 1), (1, 2), 1), ""),
    "valid": ({"padding": "valid"}, ((1, 1), (0, 0), (1, 1), 1), ""),
    "same": ({"padding": "same"}, ((1, 1), (1, 1), (1, 1), 1), ""),
    "same dilated": ({"padding": "same", "dilation": 2}, ((1, 1), (2, 2), (2, 2), 1), ""),
    "same even": ({"padding": "same", "kernel_size": 2}, None, "pads one side more"),
    "circular": ({"padding": 1, "padding_mode": "circular"}, ((1, 1), (0, 0), (1, 1), 1), ""),
}


@pytest.mark.parametrize("case", CONVS)
def test_constants_of_a_convolution(lower, case):
    kwargs, want, unusual = CONVS[case]
    conv = nn.Conv2d(8, 8, **{"kernel_size": 3, **kwargs})
    sdm.sparsify(conv, "2:4", policy="all")
    lowering, _ = lower(conv, [torch.randn(1, 8, 9, 9)], [find_layers])
    (layer,) = lowering.layers
    spec = layer.spec
    if want is not None:
        assert (spec.stride, spec.padding, spec.dilation, spec.groups) == want
    assert spec.weight_shape == tuple(conv.weight.shape)
    assert (spec.op, spec.pattern, spec.dtype, spec.device) == ("conv2d", Pattern(2, 4), torch.float32, "cpu")
    assert (unusual in layer.unusual) if unusual else layer.unusual == ""


def test_masked_and_plain_layers_in_execution_order_with_their_names(lower):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(8, 8)
            self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8))])

        def forward(self, x):
            return self.last(self.blocks[1](self.blocks[0](x)))

    model = Net()
    sdm.sparsify(model, "1:4", policy="all", rules={"last": "dense"})
    lowering, _ = lower(model, [torch.randn(2, 8)], [find_layers])
    assert [layer.name for layer in lowering.layers] == ["blocks.0", "blocks.1.0", "last"]
    assert [str(layer.spec.pattern) for layer in lowering.layers] == ["1:4", "1:4", "dense"]
    assert [layer.mask is not None for layer in lowering.layers] == [True, True, False]


def test_changes_no_node(lower, targets):
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU())
    sdm.sparsify(model, "2:4", policy="all")
    before, _ = lower(model, [torch.randn(2, 8)], [])
    torch._dynamo.reset()
    after, _ = lower(model, [torch.randn(2, 8)], [find_layers])
    assert targets(before) == targets(after)


def test_functional_calls_by_keyword(lower):
    weight, image = nn.Parameter(torch.randn(8, 8, 3, 3)), torch.randn(1, 8, 6, 6)
    lowering, _ = lower(lambda x: F.conv2d(x, weight=weight, stride=2, bias=None), [image], [find_layers])
    assert lowering.layers[0].spec.stride == (2, 2)
    torch._dynamo.reset()
    matrix = nn.Parameter(torch.randn(8, 8))
    lowering, _ = lower(lambda x: F.linear(input=x, weight=matrix), [torch.randn(2, 8)], [find_layers])
    assert lowering.layers[0].spec.op == "linear"


def test_weights_computed_in_the_graph_are_no_layers(lower):
    weight = nn.Parameter(torch.randn(8, 8))
    lowering, _ = lower(lambda x: F.linear(x, weight * 2) + x @ weight, [torch.randn(2, 8)], [find_layers])
    assert lowering.layers == []


def test_one_weight_used_twice_is_two_layers_of_one_weight(lower):
    layer = nn.Linear(8, 8)
    sdm.sparsify(layer, "2:4", policy="all")
    lowering, _ = lower(lambda x: layer(layer(x)), [torch.randn(2, 8)], [find_layers])
    one, two = lowering.layers
    assert one.weight is two.weight


def in_autocast(layer, x):
    with torch.autocast("cpu", torch.bfloat16):
        return layer(x)


@pytest.mark.parametrize(
    ("call", "words"),
    [(lambda layer, x: layer(x[0]), "without a batch dimension"), (in_autocast, "autocast")],
    ids=["one image", "autocast"],
)
def test_unusual_calls(lower, call, words):
    conv = nn.Conv2d(8, 8, 3)
    lowering, _ = lower(lambda x: call(conv, x), [torch.randn(2, 8, 6, 6)], [find_layers])
    assert words in lowering.layers[0].unusual


def test_packed_layers_come_with_their_kernel(lower):
    model = nn.Sequential(nn.Linear(64, 64), nn.Conv2d(64, 64, 1))
    sdm.sparsify(model, "2:4", policy="all")
    sdm.pack(model)

    def run(x):
        return model[1](model[0](x).reshape(2, 64, 1, 1))

    lowering, _ = lower(run, [torch.randn(2, 64)], [find_layers])
    for layer, module in zip(lowering.layers, model, strict=True):
        assert layer.verdict is None if module.kernel == "dense" else layer.verdict.kernel == module.kernel


def test_operator_called_in_a_users_own_way(lower):
    from sparsedm_compile.kernels import LayerSpec, get_kernel

    values, index = get_kernel("reference").pack(torch.randn(8, 8), LayerSpec("linear", (8, 8), Pattern(2, 4)))

    def by_keyword(x):
        return torch.ops.sparsedm.linear(
            x, values=values, index=index, kernel="reference", pattern="2:4", weight_shape=[8, 8]
        )

    def computed(x):
        return torch.ops.sparsedm.linear(x, values * 2, index, "reference", "2:4", [8, 8])

    for function in (by_keyword, computed):
        torch._dynamo.reset()
        x = torch.randn(2, 8)
        lowering, output = lower(function, [x], [find_layers])
        assert lowering.layers == []
        assert torch.equal(output, function(x))
