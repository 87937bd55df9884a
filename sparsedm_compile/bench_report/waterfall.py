"""Where the time of a model goes: layers, attention timed alone, what kernels fuse, the rest."""

import math
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
from sparsedm_compile.kernels import get_kernel
from sparsedm_compile.kernels.registry import LayerSpec
from sparsedm_compile.macs import count_macs
from sparsedm_compile.masked_weight import mask_out
from sparsedm_compile.pattern import Pattern
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
    """``{"linear": ms, "conv": ms}``, summed over the calls of those layers for which ``time`` knows it."""
    total = {"linear": 0.0, "conv": 0.0}
    for layer in layers:
        total["linear" if layer.kind == "linear" else "conv"] += layer.calls * (time(layer) or 0.0)
    return total


def ran_ms(layer: LayerReport) -> float | None:
    """The time of the kernel that ran the layer."""
    return layer.sparse_ms if layer.ran_sparse else layer.dense_ms


_EPILOGUES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": lambda x, _: F.gelu(x),
    "gelu_tanh": lambda x, _: F.gelu(x, approximate="tanh"),
    "silu": lambda x, _: F.silu(x),
    "geglu": lambda x, gate: x * F.gelu(gate),
    "residual": lambda x, other: x + other,
}


def fused_ms(layers: Iterable[LayerReport], like: Tensor, *, seconds: float = 1.0) -> float:
    """Milliseconds that sparse saves by the activations and residuals that its kernels apply.

    Dense runs each as an operator of its own, compiled by Inductor; what a kernel takes more with it than without is
    less than that where fusing pays, and more where it does not: then the sum may be negative. Both are timed in turn.
    For a convolution its kernel is timed in a linear of as many outputs.

    Args:
        like: a tensor of the dtype and device of the layers.
        seconds: of timing, for all different ones together.
    """
    calls: Counter[tuple] = Counter()
    for layer in layers:
        for name in layer.fused if layer.output_shape else ():
            kernel = layer.kernel.split(", ")[0]
            calls[name, layer.output_shape, layer.kind, layer.weight_shape[:2], kernel, layer.pattern] += layer.calls
    synchronize = torch.cuda.synchronize if like.is_cuda else None
    total = 0.0
    with torch.no_grad():
        for (name, shape, kind, weight, kernel, pattern), count in calls.items():
            x, other = (torch.randn(shape, device=like.device).to(like.dtype) for _ in range(2))
            alone = partial(torch.compile(_EPILOGUES[name], dynamic=True), x, other)
            tokens = math.prod(shape[:-1]) if kind == "linear" else shape[0] * math.prod(shape[2:])
            runs = {"alone": alone, **_product(name, tokens, weight, kernel, pattern, like)}
            times = paired_times(runs, seconds=seconds / len(calls), synchronize=synchronize)
            ms = {run: median(rounds) * 1e3 for run, rounds in times.items()}
            total += count * (ms["alone"] - (ms["fused"] - ms["plain"] if "fused" in ms else 0.0))
    return total


def _product(
    name: str, tokens: int, weight: tuple[int, int], kernel: str, pattern: str, like: Tensor
) -> dict[str, Callable[[], Tensor]]:
    """A linear by a sparse kernel, with what it fuses and without; empty where it takes no such linear."""
    parsed = Pattern.parse(pattern)
    outputs, width = weight[0], -(-weight[1] // parsed.m) * parsed.m
    spec = LayerSpec("linear", (outputs, width), parsed, like.dtype, like.device.type)
    if get_kernel(kernel).refusal(spec) is not None:
        return {}
    x, dense, residual = (
        torch.randn(size, device=like.device).to(like.dtype)
        for size in ((tokens, width), (outputs, width), (tokens, outputs))
    )
    packed = get_kernel(kernel).pack(mask_out(dense, pattern), spec)
    plain = partial(torch.ops.sparsedm.linear.default, x, *packed, kernel, pattern, [outputs, width], None)
    fused = {"residual": residual} if name == "residual" else {"activation": name}
    return {"plain": plain, "fused": partial(plain, **fused)}


def waterfall(total_ms: float, layers: Mapping[str, float], attention: float) -> dict[str, float]:
    """Milliseconds by :data:`PARTS`; ``"other"`` is what the rest leaves of the total.

    Negative where the parts, measured one by one, add up to more than the model takes: then they were measured at
    another time or on a busier machine than the model.
    """
    return {**layers, "attention": attention, "other": total_ms - sum(layers.values()) - attention}
