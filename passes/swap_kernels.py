"""Pass ``swap_kernels``: run each masked layer from its packed weight, where that is faster."""

import logging
import time
from functools import partial

import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._prims_common import suggest_memory_format

from sparsedm_compile.kernels import get_kernel
from sparsedm_compile.kernels.choice import choose
from sparsedm_compile.kernels.registry import LayerSpec
from sparsedm_compile.masked_weight import mask_out
from sparsedm_compile.passes.find_layers import WRITTEN, layer_bias, layer_input
from sparsedm_compile.passes.lowering import LayerNode, Lowering

_log = logging.getLogger(__name__)


def swap_kernels(lowering: Lowering) -> None:
    """Replace ``linear(x, masked_weight(w), b)`` by ``sparsedm::linear(x, packed, ..., b)``, convolutions alike.

    Packed weights become inputs of the graph. A layer for which plain dense wins, or that no kernel takes, keeps its
    dense operator, with the masked weight as an input: no mask is recomputed at inference. Layers without a mask take
    part as well: where a prepacked dense kernel is faster, they get it.

    Logs at INFO how many layers there are, before and after: nothing else is heard of a first compilation.
    """
    layers = [layer for layer in lowering.layers if layer.verdict is None]  # others were packed before it was compiled
    if layers:
        _log.info("measuring kernels for %d layers and packing their weights; known choices are reused", len(layers))
    start = time.perf_counter()
    graphs = lowering.options.inductor.get("triton.cudagraphs", inductor_config.triton.cudagraphs)
    for layer in layers:
        value, has_bias = layer_input(layer.node), layer_bias(layer.node) is not None
        memory_format = _memory_format(layer)
        if memory_format is not None:
            value = value.contiguous(memory_format=memory_format)
        layer.verdict = choose(layer.spec, value, has_bias, lowering.options.kernel, layer.unusual, graphs)
        if layer.verdict.kernel != "dense":
            _use_packed(lowering, layer)
        elif layer.mask is not None and layer.unusual != WRITTEN:
            _use_masked(lowering, layer)
        if layer.mask is not None and not layer.mask.users:
            lowering.gm.graph.erase_node(layer.mask)
    if layers:
        sparse = sum(
            layer.verdict.kernel != "dense" and get_kernel(layer.verdict.kernel).skips_zeros for layer in layers
        )
        seconds = time.perf_counter() - start
        _log.info(
            "%d layers measured and packed in %.1f s, %d of them sparse; now Inductor", len(layers), seconds, sparse
        )


def _memory_format(layer: LayerNode) -> torch.memory_format | None:
    """Channels last, where the weight is so: dense then answers so, and for a packed layer the input must ask.

    A kernel of one pixel lies either way: dense goes by the input.
    """
    weight = layer.weight.meta["example_value"]
    memory_format = suggest_memory_format(weight)
    return None if memory_format == torch.contiguous_format or weight.shape[2:].numel() == 1 else memory_format


def _use_masked(lowering: Lowering, layer: LayerNode) -> None:
    pattern = str(layer.spec.pattern)
    (masked,) = lowering.add_derived(layer.weight, ("masked", pattern), partial(_masked, pattern=pattern))
    layer.node.replace_input_with(layer.mask, masked)


def _masked(weight: Tensor, pattern: str) -> tuple[Tensor, ...]:
    return (mask_out(weight, pattern),)


def _packed(weight: Tensor, kernel: str, spec: LayerSpec) -> tuple[Tensor, ...]:
    return get_kernel(kernel).pack(weight.reshape(spec.weight_shape), spec)


def _use_packed(lowering: Lowering, layer: LayerNode) -> None:
    spec, kernel, node = layer.spec, layer.verdict.kernel, layer.node
    values, index = lowering.add_derived(layer.weight, (kernel, spec), partial(_packed, kernel=kernel, spec=spec))
    constants = [kernel, str(spec.pattern), list(spec.weight_shape)]
    if spec.op != "linear":
        constants += [list(spec.stride), list(spec.padding), list(spec.dilation), spec.groups]
    operator = torch.ops.sparsedm.linear.default if spec.op == "linear" else torch.ops.sparsedm.conv.default
    x = node.args[0] if node.args else node.kwargs["input"]
    with lowering.gm.graph.inserting_before(node):
        memory_format = _memory_format(layer)
        if memory_format is not None:
            x = lowering.gm.graph.call_method("contiguous", (x,), {"memory_format": memory_format})
            x.meta["example_value"] = layer_input(node).contiguous(memory_format=memory_format)
        swapped = lowering.gm.graph.call_function(operator, (x, values, index, *constants, layer_bias(node)))
    swapped.meta = dict(node.meta)
    node.replace_all_uses_with(swapped)
    lowering.gm.graph.erase_node(node)
    layer.node = swapped
