"""int8 and fp8 through cuSPARSELt, with the library replaced by a dense stand-in that keeps to its rules."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT

from sparsedm_compile.kernels import Epilogue, LayerSpec, choice, get_kernel, kernel_names
from sparsedm_compile.kernels.cusparselt import kernel as module
from sparsedm_compile.kernels.cusparselt import quantized
from sparsedm_compile.kernels.cusparselt.algorithms import Algorithms
from sparsedm_compile.kernels.cusparselt.quantized import quantize
from sparsedm_compile.kernels.two_four.compress import compress, expand
from sparsedm_compile.masks import magnitude_mask_naive
from sparsedm_compile.pattern import Pattern

NAMES = ("cusparselt_int8", "cusparselt_fp8")
DTYPES = {"cusparselt_int8": torch.int8, "cusparselt_fp8": torch.float8_e4m3fn}
RESULTS = {torch.int8: torch.int32, torch.float8_e4m3fn: torch.float32}
TWO_FOUR = Pattern(2, 4)


class Library:
    """8-bit cuSPARSELt as torch shows it, computing densely: kept bytes, then two bits for each."""

    def __init__(self):
        self.broken = False

    def compress(self, weight):
        assert weight.is_contiguous()
        assert all(size % 32 == 0 for size in weight.shape)
        values, quads = compress(weight.float(), TWO_FOUR)
        assert torch.equal(expand(values, quads), weight.float()), "weight is not 2:4"
        positions = quads[:, 0::2] | quads[:, 1::2] << 4
        return torch.cat((values.to(weight.dtype).view(torch.uint8), positions), dim=1).view(weight.dtype)

    def sparse_mm(self, compressed, b, bias=None, alpha=None, out_dtype=None, transpose_result=False, alg_id=0):
        width, tokens = b.shape
        assert b.dtype == compressed.dtype
        assert out_dtype == RESULTS[b.dtype]
        assert b.t().is_contiguous()
        assert (width % 32, tokens % 16) == (0, 0)
        assert transpose_result
        assert bias is None
        positions = compressed[:, width // 2 :].contiguous().view(torch.uint8)
        quads = torch.stack((positions & 15, positions >> 4), dim=2).flatten(1)
        weight = expand(compressed[:, : width // 2].float(), quads)
        return (b.t().double() @ weight.double().t() * (1 + self.broken)).to(out_dtype)


@pytest.fixture
def library(monkeypatch, tmp_path):
    library = Library()
    monkeypatch.setenv("SPARSEDM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch, "_cslt_compress", library.compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", library.sparse_mm)
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", lambda *args, **kwargs: 5)
    monkeypatch.setattr(module, "_unavailable", lambda: None)
    monkeypatch.setattr(module, "_algorithms", Algorithms())
    return library


def spec(shape, pattern="2:4", dtype=torch.bfloat16, **conv):
    op = "linear" if len(shape) == 2 else "conv2d"
    return LayerSpec(op, shape, Pattern.parse(pattern), dtype, "cuda", **conv)


def masked(weight, pattern="2:4"):
    return weight.double() * magnitude_mask_naive(weight, Pattern.parse(pattern))


def rounded(matrix, dtype):
    levels, scale = quantize(matrix, dtype)
    return levels.double() * scale.double()


@pytest.mark.parametrize("dtype", RESULTS)
def test_every_number_is_rounded_to_the_nearest(dtype):
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    numbers = numbers[numbers.isfinite()]
    numbers = numbers[numbers >= -numbers.max()]  # int8 is used symmetrically
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(20, 30, generator=generator) * torch.randn(20, 1, generator=generator).exp()
    scale = matrix.double().abs().amax(1, keepdim=True) / numbers.max()
    nearest = ((matrix.double() / scale)[..., None] - numbers).abs().amin(-1)
    # In steps of the scale, of which float32 knows a number up to 448 to 3e-5.
    torch.testing.assert_close((rounded(matrix, dtype) - matrix).abs() / scale, nearest, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [((1,), torch.bfloat16), ((33,), torch.float16), ((2, 16), torch.bfloat16), ((0,), torch.bfloat16)],
)
def test_linear_is_the_product_of_the_rounded_operands(library, name, tokens, dtype):
    torch.manual_seed(0)
    s = spec((64, 96), dtype=dtype)
    weight, x, bias = (torch.randn(size).to(dtype) for size in ((64, 96), (*tokens, 96), (64,)))
    x *= torch.randn(*tokens, 1).exp().to(dtype)  # tokens of different sizes
    out = get_kernel(name).linear(x, *get_kernel(name).pack(weight, s), s, Epilogue(bias, "silu"))
    assert (out.shape, out.dtype) == ((*tokens, 64), dtype)
    if not out.numel():
        return
    flat, kept = rounded(x.reshape(-1, 96), DTYPES[name]), rounded(masked(weight), DTYPES[name])
    expected = F.silu(F.linear(flat, kept, bias.double())).reshape(out.shape)
    exact = F.silu(F.linear(x.double(), masked(weight), bias.double()))
    assert (out - expected).norm() / expected.norm() < torch.finfo(dtype).eps  # one rounding of the output
    assert 1e-3 < (out - exact).norm() / exact.norm() < {"cusparselt_int8": 0.02, "cusparselt_fp8": 0.08}[name]


@pytest.mark.parametrize("name", NAMES)
def test_pointwise_convolution(library, name):
    s = spec((32, 64, 1, 1))
    weight, x = torch.randn(32, 64, 1, 1).bfloat16(), torch.randn(2, 64, 5, 7).bfloat16()
    out = get_kernel(name).conv(x, *get_kernel(name).pack(weight, s), s, Epilogue())
    expected = F.conv2d(x.double(), masked(weight))
    assert (out - expected).norm() / expected.norm() < 0.06
    assert out.stride() == F.conv2d(x, weight).stride()


@pytest.mark.parametrize("name", NAMES)
def test_unpacks_the_rounded_weight(library, name):
    for shape in ((64, 96), (32, 64, 1, 1)):
        weight, s = torch.randn(shape).half(), spec(shape, dtype=torch.float16)
        values, index = get_kernel(name).pack(weight, s)
        expected = rounded(masked(weight).flatten(1), DTYPES[name]).reshape(shape)
        torch.testing.assert_close(get_kernel(name).unpack(values, index, s).double(), expected, rtol=1e-3, atol=1e-3)
        empty = get_kernel(name).empty_packed(s, torch.device("cpu"))
        assert [(t.shape, t.dtype) for t in empty] == [(t.shape, t.dtype) for t in (values, index)]


@pytest.mark.parametrize("name", NAMES)
def test_goes_dense_where_the_library_is_wrong(library, name, monkeypatch, tmp_path):
    s, weight, x = spec((32, 64)), torch.randn(32, 64).bfloat16(), torch.randn(16, 64).bfloat16()
    kernel = get_kernel(name)
    packed = kernel.pack(weight, s)
    monkeypatch.setattr(quantized, "sparse_product", lambda *_: None)
    torch.testing.assert_close(kernel.linear(x, *packed, s, Epilogue()), F.linear(x, kernel.unpack(*packed, s)))
    library.broken = True
    monkeypatch.setenv("SPARSEDM_CACHE_DIR", str(tmp_path / "another"))
    monkeypatch.setattr(module, "_algorithms", Algorithms())
    with pytest.raises(RuntimeError, match="no right result for 32x64x64"):
        kernel.unpack(*packed, s)


@pytest.mark.parametrize("dtype", RESULTS)
def test_rows_that_are_zero_or_not_finite(dtype):
    matrix = torch.ones(4, 8)
    matrix[0], matrix[1, 3], matrix[2, 3] = 0, torch.inf, torch.nan
    levels, scale = quantize(matrix, dtype)
    product = levels.float() * scale
    assert torch.equal(product[0], torch.zeros(8))
    assert not product[1, 3].isfinite()
    assert product[2].isnan().all()
    assert torch.equal(product[3], torch.ones(8))


def test_only_who_asks_for_it_by_name_gets_it(library, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    asked = []
    monkeypatch.setattr(
        choice, "_measure", lambda *arguments: asked.append(arguments[4]) or choice.Verdict("dense", "")
    )
    x = torch.empty(256, 64, device="meta")
    choice.choose(spec((64, 64)), x, False)
    assert "cusparselt" in asked[0]
    assert not set(NAMES) & set(asked[0])
    assert choice.choose(spec((64, 64)), x, False, forced="cusparselt_int8").kernel == "cusparselt_int8"
    assert set(NAMES) <= set(kernel_names())


@pytest.mark.parametrize(
    ("name", "s", "capability", "reason"),
    [
        ("cusparselt_int8", spec((48, 64)), (9, 0), "multiples of 32, not 48 x 64"),
        ("cusparselt_int8", spec((64, 64), "3:4"), (9, 0), "does not fit into 2:4"),
        ("cusparselt_fp8", spec((64, 64)), (8, 6), "cusparselt_fp8 needs compute capability 8.9, this GPU has 8.6"),
        ("cusparselt_fp8", spec((64, 64)), (8, 9), None),
        ("cusparselt_int8", spec((64, 64)), (8, 0), None),
    ],
)
def test_refusals(library, monkeypatch, name, s, capability, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    refusal = get_kernel(name).refusal(s)
    assert refusal is None if reason is None else reason in refusal


@pytest.mark.parametrize("dtype", RESULTS)
def test_multiples_are_those_that_torch_knows(dtype):
    known = SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS[dtype]
    ours = SimpleNamespace(sparse=quantized._SPARSE, dense=quantized._TOKENS)
    assert (known.sparse_min_rows, known.sparse_min_cols) == (ours.sparse, ours.sparse)
    assert (known.dense_min_rows, known.dense_min_cols) == (ours.dense, ours.dense)
