import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from sparsedm_compile.passes.effects import may_write


@torch.library.custom_op("sparsedm_tests::scale_", mutates_args=("x",))
def scale_(x: torch.Tensor) -> None:
    x.mul_(2)


def node(op, target, *args, **kwargs):
    graph = fx.Graph()
    x = graph.placeholder("x")
    return graph.create_node(op, target, (x, *args), kwargs)


WRITES = {
    "inplace by position": ("call_function", F.leaky_relu, (0.1, True), {}),
    "inplace by name": ("call_function", F.silu, (), {"inplace": True}),
    "out": ("call_function", torch.mul, (3,), {"out": 0}),
    "overload": ("call_function", torch.ops.aten.add_.Tensor, (1,), {}),
    "packet": ("call_function", torch.ops.aten.add_, (1,), {}),
    "augmented power": ("call_function", operator.ipow, (2,), {}),
    "item": ("call_function", operator.setitem, (0, 1), {}),
    "method": ("call_method", "mul_", (3,), {}),
    "dunder": ("call_method", "__iadd__", (3,), {}),
    "custom operator": ("call_function", torch.ops.sparsedm_tests.scale_.default, (), {}),
    "module": ("call_module", "anything", (), {}),
}
PURE = {
    "add": ("call_function", operator.add, (1,), {}),
    "index": ("call_function", operator.getitem, (0,), {}),
    "function": ("call_function", F.leaky_relu, (0.1, False), {}),
    "default": ("call_function", F.silu, (), {}),
    "linear": ("call_function", F.linear, (), {}),
    "overload": ("call_function", torch.ops.aten.add.Tensor, (1,), {}),
    "method": ("call_method", "reshape", (-1,), {}),
    "dunder": ("call_method", "__getitem__", (0,), {}),
}


@pytest.mark.parametrize(("op", "target", "args", "kwargs"), WRITES.values(), ids=WRITES)
def test_writing_nodes(op, target, args, kwargs):
    assert may_write(node(op, target, *args, **kwargs))


@pytest.mark.parametrize(("op", "target", "args", "kwargs"), PURE.values(), ids=PURE)
def test_pure_nodes(op, target, args, kwargs):
    assert not may_write(node(op, target, *args, **kwargs))
