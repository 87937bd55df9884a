"""Which nodes of a Dynamo graph may write to a tensor in place. What is not known to be pure counts as writing."""

import inspect
import operator
from functools import cache

from torch import fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

# operator.iadd, operator.ipow, ...: every augmented assignment, and assignment to an item.
_ASSIGNMENTS = {getattr(operator, name) for name in dir(operator) if f"__{name}__" in dir(operator) and name[0] == "i"}
_ASSIGNMENTS -= {operator.index, operator.inv, operator.invert, operator.is_, operator.is_not}
_ASSIGNMENTS |= {operator.setitem, operator.delitem}


def may_write(node: fx.Node) -> bool:
    """Whether the node may change one of its inputs."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    if node.op == "call_method":
        name = node.target
        return (name.endswith("_") and not name.endswith("__")) or name.startswith("__i") or name == "__setitem__"
    if node.op != "call_function" or node.kwargs.get("out") is not None or isinstance(node.target, HigherOrderOperator):
        return True
    if isinstance(node.target, OpOverload):
        return node.target._schema.is_mutable
    if isinstance(node.target, OpOverloadPacket):
        return any(getattr(node.target, name)._schema.is_mutable for name in node.target.overloads())
    if node.target in _ASSIGNMENTS or getattr(node.target, "__name__", "_").endswith("_"):
        return True
    position = _inplace_position(node.target)
    if position is None:
        return False
    given = node.args[position] if len(node.args) > position else node.kwargs.get("inplace", False)
    return given is not False


@cache
def _inplace_position(function) -> int | None:
    """Where ``function`` takes its ``inplace`` flag, as ``F.leaky_relu(x, slope, inplace)`` does."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None  # a builtin of torch: writes only with out= or by a name that ends in "_"
    return names.index("inplace") if "inplace" in names else None
