"""The register layout of sparse matrix instructions: a packed weight is loaded by lanes as it lies in memory.

The unit is the tile of one ``mma.sp::ordered_metadata.m16n8k32`` (bf16, fp16): 16 rows, 32 columns, of which 16 are
stored. ``wgmma.mma_async.sp.m64nNk32`` with A in registers gives each of its four warps such a tile, in the same
layout, so one packing serves both (PTX ISA, "matrix fragments for sparse mma.m16n8k32" and "wgmma.mma_async.sp").

Lane ``4 g + t`` holds of a tile, in this order, rows g and g + 8 of stored columns 2t, 2t + 1, then the same rows of
stored columns 2t + 8, 2t + 9: sixteen bytes, one 128-bit load. Of the four lanes of a quad, t = 0 and 1 hold the
metadata of a tile (sparsity selector 0) and t = 2 and 3 that of the tile to its right (selector 1), so 64 columns share
one word a lane: rows g (low half) and g + 8 (high half), sixteen columns for each t. The two tiles lie side by side and
not one above the other because the four warps of a ``wgmma`` have one selector: each brings its own rows.
"""

import torch
from torch import Tensor

#: Rows of a tile; weights are padded to a multiple.
ROW_BLOCK = 16
#: Columns that share a metadata word; they are the depth of one main-loop step of the kernels, too.
K_BLOCK = 64
# Of a quad whose two values are padding, the positions 0 and 1: equal positions would be undefined behaviour.
_PADDING_QUAD = 0b0100


def padded_shape(rows: int, width: int) -> tuple[int, int]:
    """``(rows, K)`` rounded up to whole blocks."""
    return -(-rows // ROW_BLOCK) * ROW_BLOCK, -(-width // K_BLOCK) * K_BLOCK


def packed_shapes(rows: int, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of values and metadata for a ``(rows, K)`` matrix: see :func:`to_fragments`."""
    rows, width = padded_shape(rows, width)
    return (rows // 16, width // 32, 32, 8), (rows // 16, width // K_BLOCK, 32)


def to_fragments(values: Tensor, quads: Tensor) -> tuple[Tensor, Tensor]:
    """Reorder what :func:`~sparsedm_compile.kernels.two_four.compress.compress` gave into register order.

    Args:
        values: ``(rows, K / 2)``, a 16-bit dtype.
        quads: ``(rows, K / 4)`` uint8.

    Returns:
        values ``(rows / 16, K / 32, 32 lanes, 8)`` and metadata words ``(rows / 16, K / 64, 32 lanes)`` int32, rows
        rounded up to 16 and K to 64 with zeros.

    Raises:
        TypeError: values are not 16 bits wide.
    """
    if values.element_size() != 2:
        raise TypeError(f"to_fragments packs 16-bit values (bfloat16, float16), got {values.dtype}")
    rows, width = padded_shape(values.shape[0], values.shape[1] * 2)
    padded = values.new_zeros(rows, width // 2)
    padded[: values.shape[0], : values.shape[1]] = values
    # (tile, row half, g, k, column half, t, pair) -> (tile, k, g, t, column half, row half, pair)
    tiles = padded.reshape(rows // 16, 2, 8, width // 32, 2, 4, 2).permute(0, 3, 2, 5, 4, 1, 6)
    words = quads.new_full((rows, width // 4), _PADDING_QUAD)
    words[: quads.shape[0], : quads.shape[1]] = quads
    # two quads a byte, the earlier one in the low bits
    octets = words[:, 0::2] | words[:, 1::2] << 4
    # (tile, row half, g, k, t, byte) -> (tile, k, g, t, row half, byte)
    octets = octets.reshape(rows // 16, 2, 8, width // K_BLOCK, 4, 2).permute(0, 3, 2, 4, 1, 5)
    shapes = packed_shapes(rows, width)
    return tiles.reshape(shapes[0]), octets.reshape(*shapes[1], 4).view(torch.int32).squeeze(-1)


def from_fragments(values: Tensor, words: Tensor, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`to_fragments`: ``(rows, K / 2)`` values and ``(rows, K / 4)`` quads, without padding."""
    tall, wide = padded_shape(rows, width)
    tiles = values.reshape(tall // 16, wide // 32, 8, 4, 2, 2, 2).permute(0, 5, 2, 1, 4, 3, 6)
    octets = words.contiguous().view(torch.uint8).reshape(tall // 16, wide // K_BLOCK, 8, 4, 2, 2)
    octets = octets.permute(0, 4, 2, 1, 3, 5).reshape(tall, wide // 8)
    quads = torch.stack((octets & 15, octets >> 4), dim=2).reshape(tall, wide // 4)
    return tiles.reshape(tall, wide // 2)[:rows, : width // 2].contiguous(), quads[:rows, : width // 4].contiguous()
