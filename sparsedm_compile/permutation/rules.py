"""The rule of each operator, made of the primitives of ``Propagation``. One without a rule pins what it touches."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from sparsedm_compile.permutation.layout import Layout, varying
from sparsedm_compile.permutation.propagation import Propagation


class Call:
    """One node's arguments by their names in the operator's schema, with layouts in the place of tensors."""

    def __init__(self, node: fx.Node, layouts: dict[fx.Node, Any]) -> None:
        self.target = node.target
        self.value = node.meta.get("val")
        parameters = node.target._schema.arguments
        given = dict(zip((parameter.name for parameter in parameters), node.args, strict=False)) | dict(node.kwargs)
        self.arguments = {
            parameter.name: fx.node.map_arg(given[parameter.name], layouts.__getitem__)
            if parameter.name in given
            else parameter.default_value
            for parameter in parameters
        }

    def __getitem__(self, name: str) -> Any:
        """The argument; None where the operator has no such parameter."""
        return self.arguments.get(name)

    @property
    def tensors(self) -> list[Layout]:
        """The layouts among the arguments, in order."""
        return [value for value in self.arguments.values() if isinstance(value, Layout)]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the (only) result."""
        return tuple(self.value.shape)


#: Layout of the result, a list of them for several results, or None where this call is not understood.
Rule = Callable[[Propagation, Call], "Layout | list[Layout] | None"]


def propagate(graph: fx.Graph, inputs: dict[str, Layout], propagation: Propagation) -> None:
    """Visit every node of an ATen graph, outputs included.

    Args:
        graph: as ``torch.export`` captures it, before decompositions.
        inputs: name of a placeholder -> its layout.
    """
    layouts: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            layouts[node] = inputs[node.name]
        elif node.op == "call_function":
            layouts[node] = _visit(node, layouts, propagation)
        elif node.op == "output":
            for source in node.all_input_nodes:
                propagation.pin(layouts[source], "leaves the model as output")
        else:
            layouts[node] = None  # a subgraph of a control-flow operator, which has no rule


def _visit(node: fx.Node, layouts: dict[fx.Node, Any], propagation: Propagation) -> Any:
    if node.target is operator.getitem:
        source, index = node.args
        return layouts[source][index]
    is_aten = getattr(node.target, "namespace", "") == "aten"
    name = node.target._schema.name.removeprefix("aten::") if is_aten else str(node.target)
    propagation.operator = name
    if name == "_assert_tensor_metadata":
        return None
    if is_aten:
        default = _join_all if torch.Tag.pointwise in node.target.tags else None
        rule = _RULES.get(name, default)
        result = rule(propagation, Call(node, layouts)) if rule is not None else None
        if result is not None:
            return result
    for source in node.all_input_nodes:
        propagation.pin(layouts[source], f"{name} is not understood")
    return _fixed(node.meta.get("val"), f"computed by {name}")


def _fixed(value: Any, why: str) -> Any:
    if isinstance(value, list | tuple):
        return [_fixed(part, why) for part in value]
    return Layout(tuple(value.shape), (), why) if isinstance(value, torch.Tensor) else None


def _join_all(graph: Propagation, call: Call) -> Layout | None:
    return graph.join(*call.tensors) if call.tensors and isinstance(call.value, torch.Tensor) else None


def _same(_graph: Propagation, call: Call) -> Layout:
    return call.tensors[0]


def _reshape(graph: Propagation, call: Call) -> Layout | None:
    layout = call.tensors[0]
    if np.prod(layout.shape) != np.prod(call.shape):
        return None  # a view of the same bytes as numbers of another size
    return graph.reshape(layout, call.shape)


def _permute(_graph: Propagation, call: Call) -> Layout:
    # Sizes that tell the dimensions apart, run through the operator itself, say where each went.
    (layout,) = call.tensors
    probe = torch.empty(*range(2, len(layout.shape) + 2), device="meta")
    rest = {name: value for name, value in call.arguments.items() if value is not layout}
    return layout.permuted([size - 2 for size in call.target(probe, **rest).shape])


def _expand(_graph: Propagation, call: Call) -> Layout:
    return call.tensors[0].expanded(call.shape)


def _slice(graph: Propagation, call: Call) -> Layout | None:
    layout, dim = call["self"], call["dim"] % len(call.shape)
    size, length = layout.shape[dim], call.shape[dim]
    if call["step"] != 1:
        return None
    start, _stop, _step = slice(call["start"], None).indices(size)
    return layout if length == size else graph.take(layout, dim, start, start + length)


def _select(graph: Propagation, call: Call) -> Layout:
    layout = call["self"]
    dim = call["dim"] % len(layout.shape)
    index = call["index"] % layout.shape[dim]
    return graph.reshape(graph.take(layout, dim, index, index + 1), call.shape)


def _split(graph: Propagation, call: Call) -> list[Layout]:
    layout = call["self"]
    dim = call["dim"] % len(layout.shape)
    shapes = [tuple(value.shape) for value in call.value]
    sizes = [shape[dim] if len(shape) == len(layout.shape) else 1 for shape in shapes]  # unbind drops the dimension
    starts = np.cumsum([0, *sizes]).tolist()
    parts = [graph.take(layout, dim, start, start + size) for start, size in zip(starts, sizes, strict=False)]
    return [graph.reshape(part, shape) for part, shape in zip(parts, shapes, strict=True)]


def _glu(graph: Propagation, call: Call) -> Layout:
    layout = call["self"]
    dim = call["dim"] % len(layout.shape)
    half = layout.shape[dim] // 2
    return graph.join(graph.take(layout, dim, 0, half), graph.take(layout, dim, half, 2 * half))


def _cat(graph: Propagation, call: Call) -> Layout:
    return graph.concatenate(call["tensors"], call["dim"] % len(call.shape))


def _stack(graph: Propagation, call: Call) -> Layout:
    dim = call["dim"] % len(call.shape)
    return graph.concatenate([part.unsqueezed(dim) for part in call["tensors"]], dim)


def _reduce(graph: Propagation, call: Call) -> Layout:
    layout, dims = call.tensors[0], call["dim"]
    if isinstance(dims, int):
        dims = [dims]
    return graph.reduce(layout, dims or range(len(layout.shape)), bool(call["keepdim"]))


def _softmax(graph: Propagation, call: Call) -> Layout:
    return graph.softmax(call["self"], call["dim"])


def _linear(graph: Propagation, call: Call) -> Layout:
    result = graph.reduce(graph.join(call["input"].unsqueezed(-2), call["weight"]), [-1])
    return result if call["bias"] is None else graph.join(result, call["bias"])


def _matmul(graph: Propagation, call: Call) -> Layout | None:
    left, right = call.tensors
    return graph.matmul(left, right) if min(len(left.shape), len(right.shape)) > 1 else None


def _baddbmm(graph: Propagation, call: Call) -> Layout:
    return graph.join(graph.matmul(call["batch1"], call["batch2"]), call["self"])


def _attention(graph: Propagation, call: Call) -> Layout | None:
    query, key, value = call["query"], call["key"], call["value"]
    if not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        return None  # grouped queries
    rank = len(key.shape)
    scores = graph.matmul(query, key.permuted([*range(rank - 2), rank - 1, rank - 2]))
    if call["is_causal"]:
        scores = graph.join(scores, Layout(scores.shape[-2:], (), "causal mask"))
    if call["attn_mask"] is not None:
        scores = graph.join(scores, call["attn_mask"])
    return graph.matmul(graph.softmax(scores, -1), value)


def _layer_norm(graph: Propagation, call: Call) -> Layout:
    """layer_norm and rms_norm."""
    layout = call["input"]
    statistics = graph.reduce(layout, range(-len(call["normalized_shape"]), 0), keepdim=True)
    scales = [scale for scale in (call["weight"], call["bias"]) if scale is not None]
    return graph.join(layout, statistics, *scales)


def _per_channel(graph: Propagation, layout: Layout, *vectors: Layout | None) -> Layout:
    """Join vectors ``(C,)`` with dimension 1 of ``layout``."""
    ones = (1,) * (len(layout.shape) - 2)
    shaped = [graph.reshape(vector, (*vector.shape, *ones)) for vector in vectors if vector is not None]
    return graph.join(layout, *shaped)


def _group_norm(graph: Propagation, call: Call) -> Layout | None:
    layout, array = call["input"], call["input"].covering(1)
    if any(len(varying(array)) > 1 for array in layout.arrays):
        return None
    if array is not None:
        graph.channels.block(array.reshape(call["num_groups"], -1))
    return _per_channel(graph, layout, call["weight"], call["bias"])


def _batch_norm(graph: Propagation, call: Call) -> Layout | None:
    if call["training"] and any(len(varying(array)) > 1 for array in call["input"].arrays):
        return None
    return _per_channel(graph, *(call[name] for name in ("input", "weight", "bias", "running_mean", "running_var")))


def _convolution(graph: Propagation, call: Call) -> Layout | None:
    layout, weight, groups = call["input"], call["weight"], call["groups"]
    dim = len(layout.shape) - len(weight.shape) + 1  # of the channels; 0 where there is no batch
    if any(varying(array) != [dim] for array in layout.arrays):
        return None
    if any(len(varying(array)) > 1 for array in weight.arrays):
        return None
    for array in weight.arrays:
        if varying(array)[0] > 1:
            graph.channels.pin(array, "kernel positions, not channels")

    def vector(source: Layout, dim: int) -> Layout:
        array = source.covering(dim)
        return Layout((source.shape[dim],), () if array is None else (array.ravel(),), source.why)

    inputs, outputs, fan_in = vector(layout, dim), vector(weight, 0), vector(weight, 1)
    if groups == 1:
        graph.join(inputs, fan_in)
    elif groups == inputs.shape[0] == outputs.shape[0]:
        outputs = graph.join(inputs, outputs)
    else:
        for grouped in (inputs, fan_in):
            graph.pin(grouped, "grouped convolution")
        for array in outputs.arrays:
            graph.channels.cut(array.reshape(groups, -1))
    if call["bias"] is not None:
        outputs = graph.join(outputs, call["bias"])
    shape = [1] * len(call.shape)
    shape[dim] = outputs.shape[0]
    return Layout(call.shape, tuple(array.reshape(shape) for array in outputs.arrays))


def _embedding(graph: Propagation, call: Call) -> Layout | None:
    weight, rank = call["weight"], len(call.shape)
    width = weight.covering(1)
    if any(len(varying(array)) > 1 for array in weight.arrays):
        return None
    for array in weight.arrays:
        if array is not width:
            graph.channels.pin(array, "rows chosen by an index")
    graph.pin(call["indices"], "used as an index")
    return Layout(call.shape, () if width is None else (width.reshape((1,) * (rank - 1) + width.shape[1:]),))


def _spatial(dims: int) -> Rule:
    """An operator on the last ``dims`` dimensions that treats every channel before them alike."""

    def rule(graph: Propagation, call: Call) -> Layout | None:
        layout = call.tensors[0]
        if any(varying(array)[-1] >= len(layout.shape) - dims for array in layout.arrays):
            return None
        return Layout(call.shape, layout.arrays, layout.why)

    return rule


def _pad(graph: Propagation, call: Call) -> Layout | None:
    return _spatial(len(call["pad"]) // 2)(graph, call)


def _each(rule: Rule, names: Sequence[str]) -> dict[str, Rule]:
    return dict.fromkeys(names, rule)


_RULES: dict[str, Rule] = {
    **_each(_same, ["alias", "clone", "contiguous", "detach", "dropout", "dropout_", "to", "_to_copy"]),
    **_each(_reshape, ["flatten", "reshape", "squeeze", "unflatten", "unsqueeze", "view", "_unsafe_view"]),
    **_each(_permute, ["mT", "movedim", "numpy_T", "permute", "swapaxes", "t", "transpose"]),
    **_each(_expand, ["expand", "expand_as"]),
    **_each(_split, ["chunk", "split", "split_with_sizes", "unbind"]),
    **_each(_reduce, ["amax", "amin", "mean", "std", "sum", "var"]),
    **_each(_softmax, ["softmax", "log_softmax"]),
    **_each(_matmul, ["bmm", "matmul"]),
    **_each(_layer_norm, ["layer_norm", "rms_norm"]),
    **_each(_convolution, ["conv1d", "conv2d", "conv3d"]),
    **{
        f"{name}{dims}d": _spatial(dims)
        for dims in (1, 2, 3)
        for name in ("avg_pool", "max_pool", "adaptive_avg_pool", "upsample_nearest", "_upsample_nearest_exact")
    },
    **_each(_spatial(1), ["upsample_linear1d"]),
    **_each(_spatial(2), ["upsample_bilinear2d", "upsample_bicubic2d"]),
    **_each(_spatial(3), ["upsample_trilinear3d"]),
    "baddbmm": _baddbmm,
    "batch_norm": _batch_norm,
    "cat": _cat,
    "embedding": _embedding,
    "glu": _glu,
    "group_norm": _group_norm,
    "linear": _linear,
    "pad": _pad,
    "scaled_dot_product_attention": _attention,
    "select": _select,
    "slice": _slice,
    "stack": _stack,
}
