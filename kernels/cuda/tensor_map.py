"""Matrices as Hopper's copy engine knows them: 128 opaque bytes that the driver makes and a kernel takes by value."""

import ctypes
from functools import cache, lru_cache
from typing import Any

import numpy

#: Columns of a box: 128 bytes of a 16-bit type, the span of the swizzle.
BOX_COLUMNS = 64
# Of cuda.h: CU_TENSOR_MAP_DATA_TYPE_UINT16, _INTERLEAVE_NONE, _SWIZZLE_128B, _L2_PROMOTION_L2_256B,
# _FLOAT_OOB_FILL_NONE. Bits are copied as they are, so any 16-bit type will do.
_UINT16, _NO_INTERLEAVE, _SWIZZLE_128B, _PROMOTE_256B, _FILL_ZEROS = 1, 0, 3, 3, 0


@lru_cache(maxsize=1024)
def tensor_map(address: int, rows: int, columns: int, box_rows: int) -> numpy.ndarray:
    """The map of a contiguous ``(rows, columns)`` matrix of 16-bit elements, in boxes of ``box_rows x BOX_COLUMNS``.

    Boxes are swizzled as the tensor cores read them (16-byte column c of row r at ``c ^ (r % 8)``); what leaves the
    matrix is zeros.

    Args:
        address: of the first element on the GPU, a multiple of 16.
        columns: a multiple of 8, so that rows start at such addresses, too.
        box_rows: at most 256.

    Returns:
        An array of size one, which CuPy passes by value.

    Raises:
        RuntimeError: the driver refuses it.

    Source: CUDA driver API, ``cuTensorMapEncodeTiled``.
    """
    storage = numpy.zeros(192, numpy.uint8)
    start = -storage.ctypes.data % 64  # the driver wants it aligned
    encoded = storage[start : start + 128].view("V128")
    status = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(encoded.ctypes.data),
        _UINT16,
        2,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * 2)(columns, rows),
        (ctypes.c_uint64 * 1)(columns * 2),
        (ctypes.c_uint32 * 2)(BOX_COLUMNS, box_rows),
        (ctypes.c_uint32 * 2)(1, 1),
        _NO_INTERLEAVE,
        _SWIZZLE_128B,
        _PROMOTE_256B,
        _FILL_ZEROS,
    )
    if status != 0:
        raise RuntimeError(
            f"CUDA error {status}: no tensor map for {rows} x {columns} 16-bit elements at {address:#x} in boxes of "
            f"{box_rows} x {BOX_COLUMNS}"
        )
    return encoded


@cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")
