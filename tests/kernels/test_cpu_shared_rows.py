"""Convolutions whose taps share the rows of a panel: every geometry that decides how rows, lanes and blocks are cut."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsedm_compile.kernels.cpu.kernel import CpuKernel
from sparsedm_compile.kernels.registry import Epilogue, LayerSpec
from sparsedm_compile.masks import magnitude_mask
from sparsedm_compile.pattern import Pattern

KERNEL = CpuKernel()
SPEC = LayerSpec("conv2d", (8, 8, 3, 3), Pattern(2, 4))

pytestmark = pytest.mark.skipif(KERNEL.refusal(SPEC) is not None, reason="no C++ compiler here")


def check(
    size: tuple[int, ...],
    weight_shape: tuple[int, ...],
    pattern: str = "2:4",
    stride: int = 1,
    padding: int = 1,
    dilation: int = 1,
    channels_last: bool = False,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Against torch's convolution in float64; the packed weight must also unpack to the masked one."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*size, generator=generator).to(dtype)
    weight = torch.randn(*weight_shape, generator=generator).to(dtype)
    dims = len(weight_shape) - 2
    window = ((stride,) * dims, (padding,) * dims, (dilation,) * dims)
    spec = LayerSpec(f"conv{dims}d", weight_shape, Pattern.parse(pattern), dtype, "cpu", *window)
    masked = weight * magnitude_mask(weight, spec.pattern)
    packed = KERNEL.pack(weight, spec)
    assert torch.equal(KERNEL.unpack(*packed, spec), masked)
    assert [tensor.shape for tensor in KERNEL.empty_packed(spec, torch.device("cpu"))] == [t.shape for t in packed]
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last if dims == 2 else torch.channels_last_3d)
    bias = torch.randn(weight_shape[0], generator=generator).to(dtype)
    out = KERNEL.conv(x, *packed, spec, Epilogue(bias=bias))
    convolve = F.conv2d if dims == 2 else F.conv3d
    exact: Tensor = convolve(x.double(), masked.double(), bias.double(), *window)
    assert out.stride() == convolve(x, masked, bias, *window).stride() or 1 in out.shape
    rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-4  # sums are float32, rounded once
    torch.testing.assert_close(out.double(), exact, rtol=rounding, atol=max(rounding / 16, 1e-4))


# Images narrower than a register, as wide, just wider; rows that do not fill panels; images side by side in a register;
# a row alone (nothing to share), a column alone.
@pytest.mark.parametrize(
    "size", [(1, 1), (4, 4), (6, 6), (7, 7), (8, 8), (9, 5), (13, 13), (17, 3), (3, 17), (28, 28), (1, 40), (40, 1)]
)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("pattern", ["2:4", "2:4v4"])
def test_sizes_of_images(size: tuple[int, int], batch: int, pattern: str) -> None:
    check((batch, 8, *size), (12, 8, 3, 3), pattern)


@pytest.mark.parametrize("kernel", [(3, 1), (1, 3), (2, 2), (5, 3), (7, 7), (4, 1)])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2, 5])
def test_kernels_strides_dilations(kernel: tuple[int, int], stride: int, dilation: int) -> None:
    check((2, 8, 34, 33), (8, 8, *kernel), "2:4v2", stride, 0, dilation)
    check((2, 8, 34, 33), (8, 8, *kernel), "1:4v4", stride, 3, dilation, channels_last=True)


def test_blocks_of_many_channels() -> None:
    """More channels than one block of K holds, and a last block that holds fewer."""
    for channels, pattern in ((132, "2:4"), (132, "1:4v4"), (96, "2:32"), (192, "5:16v4")):
        check((1, channels, 9, 10), (132, channels, 3, 3), pattern)


def test_one_choice_of_channels_does_not_fit() -> None:
    """32 channels of a tall, wide kernel exceed a panel: every tap then has rows of its own."""
    check((1, 32, 12, 40), (8, 32, 9, 31), "8:32", padding=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Steps of two rows leave a slot over where an odd number is kept."""
    for pattern in ("2:4", "1:4v4", "1:12v2"):
        check((2, 36, 9, 20), (20, 36, 3, 3), pattern, dtype=dtype)
        check((1, 12, 8, 8), (20, 12, 3, 3), pattern, stride=2, dtype=dtype)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_work_is_cut_for_any_number_of_threads(threads: int) -> None:
    """By channels where there are enough units of 128, else by rows; never so that something is left out."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for images, height, width, channels in ((1, 5, 9, 8), (1, 16, 16, 8), (2, 7, 24, 8), (1, 6, 6, 700)):
            check((images, 8, height, width), (channels, 8, 3, 3))
        check((1, 512, 9, 9), (512, 512, 3, 3), "2:4v4")  # weights of 4.7 MB: panels take turns
    finally:
        torch.set_num_threads(before)


def test_depth() -> None:
    check((2, 8, 5, 7, 9), (8, 8, 3, 3, 3), "2:4")
    check((1, 8, 6, 9, 8), (8, 8, 2, 3, 1), "2:4v4", stride=2, channels_last=True)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_geometry(data: st.DataObject) -> None:
    draw = data.draw
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 4)))
    stride, dilation, padding = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(0, 3))
    size = [draw(st.integers(max(1, dilation * (k - 1) + 1 - 2 * padding), 24 + dilation * (k - 1))) for k in kernel]
    pattern = draw(st.sampled_from(["2:4", "1:4", "2:4v2", "2:4v4", "1:4v8", "3:8", "4:16v4"]))
    groups = draw(st.integers(1, 3))
    weight_shape = (8 * draw(st.integers(1, 5)), Pattern.parse(pattern).m * groups, *kernel)
    batch = draw(st.integers(1, 3))
    check((batch, weight_shape[1], *size), weight_shape, pattern, stride, padding, dilation, draw(st.booleans()))
