"""Pass ``remove_dropout``: the identity in inference, it would stand between a layer and its epilogue."""

import torch.nn.functional as F
from torch import fx

from sparsedm_compile.passes.lowering import Lowering


def remove_dropout(lowering: Lowering) -> None:
    """Replace every ``dropout`` that is not training, or drops nothing, by its input."""
    for node in lowering.gm.graph.find_nodes(op="call_function", target=F.dropout):
        if _is_identity(node):
            node.replace_all_uses_with(_argument(node, 0, "input", None))
            lowering.gm.graph.erase_node(node)


def _is_identity(node: fx.Node) -> bool:
    if _argument(node, 3, "inplace", False):
        return False
    return _argument(node, 2, "training", True) is False or _argument(node, 1, "p", 0.5) == 0


def _argument(node: fx.Node, position: int, name: str, default):
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
