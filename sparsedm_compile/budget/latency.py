"""What each pattern of each layer costs in time: the backend's own measured choices, and the whole dense model once."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from sparsedm_compile.budget.choices import Choice, layer_choices
from sparsedm_compile.kernels import get_kernel, kernel_names
from sparsedm_compile.kernels.choice import choose
from sparsedm_compile.kernels.verdicts import Verdict
from sparsedm_compile.modes import evaluating
from sparsedm_compile.packed_layers import spec_of
from sparsedm_compile.pattern import DENSE, Pattern
from sparsedm_compile.planning import Rules, named_modules, unwrap
from sparsedm_compile.policy import LayerPolicy
from sparsedm_compile.rendering import RichText, milliseconds
from sparsedm_compile.timing import paired_times


@dataclass(frozen=True)
class LatencyTable(RichText):
    """The time of each layer at each pattern; prints as a table. ``LatencyTable(**json.load(file))`` reads it back.

    Attributes:
        dense_ms: of one call of the whole dense model.
        layers: layer -> spelling of a pattern, ``"dense"`` included -> milliseconds in one call of the model. A layer
            whose time no pattern changes may be missing.
    """

    dense_ms: float
    layers: Mapping[str, Mapping[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON."""
        return asdict(self)

    def of(self, name: str, pattern: Pattern) -> tuple[float, float] | tuple[None, None]:
        """Milliseconds of one layer, dense and at ``pattern``; None where it is not in the table."""
        row = self.layers.get(name)
        return (None, None) if row is None else (row[str(DENSE)], row[str(pattern)])

    def savings(self, choice: Choice) -> list[float]:
        """For each option of ``choice``, the milliseconds that its layers take less than dense.

        Raises:
            ValueError: not measured.
        """
        missing = {
            str(option)
            for option in (DENSE, *choice.options)
            for name in choice.names
            if name in self.layers and str(option) not in self.layers[name]
        }
        if missing:
            raise ValueError(
                f"the latency table holds no time of layer {choice.name!r} at {', '.join(sorted(missing))}: measure it "
                "with the same model, candidates, policy and rules"
            )
        rows = [self.layers[name] for name in choice.names if name in self.layers]
        return [sum(row[str(DENSE)] - row[str(option)] for row in rows) for option in choice.options]

    def __rich__(self) -> Table:
        patterns = list(dict.fromkeys(pattern for row in self.layers.values() for pattern in row))
        table = Table(title="latency, ms", caption=f"the whole dense model: {milliseconds(self.dense_ms)} ms")
        table.add_column("layer", overflow="fold")
        for pattern in patterns:
            table.add_column(pattern, justify="right")
        for name, row in self.layers.items():
            table.add_row(name or "(model)", *(milliseconds(row.get(pattern)) for pattern in patterns))
        return table


def measure_latency(
    model: nn.Module,
    inputs: Sequence[Any],
    *,
    candidates: Sequence["str | Pattern"],
    policy: str | LayerPolicy = "default",
    rules: Rules | None = None,
    seconds: float = 2.0,
) -> LatencyTable:
    """Time each layer at each candidate pattern, and the whole dense model compiled with the backend.

    A layer's time is that of the kernel that the backend would choose for it, so no pattern is slower than dense. It is
    the dense time divided by the measured ratio of the two: ratios are taken side by side, times are not. Choices that
    the backend remembers cost nothing here, and those measured here serve it later. A choice that is clear at a size
    near that of ``inputs`` counts for it, its time scaled by the elements.

    Args:
        model: dense, called as ``model(*inputs)``; left as it was.
        inputs: one batch, of the size that the latency is wanted for.
        candidates, policy, rules: as in :func:`sparsedm_compile.plan_for`.
        seconds: spent on timing the whole model, after its compilation; its fastest call counts.

    Raises:
        ValueError: what :func:`layer_choices` refuses.
        TypeError: an argument of the wrong type.
    """
    choices = layer_choices(model, candidates, policy, rules)
    model = unwrap(model)
    modules = dict(named_modules(model))
    compiled = torch.compile(model, backend="sparsedm")
    with evaluating(model), torch.no_grad():
        calls = _record_inputs({name: modules[name] for choice in choices for name in choice.names}, model, inputs)
        on_gpu = next(model.parameters()).device.type == "cuda"
        times = paired_times(
            {"dense": lambda: compiled(*inputs)},
            seconds=seconds,
            synchronize=torch.cuda.synchronize if on_gpu else None,
        )
    layers = {}
    for choice in choices:
        for name in choice.names:
            rows = [_call_times(modules[name], x, choice.options) for x in calls[name]]
            if rows and None not in rows:
                layers[name] = {pattern: sum(row[pattern] for row in rows) for pattern in rows[0]}
    # The least disturbed round: on a busy machine the choice compares minima of layers, and a median of the whole model
    # (seen at 36 ms beside layers of 6) would hold other work that no pattern makes faster.
    return LatencyTable(min(times["dense"]) * 1e3, layers)


def _record_inputs(
    layers: Mapping[str, nn.Module], model: nn.Module, inputs: Sequence[Any]
) -> Mapping[str, list[Tensor]]:
    """Run the model once; for each layer, the shape and strides of its input at each call, as tensors on meta."""
    calls: dict[str, list[Tensor]] = defaultdict(list)

    def record(name: str, args: tuple, kwargs: dict[str, Any]) -> None:
        calls[name].append(torch.empty_like(args[0] if args else kwargs["input"], device="meta"))

    with ExitStack() as stack, torch.compiler.set_stance("force_eager"):
        for name, layer in layers.items():
            hook = layer.register_forward_pre_hook(
                lambda _module, args, kwargs, name=name: record(name, args, kwargs), with_kwargs=True
            )
            stack.callback(hook.remove)
        model(*inputs)
    return calls


def _call_times(layer: nn.Module, x: Tensor, options: Sequence[Pattern]) -> dict[str, float] | None:
    """Milliseconds of one call at each option and at dense; None where the backend has measured no dense time."""
    if options == (DENSE,):
        return None  # nothing to decide: its time is part of the rest
    spec = spec_of(layer, layer.weight)
    unusual = "the input is one image without a batch dimension" if x.dim() < layer.weight.dim() > 2 else ""
    verdicts = {
        pattern: choose(replace(spec, pattern=pattern), x, layer.bias is not None, unusual=unusual)
        for pattern in dict.fromkeys((DENSE, *options))
    }
    timed = next((v for v in verdicts.values() if v.dense_seconds is not None), None)
    if timed is None:
        return None
    # A verdict may come from an input of like size.
    dense = 1e3 * timed.dense_seconds * x.numel() / math.prod(timed.measured_at)
    return {str(pattern): dense / _speedup(verdict) for pattern, verdict in verdicts.items()}


def _speedup(verdict: Verdict) -> float:
    sparse = verdict.kernel in kernel_names() and get_kernel(verdict.kernel).skips_zeros
    return verdict.ratio if sparse and verdict.ratio is not None else 1.0
