"""The Triton code of packed N:M: for few rows, where the time is the time to read the weight.

A row of activations meets every weight once, so the floor is the weight's bytes over the memory bandwidth. The weight
stays packed in memory (16 bits a kept value, 1, 2, 4 or 8 bits a position: 2:4 reads 36 bits where dense reads 64) and
is unpacked in registers: position p of a group is value s where slot s names p, otherwise zero. The product is then a
dense tensor-core product, whose wasted multiplications are free: at 16 rows the weight's bytes take ten times longer
than its FLOPs on every chip since sm_80.
"""

import triton
import triton.language as tl

from sparsedm_compile.kernels.triton.epilogue import activate


@triton.jit
def packed_kernel(
    x_ptr,  # (rows, K)
    values_ptr,  # (N, n, GROUPS), groups = K / m rounded up to whole words
    index_ptr,  # (N / V, n, groups / PER_WORD) int32, PER_WORD positions of BITS bits each
    bias_ptr,
    residual_ptr,  # (rows, N), as out
    out_ptr,
    rows,
    N,
    K,
    GROUPS8,  # stored groups / 8: the factor tells the compiler that 16-byte copies are aligned
    bucket,  # rows rounded up to a power of two: for the choice of tile only
    n: tl.constexpr,
    m: tl.constexpr,
    M_PADDED: tl.constexpr,  # m rounded up to a power of two, as tensor shapes must be
    V: tl.constexpr,
    BITS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of BLOCK_N channels by BLOCK_M rows, in steps of BLOCK_K unpacked inputs."""
    PER_WORD: tl.constexpr = 32 // BITS
    BLOCK_G: tl.constexpr = BLOCK_K // M_PADDED
    groups = GROUPS8 * 8
    first_channel = tl.program_id(0) * BLOCK_N
    first_row = tl.program_id(1) * BLOCK_M
    channel = tl.arange(0, BLOCK_N)
    row = tl.arange(0, BLOCK_M)
    g = tl.arange(0, BLOCK_G)
    depth = tl.arange(0, BLOCK_K)
    word = tl.arange(0, BLOCK_G // PER_WORD)
    # Channels beyond the last repeat it; they are not stored.
    from_channel = tl.minimum(first_channel + channel, N - 1).to(tl.int64)
    value_at = values_ptr + (from_channel * n * groups)[:, None] + g[None, :]
    index_at = index_ptr + (from_channel // V * n * (groups // PER_WORD))[:, None] + word[None, :]
    x_tile = x_ptr + first_row.to(tl.int64) * K
    row_ok = first_row + row < rows
    # Position of each unpacked input in x; where m is no power of two, each group leaves a gap.
    k = depth if m == M_PADDED else depth // M_PADDED * m + depth % M_PADDED
    x_at = k[:, None] + row[None, :] * K

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, groups, BLOCK_G):
        in_depth = start + g < groups
        dense = tl.zeros((BLOCK_N, BLOCK_G, M_PADDED), values_ptr.dtype.element_ty)
        for slot in tl.static_range(n):
            value = tl.load(value_at + slot * groups + start, mask=in_depth[None, :], other=0.0)
            packed = tl.load(
                index_at + (slot * groups + start) // PER_WORD,
                mask=(start + word * PER_WORD < groups)[None, :],
                other=0,
            )
            position = packed[:, :, None] >> (tl.arange(0, PER_WORD) * BITS)[None, None, :] & ((1 << BITS) - 1)
            position = tl.reshape(position, (BLOCK_N, BLOCK_G))
            here = position[:, :, None] == tl.arange(0, M_PADDED)[None, None, :]
            dense = tl.where(here, value[:, :, None], dense)
        inside = start * m + k < K
        if m != M_PADDED:
            inside = inside & (depth % M_PADDED < m)
        x = tl.load(x_tile + start * m + x_at, mask=inside[:, None] & row_ok[None, :], other=0.0)
        acc = tl.dot(tl.reshape(dense, (BLOCK_N, BLOCK_K)), x, acc, input_precision="ieee")

    z = tl.trans(acc)
    columns = first_channel + channel
    if HAS_BIAS:
        z += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    z = activate(z, ACTIVATION)
    mask = row_ok[:, None] & (columns < N)[None, :]
    out_tile = first_row.to(tl.int64) * N
    out_at = row[:, None] * N + columns[None, :]
    if HAS_RESIDUAL:
        z += tl.load(residual_ptr + out_tile + out_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + out_tile + out_at, z.to(out_ptr.dtype.element_ty), mask=mask)
