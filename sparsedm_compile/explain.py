"""``explain``: which kernel ran each layer, how long it takes against dense, and why it was chosen."""

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import nn

from sparsedm_compile.backend import CompiledGraph, record_calls
from sparsedm_compile.kernels import get_kernel, kernel_names
from sparsedm_compile.packed_layers import packed_layers
from sparsedm_compile.plan import LayerInfo
from sparsedm_compile.planning import named_modules, survey, unwrap
from sparsedm_compile.rendering import RichText, milliseconds, summary_line

_NOT_RUN = "not run"


@dataclass(frozen=True)
class LayerReport:
    """What happened to one layer.

    Attributes:
        name, kind, weight_shape: of the layer.
        pattern: what it computed with.
        kernel: the kernel that ran it; ``"dense"`` is torch's own operator in Inductor's graph; ``"not run"`` if no
            compiled graph used it.
        sparse_ms, dense_ms: measured milliseconds of one call of the fastest kernel of each kind; None where not
            measured. An input of like size may have been timed: ``reason`` names its shape.
        reason: why this kernel, or why dense.
        fused: what the kernel also does, beside the bias: an activation (``"gelu"``, ``"gelu_tanh"``, ``"silu"``,
            ``"geglu"``), ``"residual"``. Neither time contains it.
        output_shape: of the input that the graph was compiled for; empty where nothing is fused or a size is unknown.
        native_ms: as ``dense_ms``, of torch's own operator, which Inductor calls unless it freezes the weights.
        calls: of the layer in one call of the model. Calls of layers that share a weight are not told apart: the first
            of them has all, the others none.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    pattern: str
    kernel: str
    sparse_ms: float | None
    dense_ms: float | None
    reason: str
    fused: tuple[str, ...] = ()
    output_shape: tuple[int, ...] = ()
    native_ms: float | None = None
    calls: int = 1

    @property
    def ran_sparse(self) -> bool:
        """Whether its kernel, or each of them where calls got different ones, skips the zeros."""
        kernels = self.kernel.split(", ")
        return all(kernel in kernel_names() and get_kernel(kernel).skips_zeros for kernel in kernels)


@dataclass(frozen=True)
class Explanation(RichText):
    """The verdict of every layer; prints as a table.

    Attributes:
        layers: every linear and convolution of the model.
        graphs: compiled graphs that ran; more than one for a whole model means graph breaks or blocks compiled apart.
        mode: ``"inference"``, ``"training"`` or ``"mixed"``.
    """

    layers: tuple[LayerReport, ...]
    graphs: int
    mode: str

    def __getitem__(self, name: str) -> LayerReport:
        return next(layer for layer in self.layers if layer.name == name)

    def to_dict(self) -> dict[str, Any]:
        """``{"graphs", "mode", "layers": {name: {...}}}``, ready for JSON."""
        return {
            "graphs": self.graphs,
            "mode": self.mode,
            "layers": {layer.name: asdict(layer) for layer in self.layers},
        }

    def __rich__(self) -> Table:
        sparse = [layer for layer in self.layers if layer.ran_sparse]
        caption = summary_line(len(sparse), len(self.layers), "layers ran a sparse kernel")
        table = Table(title="explain", caption=f"{caption}; {self.graphs} graph(s), {self.mode}")
        for column in ("layer", "kind", "shape", "pattern", "kernel"):
            table.add_column(column, overflow="fold")
        for column in ("sparse ms", "dense ms"):
            table.add_column(column, justify="right")
        table.add_column("why", overflow="fold")
        for layer in self.layers:
            table.add_row(
                layer.name or "(model)",
                layer.kind,
                " x ".join(map(str, layer.weight_shape)),
                layer.pattern,
                " + ".join((layer.kernel, *layer.fused)),
                milliseconds(layer.sparse_ms),
                milliseconds(layer.dense_ms),
                layer.reason,
            )
        return table


def explain(model: nn.Module, *inputs: Any, **kwargs: Any) -> Explanation:
    """Run ``model`` once, without gradients, and tell what ran each of its layers and why.

    Args:
        model: compiled with ``backend="sparsedm"``, whole or block by block; or not compiled: then it is compiled here.
        inputs, kwargs: of one call.

    Raises:
        TypeError: not a module.
        ValueError: the model is on meta, or is compiled with another backend.
    """
    eager = unwrap(model)
    meta = next((name for name, tensor in eager.named_parameters() if tensor.device.type == "meta"), None)
    if meta is not None:
        raise ValueError(f"parameter {meta!r} is on meta: explain runs the model and needs its weights loaded first")
    compiled = model is not eager or any(
        module._compiled_call_impl is not None or hasattr(module, "_orig_mod") for module in eager.modules()
    )
    if not compiled:
        model = torch.compile(model, backend="sparsedm")
    with record_calls() as calls, torch.no_grad():
        model(*inputs, **kwargs)
    if not calls:
        raise ValueError(
            "no graph of backend 'sparsedm' ran: the model is compiled with another backend, or not at all"
        )
    return _explanation(eager, calls)


def _explanation(model: nn.Module, calls: list[tuple[CompiledGraph, tuple]]) -> Explanation:
    seen = defaultdict(list)
    for graph, args in calls:
        for layer, position in zip(graph.layers, graph.weight_positions, strict=True):
            seen[id(args[position])].append((graph, layer))
    plan_reasons = {layer.name: layer.reason for layer in getattr(model, "_sparsedm_plan", ())}
    infos, obstacles = survey(model)
    modules = dict(named_modules(model))
    packed = packed_layers(model)
    infos += [LayerInfo(name, layer.kind, layer.weight_shape) for name, layer in packed.items()]
    order = {name: i for i, name in enumerate(modules)}
    reports, counted = [], set()
    for info in sorted(infos, key=lambda info: order[info.name]):
        module = modules[info.name]
        weight = module.packed_values if info.name in packed else getattr(module, "weight", None)
        uses = seen.get(id(weight), [])
        graph, layer = uses[0] if uses else (None, None)
        verdict = layer.verdict if layer is not None else None
        pattern = str(layer.spec.pattern) if layer is not None else "dense"
        why_dense = plan_reasons.get(info.name) or (layer.dense_reason if layer else "") or "not sparsified"
        if layer is None and info.name in obstacles:
            kernel, reason = "dense", obstacles[info.name]
        elif layer is None:
            kernel, reason = _NOT_RUN, "no compiled graph used this layer"
        elif info.name in packed:
            kernel, pattern, reason = verdict.kernel, module.pattern, module.reason
        elif not graph.inference and layer.mask is not None and verdict is None:
            kernel, reason = "dense", "training graph: the mask is fused by Inductor; sparse kernels run under no_grad"
        elif layer.mask is None:
            kernel, reason = (verdict.kernel if verdict else "dense"), why_dense
        else:
            kernel, reason = verdict.kernel, verdict.reason
        kernels = list(dict.fromkeys(use.verdict.kernel for _, use in uses if use.verdict is not None))
        if len(kernels) > 1:
            kernel, reason = ", ".join(kernels), f"{len(uses)} calls; the first: {reason}"
        reports.append(
            LayerReport(
                info.name,
                info.kind,
                info.weight_shape,
                pattern,
                kernel,
                _ms(verdict.sparse_seconds if verdict else None),
                _ms(verdict.dense_seconds if verdict else None),
                reason,
                layer.fused if layer is not None else (),
                layer.output_shape if layer is not None and layer.fused else (),
                _ms(verdict.native_seconds if verdict else None),
                0 if id(weight) in counted else len(uses),
            )
        )
        counted.add(id(weight))
    modes = {"inference" if graph.inference else "training" for graph, _ in calls}
    return Explanation(
        tuple(reports), len({id(graph) for graph, _ in calls}), "mixed" if len(modes) > 1 else modes.pop()
    )


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3
