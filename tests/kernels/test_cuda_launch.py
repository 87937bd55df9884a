"""What a launch hands to CuPy and to the driver, on stand-ins for both."""

import ctypes
import re
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

from sparsedm_compile.kernels.cuda import launch as module
from sparsedm_compile.kernels.cuda import tensor_map as maps
from sparsedm_compile.kernels.cuda.launch import Boxed, Program, launch


class Driver:
    """``libcuda`` as ctypes sees it; writes what it was asked for into the map."""

    def __init__(self, status=0):
        self.status, self.calls = status, []

    def cuTensorMapEncodeTiled(self, target, dtype, rank, address, sizes, strides, box, steps, *modes):
        self.calls.append((dtype, rank, address.value, [*sizes], [*strides], [*box], [*steps], modes))
        assert target.value % 64 == 0
        ctypes.memmove(target, bytes(range(128)), 128)
        return self.status


@pytest.fixture
def driver(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(maps, "_driver", lambda: driver)
    maps.tensor_map.cache_clear()
    yield driver
    maps.tensor_map.cache_clear()


def cuda_h():
    """NVIDIA's own header, which Triton carries."""
    triton = find_spec("triton")
    header = triton and Path(triton.submodule_search_locations[0], "backends", "nvidia", "include", "cuda.h")
    if not header or not header.exists():
        pytest.skip("needs the cuda.h that Triton carries")
    return header.read_text()


def test_a_map_says_what_the_driver_must_know(driver):
    encoded = maps.tensor_map(0x7000, 257, 320, 128)
    assert (encoded.size, encoded.nbytes) == (1, 128)  # CuPy passes arrays of size one by value
    assert encoded.tobytes() == bytes(range(128))
    ((dtype, rank, address, sizes, strides, box, steps, modes),) = driver.calls
    assert (rank, address, sizes, strides, box, steps) == (2, 0x7000, [320, 257], [640], [64, 128], [1, 1])
    header = cuda_h()
    names = ("DATA_TYPE_UINT16", "INTERLEAVE_NONE", "SWIZZLE_128B", "L2_PROMOTION_L2_256B", "FLOAT_OOB_FILL_NONE")
    for value, name in zip((dtype, *modes), names, strict=True):
        declared = next(body for body in re.findall(r"typedef enum \w+ {(.*?)}", header, re.S) if name in body)
        members = re.findall(r"CU_TENSOR_MAP_(\w+)", declared)
        assert members[value] == name  # none of them has a number of its own in the header, but the first: 0


def test_the_same_matrix_is_encoded_once(driver):
    assert maps.tensor_map(0x7000, 257, 320, 128) is maps.tensor_map(0x7000, 257, 320, 128)
    maps.tensor_map(0x8000, 257, 320, 128)
    assert len(driver.calls) == 2


def test_a_refusal_of_the_driver_names_the_matrix(driver):
    driver.status = 1
    with pytest.raises(RuntimeError, match=r"CUDA error 1: no tensor map for 257 x 320 .* at 0x7000 in boxes of 512"):
        maps.tensor_map(0x7000, 257, 320, 512)


@pytest.fixture
def launches(monkeypatch, driver):
    """What reaches CuPy's function: (grid, block, arguments, shared bytes), and the stream it runs on."""
    seen = []
    cupy = SimpleNamespace(
        cuda=SimpleNamespace(
            Device=lambda index: seen.append(("device", index)) or nullcontext(),
            ExternalStream=lambda stream: seen.append(("stream", stream)) or nullcontext(),
        )
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))
    monkeypatch.setattr(
        module,
        "_function",
        lambda program, index: (
            lambda grid, block, arguments, shared_mem: seen.append((grid, block, arguments, shared_mem))
        ),
    )
    return seen


def test_tensors_go_by_address_and_matrices_for_the_copy_engine_by_map(launches):
    x, values = torch.zeros(257, 320, dtype=torch.bfloat16), torch.zeros(8)
    program = Program("wgmma.cu", (), 256, 12345)
    launch(program, (3, 2), torch.device("cuda", 1), [values, Boxed(x, 128), None], [7, -1])
    device, stream, (grid, block, arguments, shared) = launches
    assert (device, stream) == (("device", 1), ("stream", 77))  # torch's own, so that a capture sees the launch
    assert (grid, block, shared) == ((3, 2), (256,), 12345)
    assert arguments[0] == values.data_ptr()
    assert arguments[1] is maps.tensor_map(x.data_ptr(), 257, 320, 128)
    assert arguments[2:] == (0, 7, -1)
    assert [a.dtype for a in arguments[3:]] == [numpy.int32] * 2
