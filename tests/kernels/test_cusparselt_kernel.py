"""The cuSPARSELt kernel's logic, with the library replaced by a dense stand-in that keeps to its rules."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from sparsedm_compile.kernels.cusparselt import kernel as module
from sparsedm_compile.kernels.cusparselt.algorithms import Algorithms
from sparsedm_compile.kernels.cusparselt.kernel import CuSparseLtKernel
from sparsedm_compile.kernels.registry import Epilogue, LayerSpec
from sparsedm_compile.masks import magnitude_mask_naive
from sparsedm_compile.pattern import Pattern

KERNEL = CuSparseLtKernel()


class Library:
    """cuSPARSELt as torch shows it, computing densely; knows its limits and which of its algorithms are wrong."""

    def __init__(self):
        self.best, self.searches, self.products = 7, 0, []
        self.is_wrong = lambda algorithm, tokens: False

    def compress(self, weight):
        assert weight.is_contiguous()
        values, meta = sparse_semi_structured_from_dense_cutlass(weight)
        assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, meta), weight), "weight is not 2:4"
        return torch.cat((values, meta.view(weight.dtype)), dim=1)

    def sparse_mm(self, compressed, b, bias=None, alpha=None, out_dtype=None, transpose_result=False, alg_id=0):
        width, tokens = b.shape
        assert b.is_contiguous() or b.t().is_contiguous(), "this would be copied"
        assert width % 16 == 0
        assert tokens % 8 == 0
        self.products.append((tokens, alg_id, transpose_result))
        values, meta = compressed.split((width // 2, width // 16), dim=1)
        weight = sparse_semi_structured_to_dense_cutlass(values.contiguous(), meta.contiguous().view(torch.int16))
        out = weight.float() @ b.float()
        if bias is not None:
            out += bias.float()[:, None]
        if self.is_wrong(alg_id, tokens):
            out[0] += 1e3
        out = out.to(b.dtype)
        return out.t().contiguous() if transpose_result else out

    def search(self, *args, **kwargs):
        self.searches += 1
        return self.best


@pytest.fixture
def library(monkeypatch, tmp_path):
    library = Library()
    monkeypatch.setenv("SPARSEDM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch, "_cslt_compress", library.compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", library.sparse_mm)
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", library.search)
    monkeypatch.setattr(module, "_unavailable", lambda: None)
    monkeypatch.setattr(module, "_algorithms", Algorithms())
    return library


def spec(shape, pattern="2:4", dtype=torch.bfloat16, **conv):
    op = "linear" if len(shape) == 2 else "conv2d"
    return LayerSpec(op, shape, Pattern.parse(pattern), dtype, "cuda", **conv)


def masked(weight, pattern="2:4"):
    return weight.double() * magnitude_mask_naive(weight, Pattern.parse(pattern))


@pytest.mark.parametrize("pattern", ["2:4", "2:4v4", "1:4"])
@pytest.mark.parametrize("tokens", [(1,), (8,), (257,), (2, 257), (3, 2, 4), (0,)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear(library, pattern, tokens, with_bias):
    weight, x = torch.randn(64, 96).bfloat16(), torch.randn(*tokens, 96).bfloat16()
    bias = torch.randn(64).bfloat16() if with_bias else None
    s = spec((64, 96), pattern)
    out = KERNEL.linear(x, *KERNEL.pack(weight, s), s, Epilogue(bias))
    expected = F.linear(x.double(), masked(weight, pattern), bias.double() if with_bias else None)
    assert out.is_contiguous()
    torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=1e-2 * 10)
    # a product is never asked for in the layout that needs a transpose
    assert all(transposed for _, _, transposed in library.products)


def test_padding_rows_never_reach_the_output(library):
    weight, x = torch.randn(32, 64).half(), torch.randn(257, 64).half()
    s = spec((32, 64), dtype=torch.float16)
    packed = KERNEL.pack(weight, s)
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        out = KERNEL.linear(x, *packed, s, Epilogue())
    finally:
        torch.use_deterministic_algorithms(False)
    assert out.shape == (257, 32)
    torch.testing.assert_close(out.double(), x.double() @ masked(weight).T, rtol=1e-2, atol=0.05)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "silu"])
def test_pointwise_convolution(library, memory_format, activation):
    weight, bias = torch.randn(32, 64, 1, 1).bfloat16(), torch.randn(32).bfloat16()
    x = torch.randn(2, 64, 5, 7).bfloat16().contiguous(memory_format=memory_format)
    residual = torch.randn(2, 32, 5, 7).bfloat16()
    s = spec((32, 64, 1, 1))
    out = KERNEL.conv(x, *KERNEL.pack(weight, s), s, Epilogue(bias, activation, residual))
    product = F.conv2d(x.double(), masked(weight), bias.double())
    act = {
        "none": lambda y: y,
        "gelu": F.gelu,
        "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
        "silu": F.silu,
    }[activation]
    torch.testing.assert_close(out.double(), act(product) + residual, rtol=2e-2, atol=0.1)
    assert out.stride() == F.conv2d(x, weight).stride()


def test_unpacks_exactly(library):
    for shape in ((64, 96), (32, 64, 1, 1)):
        weight, s = torch.randn(shape).half(), spec(shape, dtype=torch.float16)
        values, index = KERNEL.pack(weight, s)
        assert torch.equal(KERNEL.unpack(values, index, s).double(), masked(weight))
        empty = KERNEL.empty_packed(s, torch.device("cpu"))
        assert [(t.shape, t.dtype) for t in empty] == [(t.shape, t.dtype) for t in (values, index)]


def test_searches_once_per_shape_and_remembers_on_disk(library, monkeypatch):
    s = spec((32, 64))
    packed = KERNEL.pack(torch.randn(32, 64).bfloat16(), s)
    for tokens in (16, 16, 9, 24):  # 9 is padded to 16
        KERNEL.linear(torch.randn(tokens, 64).bfloat16(), *packed, s, Epilogue())
    assert library.searches == 2
    assert library.products[-1][1] == 7
    monkeypatch.setattr(module, "_algorithms", Algorithms())  # a new process
    KERNEL.linear(torch.randn(16, 64).bfloat16(), *packed, s, Epilogue())
    assert library.searches == 2


def test_a_wrong_algorithm_is_not_used(library, caplog):
    library.is_wrong = lambda algorithm, tokens: algorithm == 7
    s, weight, x = spec((32, 64)), torch.randn(32, 64).bfloat16(), torch.randn(16, 64).bfloat16()
    out = KERNEL.linear(x, *KERNEL.pack(weight, s), s, Epilogue())
    assert library.products[-1][1] == 0
    assert "algorithm 7 gives wrong results" in caplog.text
    torch.testing.assert_close(out.double(), x.double() @ masked(weight).T, rtol=1e-2, atol=0.1)


def test_goes_dense_where_every_algorithm_is_wrong(library):
    library.is_wrong = lambda algorithm, tokens: tokens == 16
    s, weight, x = spec((32, 64)), torch.randn(32, 64).bfloat16(), torch.randn(16, 64).bfloat16()
    out = KERNEL.linear(x, *KERNEL.pack(weight, s), s, Epilogue())
    torch.testing.assert_close(out.double(), x.double() @ masked(weight).T, rtol=1e-2, atol=0.1)


def test_says_so_where_it_cannot_even_unpack(library):
    library.is_wrong = lambda algorithm, tokens: True
    s = spec((32, 64))
    packed = KERNEL.pack(torch.randn(32, 64).bfloat16(), s)
    with pytest.raises(RuntimeError, match=r"no right result for 32x64x64.*kernel='dense'"):
        KERNEL.linear(torch.randn(16, 64).bfloat16(), *packed, s, Epilogue())


def test_a_library_error_is_no_result(library, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise RuntimeError("CUSPARSE_STATUS_NOT_SUPPORTED")

    s = spec((32, 64))
    packed = KERNEL.pack(torch.randn(32, 64).bfloat16(), s)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", fail)
    with pytest.raises(RuntimeError, match="no right result"):
        KERNEL.linear(torch.randn(16, 64).bfloat16(), *packed, s, Epilogue())
    assert "NOT_SUPPORTED" in caplog.text


@pytest.mark.parametrize("content", ["{not json", '{"a": "b"}', "[]"])
def test_a_damaged_memory_costs_a_search(library, content, caplog):
    path = Algorithms().path(torch.device("cpu"))
    path.write_text(content)
    s = spec((32, 64))
    KERNEL.linear(torch.randn(8, 64).bfloat16(), *KERNEL.pack(torch.randn(32, 64).bfloat16(), s), s, Epilogue())
    assert library.searches == 1
    assert "searched anew" in caplog.text
    assert list(json.loads(path.read_text()).values()) == [7]


def test_nothing_is_searched_during_a_graph_capture(library, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    s = spec((32, 64))
    KERNEL.linear(torch.randn(8, 64).bfloat16(), *KERNEL.pack(torch.randn(32, 64).bfloat16(), s), s, Epilogue())
    assert library.searches == 0
    assert library.products[-1][1] == 0


@pytest.mark.parametrize(
    ("s", "reason"),
    [
        (LayerSpec("linear", (32, 64), Pattern(2, 4), torch.bfloat16, "cpu"), "does not run on cpu"),
        (spec((32, 64), dtype=torch.float32), "not float32"),
        (spec((32, 64), "3:4"), "does not fit into 2:4"),
        (spec((32, 64), "dense"), "dense"),
        (spec((8, 64)), "multiples of 16, not 8 x 64"),
        (spec((32, 72)), "multiples of 16, not 32 x 72"),
        (spec((32, 64, 3, 3), padding=(1, 1)), "1x1 convolutions"),
        (spec((32, 64, 1, 1), stride=(2, 2)), "1x1 convolutions"),
        (spec((32, 32, 1, 1), groups=2), "1x1 convolutions"),
    ],
)
def test_refusals(library, s, reason):
    assert reason in KERNEL.refusal(s)


def test_takes_what_it_should(library):
    assert KERNEL.refusal(spec((32, 64))) is None
    assert KERNEL.refusal(spec((32, 64, 1, 1), "1:4")) is None


def test_says_what_is_missing(monkeypatch):
    s = spec((32, 64))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert KERNEL.refusal(s) == "no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert "without cuSPARSELt" in KERNEL.refusal(s)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "has 7.5" in KERNEL.refusal(s)
