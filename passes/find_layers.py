"""Pass ``find_layers``: list the linears and convolutions of the graph, masked and plain, with their constants."""

import re

import torch
import torch.nn.functional as F
from torch import fx, nn

import sparsedm_compile.kernels.ops  # noqa: F401  (registers the operators that packed layers call)
from sparsedm_compile.kernels.registry import LayerSpec
from sparsedm_compile.kernels.verdicts import Verdict
from sparsedm_compile.passes.effects import may_write
from sparsedm_compile.passes.lowering import LayerNode, Lowering
from sparsedm_compile.pattern import DENSE, Pattern

_OPS = {F.linear: "linear", torch.conv2d: "conv2d", F.conv2d: "conv2d"}
_PACKED = {
    torch.ops.sparsedm.linear: "linear",
    torch.ops.sparsedm.linear.default: "linear",
    torch.ops.sparsedm.conv2d: "conv2d",
    torch.ops.sparsedm.conv2d.default: "conv2d",
}
_MASKS = (torch.ops.sparsedm.masked_weight, torch.ops.sparsedm.masked_weight.default)
_CONV_DEFAULTS = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
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
        op = _OPS[node.target]
        value = placeholder.meta["example_value"]
        pattern = Pattern.parse(mask.args[1]) if mask is not None else DENSE
        conv, unusual = _conv_constants(node, value.shape) if op == "conv2d" else ({}, "")
        device = value.device.type
        spec = LayerSpec(op, tuple(value.shape), pattern, value.dtype, device, **conv)
        if torch.is_autocast_enabled(device) or autocast_inside:
            unusual = "under autocast the layer computes in another dtype than its weight's"
        elif layer_input(node).dtype != value.dtype:
            unusual = f"input is {layer_input(node).dtype}, weight is {value.dtype}"
        elif op == "conv2d" and layer_input(node).dim() != 4:
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
    spec = LayerSpec(_PACKED[node.target], tuple(weight_shape), Pattern.parse(pattern), value.dtype, value.device.type)
    return LayerNode(_layer_name(values), node, values, None, spec, verdict=Verdict(kernel, "packed"))


def layer_input(node: fx.Node) -> torch.Tensor:
    """The example value of the activation that enters a layer."""
    return _argument(node, 0, "input").meta["example_value"]


def layer_bias(node: fx.Node) -> fx.Node | None:
    """The bias argument of a ``linear`` or ``conv2d`` call."""
    return _argument(node, 2, "bias")


def _argument(node: fx.Node, position: int, name: str):
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def _conv_constants(node: fx.Node, weight_shape: torch.Size) -> tuple[dict, str]:
    constants = {}
    for position, (name, default) in enumerate(_CONV_DEFAULTS.items(), start=3):
        given = _argument(node, position, name)
        constants[name] = default if given is None else given
    unusual = ""
    if constants["padding"] == "valid":
        constants["padding"] = (0, 0)
    elif constants["padding"] == "same":
        dilation = _pair(constants["dilation"])
        extent = [d * (k - 1) for d, k in zip(dilation, weight_shape[2:], strict=True)]
        constants["padding"] = tuple(e // 2 for e in extent)
        if any(e % 2 for e in extent):
            unusual = "padding='same' with an even kernel pads one side more than the other"
    for name in ("stride", "padding", "dilation"):
        constants[name] = _pair(constants[name])
    return constants, unusual


def _pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value) * (2 // len(value))


def _source(placeholder: fx.Node) -> str:
    """Where Dynamo found the input, spelled as the Python expression that reads it."""
    source = getattr(placeholder, "_dynamo_source", None) or getattr(placeholder.meta.get("grapharg"), "source", None)
    spelled = getattr(source, "name", "")
    return spelled() if callable(spelled) else spelled  # a method before torch 2.10, a property since


def _layer_name(placeholder: fx.Node) -> str:
    """``blocks.0.attn.qkv`` from the source ``L['self']._modules['blocks']._modules['0']...._parameters['weight']``."""
    spelled = _source(placeholder)
    return ".".join(re.findall(r"_modules\['([^']+)'\]", spelled)) or placeholder.name
