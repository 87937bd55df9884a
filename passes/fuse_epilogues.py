"""Pass ``fuse_epilogues``: let the sparse kernel apply the activation and add the residual that follow it.

The kernel does so on registers that it is about to write; left outside, each is one more pass over the output.
"""

import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import fx

from sparsedm_compile.kernels import get_kernel
from sparsedm_compile.passes.effects import may_write
from sparsedm_compile.passes.lowering import LayerNode, Lowering

_ADDS = (operator.add, torch.add)
_MULS = (operator.mul, torch.mul)


def fuse_epilogues(lowering: Lowering) -> None:
    """Pull ``gelu``, ``silu`` or ``geglu``, and then ``+ residual``, into the ``sparsedm`` operator before them.

    Only where the output of the layer has no other use, and no operator in between works in place.
    """
    for layer in lowering.layers:
        if layer.verdict is None or layer.verdict.kernel == "dense" or not get_kernel(layer.verdict.kernel).fuses:
            continue
        if get_kernel(layer.verdict.kernel).gates(layer.spec):
            _absorb_gate(lowering, layer)
        # Behind a gate the kernel has its one activation already.
        activation = None if "activation" in layer.node.kwargs else _only_user(layer.node)
        name = _activation_name(activation) if activation is not None else None
        if name is not None:
            _absorb(lowering, layer, activation, activation=name)
        add = _only_user(layer.node)
        residual = _residual(layer.node, add) if add is not None else None
        if residual is not None:
            _absorb(lowering, layer, add, residual=residual)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _activation_name(node: fx.Node) -> str | None:
    if node.op != "call_function" or len(node.args) > 1:
        return None
    if node.target is F.silu:
        return None if node.kwargs.get("inplace") else "silu"
    if node.target is F.gelu:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(node.kwargs.get("approximate", "none"))
    return None


def _absorb_gate(lowering: Lowering, layer: LayerNode) -> None:
    """Take in ``value * gelu(gate)``, where value and gate are the halves of the output, as in diffusers' GEGLU."""
    halves = _only_user(layer.node)
    if halves is None or not _is_halving(halves, layer.node.meta["example_value"].dim()):
        return
    items = {item.args[1]: item for item in halves.users}
    if len(halves.users) != 2 or items.keys() != {0, 1}:
        return
    product, activated = (_only_user(items[i]) for i in (0, 1))
    if activated is None or _activation_name(activated) != "gelu" or _only_user(activated) is not product:
        return
    if product is None or product.target not in _MULS or set(product.args) != {items[0], activated} or product.kwargs:
        return
    _absorb(lowering, layer, product, (activated, items[1], items[0], halves), activation="geglu")


def _is_halving(node: fx.Node, dims: int) -> bool:
    """Whether it is ``chunk(2)`` along the last of ``dims`` dimensions."""
    if node.target not in ("chunk", torch.chunk) or (node.args[1:2] or (node.kwargs.get("chunks"),)) != (2,):
        return False
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    return dim in (-1, dims - 1)


def _residual(layer: fx.Node, add: fx.Node) -> fx.Node | None:
    """The other term of ``add``, if it is a tensor just like the layer's output."""
    if add.op != "call_function" or add.target not in _ADDS or add.kwargs or len(add.args) != 2:
        return None
    other = add.args[1] if add.args[0] is layer else add.args[0]
    if not isinstance(other, fx.Node) or other is layer:
        return None
    mine, theirs = layer.meta["example_value"], other.meta.get("example_value")
    if not isinstance(theirs, torch.Tensor) or theirs.dtype != mine.dtype or theirs.device != mine.device:
        return None
    # Equal as expressions: a broadcast stays outside.
    return other if tuple(theirs.shape) == tuple(mine.shape) else None


def _absorb(lowering: Lowering, layer: LayerNode, node: fx.Node, between: Sequence[fx.Node] = (), **epilogue) -> None:
    """Move the layer to where ``node`` stands, with ``node`` as its epilogue.

    Args:
        between: what else of the epilogue goes, last use first.
    """
    old = layer.node
    if _mutates_between(old, node):
        return
    with lowering.gm.graph.inserting_before(node):
        fused = lowering.gm.graph.call_function(old.target, old.args, {**old.kwargs, **epilogue})
    fused.meta = dict(node.meta)
    node.replace_all_uses_with(fused)
    for gone in (node, *between, old):
        lowering.gm.graph.erase_node(gone)
    layer.node = fused


def _mutates_between(first: fx.Node, last: fx.Node) -> bool:
    node = first.next
    while node is not last:
        if may_write(node):
            return True
        node = node.next
    return False
