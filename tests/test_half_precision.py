"""Models in bfloat16 and float16 on a CPU: what runs their layers, and how far the outputs are from exact ones."""

import copy

import pytest
import torch
from torch import nn

import sparsedm_compile as sdm
from sparsedm_compile.kernels import LayerSpec, get_kernel
from sparsedm_compile.models import UViT
from sparsedm_compile.pattern import Pattern

pytestmark = pytest.mark.skipif(
    get_kernel("cpu").refusal(LayerSpec("linear", (8, 8), Pattern(2, 4))) is not None, reason="no C++ compiler here"
)


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 32, 3, padding=1)
        self.down = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.same = nn.Conv2d(64, 64, 3, padding=1)
        self.mix = nn.Conv2d(64, 64, 1)
        self.head = nn.Linear(64, 32)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.down(nn.functional.silu(self.enter(image)))
        x = x + nn.functional.silu(self.same(x))
        return self.head(nn.functional.gelu(self.mix(x)).mean((2, 3)))


def uvit() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    model = UViT(img_size=8, patch_size=2, embed_dim=64, depth=2, num_heads=2, num_classes=-1)
    return model, (torch.randn(2, 3, 8, 8), torch.tensor([3.0, 500.0]))


def conv_net() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return ConvNet(), (torch.randn(2, 3, 16, 16),)


def relative(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(
    ("make", "dtype"), [(uvit, torch.bfloat16), (conv_net, torch.bfloat16), (conv_net, torch.float16)], ids=str
)
def test_a_model_in_half_precision(make, dtype: torch.dtype, masked_dense) -> None:
    """Not farther from the masked dense model in float64 than that model is in this dtype."""
    torch.manual_seed(0)
    model, inputs = make()
    sdm.sparsify(model.eval(), "2:4", policy="all")
    model.to(dtype)
    inputs = tuple(tensor.to(dtype) for tensor in inputs)
    dense = masked_dense(model)
    compiled = torch.compile(model, backend="sparsedm", options={"kernel": "cpu"})
    with torch.no_grad():
        exact = copy.deepcopy(dense).double()(*(tensor.double() for tensor in inputs))
        expected, got = dense(*inputs), compiled(*inputs)
    assert got.dtype == dtype
    assert relative(got, exact) <= 1.25 * relative(expected, exact)
    ran = {layer.name: layer.kernel for layer in sdm.explain(compiled, *inputs).layers if layer.pattern == "2:4"}
    assert len(ran) >= 4
    assert set(ran.values()) == {"cpu"}
