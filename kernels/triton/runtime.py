"""What both Triton kernels ask of the machine, and how they find the device to launch on."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from sparsedm_compile.dtypes import dtype_name
from sparsedm_compile.kernels.registry import Epilogue, Kernel, LayerSpec

#: 0, 1, 2, 3 in the kernels: a branch on a compile-time number costs nothing.
ACTIVATIONS = {"none": 0, "gelu": 1, "gelu_tanh": 2, "silu": 3}


@cache
def is_installed() -> bool:
    """Whether triton can be imported, without importing it."""
    return find_spec("triton") is not None


@cache
def interpreting() -> bool:
    """Whether Triton runs its kernels in numpy on CPU tensors (``TRITON_INTERPRET=1``), as the tests do."""
    if not is_installed():
        return False
    import triton

    return triton.knobs.runtime.interpret


def machine_refusal(spec: LayerSpec, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why no Triton kernel can run this layer on this machine, or None."""
    if not is_installed():
        return "triton is not installed: pip install triton"
    if spec.dtype not in dtypes:
        names = " and ".join(dtype_name(dtype) for dtype in dtypes)
        return f"takes {names}, not {dtype_name(spec.dtype)}"
    if interpreting():
        return None
    if spec.device != "cuda":
        return f"runs on CUDA devices, not on {spec.device}"
    return _cuda_refusal()


@cache
def _cuda_refusal() -> str | None:
    if torch.version.hip is not None:
        return "written for NVIDIA GPUs, this is ROCm"
    if not torch.cuda.is_available():
        return "no CUDA device is available"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"needs compute capability 8.0 (bf16 tensor cores, asynchronous copies), this is {major}.{minor}"
    return None


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the one that holds ``x``."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def aligned(x: Tensor) -> Tensor:
    """``x``, copied if its storage offset breaks the 16-byte alignment that vector loads need."""
    return x.clone(memory_format=torch.preserve_format) if x.data_ptr() % 16 else x


def check_operands(spec: LayerSpec, x: Tensor, channel_dim: int, epilogue: Epilogue, out: Tensor) -> None:
    """Refuse operands that the kernel would read as something else.

    Raises:
        ValueError: dtype, shape or device of an operand is not what ``spec`` and the output say.
    """
    out_features, in_features = spec.weight_shape[:2]
    if x.shape[channel_dim] != in_features:
        raise ValueError(f"x has {x.shape[channel_dim]} channels in {tuple(x.shape)}, the weight takes {in_features}")
    expected = {"x": (x, x.shape), "bias": (epilogue.bias, (out_features,)), "residual": (epilogue.residual, out.shape)}
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.dtype != spec.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, the layer computes in {spec.dtype}: convert {name}")
        if tensor.shape != torch.Size(shape):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the layer needs {tuple(shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: move {name}")
    if epilogue.activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {epilogue.activation!r}: one of {', '.join(ACTIVATIONS)}")


def require(kernel: Kernel, spec: LayerSpec) -> None:
    """Raise where ``kernel`` refuses ``spec``, before Triton fails in a way that explains nothing.

    Raises:
        ValueError: with the reason.
    """
    refusal = _refusal(kernel, spec)
    if refusal is not None:
        raise ValueError(f"kernel {kernel.name!r} cannot take {spec}: {refusal}")


@lru_cache(maxsize=4096)
def _refusal(kernel: Kernel, spec: LayerSpec) -> str | None:
    return kernel.refusal(spec)
