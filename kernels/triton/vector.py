"""The Triton code of vector-wise N:M: dense tensor-core products of inputs that were selected in registers.

``v`` output channels share the k that they keep, so their product is dense over the kept k: with x[:, kept] it takes
n / m of the multiplications on any tensor core. The difficulty is x[:, kept]: single 2-byte columns, which no
asynchronous copy can fetch. So x is copied whole, and the selection happens on the way from shared memory to the
tensor core: one group of four 16-bit inputs is read as one 64-bit word, and keeping one of the four is one funnel
shift (SHF.R.S64) by an amount that all rows share. The n inputs that a group keeps are neighbours in the product, as
they are neighbours in a register of the A operand, so joining them is one byte permutation: nothing moves between
threads, and nothing goes back to memory. On sm_90 Triton keeps eight wgmma in flight this way; one product for each of
the n, into one accumulator, would wait for each.

x stays as it is (row-major, NHWC): 16-byte copies, no transposed copy, any stride, padding and dilation.
"""

import triton
import triton.language as tl

from sparsedm_compile.kernels.triton.epilogue import activate


@triton.jit
def interleave(parts, COUNT: tl.constexpr):
    """1, 2, 4 or 8 tensors side by side in new last dimensions, the first one slowest."""
    if COUNT == 1:
        joined = parts[0]
    elif COUNT == 2:
        joined = tl.join(parts[0], parts[1])
    elif COUNT == 4:
        joined = tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3]))
    else:
        even = tl.join(tl.join(parts[0], parts[4]), tl.join(parts[2], parts[6]))
        odd = tl.join(tl.join(parts[1], parts[5]), tl.join(parts[3], parts[7]))
        joined = tl.join(even, odd)
    return joined


@triton.jit
def words_of_groups(words, ROWS: tl.constexpr, G: tl.constexpr, WORDS: tl.constexpr):
    """``(ROWS, G * WORDS)``, as loaded, to a tuple of ``(ROWS, G)``: the first words of all groups, the second, ..."""
    if WORDS == 1:
        return (words,)
    elif WORDS == 2:
        low, high = tl.split(tl.reshape(words, (ROWS, G, 2)))
        return (low, high)
    else:
        even, odd = tl.split(tl.reshape(words, (ROWS, G, 2, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        return (first, second, third, fourth)


@triton.jit
def vector_kernel(
    x_ptr,  # 32- or 64-bit words of (rows, K) or NHWC
    values_ptr,  # (N / V, KH * KW, groups, n, V)
    shift_ptr,  # (N / V, KH * KW, n, groups) int32: bits from the start of the group
    bias_ptr,
    residual_ptr,  # strides of the output
    out_ptr,
    rows,  # tokens, or output pixels of the batch
    N,
    K8,  # input channels / 8: the factor tells the compiler that 16-byte copies are aligned
    out_image,  # strides of the output: image, pixel, channel
    out_pixel,
    out_channel,
    HEIGHT,  # of the input
    WIDTH,
    OUT_WIDTH,
    PIXELS,  # output pixels of an image
    bucket,  # rows rounded up to a power of two: for the choice of tile only
    n: tl.constexpr,
    m: tl.constexpr,
    V: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    CONV: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of BLOCK_M rows by BLOCK_N channels, the latter in strips that share a selection."""
    # Channels of one product. Beyond 64, selecting once more is cheaper than the registers that the epilogue needs.
    STRIP: tl.constexpr = V if V < 64 else 64
    STRIPS: tl.constexpr = BLOCK_N // STRIP
    G: tl.constexpr = BLOCK_K // m
    WORDS: tl.constexpr = m // 4 if m > 4 else 1  # 64-bit words of a group; m = 2 is one 32-bit word
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    JOINED: tl.constexpr = n & -n  # kept inputs of a group in one product: tensor shapes are powers of two
    words_per_row = K8 * 4 if m == 2 else K8 * 2
    groups = words_per_row // WORDS

    # Programs that run together share rows of x in L2: eight row tiles for each step along the channels.
    row_tiles = tl.cdiv(rows, BLOCK_M)
    strips = N // STRIP
    channel_tiles = tl.cdiv(strips, STRIPS)
    pid = tl.program_id(0)
    first = pid // (8 * channel_tiles) * 8
    height = tl.minimum(row_tiles - first, 8)
    row_tile = first + pid % (8 * channel_tiles) % height
    channel_tile = pid % (8 * channel_tiles) // height

    # Addresses: a 64-bit scalar for the tile, 32-bit offsets inside it, which cost half the registers.
    first_row = row_tile * BLOCK_M
    i = tl.arange(0, BLOCK_M)
    g = tl.arange(0, G)
    channel = tl.arange(0, STRIP)
    valid = first_row + i < rows
    if CONV:
        first_image = first_row // PIXELS
        start = first_row - first_image * PIXELS + i
        image = start // PIXELS  # counted from the first image of the tile
        pixel = start - image * PIXELS
        y = pixel // OUT_WIDTH * STRIDE_H - PAD_H
        x = pixel % OUT_WIDTH * STRIDE_W - PAD_W
        x_tile = x_ptr + first_image.to(tl.int64) * HEIGHT * WIDTH * words_per_row
        out_tile = first_image.to(tl.int64) * out_image
        row_words = ((image * HEIGHT + y) * WIDTH + x) * words_per_row
        row_out = image * out_image + pixel * out_pixel
    else:
        x_tile = x_ptr + first_row.to(tl.int64) * words_per_row
        out_tile = first_row.to(tl.int64) * out_pixel
        row_words = i * words_per_row
        row_out = i * out_pixel
    word = tl.arange(0, G * WORDS)
    word_at = row_words[:, None] + word[None, :]
    kept_k = tl.arange(0, G * JOINED)
    kept_group = kept_k // JOINED
    weight_at = (kept_group * n + kept_k % JOINED)[:, None] * V + channel[None, :]

    accumulators = ()
    for _ in tl.static_range(STRIPS):
        accumulators += (tl.zeros((BLOCK_M, STRIP), tl.float32),)
    steps = tl.cdiv(groups, G)
    for step in range(TAPS * steps):
        tap = step // steps if TAPS > 1 else 0
        k = (step - tap * steps) * G
        in_depth = k + g < groups
        mask = valid[:, None] & (k * WORDS + word < words_per_row)[None, :]
        x_step = x_tile + k * WORDS
        if CONV:
            dy = tap // KERNEL_W * DILATION_H
            dx = tap % KERNEL_W * DILATION_W
            inside = (y + dy >= 0) & (y + dy < HEIGHT) & (x + dx >= 0) & (x + dx < WIDTH)
            mask = mask & inside[:, None]
            x_step += (dy * WIDTH + dx) * words_per_row
        group = words_of_groups(tl.load(x_step + word_at, mask=mask, other=0), BLOCK_M, G, WORDS)
        sums = ()
        for strip in tl.static_range(STRIPS):
            # The last tile may have fewer strips: those beyond repeat the last one and are not stored.
            at = tl.minimum(channel_tile * STRIPS + strip, strips - 1) * STRIP
            block = (at // V).to(tl.int64)
            in_block = (at - at // V * V).to(tl.int64)  # not at % V: Triton 3.6 loses the alignment there
            acc = accumulators[strip]
            depth = (block * TAPS + tap) * groups * n
            for first_slot in tl.static_range(0, n, JOINED):
                kept = ()
                for slot in tl.static_range(first_slot, first_slot + JOINED):
                    shift = tl.load(shift_ptr + depth + slot * groups + k + g, mask=in_depth, other=0)
                    chosen = group[0]
                    for other in tl.static_range(1, WORDS):
                        chosen = tl.where((shift >= other * 64)[None, :], group[other], chosen)
                    amount = (shift & 63 if WORDS > 1 else shift)[None, :].to(chosen.dtype)
                    kept += ((chosen >> amount).to(tl.int16),)
                operand = tl.reshape(interleave(kept, JOINED), (BLOCK_M, G * JOINED))
                operand = operand.to(values_ptr.dtype.element_ty, bitcast=True)
                weight_step = values_ptr + (depth + k * n + first_slot) * V + in_block
                weight = tl.load(weight_step + weight_at, mask=(k + kept_group < groups)[:, None], other=0.0)
                acc = tl.dot(operand, weight, acc)
            sums += (acc,)
        accumulators = sums

    out_at = row_out[:, None] + channel[None, :] * out_channel
    for strip in tl.static_range(STRIPS):
        at = (channel_tile * STRIPS + strip) * STRIP
        z = accumulators[strip]
        mask = valid[:, None] & (at + channel < N)[None, :]
        if HAS_BIAS:
            z += tl.load(bias_ptr + at + channel, mask=at + channel < N, other=0.0).to(tl.float32)[None, :]
        z = activate(z, ACTIVATION)
        out_strip = out_tile + at.to(tl.int64) * out_channel
        if HAS_RESIDUAL:
            z += tl.load(residual_ptr + out_strip + out_at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + out_strip + out_at, z.to(out_ptr.dtype.element_ty), mask=mask)
