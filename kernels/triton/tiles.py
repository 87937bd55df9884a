"""Tile shapes that the autotuner tries: few, each with its reason.

Vector-wise kernel. Floors for one step of 128 inputs at 2:4, bf16, tile 128 x 256: 1,024 cycles of sm_90's tensor cores
(4,096 FLOP a cycle and SM); 64 KB from L2 (32 KB of x, whole; 32 KB of kept weights), so 64 B a cycle at full rate,
where about 35 arrive (5.5-8 TB/s over 132 SMs, believed). Such a tile reaches at most 0.55 of the peak on the kept
weights, 1.1 of it counted dense, where dense libraries reach 0.65-0.75. 128 x 128 reaches 0.35, so Hopper needs the
widest tile that fits registers: 128 x 256 in fp32 is 128 of the 255 registers of 256 threads. sm_80 and sm_89 need half
and a quarter of these bytes a cycle (2,048 and 512-1,024 FLOP), so 128 x 128 is wide enough there. Selecting costs one
shift and half a byte permutation an operand: the loop of 128 x 256 x 64 is 319 instructions (Triton 3.6), so 8
warps issue for 640 cycles of the SM where the tensor cores work for 512: below what L2 allows, so it does not bind.

Packed kernel. The weight's bytes are the floor, so what counts is bytes in flight: 4.8 TB/s for 700 ns is 25 KB an SM
on an H200. 32 channels by 256 unpacked inputs at 2:4 are 9 KB a stage, three of them in flight 27 KB, with room for a
second and third block. Fewer channels make more blocks, for narrow layers; more channels read x less often.
"""

from dataclasses import dataclass, replace

from sparsedm_compile.pattern import Pattern


@dataclass(frozen=True)
class Tile:
    """``rows x channels`` of the output in steps of ``depth`` inputs (before selection)."""

    rows: int
    channels: int
    depth: int
    warps: int
    stages: int

    @property
    def blocks(self) -> dict[str, int]:
        """As compile-time constants of the kernel."""
        return {"BLOCK_M": self.rows, "BLOCK_N": self.channels, "BLOCK_K": self.depth}


# wgmma and tcgen05: four warps share a product of 64 rows.
_COMMON = (
    Tile(128, 128, 64, 8, 4),  # two blocks an SM: one multiplies while the other waits
    Tile(64, 128, 128, 4, 3),  # few rows: U-ViT at batch 1 has 257
    Tile(64, 64, 128, 4, 4),  # few rows and few channels: fills the chip
)
_WIDE = (
    Tile(128, 256, 64, 8, 4),  # fewest bytes a FLOP
    Tile(128, 192, 128, 8, 3),  # steps twice as long: half the barriers
    *_COMMON,
)
# Pixel coordinates take registers: wider or deeper convolution tiles spilled, here and below.
_WIDE_CONV = (Tile(128, 192, 64, 8, 4), *_COMMON)
# mma.sync: a warp has its own product, so smaller tiles lose less.
_NARROW_CONV = (Tile(128, 128, 64, 8, 4), Tile(64, 64, 64, 4, 4))
_NARROW = (*_NARROW_CONV, Tile(128, 64, 64, 4, 4), Tile(64, 128, 64, 4, 4))
_MIN_DEPTH = 16  # of one tensor-core product in 16-bit types
_SHARE = 7 / 8  # of shared memory for what is counted; the rest for shifts, positions, padding and barriers
_MAX_SELECTED = 12  # strips x kept inputs of a group: each is code of its own


def vector_tiles(major: int, shared_bytes: int, pattern: Pattern, out_features: int, conv: bool) -> list[Tile]:
    """The tiles worth trying for the vector-wise kernel.

    Args:
        major: of the compute capability.
        shared_bytes: that one block may have.
        pattern: of the layer.
        out_features: of the layer; wider tiles are left out.
        conv: whether the kernel walks a window.

    Returns:
        At least one tile. Depth and stages are fitted to the pattern and to shared memory.
    """
    wgmma = major in (9, 10)
    strip = min(pattern.v, 64)  # channels of one product, as in the kernel
    least = _MIN_DEPTH * pattern.m // (pattern.n & -pattern.n)  # so many of a group's inputs share a product
    fitted = []
    linear, convolution = (_WIDE, _WIDE_CONV) if wgmma else (_NARROW, _NARROW_CONV)
    for tile in convolution if conv else linear:
        depth = max(tile.depth, least)
        if tile.channels > max(out_features, strip):
            continue
        if tile.channels // strip * pattern.n > _MAX_SELECTED:
            continue
        x_bytes = 2 * depth * tile.rows
        weight_bytes = 2 * depth // pattern.m * pattern.n * tile.channels
        # Weights that wgmma reads while it runs need one buffer more than x, which is in registers by then.
        room = shared_bytes * _SHARE - wgmma * weight_bytes
        stages = _fit_stages(room, x_bytes + weight_bytes, tile.stages)
        if stages:
            fitted.append(replace(tile, depth=depth, stages=stages))
    return fitted or [Tile(64, strip, least, 4, 2)]


def packed_tiles(shared_bytes: int, pattern: Pattern, rows: int, item_bytes: int) -> list[Tile]:
    """The tiles worth trying for the packed kernel: channels and depth vary, rows follow the input.

    Args:
        shared_bytes: that one block may have.
        pattern: of the layer.
        rows: of the input.
        item_bytes: of a weight.
    """
    height = max(16, 1 << (rows - 1).bit_length())
    padded = 1 << (pattern.m - 1).bit_length()
    fitted = []
    for channels, depth in ((32, 128), (32, 256), (64, 128)):
        # With more threads than words of positions, Triton 3.6 copies each word up to 32 times.
        words = channels * (depth // padded) * position_bits(pattern) // 32
        warps = min(4, words // 32)
        # Fewer threads a channel, more rows a warp, or rows beside a deep step: registers spilled.
        tall = min(height, max(16, 8 * warps))
        if 32 * warps < 2 * channels or (tall > 16 and depth > 128):
            continue
        stage_bytes = item_bytes * depth * (tall + channels * pattern.n // pattern.m)
        # The unpacked weight passes through shared memory on its way to the tensor core.
        stages = _fit_stages(shared_bytes * _SHARE - item_bytes * channels * depth, stage_bytes, 4)
        if stages:
            fitted.append(Tile(tall, channels, depth, warps, stages))
    return fitted or [Tile(16, 32, 128, 2, 2)]


def position_bits(pattern: Pattern) -> int:
    """Bits of a position in a group; a divisor of 32, so that no position straddles words."""
    return next(bits for bits in (1, 2, 4, 8) if 2**bits >= pattern.m)


def _fit_stages(room: float, stage_bytes: int, wanted: int) -> int:
    """Stages whose buffers, one fewer than stages, fit into ``room``; 0 if copies and products could not overlap."""
    stages = min(wanted, int(room // stage_bytes) + 1)
    return stages if stages >= 3 else 0
