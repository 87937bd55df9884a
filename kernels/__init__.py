"""Kernels that skip the zeros, one folder per device, each beside a naive oracle."""

from sparsedm_compile.kernels.cpu.kernel import CpuKernel
from sparsedm_compile.kernels.cuda.kernel import CudaKernel
from sparsedm_compile.kernels.cusparselt.kernel import CuSparseLtKernel
from sparsedm_compile.kernels.cusparselt.quantized import QuantizedKernel
from sparsedm_compile.kernels.onednn.kernel import OneDnnKernel
from sparsedm_compile.kernels.reference.kernel import ReferenceKernel
from sparsedm_compile.kernels.registry import Epilogue, Kernel, LayerSpec
from sparsedm_compile.kernels.triton.packed_kernel import TritonPackedKernel
from sparsedm_compile.kernels.triton.vector_kernel import TritonVectorKernel

_KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        CpuKernel(),
        OneDnnKernel(),
        CuSparseLtKernel(),
        CudaKernel(),
        TritonVectorKernel(),
        TritonPackedKernel(),
        QuantizedKernel("cusparselt_int8"),
        QuantizedKernel("cusparselt_fp8"),
        ReferenceKernel(),
    )
}


def kernel_names() -> list[str]:
    """Every kernel there is, in the order in which the choice tries them."""
    return list(_KERNELS)


def get_kernel(name: str) -> Kernel:
    """The kernel of this name.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    kernel = _KERNELS.get(name)
    if kernel is None:
        raise ValueError(f"unknown kernel {name!r}: one of {', '.join(_KERNELS)}")
    return kernel


__all__ = ["Epilogue", "Kernel", "LayerSpec", "get_kernel", "kernel_names"]
