"""End-to-end time of a model: the backend at several patterns against the faster of two dense compilations."""

import copy
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sparsedm_compile.bench_report.graph_times import graph_layer_ms, kernel_share, profile_calls
from sparsedm_compile.bench_report.waterfall import attention_ms, fused_ms, layer_ms, ran_ms
from sparsedm_compile.dtypes import dtype_name
from sparsedm_compile.explain import LayerReport, explain
from sparsedm_compile.layers import sparse_layers
from sparsedm_compile.macs import count_macs
from sparsedm_compile.masks import magnitude_mask
from sparsedm_compile.pattern import Pattern
from sparsedm_compile.plan import Plan
from sparsedm_compile.planning import Rules, make_plan
from sparsedm_compile.policy import LayerPolicy
from sparsedm_compile.provenance import provenance
from sparsedm_compile.rendering import RichText
from sparsedm_compile.sparsify import check_weight, sparsify
from sparsedm_compile.timing import median_ratio, paired_times

# Every pattern, and either dense compilation, is a cache entry of the same forward function.
_RECOMPILES = 64


@dataclass(frozen=True)
class PatternBench:
    """The model at one pattern.

    Attributes:
        pattern: its spelling.
        ms: median milliseconds of one call.
        speedup: median, over rounds, of dense over sparse time; dense is the faster dense compilation.
        spread: interquartile range of the rounds' ratios.
        relative_error: largest difference to the masked dense model, computed eagerly, over its largest output.
        macs: of linear and convolution layers, zeros skipped.
        kernels: name -> number of layers that it ran; ``"dense"`` is torch's own operator.
        least_gain: of the layers that ran a sparse kernel, the smallest ratio of dense to sparse time, as measured for
            the choice; None if that was remembered without times or no sparse kernel ran.
        graphs: compiled graphs of one call.
        compile_seconds: of the first call, kernel choice included.
        layer_ms: ``"linear"`` and ``"conv"`` -> milliseconds of those layers, by the kernels that ran: their times in
            the dense graph, each times what its kernel took of the dense operator's time when both were timed in turn
            for the choice (see :func:`explain`), which the machine's speed at that hour does not touch. On a GPU the
            times of the choice themselves.
        dense_layer_ms: of the same layers in the faster dense compilation: on a CPU of their operators as they run in
            its graph (see :func:`graph_layer_ms`), on a GPU of torch's own operators when kernels were chosen.
        fused_ms: what the activations and residuals that kernels applied would take as operators of their own, less
            what they take in the kernels; negative where that is more.
    """

    pattern: str
    ms: float
    speedup: float
    spread: float
    relative_error: float
    macs: int
    kernels: dict[str, int]
    least_gain: float | None
    graphs: int
    compile_seconds: float
    layer_ms: dict[str, float]
    dense_layer_ms: dict[str, float]
    fused_ms: float

    def explained_ms(self, dense_ms: float) -> float:
        """What a call should take going by the layers' times: whatever the dense model, which takes ``dense_ms``,
        spends outside of its layers, less what kernels spare it by fusing, and the times of the kernels that ran.

        The sparse model's own time is no part of it.
        """
        rest = dense_ms - sum(self.dense_layer_ms.values()) - self.fused_ms
        return rest + sum(self.layer_ms.values())


@dataclass(frozen=True)
class BenchReport(RichText):
    """Dense against sparse, timed in turn; prints as a table.

    Attributes:
        model: its name.
        shapes: of the inputs that are tensors.
        dtype: of the weights.
        policy: which layers were sparse; its name.
        threads: of torch, on the CPU.
        dense_ms: dense compilation -> median milliseconds.
        baseline: the faster of them, which speedups refer to.
        rounds: each ran every candidate once.
        dense_macs: of linear and convolution layers.
        attention_macs: which no pattern changes.
        attention_ms: of the attentions of one call, timed alone.
        patterns: one row each.
        provenance: see :func:`sparsedm_compile.provenance.provenance`.
    """

    model: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    policy: str
    threads: int
    dense_ms: dict[str, float]
    baseline: str
    rounds: int
    dense_macs: int
    attention_macs: int
    attention_ms: float
    patterns: tuple[PatternBench, ...]
    provenance: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON."""
        return asdict(self)

    def __rich__(self) -> Table:
        shapes = ", ".join("x".join(map(str, shape)) for shape in self.shapes)
        table = Table(
            title=f"{self.model}: {shapes}, {self.dtype}, policy {self.policy}",
            caption=f"{self.provenance['cpu']}, {self.threads} threads, torch {self.provenance['versions']['torch']}; "
            f"{self.rounds} rounds, speedup over {self.baseline}",
        )
        for column in ("", "ms", "speedup", "IQR", "GMACs", "relative error", "compile s"):
            table.add_column(column, justify="right" if column else "left")
        table.add_column("layers by kernel", overflow="fold")
        for name, ms in self.dense_ms.items():
            table.add_row(name, f"{ms:.1f}", "", "", f"{self.dense_macs / 1e9:.2f}")
        for row in self.patterns:
            table.add_row(
                row.pattern,
                f"{row.ms:.1f}",
                f"{row.speedup:.2f}x",
                f"{row.spread:.2f}",
                f"{row.macs / 1e9:.2f}",
                f"{row.relative_error:.1e}",
                f"{row.compile_seconds:.1f}",
                ", ".join(f"{count} {kernel}" for kernel, count in row.kernels.items()),
            )
        return table


def bench_model(
    model: nn.Module,
    inputs: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    patterns: Sequence["str | Pattern"] = ("2:4",),
    policy: str | LayerPolicy = "default",
    rules: Rules | None = None,
    seconds: float = 10.0,
    name: str = "",
    progress: Callable[[str], object] = lambda step: None,
) -> BenchReport:
    """Time ``model`` at each pattern against Inductor and Inductor with freezing (constant folding of the weights).

    All candidates are compiled first and then run in turn, two calls each a round of which the second is timed, so that
    a drift of the machine's speed meets all alike and each finds the caches as it left them. The model itself is left
    as it was; sparse copies share its weights.

    Args:
        model: dense, in eval mode, with its weights loaded.
        inputs, kwargs: of one call.
        patterns: any number but none; ``"dense"`` times the backend without any mask.
        policy, rules: as in :func:`sparsify`.
        seconds: for the timed rounds, all candidates together; at least 5 rounds are run.
        name: for the report; the class name unless given.
        progress: called with what is about to be done.

    Raises:
        ValueError: no pattern, or one that ``model`` cannot take (see :func:`sparsify`); the model is sparse already.
        TypeError: not a module.
    """
    kwargs = dict(kwargs or {})
    if not patterns:
        raise ValueError("bench_model: patterns is empty; pass at least one, such as '2:4'")
    if sparse_layers(model):
        raise ValueError("bench_model: the model is sparse already; pass the dense one, sparse copies are made of it")
    plans = {str(Pattern.parse(pattern)): make_plan(model, pattern, policy, rules) for pattern in patterns}
    modules = dict(model.named_modules())
    for pattern, plan in plans.items():  # before anything is compiled, which takes a minute
        if not plan.patterns():
            raise ValueError(
                f"bench_model: no layer takes {pattern}: {'; '.join(sorted({row.reason for row in plan}))}"
            )
        for layer in plan.patterns():
            check_weight(layer, modules[layer].weight)
    counted = {pattern: count_macs(model, *inputs, plan=plan, **kwargs) for pattern, plan in plans.items()}
    synchronize = torch.cuda.synchronize if any(p.is_cuda for p in model.parameters()) else None

    candidates: dict[str, Callable[[], object]] = {}
    rows: dict[str, dict[str, Any]] = {}
    timed_layers: dict[str, list[LayerReport]] = {}
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=_RECOMPILES):
        for dense, freezing in (("inductor", False), ("inductor, freezing", True)):
            progress(f"compile {dense}")
            # Freezing must be on while Dynamo traces as well, which torch.compile's options alone do not bring about.
            compiled = torch.compile(model, options={"freezing": freezing})
            with torch._inductor.config.patch(freezing=freezing):
                compiled(*inputs, **kwargs)
            candidates[dense] = lambda run=compiled: run(*inputs, **kwargs)
        baselines = list(candidates)
        for pattern, plan in plans.items():
            progress(f"compile {pattern}")
            sparse = _sharing_copy(model)
            sparsify(sparse, pattern, policy=policy, rules=rules)
            compiled = torch.compile(sparse, backend="sparsedm")
            start = time.perf_counter()
            output = compiled(*inputs, **kwargs)
            elapsed = time.perf_counter() - start
            candidates[pattern] = lambda run=compiled: run(*inputs, **kwargs)
            told = explain(compiled, *inputs, **kwargs)
            gains = [
                layer.dense_ms / layer.sparse_ms
                for layer in told.layers
                if layer.sparse_ms and layer.dense_ms and layer.ran_sparse
            ]
            timed_layers[pattern] = [layer for layer in told.layers if ran_ms(layer) is not None]
            rows[pattern] = {
                "relative_error": _relative_error(output, _masked_dense(model, plan, inputs, kwargs)),
                "macs": counted[pattern].sparse,
                "kernels": dict(Counter(layer.kernel for layer in told.layers).most_common()),
                "least_gain": min(gains, default=None),
                "graphs": told.graphs,
                "compile_seconds": elapsed,
                "fused_ms": fused_ms(told.layers, next(model.parameters())),
            }
        progress("time in turn")
        times = paired_times(candidates, seconds=seconds, min_rounds=5, warm=True, synchronize=synchronize)
        attention = attention_ms(model, inputs, kwargs, seconds=seconds / 10)
        baseline = min(baselines, key=lambda dense: median(times[dense]))
        dense_ms = {dense: median(times[dense]) * 1e3 for dense in baselines}
        profiled = profile_calls(candidates[baseline]) if synchronize is None else None
        share = partial(kernel_share, freezing=baseline != "inductor")
        for pattern, layers in timed_layers.items():
            if profiled is None:  # on a GPU a host's profile has launches alone
                dense, ran = layer_ms(layers, lambda layer: layer.native_ms), layer_ms(layers, ran_ms)
            else:
                dense = graph_layer_ms(profiled, layers, dense_ms[baseline])
                ran = graph_layer_ms(profiled, layers, dense_ms[baseline], share)
            rows[pattern] |= {"dense_layer_ms": dense, "layer_ms": ran}

    measured = []
    for pattern, row in rows.items():
        speedup, spread = median_ratio(times[baseline], times[pattern])
        measured.append(PatternBench(pattern, median(times[pattern]) * 1e3, speedup, spread, **row))
    first = next(iter(counted.values()))
    return BenchReport(
        model=name or type(model).__name__,
        shapes=tuple(tuple(t.shape) for t in tree_leaves((tuple(inputs), kwargs)) if isinstance(t, Tensor)),
        dtype=dtype_name(next(model.parameters()).dtype),
        policy=policy if isinstance(policy, str) else getattr(policy, "__name__", "custom"),
        threads=torch.get_num_threads(),
        dense_ms=dense_ms,
        baseline=baseline,
        rounds=len(times[baseline]),
        dense_macs=first.dense,
        attention_macs=first.attention,
        attention_ms=attention,
        patterns=tuple(measured),
        provenance=provenance(),
    )


def _sharing_copy(model: nn.Module) -> nn.Module:
    """A copy with modules of its own, which hold the same parameters and buffers."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def _masked_dense(model: nn.Module, plan: Plan, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What torch alone computes, eagerly, from weights with the zeros written in."""
    weights = {f"{layer}.weight" if layer else "weight": pattern for layer, pattern in plan.patterns().items()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    masked = {key: parameters[key] * magnitude_mask(parameters[key], pattern) for key, pattern in weights.items()}
    return torch.func.functional_call(model, masked, tuple(inputs), dict(kwargs))


def _relative_error(output: Any, expected: Any) -> float:
    """Over all tensors of two outputs of one structure: largest difference over largest magnitude."""
    pairs = [
        (a.double(), b.double())
        for a, b in zip(tree_leaves(output), tree_leaves(expected), strict=True)
        if isinstance(a, Tensor) and a.is_floating_point()
    ]
    largest = max(b.abs().max().item() for _, b in pairs)
    difference = max((a - b).abs().max().item() for a, b in pairs)
    return difference / largest if largest else difference
