"""Making a plan: policy, rules and shapes decide the pattern of every layer, before anything is touched."""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parallel import DistributedDataParallel

from sparsedm_compile.pattern import DENSE, Pattern
from sparsedm_compile.plan import LayerInfo, Plan, PlanLayer
from sparsedm_compile.policy import LayerPolicy, dense_reasons

Rules = Mapping[str, "str | Pattern"]

_KINDS = {nn.Linear: "linear", nn.Conv1d: "conv1d", nn.Conv2d: "conv2d", nn.Conv3d: "conv3d"}


def unwrap(model: nn.Module) -> nn.Module:
    """The module behind the wrappers of ``torch.compile`` and ``DistributedDataParallel``.

    Raises:
        TypeError: not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    model = getattr(model, "_orig_mod", model)
    return unwrap(model.module) if isinstance(model, DistributedDataParallel) else model


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()`` by the names from before ``torch.compile`` wrapped any submodule."""
    for name, module in model.named_modules():
        yield ".".join(part for part in name.split(".") if part != "_orig_mod"), module


def decide(
    layers: Sequence[LayerInfo],
    pattern: "str | Pattern",
    policy: str | LayerPolicy = "default",
    rules: Rules | None = None,
    obstacles: Mapping[str, str] | None = None,
) -> Plan:
    """Give each layer its pattern. Rules override the policy; the last rule that matches a layer wins.

    Args:
        layers: all layers, in model order.
        pattern: what a layer gets that the policy makes sparse.
        policy: a name in ``POLICIES``, or ``f(layer: LayerInfo) -> True | False | "reason for dense"``.
        rules: glob or exact name -> pattern or ``"dense"``. A glob leaves dense, with the reason, what cannot take its
            pattern; an exact name that cannot is an error.
        obstacles: name -> why this layer cannot be sparse, whatever its shape.

    Raises:
        ValueError: an unknown pattern or policy, a rule that matches no layer, an exact rule that cannot hold.
        TypeError: an argument of the wrong type.
    """
    pattern = Pattern.parse(pattern)
    obstacles = obstacles or {}
    if rules is not None and not isinstance(rules, Mapping):
        raise TypeError(f"rules must map layer globs to patterns, got {type(rules).__name__}")
    parsed = {glob: Pattern.parse(spelling) for glob, spelling in (rules or {}).items()}
    names = [layer.name for layer in layers]
    for glob in parsed:
        if not any(_matches(name, glob) for name in names):
            raise ValueError(f"rule {glob!r} matches no layer; layers are: {_sample(names)}")

    reasons = dense_reasons(policy, layers)
    decided = []
    for layer in layers:
        reason = reasons.get(layer.name, "")
        wanted, rule = DENSE if reason else pattern, None
        for glob, ruled in parsed.items():
            if _matches(layer.name, glob):
                wanted, rule = ruled, glob
                reason = f"rule {glob!r}" if ruled.is_dense else ""
        obstacle = obstacles.get(layer.name, "")
        switchable = not (reason or obstacle)
        if not wanted.is_dense:
            obstacle = obstacle or wanted.refusal(layer.weight_shape, layer.groups)
            if obstacle and rule == layer.name:
                raise ValueError(f"layer {layer.name!r} cannot be {wanted} as its rule demands: {obstacle}")
            if obstacle:
                wanted, reason = DENSE, obstacle
        elif not reason:
            reason = obstacle or "pattern dense"
        decided.append(PlanLayer(layer.name, layer.kind, layer.weight_shape, layer.groups, wanted, reason, switchable))
    return Plan(decided)


def _matches(name: str, rule: str) -> bool:
    return name == rule or fnmatchcase(name, rule)  # an exact name may hold brackets, as keys of a ModuleDict do


def _sample(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:8])
    return shown + (f", ... ({len(names)} in all)" if len(names) > 8 else "")


def survey(model: nn.Module) -> tuple[list[LayerInfo], dict[str, str]]:
    """The layers of a model that multiply by a weight, and why some of them cannot be sparse.

    Returns:
        All linear and convolution layers in registration order; name -> obstacle.
    """
    layers, obstacles = [], {}
    unmasked = _unmasked_parameters(model)
    for name, module in named_modules(model):
        if isinstance(module, nn.Linear | _ConvNd):
            kind = next((kind for cls, kind in _KINDS.items() if isinstance(module, cls)), type(module).__name__)
            shape, groups = tuple(module.weight.shape), getattr(module, "groups", 1)
            obstacle = _obstacle(module)
            if obstacle is None and id(module.weight) in unmasked:
                obstacle = f"weight shared with {unmasked[id(module.weight)]}, which has no mask"
        elif isinstance(module, nn.MultiheadAttention):
            kind, groups = "MultiheadAttention", 1
            shape = (3 * module.embed_dim, module.embed_dim)
            obstacle = "MultiheadAttention holds its projections in one parameter and bypasses nn.Linear"
        else:
            continue
        layers.append(LayerInfo(name, kind, shape, groups))
        if obstacle:
            obstacles[name] = obstacle
    return layers, obstacles


def _unmasked_parameters(model: nn.Module) -> dict[int, str]:
    """Id of each parameter that is used without a mask -> name and type of a module that holds it."""
    return {
        id(parameter): f"{name!r} ({type(module).__name__})"
        for name, module in named_modules(model)
        for attribute, parameter in module._parameters.items()
        if parameter is not None and (attribute != "weight" or _obstacle(module) is not None)
    }


def _obstacle(module: nn.Module) -> str | None:
    base = next((cls for cls in _KINDS if isinstance(module, cls)), None)
    if base is None:
        return f"{type(module).__name__} has no sparse kernel"
    # Sparse layers are subclasses too, but by definition they can be sparse.
    if type(module) is not base and not getattr(type(module), "carries_pattern", False):
        return f"{type(module).__name__} is a subclass of {base.__name__} with a forward or weight of its own"
    if not isinstance(module.weight, nn.Parameter):
        return "its weight is computed by a hook (weight_norm), not a parameter"
    return None


def make_plan(
    model: nn.Module,
    pattern: "str | Pattern" = "2:4",
    policy: str | LayerPolicy = "default",
    rules: Rules | None = None,
) -> Plan:
    """What :func:`sparsify` would do, without doing it. Reads shapes only, so a model on ``meta`` will do.

    Args, Raises: as :func:`sparsify`, less what concerns the weights' values.
    """
    layers, obstacles = survey(unwrap(model))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear or convolution layer to make sparse")
    return decide(layers, pattern, policy, rules, obstacles)
