"""How far sparse layers and models are from masked dense in float64, beside dense in the same dtype.

    python bench/fidelity.py [--only uvit] [--patterns 2:4,2:4v4] [--dtypes float32,bfloat16] [--out bench/results]

Writes results of kind "fidelity". Errors are norms of the difference over norms of the output.
"""

import argparse
import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import arguments
import torch
import torch.nn.functional as F
from model_list import MODELS
from rich.console import Console
from shapes import LayerShape, layer_shapes
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from sparsedm_compile import sparsify
from sparsedm_compile.bench_report import Results, write_results
from sparsedm_compile.bench_report.results import Row
from sparsedm_compile.dtypes import dtype_name
from sparsedm_compile.explain import explain
from sparsedm_compile.kernels import get_kernel, kernel_names
from sparsedm_compile.kernels.registry import Epilogue, LayerSpec
from sparsedm_compile.masked_weight import mask_out
from sparsedm_compile.model_spec import LoadedModel

PATTERNS = ("2:4", "2:4v4", "1:4v4")
DTYPES = ("float32", "bfloat16")
#: Small enough to run in float64 on two cores.
CASES = ("U-ViT-S/2", "U-ViT-M/4", "DDPM UNet 35M", "SparseDM UNet")
# Rows or pixels of an input at most: errors of outputs do not depend on how many there are.
_SIZE = 256


def error(out: Tensor, exact: Tensor) -> float:
    """``|out - exact| / |exact|``, in float64."""
    return ((out.double() - exact).norm() / exact.norm()).item()


def layer_rows(case: str, shapes: list[LayerShape], pattern: str, dtype: torch.dtype) -> Iterator[Row]:
    """One row a layer: the first sparse CPU kernel that takes it, or dense where none does."""
    for shape in shapes:
        spec = shape.spec(pattern, dtype)
        if spec.pattern.refusal(spec.weight_shape):
            continue
        weight = (torch.randn(shape.weight_shape) / math.sqrt(math.prod(shape.weight_shape[1:]))).to(dtype)
        x = torch.randn(_input_shape(shape)).to(dtype)
        masked = mask_out(weight, pattern)
        exact = _dense(spec, x.double(), masked.double())
        dense = error(_dense(spec, x, masked), exact)
        able = (name for name in kernel_names() if get_kernel(name).skips_zeros and name != "reference")
        name = next((name for name in able if get_kernel(name).refusal(spec) is None), None)
        value = dense
        if name is not None:
            kernel = get_kernel(name)
            run = kernel.linear if spec.op == "linear" else kernel.conv
            value = error(run(x, *kernel.pack(weight, spec), spec, Epilogue()), exact)
        yield _row(case, shape.name, dtype, pattern, name or "dense", value, dense)


def model_row(case: str, loaded: LoadedModel, pattern: str, dtype: torch.dtype) -> Row:
    """The whole model through the backend."""
    policy = "sparsedm+skip" if case.startswith("U-ViT") else "default"
    torch._dynamo.reset()
    sparse = copy.deepcopy(loaded.model).to(dtype)
    plan = sparsify(sparse, pattern, policy=policy)
    masked = copy.deepcopy(loaded.model).to(dtype)
    for layer in plan.patterns():
        weight = masked.get_submodule(layer).weight
        weight.data = mask_out(weight.data, pattern)
    call = _call(loaded, dtype)
    with torch.no_grad():
        compiled = torch.compile(sparse, backend="sparsedm")
        out, dense = _outputs(compiled, call), _outputs(masked, call)
        kernels = {layer.kernel for layer in explain(compiled, *call[0], **call[1]).layers if layer.ran_sparse}
        exact = _outputs(masked.double(), _call(loaded, dtype, torch.float64))
    name = ", ".join(sorted(kernels)) or "dense"
    return _row(case, "whole model", dtype, pattern, name, error(out, exact), error(dense, exact))


def _row(case: str, layer: str, dtype: torch.dtype, pattern: str, kernel: str, value: float, dense: float) -> Row:
    return {
        "case": case,
        "layer": layer,
        "dtype": dtype_name(dtype),
        "pattern": pattern,
        "kernel": kernel,
        "error": value,
        "dense_error": dense,
        "spread": 0.0,
    }


def _input_shape(shape: LayerShape) -> tuple[int, ...]:
    if shape.op == "linear":
        return min(shape.size[0], _SIZE), shape.weight_shape[1]
    side = int(math.sqrt(_SIZE))
    return 1, shape.weight_shape[1], *(min(size, side + 1) for size in shape.size)


def _dense(spec: LayerSpec, x: Tensor, weight: Tensor) -> Tensor:
    if spec.op == "linear":
        return F.linear(x, weight)
    return F.conv2d(x, weight, None, spec.stride, spec.padding, spec.dilation)


def _call(loaded: LoadedModel, *dtypes: torch.dtype) -> tuple[tuple, dict[str, Any]]:
    """The inputs, rounded to each dtype in turn: all runs of one case then see the same numbers."""

    def cast(tensor: Tensor) -> Tensor:
        for dtype in dtypes:
            tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
        return tensor

    return tree_map_only(Tensor, cast, (loaded.inputs, loaded.kwargs))


def _outputs(model: Any, call: tuple[tuple, dict[str, Any]]) -> Tensor:
    leaves = (leaf for leaf in tree_leaves(model(*call[0], **call[1])) if isinstance(leaf, Tensor))
    return torch.cat([leaf.double().flatten() for leaf in leaves])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help=f"only cases whose name holds this; there are {', '.join(CASES)}")
    parser.add_argument("--patterns", type=arguments.patterns, default=",".join(PATTERNS))
    parser.add_argument("--dtypes", type=arguments.dtypes, default=",".join(DTYPES))
    parser.add_argument("--layers", action="store_true", help="layers alone, no whole model")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    chosen = [case for case in CASES if options.only.lower() in case.lower()]
    if not chosen:
        parser.error(f"no case holds {options.only!r}; there are {', '.join(CASES)}")
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    with Console(stderr=True).status("fidelity"):
        for case in chosen:
            torch.manual_seed(0)
            shapes = list(layer_shapes(MODELS[case].load(device="meta")))
            loaded = None if options.layers else MODELS[case].load()
            for dtype in options.dtypes:
                for pattern in options.patterns:
                    rows += layer_rows(case, shapes, pattern, dtype)
                    if loaded is not None:
                        rows.append(model_row(case, loaded, pattern, dtype))
    write_results(options.out / "fidelity.json", Results("fidelity", rows))


if __name__ == "__main__":
    main()
