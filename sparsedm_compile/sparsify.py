"""Turning a dense model sparse in place, and switching its patterns at run time."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sparsedm_compile.layers import SPARSE_TYPES, layer_pattern, sparse_layers
from sparsedm_compile.packed_layers import packed_layers
from sparsedm_compile.pattern import Pattern
from sparsedm_compile.plan import Plan
from sparsedm_compile.planning import Rules, decide, make_plan, named_modules, survey, unwrap
from sparsedm_compile.policy import LayerPolicy

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def sparsify(
    model: nn.Module,
    pattern: "str | Pattern" = "2:4",
    *,
    policy: str | LayerPolicy = "default",
    rules: Rules | None = None,
) -> Plan:
    """Put N:M masks on the linear and convolution layers of ``model``, in place.

    The weights stay dense and ``state_dict`` keys unchanged: a mask is derived from the weight at each use, so any
    training loop trains it through the straight-through estimator, and checkpoints load as before.

    Args:
        model: a model with its weights loaded.
        pattern: ``"2:4"``, ``"1:4"``, ``"4:8"``, ``"2:4v4"``, ... for the layers that the policy makes sparse.
        policy: ``"default"`` for any diffusion model; ``"sparsedm"`` (the paper's four linears of U-ViT);
            ``"sparsedm+skip"``; ``"all"`` (the paper's UNet); or ``f(layer: LayerInfo) -> True | False | "reason"``.
        rules: layer glob or exact name -> pattern or ``"dense"``, overriding the policy; the last match wins.

    Returns:
        The plan: every linear and convolution layer with its pattern, and the reason for each left dense.

    Raises:
        ValueError: unknown pattern, policy or rule; the model is already sparse, or on meta; weights that are not
            finite; no layer takes the pattern; one weight shared by layers of different patterns.
        TypeError: not a module; weights that are not float32, bfloat16 or float16.
        In every case the model is left as it was.

    Source: SparseDM, arXiv 2404.10445, section 3.
    """
    model = unwrap(model)
    if packed_layers(model):
        raise ValueError("model is packed: its dense weights are gone; sparsify the model that it was made of")
    if sparse_layers(model):
        raise ValueError("model is sparse already: use set_pattern(model, pattern, rules=...) to change its patterns")
    plan = make_plan(model, pattern, policy, rules)
    if not plan.patterns() and not Pattern.parse(pattern).is_dense:
        reasons = sorted({layer.reason for layer in plan})
        raise ValueError(f"no layer of {type(model).__name__} takes {pattern}: {'; '.join(reasons)}")
    modules = dict(named_modules(model))
    for layer in plan:
        if layer.switchable:  # dense for now, perhaps: set_pattern may mask it later
            check_weight(layer.name, modules[layer.name].weight)
    check_shared(model, plan)

    # Nothing below can fail, so the model changes wholly or not at all. Every layer that the policy selects becomes a
    # sparse type, dense pattern included: a later set_pattern may suit it.
    for layer in plan:
        if layer.switchable:
            module = modules[layer.name]
            module.__class__ = SPARSE_TYPES[type(module)]
            module.pattern = str(layer.pattern)
    model._sparsedm_plan = plan
    return plan


def check_weight(name: str, weight: torch.Tensor) -> None:
    """Refuse a weight on meta, of another dtype than N:M layers take, or that is not finite."""
    if weight.device.type == "meta":
        raise ValueError(
            f"layer {name!r} is on meta and has no weights to mask: load the weights first, or use make_plan and "
            "count_macs(model, *inputs, plan=plan), which need none"
        )
    if weight.dtype not in _DTYPES:
        raise TypeError(f"layer {name!r} has {weight.dtype} weights; N:M layers take float32, bfloat16 or float16")
    if not torch.isfinite(weight.detach()).all():
        raise ValueError(f"layer {name!r} has weights that are not finite; a magnitude mask needs numbers")


def check_shared(model: nn.Module, plan: Plan) -> None:
    """Refuse a plan that gives layers of one weight different patterns."""
    first: dict[int, str] = {}
    modules = dict(named_modules(model))
    for layer in plan:
        weight = getattr(modules[layer.name], "weight", None)
        if weight is None:
            continue
        other = plan[first.setdefault(id(weight), layer.name)]
        if other.pattern != layer.pattern:
            raise ValueError(
                f"layers {other.name!r} ({other.pattern}) and {layer.name!r} ({layer.pattern}) share one weight; "
                "give them one pattern with rules={...}"
            )


def get_plan(model: nn.Module) -> Plan:
    """The current plan of a sparsified model.

    Raises:
        ValueError: the model was never sparsified.
    """
    model = unwrap(model)
    plan = getattr(model, "_sparsedm_plan", None)
    if plan is None and sparse_layers(model):
        parts = [name for name, module in named_modules(model) if hasattr(module, "_sparsedm_plan")]
        raise ValueError(
            f"parts of the model were made sparse on their own ({', '.join(parts)}); address those modules"
        )
    if plan is None:
        raise ValueError("model is not sparse: call sparsify(model, pattern) first")
    return plan


def set_pattern(model: nn.Module, pattern: "str | Pattern", *, rules: Rules | None = None) -> Plan:
    """Switch the layers that :func:`sparsify` selected to another pattern, ``"dense"`` included, from the same weights.

    Layers that :func:`sparsify` left plain stay so. Compiled graphs are kept per pattern: switching back recompiles
    nothing.

    Args:
        pattern: for every selected layer; one that cannot take it becomes dense, with the reason in the plan.
        rules: as in :func:`sparsify`.

    Returns:
        The new plan.

    Raises:
        ValueError: the model is not sparse or is packed; an unknown pattern or rule; one weight under different
        patterns.
    """
    model = unwrap(model)
    previous = get_plan(model)
    chosen = sparse_layers(model)
    if not chosen:
        raise ValueError("model is packed: its patterns are fixed; set_pattern needs the sparsified model")
    layers, obstacles = survey(model)
    old_reasons = {layer.name: layer.reason for layer in previous}

    def selected(layer) -> bool | str:
        return layer.name in chosen or old_reasons.get(layer.name, "added after sparsify")

    plan = decide(layers, pattern, selected, rules, obstacles)
    for layer in plan:
        if not layer.pattern.is_dense and layer.name not in chosen:
            why = old_reasons.get(layer.name, "it was added later")
            raise ValueError(f"layer {layer.name!r} was left dense by sparsify ({why}); it stays so")
    check_shared(model, plan)
    for name, module in chosen.items():
        module.pattern = str(plan[name].pattern)
    model._sparsedm_plan = plan
    return plan


@contextmanager
def use_pattern(model: nn.Module, pattern: "str | Pattern", *, rules: Rules | None = None) -> Iterator[Plan]:
    """:func:`set_pattern` for the length of a ``with`` block; the patterns before it come back, also after an error."""
    model = unwrap(model)
    previous, chosen = get_plan(model), sparse_layers(model)
    before = {name: layer_pattern(module) for name, module in chosen.items()}
    plan = set_pattern(model, pattern, rules=rules)
    try:
        yield plan
    finally:
        for name, module in chosen.items():
            module.pattern = str(before[name])
        model._sparsedm_plan = previous
