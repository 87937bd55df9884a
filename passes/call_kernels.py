"""Pass ``call_kernels``: call the operator of a layer's kernel where the kernel has one.

``sparsedm::linear`` and ``conv`` know every kernel, and look theirs up in Python at each call.
"""

from torch import fx

from sparsedm_compile.kernels import get_kernel
from sparsedm_compile.kernels.ops import spec_of_call
from sparsedm_compile.passes.lowering import Lowering


def call_kernels(lowering: Lowering) -> None:
    """Let each packed layer call its kernel's own operator, with the same tensors and epilogue."""
    for layer in lowering.layers:
        if layer.verdict is not None and layer.verdict.kernel != "dense":
            _call_kernel(layer.node, layer.verdict.kernel)


def _call_kernel(node: fx.Node, kernel: str) -> None:
    x, values, index, _, *constants, bias = node.args
    spec = spec_of_call(x.meta["example_value"], *constants)
    found = None if spec is None else get_kernel(kernel).operator(spec)
    if found is not None:
        operator, constants = found
        node.target, node.args = operator, (x, values, index, *constants, bias)
