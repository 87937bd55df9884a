"""The backend of ``torch.compile(backend="sparsedm")``."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, fx

import sparsedm_compile.kernels.ops  # noqa: F401  (registers the operators)
from sparsedm_compile.derived import Request, derived_weights
from sparsedm_compile.masked_weight import mask_out
from sparsedm_compile.masks import group_scores, magnitude_mask
from sparsedm_compile.options import parse_options
from sparsedm_compile.passes import Lowering, run_passes


class CompiledGraph:
    """One lowered graph: looks up what it needs of the weights it is called with, then runs Inductor's code."""

    def __init__(self, lowering: Lowering, run: Callable) -> None:
        self.layers = tuple(lowering.layers)
        self.inference = lowering.inference
        self.weight_positions = _positions(lowering)
        self._derived = tuple(lowering.derived)
        self._run = run

    def __call__(self, *args):
        recorder = _recorder.get()
        if recorder is not None:
            recorder.append((self, args))
        if not self._derived:
            return self._run(*args)
        requests = [Request(args[d.weight_position], d.key, d.build) for d in self._derived]
        derived = (tensor for form in derived_weights.get(requests) for tensor in form)
        return self._run(*args, *derived)


_recorder: ContextVar[list | None] = ContextVar("recorder", default=None)


@contextmanager
def record_calls():
    """Collect ``(CompiledGraph, args)`` of every compiled graph that runs inside the ``with`` block."""
    calls: list[tuple[CompiledGraph, Sequence]] = []
    token = _recorder.set(calls)
    try:
        yield calls
    finally:
        _recorder.reset(token)


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy for the passes to change: Dynamo reads its own graph again after the backend returned."""
    graph, copies = fx.Graph(), {}
    graph.output(graph.graph_copy(gm.graph, copies))
    for node, copied in copies.items():
        if hasattr(node, "_dynamo_source"):  # AOTAutograd deduplicates inputs by it
            copied._dynamo_source = node._dynamo_source
    return fx.GraphModule(gm, graph)


def _positions(lowering: Lowering) -> tuple[int, ...]:
    order = {node: i for i, node in enumerate(lowering.gm.graph.find_nodes(op="placeholder", sort=True))}
    return tuple(order[layer.weight] for layer in lowering.layers)


def sparsedm(
    gm: fx.GraphModule,
    example_inputs: Sequence[Tensor | int],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable:
    """Lower one Dynamo graph: sparse kernels where no gradient is needed, fused STE masks where one is, then Inductor.

    Args:
        gm: Dynamo's graph; left untouched.
        example_inputs: one a placeholder, the real parameters among them.
        mode: a mode of ``torch.compile``, passed on to Inductor.
        options: see :class:`sparsedm_compile.options.Options`; unknown keys are refused.

    Raises:
        ValueError, TypeError: options that do not hold (Dynamo wraps them in ``BackendCompilerFailed``).
    """
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import decompositions, select_decomp_table

    parsed = parse_options(options, mode)
    tensors = [value for value in example_inputs if isinstance(value, Tensor)]
    inference = not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
    lowering = Lowering(_copy(gm), list(example_inputs), parsed, inference)
    run_passes(lowering)
    # In Inductor's own tables: with a table passed as an argument it caches no compiled graph on disk. The second one
    # is a copy of the first that Inductor made at its first compilation, perhaps before this module was imported.
    for table in (decompositions, select_decomp_table()):
        table[torch.ops.sparsedm.masked_weight.default] = mask_out
    tag = f"{torch.compiler.config.cache_key_tag}sparsedm-{_mask_digest()}"
    with torch.compiler.config.patch(cache_key_tag=tag):
        run = compile_fx(lowering.gm, lowering.example_inputs, config_patches=parsed.inductor)
    return CompiledGraph(lowering, run)


@cache
def _mask_digest() -> str:
    """AOTAutograd's cache on disk knows graphs before they are decomposed: it must not outlive a change of the mask."""
    sources = (inspect.getsource(function) for function in (mask_out, magnitude_mask, group_scores))
    return sha256("".join(sources).encode()).hexdigest()[:16]
