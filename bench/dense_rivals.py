"""Every dense way to run a layer on a CPU that torch has: the fastest of them is the baseline."""

import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsedm_compile.kernels.registry import LayerSpec

Candidates = dict[str, Callable[[], Tensor]]


def dense_rivals(spec: LayerSpec, x: Tensor, weight: Tensor) -> Candidates:
    """Name -> run, for the layer at this input and weight, without bias.

    Candidates that this build of torch lacks are left out with a warning: their absence weakens the baseline.
    """
    return _linears(x, weight) if spec.op == "linear" else _convs(spec, x, weight)


def _add(candidates: Candidates, name: str, make: Callable[[], Callable[[], Tensor]]) -> None:
    try:
        run = make()
        run()
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        logging.warning("no dense candidate %r: %s", name, str(error).partition("\n")[0])
        return
    candidates[name] = run


def _linears(x: Tensor, weight: Tensor) -> Candidates:
    candidates: Candidates = {"F.linear": lambda: F.linear(x, weight)}

    def mkl() -> Callable[[], Tensor]:
        packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, x.shape[0])
        return lambda: torch.ops.mkl._mkl_linear(x, packed, weight, None, x.shape[0])

    def onednn() -> Callable[[], Tensor]:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0])
        return lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")

    if x.dtype == torch.float32:  # all that MKL's takes
        _add(candidates, "mkl packed", mkl)
    _add(candidates, "onednn packed", onednn)
    return candidates


def _convs(spec: LayerSpec, x: Tensor, weight: Tensor) -> Candidates:
    x_last = x.contiguous(memory_format=torch.channels_last)
    weight_last = weight.contiguous(memory_format=torch.channels_last)
    candidates: Candidates = {
        "nchw": lambda: F.conv2d(x, weight, None, spec.stride, spec.padding, spec.dilation),
        "nhwc": lambda: F.conv2d(x_last, weight_last, None, spec.stride, spec.padding, spec.dilation),
    }

    def onednn(image: Tensor) -> Callable[[], Tensor]:
        sizes = [list(pair) for pair in (spec.padding, spec.stride, spec.dilation)]
        packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *sizes, 1, list(image.shape))
        return lambda: torch.ops.mkldnn._convolution_pointwise(image, packed, None, *sizes, 1, "none", [], "")

    if x.dtype == torch.float32:  # oneDNN's packed half precision convolutions crash the process on narrow images
        _add(candidates, "nchw packed", lambda: onednn(x))
        _add(candidates, "nhwc packed", lambda: onednn(x_last))
    return candidates
