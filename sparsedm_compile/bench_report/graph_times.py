"""What a compiled dense model spends in its layers: their operators, timed where they stand in the graph.

A layer timed alone, as for the choice of kernels, finds its weight in the cache, and not every dense compilation runs
the dense operator that was fastest alone. The difference is no part of what lies between layers.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from torch.autograd.profiler import profile, record_function
from torch.autograd.profiler_util import FunctionEvent

from sparsedm_compile.explain import LayerReport

_CALL = "sparsedm: one call"
# Every operator that Inductor makes of a linear or convolution on a CPU, frozen or not.
_TRANSPOSING = ("aten::mm", "aten::addmm")
_OPERATORS = (
    *_TRANSPOSING,
    "aten::convolution",
    "mkl::_mkl_linear",
    "mkldnn::_linear_pointwise",
    "mkldnn::_convolution_pointwise",
    "mkldnn::_convolution_pointwise_",
)


@dataclass(frozen=True)
class ProfiledCall:
    """One call of a compiled model.

    Attributes:
        seconds: of all of it.
        operators: shape of a layer's weight -> seconds of each operator that ran on a weight of this shape.
    """

    seconds: float
    operators: Mapping[tuple[int, ...], Sequence[float]]


def profile_calls(run: Callable[[], object], calls: int = 5) -> list[ProfiledCall]:
    """Profile calls of a compiled model, one after another, on a CPU.

    Args:
        run: one call; warm.
    """
    with profile(record_shapes=True, use_kineto=False) as profiled:
        for _ in range(calls):
            with record_function(_CALL):
                run()
    found: dict[int, dict[tuple[int, ...], list[float]]] = {}
    seconds = {}
    for event in profiled.function_events:
        if event.name == _CALL:
            seconds[event.id] = event.cpu_time_total / 1e6
        elif event.name in _OPERATORS and (shape := _weight_shape(event.name, event.input_shapes)) is not None:
            operators = found.setdefault(_outermost(event).id, defaultdict(list))
            operators[shape].append(event.cpu_time_total / 1e6)
    return [ProfiledCall(whole, found.get(call, {})) for call, whole in seconds.items()]


def graph_layer_ms(
    profiled: Sequence[ProfiledCall],
    layers: Iterable[LayerReport],
    total_ms: float,
    scale: Callable[[LayerReport], float] = lambda layer: 1.0,
) -> dict[str, float]:
    """``{"linear": ms, "conv": ms}`` of ``total_ms`` that a dense model spends in the operators of ``layers``.

    Operators are recognized by the shapes of their weights. Layers that Inductor computes without one (of some ten
    numbers) count nothing. What a frozen convolution does on the way (adding a residual) is part of its time.

    Args:
        profiled: calls of the dense model; the median of their shares counts.
        layers: those that count. Where further operators share a weight's shape, as many count as ``layers`` call,
            each with the mean time.
        total_ms: of one call, measured without a profiler. Its layers' share is what is taken from the profiled calls,
            so that a drift of the machine's speed meets both.
        scale: what to count of each layer's time: with :func:`kernel_share`, what the kernel that ran it takes.
    """
    expected: Counter[tuple[int, ...]] = Counter()
    scaled: defaultdict[tuple[int, ...], float] = defaultdict(float)
    kinds = {}
    for layer in layers:
        expected[layer.weight_shape] += layer.calls
        scaled[layer.weight_shape] += layer.calls * scale(layer)
        kinds[layer.weight_shape] = "linear" if layer.kind == "linear" else "conv"

    def share(call: ProfiledCall, kind: str) -> float:
        spent = 0.0
        for shape, times in call.operators.items():
            if kinds.get(shape) == kind and expected[shape]:
                spent += fmean(times) * scaled[shape] * min(1.0, len(times) / expected[shape])
        return spent / call.seconds

    return {kind: total_ms * median(share(call, kind) for call in profiled) for kind in ("linear", "conv")}


def kernel_share(layer: LayerReport, freezing: bool) -> float:
    """What the kernel that ran a layer takes of the dense model's time for it, both timed in turn for the choice.

    The dense time is that of the operator that the dense model calls: torch's own, but oneDNN's for a frozen
    convolution. Frozen linears run MKL's packed one, which nobody timed: 2 to 8% faster than torch's own on one thread
    of a Zen 3.
    """
    ran = layer.sparse_ms if layer.ran_sparse else layer.dense_ms
    return ran / (layer.dense_ms if freezing and layer.kind != "linear" else layer.native_ms)


def _outermost(event: FunctionEvent) -> FunctionEvent:
    while event.cpu_parent is not None:
        event = event.cpu_parent
    return event


def _weight_shape(operator: str, shapes: list[list[int]]) -> tuple[int, ...] | None:
    """The weight is the last matrix of the second and third input: a bias may follow it, a residual stand before it."""
    inputs = shapes[1:2] if operator == "aten::mm" else shapes[1:3]  # mm's third is its output
    shape = next((tuple(one) for one in reversed(inputs) if len(one) > 1), None)
    return shape[::-1] if shape is not None and operator in _TRANSPOSING else shape
