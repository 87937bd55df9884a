"""Pass ``swap_training_kernels``: in a training graph, multiply forward by the compressed weight, if asked to."""

import logging
from dataclasses import replace

import torch
from torch import fx

import sparsedm_compile.kernels.cusparselt.training  # noqa: F401  (registers the operator)
from sparsedm_compile.kernels import get_kernel
from sparsedm_compile.kernels.verdicts import Verdict
from sparsedm_compile.passes.find_layers import layer_bias
from sparsedm_compile.passes.lowering import LayerNode, Lowering

_log = logging.getLogger(__name__)


def swap_training_kernels(lowering: Lowering) -> None:
    """Replace ``linear(x, masked_weight(w), b)`` by ``sparsedm::two_four_linear(x, masked_weight(w), b)``.

    Only with the option ``train_kernel``. The mask stays in the graph, so gradients are those of the dense operator:
    straight through to ``w``. A masked layer that the kernel cannot take stays dense; its verdict says why, and so does
    a warning.
    """
    name = lowering.options.train_kernel
    if lowering.inference or name == "dense":
        return
    for layer in lowering.layers:
        if layer.mask is None:
            continue
        refusal = _refusal(layer, name)
        if refusal is None:
            layer.verdict = Verdict(name, f"option train_kernel={name!r}: forward only, not measured")
            _swap(lowering.gm.graph, layer)
        else:
            layer.verdict = Verdict("dense", f"train_kernel {name!r} cannot take it: {refusal}")
            _log.warning("train_kernel %r cannot take layer %r: %s; dense instead", name, layer.name, refusal)


def _refusal(layer: LayerNode, name: str) -> str | None:
    if layer.spec.op != "linear":
        return "it trains linear layers, not convolutions"
    return get_kernel(name).refusal(replace(layer.spec, dtype=_computes_in(layer)))


def _computes_in(layer: LayerNode) -> torch.dtype:
    """The dtype of the product: autocast may have chosen another one than the weight's."""
    return layer.node.meta["example_value"].dtype


def _swap(graph: fx.Graph, layer: LayerNode) -> None:
    node = layer.node
    operands = (node.args[0] if node.args else node.kwargs["input"], layer.mask, layer_bias(node))
    with graph.inserting_before(node):
        # Cast here, not by autocast, which does not know the operator; the mask is that of the weight before the cast.
        operands = tuple(_cast(graph, operand, _computes_in(layer)) for operand in operands)
        swapped = graph.call_function(torch.ops.sparsedm.two_four_linear.default, operands)
    swapped.meta = dict(node.meta)
    node.replace_all_uses_with(swapped)
    graph.erase_node(node)
    layer.node = swapped


def _cast(graph: fx.Graph, operand: fx.Node | None, dtype: torch.dtype) -> fx.Node | None:
    if operand is None or operand.meta["example_value"].dtype == dtype:
        return operand
    return graph.call_method("to", (operand, dtype))
