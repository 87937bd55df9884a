"""sparsedm::two_four_linear: its contract, its gradients, and what it asks of cuSPARSELt (a dense stand-in here)."""

import pytest
import torch
import torch.nn.functional as F
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from sparsedm_compile.kernels.cusparselt import kernel as module
from sparsedm_compile.kernels.cusparselt.algorithms import Algorithms
from sparsedm_compile.kernels.cusparselt.training import compress_and_multiply
from sparsedm_compile.masks import magnitude_mask_naive
from sparsedm_compile.pattern import Pattern

OPERATOR = torch.ops.sparsedm.two_four_linear.default


def operands(x_shape, bias, dtype=torch.float32, pattern="2:4", grad=True):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 32, generator=generator)
    tensors = (
        torch.randn(*x_shape, 32, generator=generator),
        weight * magnitude_mask_naive(weight, Pattern.parse(pattern)),
        torch.randn(32, generator=generator) if bias else None,
    )
    return tuple(t if t is None else t.to(dtype).requires_grad_(grad) for t in tensors)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("x_shape", [(), (5,), (0,), (2, 3, 4)], ids=str)
def test_opcheck(x_shape, bias):
    torch.library.opcheck(OPERATOR, operands(x_shape, bias))


def test_opcheck_of_strided_operands():
    x, masked, bias = operands((6, 3), True, grad=False)
    torch.library.opcheck(OPERATOR, (x.transpose(0, 1).requires_grad_(), masked.t().contiguous().t(), bias))


@pytest.mark.parametrize("wanted", ["xwb", "x", "w", "b"])
def test_gradients_are_those_of_finite_differences(wanted):
    inputs = operands((2, 3), True, torch.float64)
    for tensor, name in zip(inputs, "xwb", strict=True):
        tensor.requires_grad_(name in wanted)
    assert torch.autograd.gradcheck(OPERATOR, inputs, fast_mode=True)


def test_without_a_bias():
    x, masked, _ = operands((5,), False, torch.float64)
    assert torch.autograd.gradcheck(torch.ops.sparsedm.two_four_linear, (x, masked), fast_mode=True)


def test_another_width_is_an_error():
    x, masked, _ = operands((5,), False)
    with pytest.raises(RuntimeError, match="the last dimension of x is 16, the weight takes 32"):
        OPERATOR(x[:, :16].to("meta"), masked.to("meta"))


class Library:
    """cuSPARSELt as torch shows it, computing densely; records its operands."""

    def __init__(self):
        self.compressed, self.products, self.is_wrong = [], [], False

    def compress(self, weight):
        assert weight.is_contiguous()
        self.compressed.append(weight)
        values, meta = sparse_semi_structured_from_dense_cutlass(weight)
        return torch.cat((values, meta.view(weight.dtype)), dim=1)

    def sparse_mm(self, compressed, b, bias=None, alpha=None, out_dtype=None, transpose_result=False, alg_id=0):
        width, tokens = b.shape
        assert (tokens % 8, b.t().is_contiguous(), transpose_result) == (0, True, True)
        self.products.append((tokens, alg_id))
        values, meta = compressed.split((width // 2, width // 16), dim=1)
        weight = sparse_semi_structured_to_dense_cutlass(values.contiguous(), meta.contiguous().view(torch.int16))
        out = F.linear(b.t().float(), weight.float(), None if bias is None else bias.float())
        return (out + 1e3 * self.is_wrong).to(b.dtype)


@pytest.fixture
def library(monkeypatch, tmp_path):
    """The stand-in, where the operator runs on CPU tensors as it does on a GPU's."""
    library = Library()
    monkeypatch.setenv("SPARSEDM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch, "_cslt_compress", library.compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", library.sparse_mm)
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", lambda *args, **kwargs: 7)
    monkeypatch.setattr(module, "_algorithms", Algorithms())
    with torch.library._scoped_library("sparsedm", "IMPL") as implementations:
        implementations.impl("two_four_linear", compress_and_multiply, "CPU")
        yield library


@pytest.mark.parametrize(("dtype", "bias", "pattern"), [(torch.bfloat16, True, "2:4"), (torch.float16, False, "2:4v4")])
@pytest.mark.parametrize("x_shape", [(), (8,), (257,), (2, 3, 4)], ids=str)
def test_forward_compresses_and_multiplies_and_backward_is_dense(library, dtype, bias, pattern, x_shape):
    inputs = operands(x_shape, bias, dtype, pattern)
    x, masked, _ = inputs
    doubles = [t if t is None else t.detach().double().requires_grad_() for t in inputs]
    out = OPERATOR(*inputs)
    want = F.linear(*doubles)
    torch.testing.assert_close(out.double(), want, rtol=1e-2, atol=5e-2)
    assert torch.equal(library.compressed[0], masked)  # the search for an algorithm compresses its own after it
    assert library.products[-1] == (-(-(x.numel() // 32) // 8) * 8, 7)  # padded to eights
    calls = len(library.compressed), len(library.products)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    out.backward(upstream)
    want.backward(upstream.double())
    assert (len(library.compressed), len(library.products)) == calls
    for mine, theirs in zip(inputs, doubles, strict=True):
        if mine is not None:
            scale = theirs.grad.abs().max().item()
            torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-2, atol=1e-2 * scale)


def test_no_tokens(library):
    x, masked, bias = operands((2, 0), True, torch.bfloat16)
    out = OPERATOR(x, masked, bias)
    assert out.shape == (2, 0, 32)
    out.sum().backward()
    assert (x.grad.shape, masked.grad.count_nonzero(), library.products) == (x.shape, 0, [])


def test_dense_where_no_algorithm_is_right(library, caplog):
    library.is_wrong = True
    x, masked, bias = operands((8,), True, torch.float16)
    torch.testing.assert_close(OPERATOR(x, masked, bias), F.linear(x, masked, bias))
    assert "gives wrong results for 32x32x8" in caplog.text
