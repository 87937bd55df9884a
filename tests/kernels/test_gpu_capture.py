"""What may be captured in a CUDA graph: once warm, no GPU kernel reads a value, waits, or allocates but for outputs.

The devices are stand-ins; what is looked at is every operator that torch runs around a launch.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparsedm_compile.kernels import Epilogue, LayerSpec, get_kernel
from sparsedm_compile.kernels.cuda import kernel as cuda
from sparsedm_compile.kernels.cuda.launch import Chip
from sparsedm_compile.kernels.cusparselt import kernel as cusparselt
from sparsedm_compile.kernels.triton import packed_kernel, vector_kernel
from sparsedm_compile.pattern import Pattern

# Views; fresh memory; copies on the device and arithmetic on what is there.
HARMLESS = {"view", "_unsafe_view", "permute", "unsqueeze", "slice", "t", "transpose", "detach", "as_strided", "alias"}
ALLOCATE, COMPUTE = {"empty", "new_empty", "empty_like", "clone"}, {"copy_", "add", "silu", "gelu"}
PATTERN = {"cuda": "2:4", "cusparselt": "2:4", "triton": "2:4v64", "triton_packed": "2:4"}


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(operator.overloadpacket.__name__)
        return operator(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch):
    """Replace every launch by a note of it."""
    seen = []
    monkeypatch.setattr(cuda, "chip", lambda device: Chip("sm_90a", 132, 227 << 10))
    monkeypatch.setattr(cuda, "launch", lambda *launch: seen.append("cuda"))

    class Launcher:
        def __getitem__(self, grid):
            return lambda **arguments: seen.append("triton")

    for module in (vector_kernel, packed_kernel):
        monkeypatch.setattr(module, "_program", lambda: (Launcher(), {}))
        monkeypatch.setattr(module, "machine_refusal", lambda spec, dtypes: None)
    prepared = {shape: torch.zeros(shape, dtype=torch.bfloat16) for shape in ((264, 128), (512, 128), (8, 128))}
    monkeypatch.setattr(
        torch,
        "_cslt_sparse_mm",
        lambda w, b, **_: seen.append("cusparselt") or prepared[b.shape[1], 128],
    )
    monkeypatch.setattr(torch, "_cslt_compress", lambda w: torch.zeros(128, 36, dtype=torch.bfloat16))
    monkeypatch.setattr(cusparselt._algorithms, "get", lambda problem, device: 3)
    return seen


def layer(kernel, shape, **conv):
    op = "linear" if len(shape) == 2 else "conv2d"
    return LayerSpec(op, shape, Pattern.parse(PATTERN[kernel]), torch.bfloat16, "cuda", **conv)


@pytest.mark.parametrize("kernel", PATTERN)
@pytest.mark.parametrize("tokens", [257, 512])
def test_linear_layers(kernel, tokens, launches):
    s = layer(kernel, (128, 64))
    packed = get_kernel(kernel).pack(torch.randn(128, 64).bfloat16(), s)
    x, bias, residual = (torch.randn(size).bfloat16() for size in ((tokens, 64), (128,), (tokens, 128)))
    with Operators() as operators:
        get_kernel(kernel).linear(x, *packed, s, Epilogue(bias, "silu", residual))
    assert len(launches) == 1
    assert {*operators.names} <= HARMLESS | ALLOCATE | COMPUTE
    # cuSPARSELt's own output is the library's; an odd number of tokens is padded, once
    padded = kernel == "cusparselt" and tokens % 8 > 0
    assert sum(name in ALLOCATE for name in operators.names) == (kernel != "cusparselt") + padded
    assert operators.names.count("copy_") == padded


@pytest.mark.parametrize("kernel", ["cuda", "triton"])
def test_convolutions_of_channels_last_images(kernel, launches):
    s = layer(kernel, (128, 64, 3, 3), padding=(1, 1))
    packed = get_kernel(kernel).pack(torch.randn(128, 64, 3, 3).bfloat16(), s)
    x, residual = (
        torch.randn(2, channels, 8, 8).bfloat16().contiguous(memory_format=torch.channels_last)
        for channels in (64, 128)
    )
    epilogue = Epilogue(torch.randn(128).bfloat16(), "silu", residual)
    with Operators() as operators:
        get_kernel(kernel).conv(x, *packed, s, epilogue)
    assert len(launches) == 1
    assert {*operators.names} - HARMLESS <= ALLOCATE
    assert sum(name in ALLOCATE for name in operators.names) == 1  # the output


def test_another_number_of_tokens_compiles_nothing(launches, monkeypatch):
    """Dynamic shapes: sizes are arguments of a launch, not constants of the code."""
    seen = []
    monkeypatch.setattr(cuda, "launch", lambda program, grid, *_: seen.append((program, grid)))
    s = layer("cuda", (128, 64))
    packed = get_kernel("cuda").pack(torch.randn(128, 64).bfloat16(), s)
    for tokens in (257, 300, 512):
        get_kernel("cuda").linear(torch.randn(tokens, 64).bfloat16(), *packed, s, Epilogue())
    assert len({program for program, _ in seen}) == 1
    assert len({grid for _, grid in seen}) > 1
