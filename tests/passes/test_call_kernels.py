"""call_kernels: layers call their kernel's own operator, and nothing else of the graph changes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsedm_compile as sdm
from sparsedm_compile.kernels import get_kernel
from sparsedm_compile.kernels.registry import LayerSpec
from sparsedm_compile.passes import PASSES
from sparsedm_compile.passes.call_kernels import call_kernels
from sparsedm_compile.pattern import Pattern

INFERENCE = [lower for lower in PASSES if lower.__name__ != "swap_training_kernels"]
pytestmark = pytest.mark.skipif(
    get_kernel("cpu").refusal(LayerSpec("linear", (32, 32), Pattern(2, 4))) is not None, reason="no compiler"
)


class Block(nn.Module):
    """A convolution with an activation, a linear with a gate, a linear with a residual."""

    def __init__(self, conv: type[nn.Module] = nn.Conv2d):
        super().__init__()
        torch.manual_seed(0)
        self.conv = conv(32, 32, 3, padding=1, stride=2)
        self.up, self.down = nn.Linear(32, 256), nn.Linear(128, 32, bias=False)

    def forward(self, x):
        x = F.silu(self.conv(x)).flatten(2).mT.contiguous()
        value, gate = self.up(x).chunk(2, dim=-1)
        return self.down(value * F.gelu(gate)) + x


def sparse(conv: type[nn.Module] = nn.Conv2d) -> nn.Module:
    model = Block(conv).eval()
    sdm.sparsify(model, "2:4v2", policy="all")
    return model


@pytest.fixture
def block():
    return sparse()


def operators(lowering) -> list:
    return [layer.node.target for layer in lowering.layers]


def test_the_cpu_kernel_is_called_without_python_in_between(lower, block, masked_dense):
    x = torch.randn(2, 32, 8, 8)
    with torch.no_grad():
        want = masked_dense(block).double()(x.double())
    lowering, output = lower(block, [x], INFERENCE, kernel="cpu")
    cpu = torch.ops.sparsedm_cpu
    assert operators(lowering) == [cpu.conv.default, cpu.linear.default, cpu.linear.default]
    torch.testing.assert_close(output.double(), want, rtol=1e-5, atol=1e-5)
    # explain reads what was fused from the nodes
    assert [layer.fused for layer in lowering.layers] == [("silu",), ("geglu",), ("residual",)]


@pytest.mark.parametrize("kernel", ["reference", "dense"])
def test_kernels_without_an_operator_keep_their_call(lower, targets, block, kernel):
    x = torch.randn(2, 32, 8, 8)
    before, _ = lower(block, [x], [lower for lower in INFERENCE if lower is not call_kernels], kernel=kernel)
    torch._dynamo.reset()
    after, _ = lower(block, [x], INFERENCE, kernel=kernel)
    assert targets(after) == targets(before)


def test_a_conv1d_keeps_its_call_since_the_kernel_sees_it_with_a_height(lower):
    model = sparse(nn.Conv1d)
    x = torch.randn(2, 32, 9)
    with torch.no_grad():
        want = model(x)
    lowering, output = lower(model, [x], INFERENCE, kernel="cpu")
    assert operators(lowering)[0] is torch.ops.sparsedm.conv.default
    torch.testing.assert_close(output, want, rtol=1e-5, atol=1e-5)


def test_packed_models_too(lower):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(128, 128, 3), nn.Flatten(2), nn.Linear(16, 32), nn.Flatten(1), nn.Linear(4096, 128))
    sdm.sparsify(model.eval(), "2:4v2", policy="all")
    x = torch.randn(2, 128, 6, 6)
    with torch.no_grad():
        want = model(x)
        sdm.pack(model)  # the narrow layer in the middle stays masked
    lowering, output = lower(model, [x], INFERENCE)
    cpu = torch.ops.sparsedm_cpu
    assert operators(lowering) == [cpu.conv.default, F.linear, cpu.linear.default]
    torch.testing.assert_close(output, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels_last", [False, True])
def test_compiled_for_any_batch_in_both_memory_formats(block, masked_dense, channels_last):
    if channels_last:
        block = block.to(memory_format=torch.channels_last)
    exact = masked_dense(block).double()
    compiled = torch.compile(block, backend="sparsedm", options={"kernel": "cpu"}, dynamic=True)
    for batch in (2, 5):
        x = torch.randn(batch, 32, 8, 6)
        with torch.no_grad():
            output, want = compiled(x), exact(x.double())
        assert output.stride() == want.stride()
        torch.testing.assert_close(output.double(), want, rtol=1e-5, atol=1e-5)
