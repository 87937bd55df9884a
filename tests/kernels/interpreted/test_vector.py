"""``TritonVectorKernel`` in the interpreter (fp16: bf16 is wrong there) against float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sparsedm_compile.kernels.ops  # noqa: F401  (registers the operators)
from sparsedm_compile.kernels import Epilogue, LayerSpec, get_kernel
from sparsedm_compile.kernels.triton.naive import vector_naive
from sparsedm_compile.pattern import Pattern

KERNEL = get_kernel("triton")
HALF = torch.float16


def linear_spec(pattern: str, out_features: int, in_features: int) -> LayerSpec:
    return LayerSpec("linear", (out_features, in_features), Pattern.parse(pattern), HALF)


def conv_spec(pattern: str, c_out: int, c_in: int, window=3, stride=1, padding=1, dilation=1) -> LayerSpec:
    pairs = [(a, a) if isinstance(a, int) else a for a in (window, stride, padding, dilation)]
    return LayerSpec("conv2d", (c_out, c_in, *pairs[0]), Pattern.parse(pattern), HALF, "cpu", *pairs[1:])


@pytest.fixture
def check(assert_true):
    """Run a layer of random weights on x and hold it against the truth."""

    def run(spec: LayerSpec, x: torch.Tensor, epilogue: Epilogue = Epilogue()) -> torch.Tensor:  # noqa: B008
        torch.manual_seed(0)
        weight = torch.randn(spec.weight_shape, dtype=HALF)
        packed = KERNEL.pack(weight, spec)
        out = (KERNEL.linear if spec.op == "linear" else KERNEL.conv)(x, *packed, spec, epilogue)
        assert_true(out, x, weight, spec, epilogue)
        return out

    return run


@pytest.mark.parametrize("rows", [1, 16, 33])
@pytest.mark.parametrize("pattern", ["1:2v32", "1:4v64", "2:4v32", "3:4v32", "2:8v32", "4:8v32", "1:16v32", "5:16v32"])
def test_linear(check, pattern, rows):
    spec = linear_spec(pattern, 64, 144)  # two and a quarter steps of the interpreter's tile
    check(spec, torch.randn(rows, 144, dtype=HALF))


@pytest.mark.parametrize(("v", "out_features"), [(32, 96), (32, 160), (64, 192), (128, 256), (256, 256)])
def test_strips_narrower_and_wider_than_the_tile(check, v, out_features):
    spec = linear_spec(f"2:4v{v}", out_features, 32)
    check(spec, torch.randn(17, 32, dtype=HALF))


@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("added", [False, True], ids=["", "residual"])
def test_epilogue(check, activation, biased, added):
    spec = linear_spec("2:4v32", 64, 40)
    bias = torch.randn(64, dtype=HALF) if biased else None
    residual = torch.randn(20, 64, dtype=HALF) if added else None
    x = torch.randn(20, 40, dtype=HALF)
    check(spec, x, Epilogue(bias, activation, residual))


CONVOLUTIONS = {
    "3x3": conv_spec("2:4v32", 64, 24),
    "3x3, several steps a tap": conv_spec("1:4v32", 32, 136),
    "3x3 stride 2": conv_spec("2:4v32", 32, 16, stride=2),
    "3x3 dilation 2": conv_spec("2:4v32", 32, 16, padding=2, dilation=2),
    "3x3 without padding": conv_spec("2:8v32", 32, 16, padding=0),
    "1x1": conv_spec("2:4v32", 32, 40, window=1, padding=0),
    "1x1 stride 2": conv_spec("2:4v32", 32, 40, window=1, stride=2, padding=0),
    "1x1 padded": conv_spec("2:4v32", 32, 16, window=1, padding=1),
    "all constants differ by axis": conv_spec("2:4v32", 32, 16, (3, 2), (2, 1), (1, 2), (1, 3)),
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("spec", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_conv2d(check, spec, memory_format):
    x = torch.randn(2, spec.weight_shape[1], 6, 7, dtype=HALF).to(memory_format=memory_format)
    weight = torch.empty(spec.weight_shape, dtype=HALF)
    dense = F.conv2d(x, weight, None, spec.stride, spec.padding, spec.dilation)
    residual = torch.randn(dense.shape, dtype=HALF)  # in NCHW whatever x is
    out = check(spec, x, Epilogue(torch.randn(spec.weight_shape[0], dtype=HALF), "silu", residual))
    assert out.stride() == dense.stride()


@pytest.mark.parametrize("spec", [linear_spec("2:4v32", 64, 24), *CONVOLUTIONS.values()])
def test_packed_weight_means_what_the_oracle_reads(assert_true, spec):
    torch.manual_seed(0)
    weight = torch.randn(spec.weight_shape, dtype=HALF)
    x = torch.randn((3, 24) if spec.op == "linear" else (1, spec.weight_shape[1], 4, 5), dtype=HALF)
    out = vector_naive(x, *KERNEL.pack(weight, spec), spec)
    assert_true(out, x, weight, spec, Epilogue())


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 12).map(lambda i: 16 * i),
    blocks=st.integers(1, 3),
    v=st.sampled_from([32, 64]),
    nm=st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 8), (4, 16)]),
    seed=st.integers(0, 99),
)
def test_small_integers_are_exact(truth, rows, width, blocks, v, nm, seed):
    """fp16 holds these sums exactly, so a single wrong, doubled or missing product shows."""
    generator = torch.Generator().manual_seed(seed)
    spec = linear_spec(f"{nm[0]}:{nm[1]}v{v}", blocks * v, width)
    weight = torch.randint(-3, 4, spec.weight_shape, generator=generator).to(HALF)
    x = torch.randint(-3, 4, (rows, width), generator=generator).to(HALF)
    out = KERNEL.linear(x, *KERNEL.pack(weight, spec), spec, Epilogue())
    assert torch.equal(out.double(), truth(x, weight, spec, Epilogue()))


def test_an_infinite_row_spoils_only_itself():
    """Reads beyond the end of a row must be masked in x too: zero weight times infinity is NaN."""
    spec = linear_spec("2:4v32", 32, 40)
    x = torch.randn(5, 40, dtype=HALF)
    x[2] = torch.inf
    torch.manual_seed(0)
    out = KERNEL.linear(x, *KERNEL.pack(torch.randn(32, 40, dtype=HALF), spec), spec, Epilogue())
    assert out[[0, 1, 3, 4]].isfinite().all()


def test_dropped_inputs_are_not_read_into_the_product():
    """Selection comes before the product: NaN in an input that no channel keeps changes nothing."""
    spec = linear_spec("2:4v32", 32, 16)
    weight = torch.ones(32, 16, dtype=HALF)
    weight[:, 3::4] = 0
    x = torch.randn(4, 16, dtype=HALF)
    x[:, 3::4] = torch.nan
    out = KERNEL.linear(x, *KERNEL.pack(weight, spec), spec, Epilogue())
    assert out.isfinite().all()


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 3, 5, 32, dtype=HALF),
        torch.randn(32, dtype=HALF),
        torch.randn(32, 9, dtype=HALF).T,
        torch.randn(9, 40, dtype=HALF)[:, 4:36],
        torch.randn(9 * 32 + 3, dtype=HALF)[3:].view(9, 32),  # 6 bytes off: 64-bit words would straddle
    ],
    ids=["4d", "1d", "transposed", "sliced", "misaligned"],
)
def test_any_strides_and_dimensions(check, x):
    assert check(linear_spec("2:4v32", 32, 32), x).is_contiguous()


def test_no_rows():
    spec = linear_spec("2:4v32", 32, 32)
    x = torch.ones(0, 32, dtype=HALF)
    assert KERNEL.linear(x, *KERNEL.pack(torch.ones(32, 32, dtype=HALF), spec), spec, Epilogue()).shape == (0, 32)


def test_the_operator_runs_it(assert_true):
    spec = linear_spec("2:4v32", 32, 32)
    weight, x = torch.randn(32, 32, dtype=HALF), torch.randn(7, 32, dtype=HALF)
    out = torch.ops.sparsedm.linear(x, *KERNEL.pack(weight, spec), "triton", "2:4v32", [32, 32])
    assert_true(out, x, weight, spec, Epilogue())
    torch.library.opcheck(torch.ops.sparsedm.linear, (x, *KERNEL.pack(weight, spec), "triton", "2:4v32", [32, 32]))


@pytest.mark.parametrize(
    ("x", "epilogue", "message"),
    [
        (torch.zeros(2, 24, dtype=HALF), Epilogue(), "x has 24 channels"),
        (torch.zeros(2, 32), Epilogue(), "x is torch.float32, the layer computes in torch.float16"),
        (torch.zeros(2, 32, dtype=HALF), Epilogue(bias=torch.zeros(31, dtype=HALF)), r"bias has shape \(31,\)"),
        (torch.zeros(2, 32, dtype=HALF), Epilogue(residual=torch.zeros(32, dtype=HALF)), r"residual has shape \(32,\)"),
        (torch.zeros(2, 32, dtype=HALF), Epilogue(activation="relu"), "unknown activation 'relu': one of none, gelu"),
    ],
)
def test_operands_that_do_not_fit_are_refused(x, epilogue, message):
    spec = linear_spec("2:4v32", 32, 32)
    with pytest.raises(ValueError, match=message):
        KERNEL.linear(x, *KERNEL.pack(torch.ones(32, 32, dtype=HALF), spec), spec, epilogue)
