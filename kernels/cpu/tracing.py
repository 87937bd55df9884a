"""What tracing and counting need of the C++ operators; to be registered once they are loaded."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sparsedm_compile.kernels.outputs import conv_flops, conv_output, linear_flops, linear_output
from sparsedm_compile.kernels.registry import LayerSpec
from sparsedm_compile.pattern import Pattern


def _linear(x, values, index, weight_shape, n, m, v, bias=None, activation="none", residual=None) -> Tensor:
    return linear_output(x, weight_shape, activation)


def _conv(
    x,
    values,
    index,
    weight_shape,
    n,
    m,
    v,
    stride,
    padding,
    dilation,
    bias=None,
    activation="none",
    residual=None,
) -> Tensor:
    window = (tuple(stride), tuple(padding), tuple(dilation))
    op = f"conv{len(weight_shape) - 2}d"
    return conv_output(x, LayerSpec(op, tuple(weight_shape), Pattern(n, m, v), x.dtype, "cpu", *window))


def _linear_flops(x_shape, values_shape, index_shape, weight_shape, n, m, v, *args, out_shape=None, **kwargs) -> int:
    return linear_flops(x_shape, weight_shape, Pattern(n, m, v))


def _conv_flops(x_shape, values_shape, index_shape, weight_shape, n, m, v, *args, out_shape=None, **kwargs) -> int:
    return conv_flops(x_shape, weight_shape, out_shape, Pattern(n, m, v))


def register() -> None:
    """Teach ``torch`` the shapes and the FLOPs of ``sparsedm_cpu::linear`` and ``conv``."""
    torch.library.register_fake("sparsedm_cpu::linear", _linear)
    torch.library.register_fake("sparsedm_cpu::conv", _conv)
    register_flop_formula(torch.ops.sparsedm_cpu.linear)(_linear_flops)
    register_flop_formula(torch.ops.sparsedm_cpu.conv)(_conv_flops)
