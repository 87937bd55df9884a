"""How a product is cut into blocks: the tiles there are, what they need of a chip, and which one suits a shape."""

from dataclasses import dataclass

_STEP = 64  # columns a step; fragments.K_BLOCK
_BARRIERS = 64  # bytes


@dataclass(frozen=True)
class Tile:
    """A block of ``rows`` output features x ``tokens``, cut into warps or, by ``wgmma.cu``, into warpgroups.

    Attributes:
        warp_rows, warp_tokens: of a warp or warpgroup.
        blocks: that should be resident on a multiprocessor; bounds the registers of a thread.
        efficiency: of a multiprocessor full of such blocks, relative to the others. An estimate from the bytes of
            shared memory that are read a multiplication; ``make gpu`` measures it.
        source: the kernel that it belongs to.
        arch: the only one that has its instructions, or None.
        fewest_stages, most_stages: steps in flight.
    """

    rows: int
    tokens: int
    warp_rows: int
    warp_tokens: int
    blocks: int
    efficiency: float
    source: str = "mma.cu"
    arch: str | None = None
    fewest_stages: int = 3  # with two, the copy of the next step would wait for the product of this one
    most_stages: int = 4

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.rows // self.warp_rows * (self.tokens // self.warp_tokens) * self.group

    @property
    def group(self) -> int:
        """Threads that multiply together: a warp, or a warpgroup."""
        return 128 if self.source == "wgmma.cu" else 32

    @property
    def stage_bytes(self) -> int:
        """Shared memory of one step: kept weights, metadata, activations."""
        return self.rows * _STEP + self.rows * 8 + self.tokens * _STEP * 2

    def shared(self, stages: int) -> int:
        """Shared memory of a block: its steps in flight and, for the copy engine, a barrier each."""
        return stages * self.stage_bytes + (_BARRIERS if self.source == "wgmma.cu" else 0)

    def stages(self, shared_limit: int) -> int:
        """Steps in flight on a chip whose blocks may use ``shared_limit`` bytes; 0 if the tile does not fit."""
        # The multiprocessor has 1 KB more than a block may use, and every resident block reserves one.
        for blocks in (self.blocks, 1):
            for stages in range(self.most_stages, self.fewest_stages - 1, -1):
                if blocks * (self.shared(stages) + 1024) <= shared_limit + 1024:
                    return stages
        return 0


MMA_TILES = (
    Tile(128, 256, 64, 64, blocks=1, efficiency=1.0),
    Tile(128, 128, 64, 64, blocks=2, efficiency=0.95),
    Tile(64, 64, 32, 32, blocks=4, efficiency=0.7),
)
# mma.sp is believed to reach about 60% of Hopper's rate.
WGMMA_TILES = (
    Tile(128, 256, 64, 256, 1, 1.6, "wgmma.cu", "sm_90a", fewest_stages=4, most_stages=5),
    Tile(128, 128, 64, 128, 2, 1.5, "wgmma.cu", "sm_90a", fewest_stages=4, most_stages=4),
)
TILES = (*WGMMA_TILES, *MMA_TILES)


def choose_tile(rows: int, tokens: int, arch: str, multiprocessors: int, shared_limit: int) -> Tile:
    """The tile with which the busiest multiprocessor has the least to do.

    Raises:
        ValueError: no tile fits into ``shared_limit``.
    """
    fitting = [tile for tile in TILES if tile.arch in (None, arch) and tile.stages(shared_limit)]
    if not fitting:
        raise ValueError(f"no tile fits into {shared_limit} bytes of shared memory; the smallest needs 40 KB")

    def work(tile: Tile) -> float:
        blocks = -(-rows // tile.rows) * -(-tokens // tile.tokens)
        return -(-blocks // multiprocessors) * tile.rows * tile.tokens / tile.efficiency

    return min(fitting, key=work)
