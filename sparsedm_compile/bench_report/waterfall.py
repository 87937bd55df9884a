"""Where the time of a model goes: layers as measured for the choice of kernels, attention timed alone, the rest."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from sparsedm_compile.explain import LayerReport
from sparsedm_compile.macs import count_macs
from sparsedm_compile.timing import paired_times

#: The parts of a waterfall, in the order in which they are shown.
PARTS = ("linear", "conv", "attention", "other")


class _Attentions(TorchFunctionMode):
    """Notes the tensors' shapes, strides and dtypes of every scaled dot product attention."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            tensors, options = tree_map_only(Tensor, _layout, (args, kwargs))
            self.calls[tensors, tuple(sorted(options.items()))] += 1
        return func(*args, **kwargs)


def _layout(tensor: Tensor) -> tuple:
    return "tensor", tuple(map(int, tensor.shape)), tuple(map(int, tensor.stride())), tensor.dtype


def _like(value: Any, device: torch.device) -> Any:
    if not (isinstance(value, tuple) and value[:1] == ("tensor",)):
        return value
    _, shape, stride, dtype = value
    tensor = torch.empty_strided(shape, stride, dtype=dtype, device=device)
    return tensor.fill_(True) if dtype == torch.bool else tensor.normal_()


def attention_ms(model: nn.Module, inputs: Sequence[Any], kwargs: Mapping[str, Any], *, seconds: float = 1.0) -> float:
    """Milliseconds of all ``F.scaled_dot_product_attention`` of one call of ``model``, each timed alone.

    0 where it calls none: attention written out as products is not told from the other operators.

    Args:
        model: eager; it is run on shapes alone.
        seconds: of timing, for all different ones together.
    """
    with _Attentions() as seen:
        count_macs(model, *inputs, **kwargs)
    device = next(model.parameters()).device
    synchronize = torch.cuda.synchronize if device.type == "cuda" else None
    total = 0.0
    with torch.no_grad():
        for (args, options), count in seen.calls.items():
            tensors = [_like(value, device) for value in args]
            named = {name: _like(value, device) for name, value in options}

            def run(tensors: list = tensors, named: dict = named) -> Tensor:
                return F.scaled_dot_product_attention(*tensors, **named)

            times = paired_times({"": run}, seconds=seconds / len(seen.calls), synchronize=synchronize)
            total += count * median(times[""]) * 1e3
    return total


def layer_ms(layers: Iterable[LayerReport], time: Callable[[LayerReport], float | None]) -> dict[str, float]:
    """``{"linear": ms, "conv": ms}``, summed over those layers for which ``time`` knows it."""
    total = {"linear": 0.0, "conv": 0.0}
    for layer in layers:
        total["linear" if layer.kind == "linear" else "conv"] += time(layer) or 0.0
    return total


def ran_ms(layer: LayerReport) -> float | None:
    """The time of the kernel that ran the layer."""
    return layer.sparse_ms if layer.ran_sparse else layer.dense_ms


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "geglu": lambda x: x * F.gelu(x),
}


def fused_ms(layers: Iterable[LayerReport], like: Tensor, *, seconds: float = 1.0) -> float:
    """Milliseconds of the activations and residuals that kernels apply, each timed alone as an operator of its own.

    Dense spends them outside of its layers, so they are part of what sparse saves; at most this much, as Inductor may
    do them on the way of something else.

    Args:
        like: a tensor of the dtype and device of the layers.
        seconds: of timing, for all different ones together.
    """
    calls = Counter((name, layer.output_shape) for layer in layers if layer.output_shape for name in layer.fused)
    synchronize = torch.cuda.synchronize if like.is_cuda else None
    total = 0.0
    with torch.no_grad():
        for (name, shape), count in calls.items():
            x, other = (torch.randn(shape, device=like.device).to(like.dtype) for _ in range(2))
            run = partial(torch.add, x, other) if name == "residual" else partial(_ACTIVATIONS[name], x)
            times = paired_times({"": run}, seconds=seconds / len(calls), synchronize=synchronize)
            total += count * median(times[""]) * 1e3
    return total


def waterfall(total_ms: float, layers: Mapping[str, float], attention: float) -> dict[str, float]:
    """Milliseconds by :data:`PARTS`; ``"other"`` is what the rest leaves of the total.

    Negative where the parts, measured one by one, add up to more than the model takes: then they were measured at
    another time or on a busier machine than the model.
    """
    return {**layers, "attention": attention, "other": total_ms - sum(layers.values()) - attention}
