"""The CPU kernel against its float64 oracle, torch's own float64 operators, and the reference mask."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from sparsedm_compile.kernels.cpu.kernel import CpuKernel
from sparsedm_compile.kernels.cpu.naive import conv2d_naive, linear_naive
from sparsedm_compile.kernels.registry import Epilogue, LayerSpec
from sparsedm_compile.masks import magnitude_mask
from sparsedm_compile.pattern import Pattern

KERNEL = CpuKernel()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PATTERNS = ["2:4", "1:4", "2:4v2", "2:4v4", "1:4v4", "2:4v8", "1:4v64", "3:8", "1:2", "2:3", "5:7v2", "1:32", "31:32"]

pytestmark = pytest.mark.skipif(
    KERNEL.refusal(LayerSpec("linear", (8, 8), Pattern(2, 4))) is not None, reason="no C++ compiler here"
)


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(actual: torch.Tensor, exact: torch.Tensor, tolerance: float = 3e-6) -> None:
    """Within ``tolerance`` of the largest output, as float32 sums are, and one rounding to a half-precision dtype."""
    assert actual.shape == exact.shape
    limit = tolerance * exact.abs().max().clamp_min(1)
    if actual.dtype != torch.float32:
        limit = limit + torch.finfo(actual.dtype).eps / 2 * exact.abs()
    assert ((actual - exact).abs() <= limit).all()


@st.composite
def epilogues(draw: st.DrawFn, channels: int, shape: tuple[int, ...], dtype: torch.dtype) -> Epilogue:
    return Epilogue(
        bias=seeded(channels, seed=1, dtype=dtype) if draw(st.booleans()) else None,
        activation=draw(st.sampled_from(["none", "gelu", "gelu_tanh", "silu"])),
        residual=seeded(*shape, seed=2, dtype=dtype) if draw(st.booleans()) else None,
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_linear_equals_naive(data: st.DataObject) -> None:
    pattern = Pattern.parse(data.draw(st.sampled_from(PATTERNS), label="pattern"))
    out = pattern.v * data.draw(st.integers(1, max(1, 40 // pattern.v)), label="out / v")
    width = pattern.m * data.draw(st.integers(1, max(1, 96 // pattern.m)), label="in / m")
    lead = data.draw(st.sampled_from([(1,), (7,), (2, 19), (100,), (3, 1, 5), ()]), label="lead")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    spec = LayerSpec("linear", (out, width), pattern, dtype)
    weight, x = seeded(out, width, dtype=dtype), seeded(*lead, width, seed=3, dtype=dtype)
    epilogue = data.draw(epilogues(out, (*lead, out), dtype))
    actual = KERNEL.linear(x, *KERNEL.pack(weight, spec), spec, epilogue)
    assert actual.is_contiguous()
    assert actual.dtype == dtype
    assert_close(actual, linear_naive(x, weight, spec, epilogue))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_conv2d_equals_naive(data: st.DataObject) -> None:
    pattern = Pattern.parse(data.draw(st.sampled_from(PATTERNS), label="pattern"))
    out = pattern.v * data.draw(st.integers(1, max(1, 20 // pattern.v)), label="out / v")
    width = pattern.m * data.draw(st.integers(1, max(1, 24 // pattern.m)), label="in / m")
    kernel = data.draw(st.sampled_from([(1, 1), (3, 3), (2, 3), (1, 5), (4, 1)]), label="kernel")
    two = st.tuples(st.integers(1, 3), st.integers(1, 3))
    stride, dilation = data.draw(two, label="stride"), data.draw(two, label="dilation")
    padding = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 3)), label="padding")
    least = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, padding, strict=True)]
    size = [low + data.draw(st.integers(0, most)) for low, most in zip(least, (5, 36), strict=True)]
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    spec = LayerSpec("conv2d", (out, width, *kernel), pattern, dtype, "cpu", stride, padding, dilation)
    weight = seeded(out, width, *kernel, dtype=dtype)
    x = seeded(data.draw(st.integers(1, 2)), width, *size, seed=3, dtype=dtype)
    if data.draw(st.booleans(), label="channels_last"):
        x = x.contiguous(memory_format=torch.channels_last)
    dense = F.conv2d(x, weight, None, stride, padding, dilation)
    epilogue = data.draw(epilogues(out, tuple(dense.shape), dtype))
    actual = KERNEL.conv(x, *KERNEL.pack(weight, spec), spec, epilogue)
    assert actual.stride() == dense.stride()
    assert actual.dtype == dtype
    assert_close(actual, conv2d_naive(x, weight, spec, epilogue))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tokens", [1, 7, 257, 1028])
@pytest.mark.parametrize("pattern", ["2:4", "2:4v2", "1:4v4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_of_many_panels_blocks_and_units(pattern: str, tokens: int, threads: int, dtype: torch.dtype) -> None:
    spec = LayerSpec("linear", (700, 520), Pattern.parse(pattern), dtype)
    weight, x = seeded(700, 520, dtype=dtype), seeded(tokens, 520, seed=1, dtype=dtype)
    exact = x.double() @ (weight * magnitude_mask(weight, spec.pattern)).double().T
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual = KERNEL.linear(x, *KERNEL.pack(weight, spec), spec, Epilogue())
    finally:
        torch.set_num_threads(before)
    assert_close(actual, exact)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("channels", "out", "size", "kernel", "stride", "padding"),
    [(128, 131, 32, 3, 1, 1), (64, 300, 16, 3, 2, 1), (320, 64, 8, 1, 1, 0), (40, 48, 33, 5, 3, 2)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_conv2d_of_many_panels_blocks_and_units(
    channels: int,
    out: int,
    size: int,
    kernel: int,
    stride: int,
    padding: int,
    memory_format: torch.memory_format,
    dtype: torch.dtype,
) -> None:
    shape = (out, channels, kernel, kernel)
    spec = LayerSpec("conv2d", shape, Pattern(2, 4), dtype, stride=(stride, stride), padding=(padding, padding))
    weight = seeded(*shape, dtype=dtype)
    x = seeded(2, channels, size, size, seed=1, dtype=dtype).contiguous(memory_format=memory_format)
    exact = F.conv2d(
        x.double(), (weight * magnitude_mask(weight, spec.pattern)).double(), None, spec.stride, spec.padding
    )
    assert_close(KERNEL.conv(x, *KERNEL.pack(weight, spec), spec, Epilogue()), exact, tolerance=1e-5)


@pytest.mark.parametrize(
    "view",
    [
        lambda: seeded(48, 30).T,
        lambda: seeded(30, 96)[:, ::2],
        lambda: seeded(60, 48)[::2],
        lambda: seeded(30, 100)[:, 5:53],
        lambda: seeded(48).expand(30, 48),
        lambda: seeded(5, 48, 6).transpose(1, 2),
    ],
    ids=["transposed", "every second feature", "every second token", "slice", "expanded", "swapped"],
)
def test_linear_takes_any_strides(view) -> None:
    x, spec = view(), LayerSpec("linear", (20, 48), Pattern(2, 4))
    weight = seeded(20, 48)
    actual = KERNEL.linear(x, *KERNEL.pack(weight, spec), spec, Epilogue())
    assert actual.is_contiguous()
    assert_close(actual, linear_naive(x, weight, spec, Epilogue()))


def test_conv2d_takes_any_strides_and_residuals_of_another_format() -> None:
    spec = LayerSpec("conv2d", (12, 8, 3, 3), Pattern(2, 4), padding=(1, 1))
    weight, x = seeded(12, 8, 3, 3), seeded(2, 8, 22, 9)[:, :, ::2]
    residual = seeded(2, 12, 11, 9, seed=4).contiguous(memory_format=torch.channels_last)
    epilogue = Epilogue(residual=residual)
    actual = KERNEL.conv(x, *KERNEL.pack(weight, spec), spec, epilogue)
    assert_close(actual, conv2d_naive(x, weight, spec, epilogue))


def test_memory_beside_the_image_is_never_used() -> None:
    """Whole registers are loaded: a NaN next to the image, or in its last row, must not leak into other outputs."""
    storage = torch.full((8 * 5 * 5 + 64,), math.nan)
    x = storage[: 8 * 5 * 5].view(1, 8, 5, 5)
    x.copy_(seeded(1, 8, 5, 5))
    for padding in (0, 1):
        spec = LayerSpec("conv2d", (6, 8, 3, 3), Pattern(2, 4), padding=(padding, padding))
        weight = seeded(6, 8, 3, 3)
        actual = KERNEL.conv(x, *KERNEL.pack(weight, spec), spec, Epilogue())
        assert_close(actual, conv2d_naive(x, weight, spec, Epilogue()))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("out", "width", "tokens"), [(256, 32, 5), (1280, 200, 130), (2560, 64, 17)])
@pytest.mark.parametrize("pattern", ["2:4", "2:4v2", "1:4v4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_meet_their_values(
    pattern: str, out: int, width: int, tokens: int, threads: int, dtype: torch.dtype
) -> None:
    spec = LayerSpec("linear", (out, width), Pattern.parse(pattern), dtype)
    weight, x, bias = seeded(out, width, dtype=dtype), seeded(tokens, width, seed=1, dtype=dtype), seeded(out, seed=3)
    residual, bias = seeded(tokens, out // 2, seed=2, dtype=dtype), bias.to(dtype)
    product = x.double() @ (weight * magnitude_mask(weight, spec.pattern)).double().T
    value, gate = (product + bias.double()).chunk(2, dim=-1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual = KERNEL.linear(x, *KERNEL.pack(weight, spec), spec, Epilogue(bias, "geglu", residual))
    finally:
        torch.set_num_threads(before)
    assert_close(actual, value * F.gelu(gate) + residual)


def test_gates_need_whole_units_of_channels() -> None:
    spec = LayerSpec("linear", (384, 32), Pattern(2, 4))
    assert not KERNEL.gates(spec)
    assert not KERNEL.gates(LayerSpec("conv2d", (256, 32, 1, 1), Pattern(2, 4)))
    with pytest.raises(ValueError, match="geglu needs a multiple of 256 output channels, got 384"):
        KERNEL.linear(seeded(2, 32), *KERNEL.pack(seeded(384, 32), spec), spec, Epilogue(activation="geglu"))


def every_value(dtype: torch.dtype) -> torch.Tensor:
    """All 65,536, as (8192, 8)."""
    return torch.arange(2**16).to(torch.int16).view(dtype).reshape(-1, 8)


def equal_bits(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    nan = expected.isnan()
    return torch.equal(actual.isnan(), nan) and torch.equal(actual[~nan], expected[~nan])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", ["linear", "conv2d"])
def test_every_half_comes_through_and_is_rounded_once(dtype: torch.dtype, op: str) -> None:
    """Each value times one, then plus a residual, a sum that torch rounds as well: ties, subnormals, overflow, NaN."""
    x, residual = every_value(dtype), every_value(dtype).flatten()
    x = torch.where(x.isfinite(), x, 0)
    if dtype == torch.bfloat16:
        x = torch.where(x.abs() < torch.finfo(dtype).tiny, 0, x)  # subnormal numbers may be taken for zero
    residual = residual[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))].view(-1, 8)
    wide, weight = x.repeat_interleave(2, dim=1), torch.zeros(8, 16, dtype=dtype)
    weight[torch.arange(8), torch.arange(8) * 2 + 1] = 1
    run, spec = KERNEL.linear, LayerSpec("linear", (8, 16), Pattern(1, 2), dtype)
    if op == "conv2d":
        run, spec = KERNEL.conv, LayerSpec("conv2d", (8, 16, 1, 1), Pattern(1, 2), dtype)
        weight = weight[:, :, None, None]
        x, residual, wide = (t.T.reshape(1, -1, 64, 128) for t in (x, residual, wide))
    packed = KERNEL.pack(weight, spec)
    assert equal_bits(run(wide, *packed, spec, Epilogue()), x)
    actual = run(wide, *packed, spec, Epilogue(residual=residual))
    assert equal_bits(actual, (x.float() + residual.float()).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_not_finite_stays_so(dtype: torch.dtype) -> None:
    spec, weight = LayerSpec("linear", (8, 8), Pattern(2, 4), dtype), torch.ones(8, 8, dtype=dtype)
    x = torch.zeros(4, 8, dtype=dtype)
    x[0, 0], x[1, 1], x[2, 4], x[3, 0] = math.inf, -math.inf, math.nan, torch.finfo(dtype).max
    x[3, 1] = torch.finfo(dtype).max
    out = KERNEL.linear(x, *KERNEL.pack(weight, spec), spec, Epilogue())
    assert equal_bits(out, torch.tensor([math.inf, -math.inf, math.nan, math.inf], dtype=dtype)[:, None].expand(4, 8))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "geglu"])
def test_activations_of_any_number(activation: str) -> None:
    """From the largest numbers over those around zero; NaN stays NaN, and what vanishes is 0."""
    span = torch.cat([torch.linspace(-12, 12, 4001), torch.logspace(-30, 38, 300), -torch.logspace(-30, 38, 300)])
    x = torch.cat([span, torch.tensor([math.nan, math.inf, -3.0e38, 3.0e38, 0.0, -50.0])])
    out_features = 512 if activation == "geglu" else 8
    weight = torch.zeros(out_features, 4)
    weight[:, 0] = 1  # every output is the input, and for geglu the value too
    spec = LayerSpec("linear", (out_features, 4), Pattern(2, 4))
    rows = torch.zeros(len(x), 4)
    rows[:, 0] = x
    with_nan = KERNEL.linear(rows, *KERNEL.pack(weight, spec), spec, Epilogue(activation=activation))[:, 0].double()
    assert with_nan[len(span)].isnan()
    out, x = with_nan[~x.isnan()], x[~x.isnan()].double()
    exact = (
        {
            "gelu": lambda: F.gelu(x),
            "gelu_tanh": lambda: F.gelu(x, approximate="tanh"),
            "silu": lambda: F.silu(x),
            "geglu": lambda: (x * F.gelu(x)).clamp(max=math.inf),
        }[activation]()
        .float()
        .double()
    )
    assert (out[x <= -50] == 0).all() or activation in ("silu", "gelu_tanh")
    assert out[x <= -100].abs().max() < 1e-36
    finite = exact.isfinite() & (x > -100)
    error = (out - exact).abs()[finite]
    scale = x.abs()[finite] * (x.abs()[finite] if activation == "geglu" else 1)
    assert (error <= 4e-7 * scale + 1e-44).all(), (error / scale).max()
    assert torch.equal(out[~exact.isfinite()], exact[~exact.isfinite()])


@pytest.mark.parametrize("channels_last", [False, True])
def test_outputs_that_the_system_gives_page_by_page(channels_last: bool) -> None:
    """Beyond 32 MB memory comes from the system, on huge pages where it has them: odd sizes, every element written."""
    spec = LayerSpec("conv2d", (64, 8, 1, 1), Pattern(2, 4))
    weight = seeded(64, 8, 1, 1)
    x = seeded(1, 8, 367, 391, seed=3)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    out = KERNEL.conv(x, *KERNEL.pack(weight, spec), spec, Epilogue())
    assert out.nbytes > 32 << 20
    assert_close(out, F.conv2d(x.double(), (weight * magnitude_mask(weight, spec.pattern)).double()))
    x = x[0].permute(1, 2, 0)
    spec = LayerSpec("linear", (64, 8), Pattern(2, 4))
    out = KERNEL.linear(x, *KERNEL.pack(weight.flatten(1), spec), spec, Epilogue())
    assert_close(out, x.double() @ (weight.flatten(1) * magnitude_mask(weight.flatten(1), spec.pattern)).double().T)


def test_no_tokens() -> None:
    spec = LayerSpec("linear", (8, 8), Pattern(2, 4))
    assert KERNEL.linear(torch.empty(0, 8), *KERNEL.pack(seeded(8, 8), spec), spec, Epilogue()).shape == (0, 8)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kernel", [(), (3, 2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unpack_gives_the_masked_weight_bit_for_bit(pattern: str, kernel: tuple[int, ...], dtype: torch.dtype) -> None:
    parsed = Pattern.parse(pattern)
    shape = (parsed.v * 3 if parsed.v > 1 else 141, parsed.m * 7, *kernel)
    spec = LayerSpec("conv2d" if kernel else "linear", shape, parsed, dtype)
    # Few distinct magnitudes: most choices are ties, and the lower index must win as it does in the reference.
    weight = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(0)).to(dtype) / 3
    values, index = KERNEL.pack(weight, spec)
    expected = torch.where(magnitude_mask(weight, parsed), weight, 0.0)
    unpacked = KERNEL.unpack(values, index, spec)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(unpacked.view(bits), (expected + 0.0).view(bits))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(PATTERNS), st.sampled_from(DTYPES), st.integers(0, 2**31), st.sampled_from([1.0, 1e-30, 1e30]))
def test_mask_equals_the_reference(pattern: str, dtype: torch.dtype, seed: int, scale: float) -> None:
    parsed = Pattern.parse(pattern)
    weight = seeded(parsed.v * 2, parsed.m * 6, seed=seed) * (1 if dtype == torch.float16 else scale)
    weight = weight.to(dtype)
    spec = LayerSpec("linear", tuple(weight.shape), parsed, dtype)
    assert torch.equal(KERNEL.unpack(*KERNEL.pack(weight, spec), spec), weight * magnitude_mask(weight, parsed))


@pytest.mark.parametrize("pattern", ["2:4", "1:4v4", "1:3"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_shapes_depend_on_the_spec_alone(pattern: str, dtype: torch.dtype) -> None:
    spec = LayerSpec("linear", (132 if pattern == "1:4v4" else 129, 396), Pattern.parse(pattern), dtype)
    alike = torch.ones(spec.weight_shape, dtype=dtype)  # every channel keeps the same rows
    for weight in (seeded(*spec.weight_shape, dtype=dtype), alike):
        packed = KERNEL.pack(weight, spec)
        for tensor, empty in zip(packed, KERNEL.empty_packed(spec, torch.device("cpu")), strict=True):
            assert (tensor.shape, tensor.dtype) == (empty.shape, empty.dtype)


def test_empty_packed_on_meta() -> None:
    values, index = KERNEL.empty_packed(LayerSpec("linear", (64, 128), Pattern(2, 4)), torch.device("meta"))
    assert values.is_meta
    assert index.is_meta


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (LayerSpec("linear", (8, 8), Pattern(2, 4), dtype=torch.float64), "float32, bfloat16 and float16, not float64"),
        (LayerSpec("linear", (8, 8), Pattern(2, 4), device="cuda"), "cuda"),
        (LayerSpec("linear", (8, 8), Pattern(2, 4), device="meta"), "meta"),
        (LayerSpec("conv2d", (8, 4, 3, 3), Pattern(2, 4), groups=2), "one group, not 2"),
        (LayerSpec("linear", (8, 6), Pattern(2, 4)), "6 is not a multiple of 4"),
        (LayerSpec("linear", (6, 8), Pattern(2, 4, 4)), "6 is not a multiple of v = 4"),
        (LayerSpec("linear", (8, 8), Pattern(1, 1)), "dense"),
        (LayerSpec("conv2d", (8, 8), Pattern(2, 4)), "4 dimensions, not 2"),
    ],
)
def test_refusals_name_the_reason(spec: LayerSpec, reason: str) -> None:
    assert reason in KERNEL.refusal(spec)


@pytest.mark.parametrize("op", ["linear", "conv2d", "conv3d"])
@pytest.mark.parametrize(("bias", "activation", "residual"), [(False, "none", False), (True, "gelu", True)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck_of_the_operators(op: str, bias: bool, activation: str, residual: bool, channels_last: bool) -> None:
    size, taps = {"linear": ((5,), ()), "conv2d": ((9, 8), (3, 2)), "conv3d": ((4, 5, 6), (2, 3, 3))}[op]
    dims = len(taps)
    constants = ((2, 1, 1)[:dims], (1,) * dims, (1, 2, 1)[:dims])
    spec = LayerSpec(op, (32, 16, *taps), Pattern(2, 4, 2), torch.float32, "cpu", *(constants if dims else ()))
    weight = seeded(32, 16, *taps)
    x = seeded(3, 16, *size, seed=1) if dims else seeded(*size, 16, seed=1)
    if channels_last and dims:
        x = x.contiguous(memory_format=(torch.channels_last, torch.channels_last_3d)[dims - 2])
    epilogue = Epilogue(seeded(32, seed=2) if bias else None, activation)
    out = KERNEL.conv(x, *KERNEL.pack(weight, spec), spec, epilogue) if dims else F.linear(x, weight)
    operator, numbers = KERNEL.operator(spec)
    args = (
        x,
        *KERNEL.pack(weight, spec),
        *numbers,
        epilogue.bias,
        activation,
        seeded(*out.shape) if residual else None,
    )
    torch.library.opcheck(operator, args)
    with FlopCounterMode(display=False) as counter:
        operator(*args)
    positions = out[:, 0].numel() if dims else 5
    assert counter.get_total_flops() == positions * weight.numel()  # two for each weight of the half that is kept


def test_bad_input_is_an_error() -> None:
    spec = LayerSpec("linear", (8, 8), Pattern(2, 4))
    packed = KERNEL.pack(seeded(8, 8), spec)
    with pytest.raises(ValueError, match=r"x: want float32 of shape \(..., 8\)"):
        KERNEL.linear(seeded(3, 4), *packed, spec, Epilogue())
    with pytest.raises(ValueError, match="x: want float32"):
        KERNEL.linear(seeded(3, 8).double(), *packed, spec, Epilogue())
    with pytest.raises(ValueError, match="bias: want float32"):
        KERNEL.linear(seeded(3, 8), *packed, spec, Epilogue(bias=seeded(3)))
    with pytest.raises(ValueError, match="residual: want float32"):
        KERNEL.linear(seeded(3, 8), *packed, spec, Epilogue(residual=seeded(8)))
    with pytest.raises(ValueError, match="values: want"):
        KERNEL.linear(seeded(3, 8), packed[0][1:], packed[1], spec, Epilogue())
    with pytest.raises(ValueError, match="index: want"):
        KERNEL.unpack(packed[0], packed[1][1:], spec)
    with pytest.raises(ValueError, match="NaN"):
        KERNEL.pack(torch.full((8, 8), math.nan), spec)
    with pytest.raises(ValueError, match="want float32, bfloat16 or float16, got Double"):
        KERNEL.pack(seeded(8, 8).double(), spec)
    video = LayerSpec("conv3d", (8, 8, 1, 1, 1), Pattern(2, 4))  # with the two strides of an image
    with pytest.raises(ValueError, match="want 3 numbers each for a weight of shape"):
        KERNEL.conv(seeded(1, 8, 2, 2, 2), *KERNEL.pack(seeded(8, 8, 1, 1, 1), video), video, Epilogue())
    with pytest.raises(ValueError, match="weight: want 2 to 5 dimensions"):
        torch.ops.sparsedm_cpu.pack(seeded(8, 8, 1, 1, 1, 1), 2, 4, 1, [1] * 4, [1] * 4)
    with pytest.raises(ValueError, match="want positive numbers"):
        torch.ops.sparsedm_cpu.pack(seeded(8, 8, 1, 1), 2, 4, 1, [0, 1], [1, 1])
    image = LayerSpec("conv2d", (256, 8, 1, 1), Pattern(2, 4))
    with pytest.raises(ValueError, match="geglu follows linear layers alone"):
        KERNEL.conv(seeded(1, 8, 2, 2), *KERNEL.pack(seeded(256, 8, 1, 1), image), image, Epilogue(activation="geglu"))
    with pytest.raises(ValueError, match="activation: want none, gelu, gelu_tanh, silu or geglu, got relu"):
        KERNEL.linear(seeded(3, 8), *packed, spec, Epilogue(activation="relu"))
    half = LayerSpec("linear", (8, 8), Pattern(2, 4), torch.bfloat16)
    packed_half = KERNEL.pack(seeded(8, 8).bfloat16(), half)
    with pytest.raises(ValueError, match="x: want bfloat16"):
        KERNEL.linear(seeded(3, 8), *packed_half, half, Epilogue())
    with pytest.raises(ValueError, match="bias: want bfloat16"):
        KERNEL.linear(seeded(3, 8).bfloat16(), *packed_half, half, Epilogue(bias=seeded(8)))
    with pytest.raises(ValueError, match="residual: want bfloat16"):
        KERNEL.linear(seeded(3, 8).bfloat16(), *packed_half, half, Epilogue(residual=seeded(3, 8)))
    conv = LayerSpec("conv2d", (8, 8, 3, 3), Pattern(2, 4))
    with pytest.raises(ValueError, match="more than the padded input"):
        KERNEL.conv(seeded(1, 8, 2, 5), *KERNEL.pack(seeded(8, 8, 3, 3), conv), conv, Epilogue())
