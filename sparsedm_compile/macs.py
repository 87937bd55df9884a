"""Count multiply-accumulates layer by layer, on shapes alone: nothing is computed and no weight is allocated."""

import difflib
import inspect
from collections import ChainMap, Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, Protocol, overload

import torch
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from sparsedm_compile.pattern import DENSE, Pattern
from sparsedm_compile.planning import unwrap
from sparsedm_compile.rendering import RichText

ATTENTION = "attention"
_MASKABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Which weight a tensor was derived from; set on the fake tensors of one count, which die with it.
_WEIGHT_TAG = "_sparsedm_weight_of"
_PRIM_DEVICE = torch.ops.prim.device.default


class HasPatterns(Protocol):
    """A plan: anything with ``patterns()``."""

    def patterns(self) -> Mapping[str, Pattern | str]:
        """Layer name -> pattern."""


class Schedule(Protocol):
    """A :class:`sparsedm_compile.TimestepSchedule`, which stands above this module."""

    def at(self, timestep: float) -> Hashable:
        """The range of a time; prints as an interval."""

    def use(self, model: nn.Module) -> AbstractContextManager[Callable[[float], None]]:
        """A block in which the model follows the schedule, by calls of what it yields."""


@dataclass(frozen=True)
class LayerMacs:
    """One row of a report.

    Attributes:
        name: of the module in ``model.named_modules()``; empty for the model itself.
        kind: ``"linear"``, ``"conv1d"``, ``"conv2d"``, ``"conv3d"``, or ``"attention"``: products of two activations.
        pattern: its spelling.
        dense: MACs of all calls in one forward pass, zeros included.
        sparse: MACs left when zeros are skipped, ``dense * n / m``.
        params: of this module, bias included.
        kept_params: of these, not masked.
        dense_bytes: of all parameters.
        packed_bytes: of the kept parameters, in their dtype, and one byte for each kept position (which ``v`` output
            channels share).
    """

    name: str
    kind: str
    pattern: str
    dense: int
    sparse: int
    params: int
    kept_params: int
    dense_bytes: int
    packed_bytes: int


@dataclass(frozen=True)
class MacsReport(RichText):
    """MACs, parameters and bytes of a model; prints as a table.

    Attributes:
        dense: MACs of all linear and convolution layers, zeros included.
        sparse: MACs of the same layers when zeros are skipped.
        attention: MACs of products of two activations (Q K and A V), which no weight mask makes fewer.
        params, kept_params, dense_bytes, packed_bytes: of the whole model, norms and embeddings included; a parameter
            shared by two modules counts once.
        layers: in order of their first call, then the layers that were not called.
    """

    dense: int
    sparse: int
    attention: int
    params: int
    kept_params: int
    dense_bytes: int
    packed_bytes: int
    layers: tuple[LayerMacs, ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON; all numbers are integers."""
        return {**asdict(self), "layers": [asdict(layer) for layer in self.layers]}

    def __rich__(self) -> Table:
        saved = 1 - self.sparse / self.dense if self.dense else 0.0
        table = Table(
            title="MACs",
            caption=f"linear and conv {_si(self.dense)} dense, {_si(self.sparse)} sparse (-{saved:.1%}); "
            f"attention {_si(self.attention)}; parameters {_si(self.params)}, {_si(self.kept_params)} kept; "
            f"{_si(self.dense_bytes)}B dense, {_si(self.packed_bytes)}B packed",
        )
        for column in ("layer", "kind", "pattern"):
            table.add_column(column, overflow="fold")
        for column in ("dense", "sparse", "params", "kept", "bytes", "packed"):
            table.add_column(column, justify="right")
        for layer in self.layers:
            numbers = (
                layer.dense,
                layer.sparse,
                layer.params,
                layer.kept_params,
                layer.dense_bytes,
                layer.packed_bytes,
            )
            table.add_row(layer.name or "(model)", layer.kind, layer.pattern, *(_si(number) for number in numbers))
        return table


@dataclass(frozen=True)
class RangeMacs:
    """The steps of a sampling run that share one range of its schedule.

    Attributes:
        range: of times, as an interval.
        steps: how many of the run's steps lie in it.
        step: the MACs of each of them.
    """

    range: str
    steps: int
    step: MacsReport


@dataclass(frozen=True)
class RunMacs(RichText):
    """MACs of a whole sampling run, one call of the model a step; prints as a table.

    Attributes:
        steps: calls of the model.
        dense: MACs of all linear and convolution layers over all steps, zeros included.
        sparse: MACs of the same when zeros are skipped, at each step those of its patterns.
        attention: MACs of products of two activations over all steps.
        ranges: those that a step lies in, in the order of the run.
    """

    steps: int
    dense: int
    sparse: int
    attention: int
    ranges: tuple[RangeMacs, ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON; all numbers are integers."""
        return asdict(self)

    def __rich__(self) -> Table:
        saved = 1 - self.sparse / self.dense if self.dense else 0.0
        table = Table(
            title=f"MACs of {self.steps} steps",
            caption=f"linear and conv {_si(self.dense)} dense, {_si(self.sparse)} sparse (-{saved:.1%}); "
            f"attention {_si(self.attention)}",
        )
        table.add_column("times")
        for column in ("steps", "dense", "sparse", "sparse, one step"):
            table.add_column(column, justify="right")
        for row in self.ranges:
            numbers = (row.steps * row.step.dense, row.steps * row.step.sparse, row.step.sparse)
            table.add_row(row.range, str(row.steps), *map(_si, numbers))
        return table


@overload
def count_macs(
    model: nn.Module,
    *inputs: Any,
    plan: Mapping[str, Pattern | str] | HasPatterns | None = None,
    schedule: None = None,
    **kwargs: Any,
) -> MacsReport: ...


@overload
def count_macs(
    model: nn.Module, *inputs: Any, schedule: Schedule, times: Iterable[float], **kwargs: Any
) -> RunMacs: ...


def count_macs(
    model: nn.Module,
    *inputs: Any,
    plan: Mapping[str, Pattern | str] | HasPatterns | None = None,
    schedule: Schedule | None = None,
    times: Iterable[float] | None = None,
    **kwargs: Any,
) -> MacsReport | RunMacs:
    """Count the MACs of one forward pass, ``model(*inputs, **kwargs)``, or of a sampling run, from shapes alone.

    Model and inputs may live on any device, ``"meta"`` included, in any mix; fake tensors stand in for them, so a model
    of 12 billion parameters takes seconds and no memory, and the model is left as it was. The formulas are those of
    ``torch.utils.flop_counter``: for a dense model its FLOPs are twice ``dense + attention``.

    Args:
        model: dense, sparsified or packed; a compiled model is counted as the eager model that it was made from.
        plan: patterns to count a model at without touching it: layer name -> pattern, or a :class:`Plan`. A layer that
            it does not name keeps its own pattern.
        schedule: a :class:`sparsedm_compile.TimestepSchedule` for a sparsified model; counts one pass for each of
            ``times``, which :func:`sparsedm_compile.sampling_times` gives for :func:`sparsedm_compile.sample`. The
            model takes the patterns of each range for a moment and gets its own back.
        times: of the steps, in the units of the schedule.
        inputs, kwargs: of ``model.forward``; only the shapes and dtypes of tensors matter.

    Returns:
        Integers, in MACs (one MAC is two FLOPs), parameters and bytes; with a schedule a :class:`RunMacs`.

    Raises:
        TypeError: ``model`` is no module, ``plan`` is no plan, or one of ``schedule`` and ``times`` comes without the
            other.
        ValueError: the inputs do not fit ``model.forward``; it needs the values of a tensor; ``plan`` names a layer
            that does not exist or that cannot take its pattern; no times, or one outside of the schedule; a schedule
            that does not fit the model.
    """
    if (schedule is None) != (times is None):
        missing = "times, the timesteps of the run" if times is None else "schedule, the patterns over time"
        raise TypeError(f"count_macs of a sampling run needs schedule and times; {missing}, is missing")
    if schedule is not None:
        if plan is not None:
            raise TypeError("count_macs takes plan or schedule: a schedule has patterns of its own")
        return _count_run(model, inputs, kwargs, schedule, list(times))
    model = unwrap(model)
    patterns = _patterns(model, plan)
    try:
        inspect.signature(model.forward).bind(*inputs, **kwargs)
    except TypeError as error:
        raise ValueError(
            f"the inputs do not fit {type(model).__name__}.forward: {error}; pass all that the model is called with, "
            f"forward{inspect.signature(model.forward)}"
        ) from error

    counter = _Counter(model)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), _plain_eager(), counter.follow_modules():
        state = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            state[name] = _fake(tensor)
            setattr(state[name], _WEIGHT_TAG, name.rpartition(".")[0])
        fake_inputs, fake_kwargs = tree_map_only(Tensor, _fake, (inputs, kwargs))
        try:
            with counter:
                torch.func.functional_call(model, state, fake_inputs, fake_kwargs)
        except Exception as error:
            shapes = ", ".join(str(tuple(t.shape)) for t in tree_leaves((inputs, kwargs)) if isinstance(t, Tensor))
            raise ValueError(
                f"{type(model).__name__}.forward failed on tensors of shape {shapes or '(no tensor)'}: {error}. Check "
                "the shapes; a model that reads the values of a tensor (.item()) cannot be counted, for there are none"
            ) from error
    return _report(model, counter.macs, patterns)


def _count_run(
    model: nn.Module, inputs: tuple, kwargs: dict[str, Any], schedule: Schedule, times: list[float]
) -> RunMacs:
    if not times:
        raise ValueError("times is empty: name the timestep of each step, as sampling_times(...) does")
    rows = []
    first_times = {schedule.at(time): time for time in reversed(times)}
    steps = Counter(schedule.at(time) for time in times)
    with schedule.use(model) as switch:
        for interval, count in steps.items():
            switch(first_times[interval])
            rows.append(RangeMacs(str(interval), count, count_macs(model, *inputs, **kwargs)))
    return RunMacs(
        steps=len(times),
        dense=sum(row.steps * row.step.dense for row in rows),
        sparse=sum(row.steps * row.step.sparse for row in rows),
        attention=sum(row.steps * row.step.attention for row in rows),
        ranges=tuple(rows),
    )


def _fake(tensor: Tensor) -> Tensor:
    """The shape, strides and dtype of ``tensor`` under the active fake mode, on the CPU whatever its own device.

    One device for all, so that a model on meta can be counted with inputs on the CPU.
    """
    size, stride = (tuple(int(i) for i in numbers) for numbers in (tensor.shape, tensor.stride()))
    return torch.empty_strided(size, stride, dtype=tensor.dtype, device="cpu")


@contextmanager
def _plain_eager() -> Iterator[None]:
    """Every operator visible: no compiled regions, no fast path that runs a whole encoder layer as one operator."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def _is_packed(module: nn.Module) -> bool:
    """A layer that holds packed values in place of a weight; told by attribute, as its class pulls in all kernels."""
    return hasattr(module, "weight_shape") and hasattr(module, "packed_values")


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, _ConvNd)) or _is_packed(module)


def _fused_attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """``(..., L, E) (..., S, E) (..., S, V) -> 2 L S (E + V)`` for each head of the query."""
    return 2 * prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


# torch has formulas for the attention kernels of CUDA but not for that of the CPU.
_FLOP_FORMULAS = ChainMap(
    {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _fused_attention_flops}, flop_registry
)


def _dense_macs(func: Any, args: tuple, kwargs: dict, result: Any) -> int:
    macs = _FLOP_FORMULAS[getattr(func, "_overloadpacket", func)](*args, **kwargs, out_val=result) // 2
    if getattr(func, "namespace", "") == "sparsedm":  # the formulas of packed layers count what is done
        arguments = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
        pattern = Pattern.parse((arguments | kwargs)["pattern"])
        macs = macs * pattern.m // pattern.n
    return macs


class _Counter(TorchDispatchMode):
    """Sum MACs by (module name, kind) of everything that runs below this mode.

    A product belongs to the innermost running module if that is a layer. Otherwise to the module whose weight it takes,
    also a weight that was cast, masked or scaled on the way (a tensor made of weights alone is taken for a weight).
    What is left multiplies two activations and is attention.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.macs: dict[tuple[str, str], int] = defaultdict(int)
        self._names = {module: name for name, module in model.named_modules()}
        self._running: list[nn.Module] = []

    @contextmanager
    def follow_modules(self) -> Iterator[None]:
        """Keep track of the modules that run; hooks on all modules, since hooks on these would change the model."""

        def enter(module: nn.Module, _args: Any) -> None:
            if module in self._names:
                self._running.append(module)

        def leave(module: nn.Module, _args: Any, _output: Any) -> None:
            if module in self._names:
                self._running.pop()

        with ExitStack() as stack:
            stack.enter_context(nn.modules.module.register_module_forward_pre_hook(enter))
            stack.enter_context(nn.modules.module.register_module_forward_hook(leave))
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        operator = getattr(func, "_overloadpacket", func)  # a higher-order operator has no overloads
        counted = operator in _FLOP_FORMULAS
        if not counted and operator is not func and func is not _PRIM_DEVICE:
            with self:  # composite operators arrive whole under inference_mode
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if counted:
            self.macs[self._owner(operator, args, result)] += _dense_macs(func, args, kwargs, result)
        else:
            self._pass_tag_on(args, kwargs, result)
        return result

    def _owner(self, operator: Any, args: tuple, result: Any) -> tuple[str, str]:
        name = operator.__name__
        module = self._running[-1] if self._running else None
        running = self._names.get(module, "")
        if ATTENTION in name:
            return running, ATTENTION
        kind = f"conv{result.dim() - 2}d" if "conv" in name else "linear"
        if module is not None and _is_layer(module):
            return running, kind
        for tensor in reversed([leaf for leaf in args if isinstance(leaf, Tensor)]):
            owner = getattr(tensor, _WEIGHT_TAG, None)
            if owner is not None:
                return owner, kind
        return running, ATTENTION

    @staticmethod
    def _pass_tag_on(args: tuple, kwargs: dict, result: Any) -> None:
        tags = {getattr(leaf, _WEIGHT_TAG, None) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        if not tags or None in tags:
            return
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not hasattr(leaf, _WEIGHT_TAG):
                setattr(leaf, _WEIGHT_TAG, min(tags))


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    return tuple(module.weight_shape if _is_packed(module) else module.weight.shape)


def _patterns(model: nn.Module, plan: Mapping[str, Pattern | str] | HasPatterns | None) -> dict[str, Pattern]:
    """Name -> pattern of the layers that are not dense, of the model itself and then of the plan."""
    modules = dict(model.named_modules())
    own = {
        name: Pattern.parse(getattr(module, "pattern", DENSE)) for name, module in modules.items() if _is_layer(module)
    }
    wanted = {} if plan is None else plan.patterns() if hasattr(plan, "patterns") else plan
    if not isinstance(wanted, Mapping):
        raise TypeError(f"plan must map layer names to patterns, got {type(plan).__name__}; write {{'fc1': '2:4'}}")
    for name, spelling in wanted.items():
        pattern = Pattern.parse(spelling)
        if name not in modules:
            close = difflib.get_close_matches(name, modules, n=3)
            hint = f"did you mean {', '.join(close)}?" if close else "names are those of model.named_modules()"
            raise ValueError(f"plan: the model has no layer {name!r}; {hint}")
        module = modules[name]
        refusal = None
        if not isinstance(module, _MASKABLE) and not _is_packed(module):
            refusal = f"{type(module).__name__} is neither Linear nor Conv1d, Conv2d or Conv3d"
        if not pattern.is_dense:
            refusal = refusal or pattern.refusal(_weight_shape(module), getattr(module, "groups", 1))
            if refusal is not None:
                raise ValueError(f"plan: layer {name!r} cannot be {pattern}: {refusal}; leave it out of the plan")
        own[name] = pattern
    return {name: pattern for name, pattern in own.items() if not pattern.is_dense}


@dataclass
class _Size:
    params: int = 0
    kept_params: int = 0
    dense_bytes: int = 0
    packed_bytes: int = 0

    def add(self, numel: int, itemsize: int, pattern: Pattern = DENSE) -> None:
        kept = numel * pattern.n // pattern.m
        self.params += numel
        self.kept_params += kept
        self.dense_bytes += numel * itemsize
        self.packed_bytes += kept * itemsize + (0 if pattern.is_dense else kept // pattern.v)


def _add_size(size: _Size, module: nn.Module, pattern: Pattern, seen: set[int]) -> _Size:
    """Add the parameters that belong to ``module`` itself; of a packed layer, those of the layer it was packed from."""
    if _is_packed(module):  # its values are buffers, in a layout that depends on the kernel
        size.add(prod(module.weight_shape), module.packed_values.element_size(), pattern)
    for name, tensor in module.named_parameters(recurse=False):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            size.add(tensor.numel(), tensor.element_size(), pattern if name == "weight" else DENSE)
    return size


def _report(model: nn.Module, macs: dict[tuple[str, str], int], patterns: dict[str, Pattern]) -> MacsReport:
    modules = dict(model.named_modules())
    called = {name for name, kind in macs if kind != ATTENTION}
    for name, module in modules.items():
        if _is_layer(module) and name not in called:
            shape = _weight_shape(module)
            macs[name, "linear" if len(shape) == 2 else f"conv{len(shape) - 2}d"] = 0

    rows = []
    for (name, kind), dense in macs.items():
        if kind == ATTENTION:
            rows.append(LayerMacs(name, kind, str(DENSE), dense, dense, 0, 0, 0, 0))
            continue
        pattern = patterns.get(name, DENSE)
        size = _add_size(_Size(), modules[name], pattern, set())
        rows.append(LayerMacs(name, kind, str(pattern), dense, dense * pattern.n // pattern.m, **vars(size)))

    total, seen = _Size(), set()
    for name, module in modules.items():
        _add_size(total, module, patterns.get(name, DENSE), seen)
    layers = [row for row in rows if row.kind != ATTENTION]
    return MacsReport(
        dense=sum(row.dense for row in layers),
        sparse=sum(row.sparse for row in layers),
        attention=sum(row.dense for row in rows if row.kind == ATTENTION),
        **vars(total),
        layers=tuple(rows),
    )


def _si(number: int) -> str:
    """``11_322_000_000 -> "11.32 G"``."""
    for power, prefix in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.2f} {prefix}"
    return f"{number} "
