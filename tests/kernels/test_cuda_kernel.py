"""The CUDA kernel's own source, run on an emulated GPU, against float64."""

import importlib.util
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from sparsedm_compile.kernels.cuda import kernel as module
from sparsedm_compile.kernels.cuda.kernel import CudaKernel, program
from sparsedm_compile.kernels.cuda.launch import Chip
from sparsedm_compile.kernels.cuda.tiles import MMA_TILES, WGMMA_TILES
from sparsedm_compile.kernels.registry import Epilogue, LayerSpec
from sparsedm_compile.masks import magnitude_mask_naive
from sparsedm_compile.pattern import Pattern

_spec = importlib.util.spec_from_file_location("emulator", Path(__file__).parent / "emulator" / "emulator.py")
emulator = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(emulator)

KERNEL = CudaKernel()
LARGE, MEDIUM, SMALL = MMA_TILES
WIDE, NARROW = WGMMA_TILES
ACTIVATIONS = {
    "none": lambda y: y,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}


@pytest.fixture
def emulated(monkeypatch):
    """Run the kernel on an emulated GPU with one tile; returns a function that chooses the tile."""
    if not emulator.available:
        pytest.skip("needs g++")
    monkeypatch.setattr(module, "chip", lambda device: Chip("emulated", 1, 100 * 1024))

    def use(tile, shared_limit=99 * 1024, lazy=True):
        monkeypatch.setattr(module, "_plan", lambda s, tokens, device: (program(s, tile, shared_limit), tile))
        monkeypatch.setattr(module, "launch", partial(emulator.launch, lazy=lazy))

    use(SMALL)
    return use


def spec(shape, pattern="2:4", dtype=torch.bfloat16, **conv):
    op = "linear" if len(shape) == 2 else "conv2d"
    return LayerSpec(op, shape, Pattern.parse(pattern), dtype, "cuda", **conv)


def masked(weight, pattern="2:4"):
    return weight.double() * magnitude_mask_naive(weight, Pattern.parse(pattern))


def close(out, expected):
    # one rounding on the way out
    eps = torch.finfo(out.dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=eps, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "width", "tokens", "pattern"),
    [(64, 64, 64, "2:4"), (128, 320, 65, "1:4"), (40, 72, 1, "2:4v4"), (200, 136, 150, "2:8")],
)
def test_linear(emulated, dtype, rows, width, tokens, pattern):
    s = spec((rows, width), pattern, dtype)
    weight, x, bias = (torch.randn(size).to(dtype) for size in ((rows, width), (tokens, width), (rows,)))
    out = KERNEL.linear(x, *KERNEL.pack(weight, s), s, Epilogue(bias))
    close(out, F.linear(x.double(), masked(weight, pattern), bias.double()))


def test_single_elements_land_where_they_were(emulated):
    s = spec((64, 64), dtype=torch.float16)
    x = torch.arange(1, 65).half().expand(8, 64)
    for row in range(0, 64, 5):
        column = row * 37 % 64
        weight = torch.zeros(64, 64).half()
        weight[row, column] = 1
        expected = torch.zeros(8, 64).half()
        expected[:, row] = column + 1
        assert torch.equal(KERNEL.linear(x, *KERNEL.pack(weight, s), s, Epilogue()), expected)


@pytest.mark.parametrize(("tile", "limit"), [(SMALL, 163), (MEDIUM, 99), (LARGE, 227), (WIDE, 227), (NARROW, 227)])
@pytest.mark.parametrize("lazy", [True, False])
def test_every_tile_with_copies_late_and_early(emulated, tile, limit, lazy):
    emulated(tile, limit * 1024, lazy)
    s = spec((136, 312))
    weight, x = torch.randn(136, 312).bfloat16(), torch.randn(130, 312).bfloat16()
    out = KERNEL.linear(x, *KERNEL.pack(weight, s), s, Epilogue())
    close(out, x.double() @ masked(weight).T)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [True, False])
def test_epilogues(emulated, activation, with_residual):
    s = spec((64, 64), dtype=torch.float16)
    weight, x, bias = torch.randn(64, 64).half(), torch.randn(3, 5, 64).half(), torch.randn(64).half()
    residual = torch.randn(3, 5, 64).half() if with_residual else None
    out = KERNEL.linear(x * 5, *KERNEL.pack(weight, s), s, Epilogue(bias, activation, residual))
    expected = ACTIVATIONS[activation](F.linear((x * 5).double(), masked(weight), bias.double()))
    close(out, expected + (residual.double() if with_residual else 0))


def test_views_strides_and_offsets(emulated):
    s = spec((64, 64))
    weight = torch.randn(64, 64).bfloat16()
    packed = KERNEL.pack(weight, s)
    base = torch.randn(10, 129).bfloat16()
    for x in (base[:, 1:65], base[:, :128].reshape(20, 64).t()[:, :10].t(), torch.randn(64).bfloat16()):
        out = KERNEL.linear(x, *packed, s, Epilogue())
        assert out.is_contiguous()
        close(out, x.double() @ masked(weight).T)
    assert KERNEL.linear(base[:0, :64], *packed, s, Epilogue()).shape == (0, 64)


def test_columns_behind_the_last_are_not_read(emulated):
    # 72 columns are padded to 128; what lies behind a row of x is the next row, here NaN
    s = spec((64, 72))
    weight, x = torch.randn(64, 72).bfloat16(), torch.randn(2, 72).bfloat16()
    x[1] = float("nan")
    out = KERNEL.linear(x, *KERNEL.pack(weight, s), s, Epilogue())
    close(out[:1], x[:1].double() @ masked(weight).T)
    assert out[1].isnan().all()


CONVOLUTIONS = {
    "3x3": ((64, 64, 3, 3), (2, 9, 7), {"padding": (1, 1)}),
    "3x3 narrow": ((24, 16, 3, 3), (1, 6, 5), {"padding": (1, 1)}),
    "3x3 stride 2": ((32, 80, 3, 3), (2, 9, 8), {"padding": (1, 1), "stride": (2, 2)}),
    "1x1": ((64, 72, 1, 1), (3, 5, 5), {}),
    "1x1 stride 2": ((32, 32, 1, 1), (1, 7, 6), {"stride": (2, 2)}),
    "odd": ((16, 40, 2, 5), (2, 11, 13), {"padding": (3, 1), "stride": (1, 3), "dilation": (2, 1)}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(emulated, name):
    shape, (batch, height, width), conv = CONVOLUTIONS[name]
    s = spec(shape, **conv)
    weight, bias = torch.randn(shape).bfloat16(), torch.randn(shape[0]).bfloat16()
    nchw = torch.randn(batch, shape[1], height, width).bfloat16()
    packed = KERNEL.pack(weight, s)
    expected = F.silu(F.conv2d(nchw.double(), masked(weight), bias.double(), **conv))
    residual = torch.randn(expected.shape).bfloat16()
    for x in (nchw, nchw.contiguous(memory_format=torch.channels_last)):
        out = KERNEL.conv(x, *packed, s, Epilogue(bias, "silu", residual))
        close(out, expected + residual.double())
        assert out.stride() == F.conv2d(x, weight, **conv).stride()


def test_a_nan_goes_where_dense_takes_it_and_no_further(emulated):
    # 16 channels x 9 taps are padded to 192 columns: no tenth tap may touch the image
    s = spec((8, 16, 3, 3), padding=(1, 1))
    weight, x = torch.randn(8, 16, 3, 3).bfloat16(), torch.randn(1, 16, 9, 9).bfloat16()
    x[:, :, 5, 5] = float("nan")
    out = KERNEL.conv(x, *KERNEL.pack(weight, s), s, Epilogue())
    assert torch.equal(out.isnan(), F.conv2d(x.double(), weight.double(), padding=1).isnan())


def test_convolution_with_every_tile(emulated):
    shape, conv = (40, 40, 3, 3), {"padding": (1, 1)}  # six steps: more than stages
    weight, x = torch.randn(shape).bfloat16(), torch.randn(1, 40, 12, 11).bfloat16()
    for tile, lazy in ((MEDIUM, True), (LARGE, False), (WIDE, False), (NARROW, True)):
        emulated(tile, 227 * 1024, lazy)
        s = spec(shape, **conv)
        close(KERNEL.conv(x, *KERNEL.pack(weight, s), s, Epilogue()), F.conv2d(x.double(), masked(weight), padding=1))


@pytest.mark.parametrize("shape", [(64, 64), (40, 72), (24, 16, 3, 3)])
@pytest.mark.parametrize("pattern", ["2:4", "1:8"])
def test_unpacks_exactly(shape, pattern):
    s, weight = spec(shape, pattern), torch.randn(shape).bfloat16()
    values, index = KERNEL.pack(weight, s)
    assert torch.equal(KERNEL.unpack(values, index, s).double(), masked(weight, pattern))
    empty = KERNEL.empty_packed(s, torch.device("cpu"))
    assert [(t.shape, t.dtype) for t in empty] == [(t.shape, t.dtype) for t in (values, index)]


@pytest.mark.parametrize(
    ("s", "reason"),
    [
        (LayerSpec("linear", (64, 64), Pattern(2, 4), torch.bfloat16, "cpu"), "does not run on cpu"),
        (spec((64, 64), dtype=torch.float32), "not float32"),
        (spec((64, 64), "3:4"), "does not fit into 2:4"),
        (spec((64, 66)), "not a multiple of 4"),
        (spec((64, 68)), "multiples of 8, not 64 x 68"),
        (spec((60, 64)), "multiples of 8, not 60 x 64"),
        (spec((64, 32, 3, 3), groups=2), "one group, not 2"),
        (spec((64, 32, 3, 3), padding=(65, 1)), "up to 64"),
        (LayerSpec("conv2d", (64, 64), Pattern(2, 4), torch.bfloat16, "cuda"), "has 4 dimensions, not 2"),
    ],
)
def test_refusals(s, reason):
    assert reason in KERNEL.refusal(s)


def test_says_what_is_missing(monkeypatch):
    s = spec((64, 64))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert KERNEL.refusal(s) == "no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "has 7.5" in KERNEL.refusal(s)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(module.build, "find_spec", lambda name: None)
    assert "CuPy is not installed" in KERNEL.refusal(s)
    monkeypatch.setattr(module.build, "find_spec", lambda name: object())
    assert KERNEL.refusal(s) is None


def test_refuses_images_that_its_offsets_cannot_reach():
    s = spec((8, 8, 1, 1))
    x = torch.empty(1, 8, 1, 8193, dtype=torch.bfloat16, device="meta")
    with pytest.raises(ValueError, match="up to 8192 pixels a side, not 1 x 8193"):
        KERNEL.conv(x, *KERNEL.empty_packed(s, torch.device("meta")), s, Epilogue())
