"""FX passes, one a file; the ordered list of them is the compiler."""

import logging
from collections.abc import Callable

from sparsedm_compile.passes.call_kernels import call_kernels
from sparsedm_compile.passes.find_layers import find_layers
from sparsedm_compile.passes.fuse_epilogues import fuse_epilogues
from sparsedm_compile.passes.insert_masks import insert_masks
from sparsedm_compile.passes.lowering import Lowering
from sparsedm_compile.passes.remove_dropout import remove_dropout
from sparsedm_compile.passes.swap_kernels import swap_kernels
from sparsedm_compile.passes.swap_training_kernels import swap_training_kernels

_log = logging.getLogger(__name__)

#: In this order. In training the masks stay in the graph, differentiable.
PASSES: tuple[Callable[[Lowering], None], ...] = (
    find_layers,
    insert_masks,
    swap_kernels,
    remove_dropout,
    fuse_epilogues,
    call_kernels,
    swap_training_kernels,
)
_INFERENCE_ONLY = {swap_kernels, remove_dropout, fuse_epilogues, call_kernels}


def run_passes(lowering: Lowering) -> None:
    """Lower the graph in place; with the option ``dump_graphs``, write it before and after each pass.

    Passes erase what they leave without a use. ``Graph.eliminate_dead_code`` must not run here: Dynamo's graph may
    still change tensors in place, and FX takes ``x.mul_(2)`` for dead when nobody reads its result.
    """
    for position, lower in enumerate(PASSES):
        if lower in _INFERENCE_ONLY and not lowering.inference:
            continue
        _dump(lowering, f"{position}_{lower.__name__}_before")
        lower(lowering)
        lowering.gm.graph.lint()
        _dump(lowering, f"{position}_{lower.__name__}_after")
    lowering.gm.recompile()


def _dump(lowering: Lowering, name: str) -> None:
    directory, only = lowering.options.dump_graphs, lowering.options.dump_pass
    if directory is None or (only is not None and f"_{only}_" not in name):
        return
    directory.mkdir(parents=True, exist_ok=True)
    # Each compiled graph of the process gets a number of its own: a model may compile to several.
    path = directory / f"graph{lowering.number}_{name}.txt"
    path.write_text(lowering.gm.graph.python_code("self").src)
    _log.info("wrote %s", path)


__all__ = ["PASSES", "Lowering", "run_passes"]
