"""From a ``triton.jit`` function to something that launches it with the fastest of a few tiles."""

from collections.abc import Callable
from typing import Any

import torch

from sparsedm_compile.kernels.triton.runtime import interpreting
from sparsedm_compile.kernels.triton.tiles import Tile


def tuned(
    function: Any, key: list[str], tiles_of: Callable[[dict[str, Any], Any], list[Tile]], interpreted: Tile
) -> tuple[Any, dict[str, int]]:
    """A launcher and the constants to pass it.

    Args:
        function: the ``triton.jit`` function; it takes BLOCK_M, BLOCK_N, BLOCK_K and has an argument ``out_ptr``.
        key: arguments that the choice of tile depends on. Timings are kept on disk with Triton's binaries.
        tiles_of: the tiles worth trying, from the arguments of a launch and the properties of its device.
        interpreted: the tile in the interpreter, which cannot time; small, so that small shapes are ragged.

    Returns:
        The autotuner and nothing; in the interpreter the function and its tile.
    """
    if interpreting():
        return function, interpreted.blocks
    import triton

    def configs(_: list, positional: dict[str, Any], **arguments: Any) -> list:
        arguments = positional | arguments
        device = torch.cuda.get_device_properties(arguments["out_ptr"].device)
        chosen = tiles_of(arguments, device)
        return [triton.Config(t.blocks, num_warps=t.warps, num_stages=t.stages) for t in chosen]

    # Two placeholders: with a single configuration the autotuner does not ask.
    placeholders = [triton.Config(interpreted.blocks, num_warps=warps) for warps in (4, 8)]
    tuner = triton.autotune(placeholders, key, prune_configs_by={"early_config_prune": configs}, cache_results=True)
    return tuner(function), {}
