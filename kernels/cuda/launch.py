"""Launch a compiled kernel on torch's tensors and torch's current stream, without a copy."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sparsedm_compile.kernels.cuda.build import Defines, cubin_path
from sparsedm_compile.kernels.cuda.tensor_map import tensor_map

_NAME = "sparse_gemm"  # the one entry point of every source


@dataclass(frozen=True)
class Program:
    """One compiled variant of a kernel.

    Attributes:
        source: its file.
        threads: of a block.
        shared: bytes of dynamic shared memory.
    """

    source: str
    defines: Defines
    threads: int
    shared: int


@dataclass(frozen=True)
class Boxed:
    """A contiguous matrix of 16-bit elements that a kernel takes as a tensor map, in boxes of ``box_rows`` rows."""

    matrix: Tensor
    box_rows: int


@dataclass(frozen=True)
class Chip:
    """What of a GPU matters for choosing and compiling a kernel."""

    arch: str
    multiprocessors: int
    shared_limit: int


@lru_cache
def chip(device: torch.device) -> Chip:
    """The GPU that ``device`` names."""
    properties = torch.cuda.get_device_properties(device)
    major, minor = properties.major, properties.minor
    # Instructions of Hopper's own (wgmma) exist in the feature set "a" only.
    arch = f"sm_{major}{minor}" + ("a" if major == 9 else "")
    return Chip(arch, properties.multi_processor_count, properties.shared_memory_per_block_optin)


def launch(program: Program, grid: tuple[int, int], device: torch.device, tensors: list, numbers: list[int]) -> None:
    """Run ``program`` on the current stream of ``device``; may be captured into a CUDA graph once it ran before.

    Args:
        tensors: Tensors or :class:`Boxed`, None for a null pointer; then come ``numbers`` as 32-bit ints.
    """
    import cupy
    import numpy

    index = torch.cuda.current_device() if device.index is None else device.index
    arguments = [_argument(tensor) for tensor in tensors] + [numpy.int32(number) for number in numbers]
    stream = torch.cuda.current_stream(device).cuda_stream
    with cupy.cuda.Device(index), cupy.cuda.ExternalStream(stream):
        _function(program, index)(grid, (program.threads,), tuple(arguments), shared_mem=program.shared)


def _argument(tensor: Tensor | Boxed | None) -> Any:
    if isinstance(tensor, Boxed):
        return tensor_map(tensor.matrix.data_ptr(), *tensor.matrix.shape, tensor.box_rows)
    return 0 if tensor is None else tensor.data_ptr()


@lru_cache(maxsize=256)
def _function(program: Program, index: int):
    import cupy

    path = cubin_path(program.source, chip(torch.device("cuda", index)).arch, program.defines)
    function = cupy.RawModule(path=str(path)).get_function(_NAME)
    function.max_dynamic_shared_size_bytes = program.shared
    return function
