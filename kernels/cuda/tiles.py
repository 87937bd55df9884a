"""How a product is cut into blocks: the tiles there are, what they need of a chip, and which one suits a shape."""

from dataclasses import dataclass

_STEP = 64  # columns a step; fragments.K_BLOCK
_MOST_STAGES = 4
_FEWEST_STAGES = 3  # with two, the copy of the next step would wait for the product of this one


@dataclass(frozen=True)
class Tile:
    """A block of ``rows`` output features x ``tokens``, cut into warps.

    Attributes:
        blocks: that should be resident on a multiprocessor; bounds the registers of a thread.
        efficiency: of a multiprocessor full of such blocks, relative to the best tile. An estimate from the bytes of
            shared memory that are read a multiplication; ``make gpu`` measures it.
    """

    rows: int
    tokens: int
    warp_rows: int
    warp_tokens: int
    blocks: int
    efficiency: float

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.rows // self.warp_rows * (self.tokens // self.warp_tokens) * 32

    @property
    def stage_bytes(self) -> int:
        """Shared memory of one step: kept weights, metadata, activations."""
        return self.rows * _STEP + self.rows * 8 + self.tokens * _STEP * 2

    def stages(self, shared_limit: int) -> int:
        """Steps in flight on a chip whose blocks may use ``shared_limit`` bytes; 0 if the tile does not fit."""
        # The multiprocessor has 1 KB more than a block may use, and every resident block reserves one.
        for blocks in (self.blocks, 1):
            for stages in range(_MOST_STAGES, _FEWEST_STAGES - 1, -1):
                if blocks * (stages * self.stage_bytes + 1024) <= shared_limit + 1024:
                    return stages
        return 0


TILES = (
    Tile(128, 256, 64, 64, blocks=1, efficiency=1.0),
    Tile(128, 128, 64, 64, blocks=2, efficiency=0.95),
    Tile(64, 64, 32, 32, blocks=4, efficiency=0.7),
)


def choose_tile(rows: int, tokens: int, multiprocessors: int, shared_limit: int) -> Tile:
    """The tile with which the busiest multiprocessor has the least to do.

    Raises:
        ValueError: no tile fits into ``shared_limit``.
    """
    fitting = [tile for tile in TILES if tile.stages(shared_limit)]
    if not fitting:
        raise ValueError(f"no tile fits into {shared_limit} bytes of shared memory; the smallest needs 40 KB")

    def work(tile: Tile) -> float:
        blocks = -(-rows // tile.rows) * -(-tokens // tile.tokens)
        return -(-blocks // multiprocessors) * tile.rows * tile.tokens / tile.efficiency

    return min(fitting, key=work)
