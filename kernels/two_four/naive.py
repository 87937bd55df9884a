"""The oracle of the packed layout: one sparse matrix instruction, register by register.

Written from the tables of the PTX ISA manual and from nothing else, so that the packer and the kernels are held against
the hardware's own description. Lanes are numbered 0-31; ``g = lane >> 2`` is its ``groupID`` and ``t = lane % 4`` its
``threadID_in_group``.
"""

import torch
from torch import Tensor


def mma_sp_m16n8k32(a: Tensor, b: Tensor, metadata: Tensor, selector: int) -> Tensor:
    """``mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{bf16,f16}.{bf16,f16}.f32`` with C = 0.

    Source: PTX ISA, "matrix fragments for sparse mma.m16n8k32 with .f16 and .bf16 types".

    Args:
        a: ``(32 lanes, 8)``, the kept elements a0-a7 of each lane.
        b: ``(32 lanes, 8)``, elements b0-b7 of each lane.
        metadata: ``(32 lanes,)`` int32.
        selector: 0 or 1: lanes t = 0, 1 or t = 2, 3 supply the metadata.

    Returns:
        ``(32 lanes, 4)`` float64, elements c0-c3 of each lane.

    Raises:
        ValueError: metadata that the manual calls invalid: the two positions of a quad equal or not in order.
    """
    dense_a = torch.zeros(16, 32, dtype=torch.float64)
    dense_b = torch.zeros(32, 8, dtype=torch.float64)
    for lane in range(32):
        g, t = lane >> 2, lane % 4
        for i in range(8):
            row = g if i < 2 or 4 <= i < 6 else g + 8
            first_column = t * 4 if i < 4 else t * 4 + 16
            dense_a[row, first_column + _position(metadata, row, first_column // 4, i % 2, selector)] = a[lane, i]
            dense_b[t * 2 + i % 2 + i // 2 * 8, g] = b[lane, i]
    product = dense_a @ dense_b
    c = torch.zeros(32, 4, dtype=torch.float64)
    for lane in range(32):
        g, t = lane >> 2, lane % 4
        for i in range(4):
            c[lane, i] = product[g if i < 2 else g + 8, t * 2 + i % 2]
    return c


def _position(metadata: Tensor, row: int, quad: int, which: int, selector: int) -> int:
    """Where in its quad the first or second kept element of a row stands.

    Of each four lanes the pair that ``selector`` names holds 32 bits each: the even lane columns 0-15, the odd one
    columns 16-31; bits 0-15 for row g, bits 16-31 for row g + 8; four bits a quad, two a position.
    """
    lane = 4 * (row % 8) + 2 * selector + quad // 4
    nibble = int(metadata[lane]) >> (16 * (row // 8) + 4 * (quad % 4)) & 15
    positions = nibble & 3, nibble >> 2
    if positions[0] >= positions[1]:
        raise ValueError(f"metadata 0b{nibble:04b} of row {row}, quad {quad} is invalid: positions must ascend")
    return positions[which]


def matmul(values: Tensor, words: Tensor, x: Tensor) -> Tensor:
    """``x (tokens, K) -> (tokens, rows)`` through the emulated instruction, tile by tile; float64.

    Args:
        values, words: of :func:`~sparsedm_compile.kernels.two_four.fragments.to_fragments`; padding included.
        x: as wide as the packed weight is with its padding; a multiple of 8 tokens.
    """
    tiles, steps = values.shape[:2]
    out = torch.zeros(x.shape[0], tiles * 16, dtype=torch.float64)
    for tile in range(tiles):
        for column in range(0, x.shape[0], 8):
            for step in range(steps):
                b = torch.zeros(32, 8, dtype=torch.float64)
                for lane in range(32):
                    for i in range(8):
                        k = lane % 4 * 2 + i % 2 + i // 2 * 8
                        b[lane, i] = x[column + (lane >> 2), step * 32 + k]
                c = mma_sp_m16n8k32(values[tile, step], b, words[tile, step // 2], step % 2)
                for lane in range(32):
                    for i in range(4):
                        row = tile * 16 + (lane >> 2) + i // 2 * 8
                        out[column + lane % 4 * 2 + i % 2, row] += c[lane, i]
    return out
