"""From a model and one call of it to the facts about its channels."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind

from sparsedm_compile.permutation.channels import Channels
from sparsedm_compile.permutation.layout import Layout
from sparsedm_compile.permutation.propagation import Propagation
from sparsedm_compile.permutation.rules import propagate


def find_channels(model: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Channels, list[str]]:
    """Follow the channels of ``model(*inputs, **kwargs)`` through its graph.

    Args:
        model: in eval mode, dense.

    Returns:
        What ties the channels of its parameters and buffers, a tied one under its first name; the names of the
        parameters that this call does not use.

    Raises:
        RuntimeError: ``torch.export`` cannot capture the call.
    """
    try:
        with torch.no_grad():
            program = torch.export.export(model, tuple(inputs), dict(kwargs), strict=False)
    except Exception as error:  # whatever the model's own code raises under fake tensors
        raise RuntimeError(
            f"cannot capture {type(model).__name__} as a graph, so its channels are unknown: {error}; check the call "
            "with torch.export.export(model, inputs, kwargs, strict=False)"
        ) from error

    tensors = named_tensors(model)
    names = first_names(tensors)
    memories = Counter(tensors[name].untyped_storage().data_ptr() for name in names.values())
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    channels, layouts, used = Channels(), {}, set()
    for spec in program.graph_signature.input_specs:
        node = placeholders[spec.arg.name]
        if not (node.users and isinstance(node.meta.get("val"), Tensor)):
            layouts[node.name] = None
            continue
        shape, fixed = tuple(node.meta["val"].shape), ""
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            tensor = tensors[spec.target]
            name = names[id(tensor)]
            used.add(name)
            if spec.kind is InputKind.BUFFER and not spec.persistent:
                fixed = f"{name} is a buffer that checkpoints do not hold"
            elif type(tensor) not in (Tensor, nn.Parameter):
                fixed = f"{name} is a {type(tensor).__name__}"
            elif memories[tensor.untyped_storage().data_ptr()] > 1:
                fixed = f"{name} shares memory with another tensor"
        else:
            kind = "an input" if spec.kind is InputKind.USER_INPUT else "a constant"
            fixed = f"{node.name} is {kind} of the model"
        layouts[node.name] = Layout(shape, (), fixed) if fixed else _tensor_layout(channels, name, shape)
    propagate(program.graph, layouts, Propagation(channels))
    return channels, [name for name, _parameter in model.named_parameters() if name not in used]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, a tied one under each of its names."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(model.named_buffers(remove_duplicate=False))}


def first_names(tensors: Mapping[str, Tensor]) -> dict[int, str]:
    """``id`` of a tensor -> the first of its names."""
    names: dict[int, str] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), name)
    return names


def _tensor_layout(channels: Channels, name: str, shape: tuple[int, ...]) -> Layout:
    """Each dimension of a parameter is an axis of its own."""
    arrays = []
    for dim, size in enumerate(shape):
        if size > 1:
            along = [1] * len(shape)
            along[dim] = size
            arrays.append(channels.axis(name, dim, size).reshape(along))
    return Layout(shape, tuple(arrays), f"{name} has one entry for all")
