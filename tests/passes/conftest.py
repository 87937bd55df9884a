"""A graph as Dynamo hands it over, with some of the passes run on it."""

from collections.abc import Callable, Sequence

import pytest
import torch

from sparsedm_compile.backend import _copy
from sparsedm_compile.options import parse_options
from sparsedm_compile.passes import Lowering


@pytest.fixture
def lower():
    """``lower(model, inputs, passes, **options) -> (lowering, output of the lowered graph)``, without gradients."""

    def run(model: Callable, inputs: Sequence, passes: Sequence, *, inference=True, **options):
        caught = []

        def backend(gm, example_inputs):
            lowering = Lowering(_copy(gm), list(example_inputs), parse_options(options), inference)
            for lowering_pass in passes:
                lowering_pass(lowering)
                lowering.gm.graph.lint()
            lowering.gm.recompile()
            caught.append(lowering)
            derived = lowering.example_inputs[len(example_inputs) :]
            return lambda *args: lowering.gm(*args, *derived)

        with torch.no_grad():
            output = torch.compile(model, backend=backend, fullgraph=True)(*inputs)
        (lowering,) = caught
        return lowering, output

    return run


@pytest.fixture
def targets():
    """Names of what a lowered graph calls, in order."""

    def names(lowering) -> list[str]:
        calls = [n for n in lowering.gm.graph.nodes if n.op in ("call_function", "call_method")]
        return [n.target if isinstance(n.target, str) else getattr(n.target, "__name__", str(n.target)) for n in calls]

    return names
