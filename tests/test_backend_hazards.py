"""Graphs in which something changes under the passes' hands: the sparse result must equal the eager one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsedm_compile as sdm

FORCED = {"kernel": "cpu"}


def sparse_linear() -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(64, 64)
    sdm.sparsify(layer, "2:4", policy="all")
    return layer.eval()


def check(model: nn.Module, *inputs: torch.Tensor, options=FORCED) -> None:
    with torch.no_grad():
        expected = model(*(t.clone() for t in inputs))
        given = torch.compile(model, backend="sparsedm", options=options)(*(t.clone() for t in inputs))
    assert (given - expected).norm() <= 1e-5 * expected.norm()


class WritesBetween(nn.Module):
    """Changes the input of a layer after the layer read it and before its epilogue."""

    def __init__(self, write):
        super().__init__()
        self.layer, self.write = sparse_linear(), write

    def forward(self, x):
        h = x * 1
        y = self.layer(h)
        self.write(h)
        return F.gelu(y) + h


@pytest.mark.parametrize(
    "write",
    [lambda h: F.leaky_relu(h, 0.1, True), lambda h: torch.mul(h, 3, out=h), lambda h: h.pow_(2)],
    ids=["inplace by position", "out", "method"],
)
def test_a_layer_is_not_moved_past_a_write_to_its_input(write):
    check(WritesBetween(write), torch.randn(5, 64))


class ChangesItsWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = sparse_linear()

    def forward(self, x):
        self.layer.weight.mul_(-1)  # an involution: eager and compiled calls in turn see the same weights
        y = self.layer(x)
        self.layer.weight.mul_(-1)
        return y


def test_a_weight_changed_inside_the_graph_is_masked_there():
    check(ChangesItsWeight(), torch.randn(5, 64))


class TwoActivations(nn.Module):
    def forward(self, x, w):
        return F.linear(x, w)


def test_activations_are_never_masked():
    check(TwoActivations(), torch.randn(5, 64), torch.randn(64, 64), options={"pattern": "2:4", "policy": "all"})


def test_packed_layers_under_autocast():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64)).eval()
    sdm.sparsify(model, "2:4", policy="all")
    x = torch.randn(5, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=False):
        expected = model(x)
    sdm.pack(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        given = model(x.bfloat16())
    assert (given.float() - expected).norm() <= 2e-2 * expected.norm()
