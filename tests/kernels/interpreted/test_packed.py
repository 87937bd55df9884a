"""``TritonPackedKernel`` in the interpreter (fp16 and float32: bf16 is wrong there) against float64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sparsedm_compile.kernels.ops  # noqa: F401  (registers the operators)
from sparsedm_compile.kernels import Epilogue, LayerSpec, get_kernel
from sparsedm_compile.kernels.triton.naive import packed_naive
from sparsedm_compile.pattern import Pattern

KERNEL = get_kernel("triton_packed")
PATTERNS = ["1:2", "2:4", "1:4v2", "3:4", "4:8v4", "1:16", "1:32", "9:32v8", "1:3", "2:5", "5:12v2"]


def linear_spec(pattern: str, out_features: int, groups: int, dtype: torch.dtype) -> LayerSpec:
    p = Pattern.parse(pattern)
    return LayerSpec("linear", (out_features, groups * p.m), p, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_linear(assert_true, pattern, dtype):
    torch.manual_seed(0)
    spec = linear_spec(pattern, 40, 37, dtype)  # an odd number of groups: padded words, padded copies
    weight, x = torch.randn(spec.weight_shape, dtype=dtype), torch.randn(19, spec.weight_shape[1], dtype=dtype)
    epilogue = Epilogue(torch.randn(40, dtype=dtype), "gelu", torch.randn(19, 40, dtype=dtype))
    packed = KERNEL.pack(weight, spec)
    assert_true(KERNEL.linear(x, *packed, spec, epilogue), x, weight, spec, epilogue)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_packed_weight_means_what_the_oracle_reads(assert_true, pattern):
    torch.manual_seed(0)
    spec = linear_spec(pattern, 8, 19, torch.float32)
    weight, x = torch.randn(spec.weight_shape), torch.randn(2, spec.weight_shape[1])
    out = packed_naive(x, *KERNEL.pack(weight, spec), spec)
    assert_true(out, x, weight, spec, Epilogue())


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 80),
    out_features=st.integers(1, 20).map(lambda i: 4 * i),
    pattern=st.sampled_from(PATTERNS[:5]),
    activation=st.sampled_from(["none", "gelu", "gelu_tanh", "silu"]),
    seed=st.integers(0, 99),
)
def test_any_shape(truth, rows, groups, out_features, pattern, activation, seed):
    torch.manual_seed(seed)
    spec = linear_spec(pattern, out_features, groups, torch.float32)
    weight, x = torch.randn(spec.weight_shape), torch.randn(rows, spec.weight_shape[1])
    epilogue = Epilogue(None, activation, None)
    out = KERNEL.linear(x, *KERNEL.pack(weight, spec), spec, epilogue)
    # Absolute: a SiLU of a few small numbers may be nearly zero. Products of unit normals, up to 640 of them.
    assert (out - truth(x, weight, spec, epilogue)).abs().max() < 1e-4


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_pointwise_convolution(assert_true, memory_format):
    torch.manual_seed(0)
    spec = LayerSpec("conv2d", (24, 16, 1, 1), Pattern(2, 4), torch.float32)
    weight = torch.randn(spec.weight_shape)
    x = torch.randn(2, 16, 3, 5).to(memory_format=memory_format)
    epilogue = Epilogue(torch.randn(24), "silu", torch.randn(2, 24, 3, 5))
    out = KERNEL.conv(x, *KERNEL.pack(weight, spec), spec, epilogue)
    assert_true(out, x, weight, spec, epilogue)
    assert out.stride() == torch.nn.functional.conv2d(x, weight).stride()


def test_an_infinite_row_spoils_only_itself():
    spec = linear_spec("2:4", 8, 10, torch.float32)
    x = torch.randn(5, 40)
    x[2] = torch.inf
    out = KERNEL.linear(x, *KERNEL.pack(torch.randn(8, 40), spec), spec, Epilogue())
    assert out[[0, 1, 3, 4]].isfinite().all()


def test_no_rows():
    spec = linear_spec("2:4", 8, 10, torch.float32)
    assert KERNEL.linear(torch.ones(0, 40), *KERNEL.pack(torch.ones(8, 40), spec), spec, Epilogue()).shape == (0, 8)


def test_the_operator_runs_it(assert_true):
    spec = linear_spec("1:4", 12, 10, torch.float32)
    weight, x = torch.randn(12, 40), torch.randn(2, 3, 40)
    out = torch.ops.sparsedm.linear(x, *KERNEL.pack(weight, spec), "triton_packed", "1:4", [12, 40])
    assert_true(out, x, weight, spec, Epilogue())
    torch.library.opcheck(torch.ops.sparsedm.linear, (x, *KERNEL.pack(weight, spec), "triton_packed", "1:4", [12, 40]))


@pytest.mark.parametrize(
    ("x", "epilogue", "message"),
    [
        (torch.zeros(2, 36), Epilogue(), "x has 36 channels"),
        (torch.zeros(2, 40).half(), Epilogue(), "x is torch.float16, the layer computes in torch.float32"),
        (torch.zeros(2, 40), Epilogue(bias=torch.zeros(9)), r"bias has shape \(9,\)"),
    ],
)
def test_operands_that_do_not_fit_are_refused(x, epilogue, message):
    spec = linear_spec("2:4", 8, 10, torch.float32)
    with pytest.raises(ValueError, match=message):
        KERNEL.linear(x, *KERNEL.pack(torch.ones(8, 40), spec), spec, epilogue)
