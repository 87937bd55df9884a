"""The oneDNN kernel: dense products over a weight packed ahead, any pattern."""

import pytest
import torch
import torch.nn.functional as F

from sparsedm_compile.kernels import Epilogue, LayerSpec, get_kernel
from sparsedm_compile.kernels.reference.kernel import apply_epilogue
from sparsedm_compile.masks import magnitude_mask_naive
from sparsedm_compile.pattern import Pattern

onednn = get_kernel("onednn")
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


def masked64(weight, pattern):
    return (weight if pattern.is_dense else weight * magnitude_mask_naive(weight, pattern)).double()


@pytest.mark.parametrize("pattern", ["dense", "2:4", "1:4v4"])
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("residual", [False, True])
def test_linear(pattern, activation, residual):
    spec = LayerSpec("linear", (24, 40), Pattern.parse(pattern))
    weight, bias, x = torch.randn(24, 40), torch.randn(24), torch.randn(3, 7, 40)
    rest = torch.randn(3, 7, 24) if residual else None
    want = F.linear(x.double(), masked64(weight, spec.pattern), bias.double())
    want = apply_epilogue(want, Epilogue(None, activation, None if rest is None else rest.double()))
    values, index = onednn.pack(weight, spec)
    got = onednn.linear(x, values, index, spec, Epilogue(bias, activation, rest))
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(onednn.unpack(values, index, spec).double(), masked64(weight, spec.pattern))


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
def test_conv2d(groups, activation, stride):
    spec = LayerSpec("conv2d", (16, 32 // groups, 3, 3), Pattern(2, 4), stride=stride, padding=(1, 1), groups=groups)
    weight, bias, x = torch.randn(spec.weight_shape), torch.randn(16), torch.randn(2, 32, 9, 8)
    want = F.conv2d(x.double(), masked64(weight, spec.pattern), bias.double(), stride, 1, 1, groups)
    want = apply_epilogue(want, Epilogue(None, activation))
    values, index = onednn.pack(weight, spec)
    got = onednn.conv(x, values, index, spec, Epilogue(bias, activation))
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    assert got.is_contiguous()
    assert torch.equal(onednn.unpack(values, index, spec).double(), masked64(weight, spec.pattern))


def test_a_strided_weight_packs_like_a_contiguous_one():
    spec = LayerSpec("linear", (24, 40), Pattern(2, 4))
    weight = torch.randn(40, 24).t()
    assert torch.equal(onednn.unpack(*onednn.pack(weight, spec), spec).double(), masked64(weight, spec.pattern))
    spec = LayerSpec("conv2d", (16, 8, 3, 3), Pattern(2, 4))
    weight = torch.randn(16, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    assert torch.equal(onednn.unpack(*onednn.pack(weight, spec), spec).double(), masked64(weight, spec.pattern))


def test_skips_nothing_and_says_so():
    assert not onednn.skips_zeros


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (LayerSpec("linear", (8, 8), Pattern(2, 4), torch.float64), "no fast float64"),
        (LayerSpec("linear", (8, 8), Pattern(2, 4), torch.float32, "cuda"), "CPU only"),
    ],
)
def test_refusals_give_the_reason(spec, message):
    assert message in onednn.refusal(spec)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    linear = LayerSpec("linear", (24, 40), Pattern(2, 4), dtype)
    refusal = onednn.refusal(linear)
    if refusal is not None:
        assert f"no fast {str(dtype).removeprefix('torch.')} on this processor" in refusal
        return
    weight, bias, x = torch.randn(24, 40).to(dtype), torch.randn(24).to(dtype), torch.randn(7, 40).to(dtype)
    values, index = onednn.pack(weight, linear)
    want = F.linear(x.double(), masked64(weight, linear.pattern), bias.double())
    got = onednn.linear(x, values, index, linear, Epilogue(bias))
    torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-3)
    assert torch.equal(onednn.unpack(values, index, linear).double(), masked64(weight, linear.pattern))


def test_half_precision_convolutions_are_refused():
    spec = LayerSpec("conv2d", (16, 32, 3, 3), Pattern(2, 4), torch.bfloat16)
    assert "bfloat16" in onednn.refusal(spec)
