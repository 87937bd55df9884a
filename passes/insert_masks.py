"""Pass ``insert_masks``: mask the layers of a plain dense model, when the options name a pattern."""

from dataclasses import replace

import torch

from sparsedm_compile.passes.lowering import Lowering
from sparsedm_compile.plan import LayerInfo, Plan
from sparsedm_compile.planning import decide


def insert_masks(lowering: Lowering) -> None:
    """Put ``sparsedm::masked_weight(w, pattern)`` between each eligible weight and its use.

    Policy and rules decide as in :func:`sparsedm_compile.sparsify`, over the layers that the graph shows.

    Raises:
        ValueError: the graph is masked already, so that the option would be ignored; or a rule that cannot hold.
    """
    options, layers = lowering.options, lowering.layers
    if options.pattern is None or not layers:
        return
    masked = next((layer.name for layer in layers if layer.mask is not None), None)
    if masked is not None:
        raise ValueError(
            f"option pattern={str(options.pattern)!r}: layer {masked!r} was made sparse by sparsify; drop the option, "
            "or use set_pattern(model, ...) to change the pattern"
        )
    infos = [LayerInfo(layer.name, layer.spec.op, layer.spec.weight_shape, layer.spec.groups) for layer in layers]
    plan: Plan = decide(infos, options.pattern, options.policy, options.rules)
    graph = lowering.gm.graph
    for layer, planned in zip(layers, plan, strict=True):
        layer.dense_reason = planned.reason
        if planned.pattern.is_dense:
            continue
        with graph.inserting_before(layer.node):
            mask = graph.call_function(torch.ops.sparsedm.masked_weight.default, (layer.weight, str(planned.pattern)))
        mask.meta["example_value"] = layer.weight.meta["example_value"]
        layer.node.replace_input_with(layer.weight, mask)
        layer.mask = mask
        layer.spec = replace(layer.spec, pattern=planned.pattern)
