"""insert_masks: masks for a plain dense model; policy and rules as in sparsify."""

import copy

import pytest
import torch
from torch import nn

import sparsedm_compile as sdm
from sparsedm_compile.passes import find_layers, insert_masks

PASSES = [find_layers, insert_masks]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patch_embed = nn.Conv2d(8, 32, 1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(2))
        self.odd = nn.Linear(32, 50)
        self.head = nn.Linear(50, 32)

    def forward(self, x):
        x = self.patch_embed(x).mean((2, 3))
        for block in self.blocks:
            x = block(x)
        return self.head(self.odd(x))


X = torch.randn(3, 8, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "options",
    [
        {"pattern": "2:4"},
        {"pattern": "1:4", "policy": "all"},
        {"pattern": "2:4v4", "policy": "all", "rules": {"blocks.1.*": "dense", "blocks.0.0": "1:4"}},
        {"pattern": "2:4", "policy": lambda layer: layer.weight_shape[0] == 64 or "narrow"},
    ],
    ids=["default", "all", "rules", "callable"],
)
def test_equals_sparsify(lower, options):
    model, twin = Net().eval(), Net().eval()
    lowering, output = lower(model, [X], PASSES, **options)
    pattern = options.pop("pattern")
    plan = sdm.sparsify(twin, pattern, **options)
    got = {layer.name: (str(layer.spec.pattern), layer.dense_reason) for layer in lowering.layers}
    assert got == {layer.name: (str(layer.pattern), layer.reason) for layer in plan}
    with torch.no_grad():
        torch.testing.assert_close(output, twin(X), rtol=1e-6, atol=1e-6)


def test_the_mask_stands_between_weight_and_layer(lower, targets):
    lowering, _ = lower(nn.Linear(8, 8), [torch.randn(2, 8)], PASSES, pattern="2:4", policy="all")
    assert targets(lowering) == ["masked_weight.default", "linear"]
    (layer,) = lowering.layers
    assert layer.mask.args == (layer.weight, "2:4")
    assert layer.node.args[1] is layer.mask


@pytest.mark.parametrize("pattern", [None, "dense"])
def test_nothing_to_do(lower, targets, pattern):
    options = {} if pattern is None else {"pattern": pattern}
    lowering, _ = lower(nn.Linear(8, 8), [torch.randn(2, 8)], PASSES, **options)
    assert targets(lowering) == ["linear"]


def test_a_graph_without_layers(lower):
    lowering, output = lower(torch.sin, [torch.zeros(3)], PASSES, pattern="2:4")
    assert lowering.layers == []
    assert torch.equal(output, torch.zeros(3))


def test_a_weight_used_twice_is_masked_for_both(lower):
    layer = nn.Linear(8, 8, bias=False)
    x = torch.randn(2, 8)
    _, output = lower(lambda x: layer(layer(x)), [x], PASSES, pattern="2:4", policy="all")
    masked = sdm.masked_weight(layer.weight.detach(), "2:4")
    torch.testing.assert_close(output, x @ masked.T @ masked.T)


def test_a_sparse_model_is_refused(lower):
    model = copy.deepcopy(nn.Sequential(nn.Linear(8, 8)))
    sdm.sparsify(model, "2:4", policy="all")
    with pytest.raises(Exception, match=r"layer '0' was made sparse by sparsify; drop the option"):
        lower(model, [torch.randn(2, 8)], PASSES, pattern="1:4")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rules": {"nothing": "2:4"}}, "rule 'nothing' matches no layer; layers are: 'patch_embed'"),
        ({"rules": {"head": "2:4"}}, "layer 'head' cannot be 2:4 as its rule demands: input width 50"),
        ({"policy": "sparsedm"}, "found none of its layers"),
    ],
)
def test_errors(lower, options, message):
    with pytest.raises(Exception, match=message):
        lower(Net(), [X], PASSES, pattern="2:4", **options)
