"""Pass ``find_layers``: list the linears and convolutions of the graph, masked and plain, with their constants."""

import re

import torch
import torch.nn.functional as F
from torch import fx, nn

import sparsedm_compile.kernels.ops  # noqa: F401  (registers the operators that packed layers call)
from sparsedm_compile.kernels.registry import LayerSpec, with_height
from sparsedm_compile.kernels.verdicts import Verdict
from sparsedm_compile.passes.effects import may_write
from sparsedm_compile.passes.lowering import LayerNode, Lowering
from sparsedm_compile.pattern import DENSE, Pattern

_CONVS = {torch.conv1d, F.conv1d, torch.conv2d, F.conv2d, torch.conv3d, F.conv3d}
_OPS = {F.linear, *_CONVS}
_PACKED_LINEAR = {torch.ops.sparsedm.linear, torch.ops.sparsedm.linear.default}
_PACKED = {*_PACKED_LINEAR, torch.ops.sparsedm.conv, torch.ops.sparsedm.conv.default}
_MASKS = (torch.ops.sparsedm.masked_weight, torch.ops.sparsedm.masked_weight.default)
_CONV_DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
#: The reason of a layer whose weight the graph changes; its mask has to stay in the graph.
WRITTEN = "its weight is changed inside the compiled graph"
_AUTOCAST = (torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast)


def find_layers(lowering: Lowering) -> None:
    """Fill ``lowering.layers``. Changes no node."""
    autocast_inside = any(node.target in _AUTOCAST for node in lowering.gm.graph.nodes)
    positions = {node: i for i, node in enumerate(lowering.gm.graph.find_nodes(op="placeholder", sort=True))}
    for node in lowering.gm.graph.nodes:
        if node.op == "call_function" and node.target in _PACKED and _is_packed_layer(node):
            lowering.layers.append(_packed_layer(node))
        if node.op != "call_function" or node.target not in _OPS:
            continue
        weight = _argument(node, 1, "weight")
        mask = weight if isinstance(weight, fx.Node) and weight.target in _MASKS else None
        placeholder = mask.args[0] if mask is not None else weight
        if placeholder not in positions or not _is_weight(placeholder, lowering.example_inputs[positions[placeholder]]):
            continue  # computed in the graph, or an activation that came in from outside: not a layer
        is_conv = node.target in _CONVS
        value = placeholder.meta["example_value"]
        pattern = Pattern.parse(mask.args[1]) if mask is not None else DENSE
        shape, conv, unusual = _conv_constants(node, value.shape) if is_conv else (tuple(value.shape), (), "")
        device = value.device.type
        spec = LayerSpec(_op(shape), shape, pattern, value.dtype, device, *conv)
        if torch.is_autocast_enabled(device) or autocast_inside:
            unusual = "under autocast the layer computes in another dtype than its weight's"
        elif layer_input(node).dtype != value.dtype:
            unusual = f"input is {layer_input(node).dtype}, weight is {value.dtype}"
        elif is_conv and layer_input(node).dim() != value.dim():
            unusual = "the input is one image without a batch dimension"
        if _is_written(placeholder):
            unusual = WRITTEN
        lowering.layers.append(LayerNode(_layer_name(placeholder), node, placeholder, mask, spec, unusual))


def _is_weight(placeholder: fx.Node, value: object) -> bool:
    """Whether the input lasts from call to call: a parameter, or what a packed layer holds in place of one.

    ``F.linear(q, k)`` multiplies two activations. Masking one would be wrong, and packing it costs more than it saves.
    """
    return isinstance(value, nn.Parameter) or _source(placeholder).endswith("_buffers['packed_values']")


def _is_written(weight: fx.Node) -> bool:
    """Whether the graph changes the weight, itself or through a view: what was derived before is then stale."""
    seen, reached = set(), [weight]
    while reached:
        for user in reached.pop().users:
            if user in seen or user.target in _OPS or user.target in _MASKS:
                continue
            if may_write(user):
                return True
            seen.add(user)
            reached.append(user)
    return False


def _is_packed_layer(node: fx.Node) -> bool:
    """Whether it is the call of a packed layer's forward; users may call the operator in their own ways."""
    return not node.kwargs and len(node.args) >= 6 and node.args[1].op == "placeholder"


def _packed_layer(node: fx.Node) -> LayerNode:
    _, values, _, kernel, pattern, weight_shape, *_ = node.args
    value = values.meta["example_value"]
    shape = tuple(weight_shape)
    spec = LayerSpec(_op(shape), shape, Pattern.parse(pattern), value.dtype, value.device.type)
    return LayerNode(_layer_name(values), node, values, None, spec, verdict=Verdict(kernel, "packed"))


def layer_input(node: fx.Node) -> torch.Tensor:
    """The example value of the activation that enters a layer."""
    return _argument(node, 0, "input").meta["example_value"]


def layer_bias(node: fx.Node) -> fx.Node | None:
    """The bias argument of a ``linear`` or convolution call."""
    return _argument(node, 2, "bias")


def _argument(node: fx.Node, position: int, name: str):
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def _op(weight_shape: tuple[int, ...]) -> str:
    return "linear" if len(weight_shape) == 2 else f"conv{len(weight_shape) - 2}d"


def _conv_constants(node: fx.Node, weight_shape: torch.Size) -> tuple[tuple[int, ...], tuple, str]:
    """Shape of the weight and ``(stride, padding, dilation, groups)`` for a kernel; what of them no kernel knows."""
    stride, padding, dilation, groups = (
        default if (given := _argument(node, position, name)) is None else given
        for position, (name, default) in enumerate(_CONV_DEFAULTS.items(), start=3)
    )
    kernel, unusual = weight_shape[2:], ""
    stride, dilation = _each(stride, len(kernel)), _each(dilation, len(kernel))
    if padding == "valid":
        padding = 0
    elif padding == "same":
        extent = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding = tuple(e // 2 for e in extent)
        if any(e % 2 for e in extent):
            unusual = "padding='same' with an even kernel pads one side more than the other"
    shape, *window = with_height(weight_shape, stride, _each(padding, len(kernel)), dilation)
    return shape, (*window, groups), unusual


def _each(value, dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims // len(value))


def _source(placeholder: fx.Node) -> str:
    """Where Dynamo found the input, spelled as the Python expression that reads it."""
    source = getattr(placeholder, "_dynamo_source", None) or getattr(placeholder.meta.get("grapharg"), "source", None)
    spelled = getattr(source, "name", "")
    return spelled() if callable(spelled) else spelled  # a method before torch 2.10, a property since


def _layer_name(placeholder: fx.Node) -> str:
    """``blocks.0.attn.qkv`` from the source ``L['self']._modules['blocks']._modules['0']...._parameters['weight']``."""
    spelled = _source(placeholder)
    return ".".join(re.findall(r"_modules\['([^']+)'\]", spelled)) or placeholder.name
