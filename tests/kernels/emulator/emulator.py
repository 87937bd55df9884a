"""Compile a kernel's own CUDA source for the CPU, with its instructions emulated (gpu.h), and launch it there."""

import ctypes
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp

import torch

import sparsedm_compile.kernels.cuda as cuda
from sparsedm_compile.kernels.cuda.launch import Boxed
from sparsedm_compile.kernels.cuda.tensor_map import BOX_COLUMNS

HERE = Path(__file__).parent
available = shutil.which("g++") is not None


@lru_cache
def _library(program):
    path = Path(mkdtemp()) / "kernel.so"
    defines = [f"-D{name}={value}" for name, value in program.defines]
    includes = [f"-I{HERE}", f"-I{cuda.__path__[0]}"]
    source = (HERE / program.source).with_suffix(".cpp")
    command = ["g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", *includes, *defines, str(source), "-o", str(path)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    run = ctypes.CDLL(str(path)).run
    run.restype = ctypes.c_char_p
    return run


def launch(program, grid, device, tensors, numbers, lazy=True):
    """As ``sparsedm_compile.kernels.cuda.launch.launch``, for tensors on the CPU.

    Raises:
        AssertionError: the kernel did what the hardware forbids: see gpu.h.
    """
    boxed = [t.matrix if isinstance(t, Boxed) else t for t in tensors]
    sizes = (ctypes.c_longlong * 3)(*(t.numel() * t.element_size() for t in boxed[:3]))
    maps = [_map(t) if isinstance(t, Boxed) else t for t in tensors]  # kept until the kernel is done
    pointers = [ctypes.c_void_p(0 if t is None else t.data_ptr()) for t in maps]
    ints = (ctypes.c_int * len(numbers))(*numbers)
    error = _library(program)(*grid, program.shared, int(lazy), *pointers[:3], sizes, *pointers[3:], ints)
    assert error is None, error.decode()


def _map(boxed):
    """The tensor map of gpu.h."""
    rows, columns = boxed.matrix.shape
    return torch.tensor([boxed.matrix.data_ptr(), columns, rows, BOX_COLUMNS, boxed.box_rows, *[0] * 11])
