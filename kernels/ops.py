"""The operators ``sparsedm::linear``, ``conv`` and ``unpack``: a layer run from its packed weight.

They only read the constants of the call and hand it to the kernel named in it, so a graph shows which kernel ran.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sparsedm_compile.kernels import get_kernel
from sparsedm_compile.kernels.outputs import conv_flops, conv_output, linear_flops, linear_output
from sparsedm_compile.kernels.registry import Epilogue, LayerSpec, convolve
from sparsedm_compile.pattern import Pattern

_PACKED = "Tensor values, Tensor index"
_LAYER = "str kernel, str pattern, int[] weight_shape"
_CONV = "int[] stride, int[] padding, int[] dilation, int groups"
_EPILOGUE = 'Tensor? bias=None, str activation="none", Tensor? residual=None'

torch.library.define("sparsedm::linear", f"(Tensor x, {_PACKED}, {_LAYER}, {_EPILOGUE}) -> Tensor")
torch.library.define("sparsedm::conv", f"(Tensor x, {_PACKED}, {_LAYER}, {_CONV}, {_EPILOGUE}) -> Tensor")
torch.library.define("sparsedm::unpack", f"({_PACKED}, str op, {_LAYER}, {_CONV}) -> Tensor")


@lru_cache(maxsize=4096)
def _spec(op: str, pattern: str, weight_shape: tuple, dtype: torch.dtype, device: str, *conv) -> LayerSpec:
    return LayerSpec(op, weight_shape, Pattern.parse(pattern), dtype, device, *conv)


def _linear(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    kernel: str,
    pattern: str,
    weight_shape: Sequence[int],
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    spec = _spec("linear", pattern, tuple(weight_shape), x.dtype, x.device.type)
    if activation == "geglu" and not get_kernel(kernel).gates(spec):
        raise ValueError(f"kernel {kernel!r} does not apply geglu to a weight of shape {tuple(weight_shape)}")
    return get_kernel(kernel).linear(x, values, index, spec, Epilogue(bias, activation, residual))


def spec_of_call(x: Tensor, pattern: str, weight_shape: Sequence[int], *conv) -> LayerSpec | None:
    """What a call of ``sparsedm::linear`` or ``conv`` hands to its kernel.

    Args:
        x: input of the call.
        pattern, weight_shape, conv: its constants, in its order; ``conv`` is empty for a linear.

    Returns:
        None where the kernel sees other tensors than the call, those of a conv1d with a height.
    """
    if not conv:
        return _spec("linear", pattern, tuple(weight_shape), x.dtype, x.device.type)
    return None if _is_flat(x, weight_shape) else _conv_spec(x, pattern, weight_shape, *conv)


def _conv_spec(x: Tensor, pattern: str, weight_shape: Sequence[int], *conv) -> LayerSpec:
    stride, padding, dilation, groups = conv
    constants = (tuple(stride), tuple(padding), tuple(dilation), groups)
    return _spec(f"conv{len(weight_shape) - 2}d", pattern, tuple(weight_shape), x.dtype, x.device.type, *constants)


def _is_flat(x: Tensor, weight_shape: Sequence[int]) -> bool:
    """Whether x is the input of a conv1d, ``(B, C, L)``, whose constants are those of the conv2d of height 1."""
    return x.dim() == 3 and len(weight_shape) == 4


def _with_height(x: Tensor) -> Tensor:
    # Contiguous, so that nobody takes it for channels_last: dense conv1d answers contiguous whatever the strides.
    return x.contiguous().unsqueeze(2)


def _conv(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    kernel: str,
    pattern: str,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    if activation == "geglu":
        raise ValueError(f"geglu follows linear layers alone, not a convolution of weight {tuple(weight_shape)}")
    flat = _is_flat(x, weight_shape)
    if flat:
        x, residual = _with_height(x), None if residual is None else _with_height(residual)
    spec = _conv_spec(x, pattern, weight_shape, stride, padding, dilation, groups)
    out = get_kernel(kernel).conv(x, values, index, spec, Epilogue(bias, activation, residual))
    return out.squeeze(2) if flat else out


def _unpack(
    values: Tensor,
    index: Tensor,
    op: str,
    kernel: str,
    pattern: str,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    conv = (tuple(stride), tuple(padding), tuple(dilation), groups)
    spec = _spec(op, pattern, tuple(weight_shape), values.dtype, values.device.type, *conv)
    return get_kernel(kernel).unpack(values, index, spec)


torch.library.impl("sparsedm::linear", "CompositeExplicitAutograd", _linear)
torch.library.impl("sparsedm::conv", "CompositeExplicitAutograd", _conv)
torch.library.impl("sparsedm::unpack", "CompositeExplicitAutograd", _unpack)


@torch.library.register_fake("sparsedm::linear")
def _linear_fake(x, values, index, kernel, pattern, weight_shape, bias=None, activation="none", residual=None):
    return linear_output(x, weight_shape, activation)


@torch.library.register_fake("sparsedm::conv")
def _conv_fake(
    x,
    values,
    index,
    kernel,
    pattern,
    weight_shape,
    stride,
    padding,
    dilation,
    groups,
    bias=None,
    activation="none",
    residual=None,
):
    spec = _conv_spec(x, pattern, weight_shape, stride, padding, dilation, groups)
    if _is_flat(x, weight_shape):
        return conv_output(_with_height(x), spec).squeeze(2)
    return conv_output(x, spec)


def _dense_conv(x: Tensor, weight: Tensor, bias: Tensor | None, pattern: str, *conv) -> Tensor:
    spec = _conv_spec(x, pattern, weight.shape, *conv)
    if _is_flat(x, weight.shape):
        return convolve(_with_height(x), weight, bias, spec).squeeze(2)
    return convolve(x, weight, bias, spec)


@torch.library.register_fake("sparsedm::unpack")
def _unpack_fake(values, index, op, kernel, pattern, weight_shape, stride, padding, dilation, groups):
    return values.new_empty(tuple(weight_shape))


def _activation_grad(grad: Tensor, product: Tensor, activation: str) -> Tensor:
    match activation:
        case "gelu":
            return torch.ops.aten.gelu_backward(grad, product)
        case "gelu_tanh":
            return torch.ops.aten.gelu_backward(grad, product, approximate="tanh")
        case "silu":
            return torch.ops.aten.silu_backward(grad, product)
        case "geglu":
            value, gate = product.chunk(2, dim=-1)
            return torch.cat([grad * F.gelu(gate), torch.ops.aten.gelu_backward(grad * value, gate)], dim=-1)
        case _:
            return grad


_DENSE_CONV = ([1, 1], [0, 0], [1, 1], 1)


def _save_for_backward(ctx, inputs, output) -> None:
    x, values, index, ctx.kernel, ctx.pattern, ctx.weight_shape, *conv, bias, ctx.activation, residual = inputs
    ctx.conv = tuple(conv)
    ctx.has_bias, ctx.has_residual = bias is not None, residual is not None
    ctx.save_for_backward(x, values, index, bias)


def _linear_backward(ctx, grad):
    # The packed weight is frozen: gradients go to the input (guidance through the model), bias and residual.
    x, values, index, bias = ctx.saved_tensors
    weight = torch.ops.sparsedm.unpack(values, index, "linear", ctx.kernel, ctx.pattern, ctx.weight_shape, *_DENSE_CONV)
    grad_product = grad
    if ctx.activation != "none":
        grad_product = _activation_grad(grad, F.linear(x, weight, bias), ctx.activation)
    grad_bias = grad_product.reshape(-1, grad_product.shape[-1]).sum(0) if ctx.has_bias else None
    return grad_product @ weight, None, None, None, None, None, grad_bias, None, grad if ctx.has_residual else None


def _conv_backward(ctx, grad):
    x, values, index, bias = ctx.saved_tensors
    stride, padding, dilation, groups = ctx.conv
    op = f"conv{len(ctx.weight_shape) - 2}d"
    weight = torch.ops.sparsedm.unpack(values, index, op, ctx.kernel, ctx.pattern, ctx.weight_shape, *ctx.conv)
    grad_product = grad
    if ctx.activation != "none":
        product = _dense_conv(x, weight, bias, ctx.pattern, *ctx.conv)
        grad_product = _activation_grad(grad, product, ctx.activation)
    flat = _is_flat(x, ctx.weight_shape)
    grad_x, _, grad_bias = torch.ops.aten.convolution_backward(
        grad_product.unsqueeze(2) if flat else grad_product,
        x.unsqueeze(2) if flat else x,
        weight,
        [weight.shape[0]] if ctx.has_bias else None,
        stride,
        padding,
        dilation,
        False,
        [0] * len(stride),
        groups,
        [True, False, ctx.has_bias],
    )
    constants = [None] * 9
    return grad_x.squeeze(2) if flat else grad_x, *constants, grad_bias, None, grad if ctx.has_residual else None


torch.library.register_autograd("sparsedm::linear", _linear_backward, setup_context=_save_for_backward)
torch.library.register_autograd("sparsedm::conv", _conv_backward, setup_context=_save_for_backward)


@register_flop_formula(torch.ops.sparsedm.linear)
def _linear_flops(x_shape, values_shape, index_shape, kernel, pattern, weight_shape, *args, out_shape=None, **kwargs):
    return linear_flops(x_shape, weight_shape, Pattern.parse(pattern))


@register_flop_formula(torch.ops.sparsedm.conv)
def _conv_flops(x_shape, values_shape, index_shape, kernel, pattern, weight_shape, *args, out_shape=None, **kwargs):
    return conv_flops(x_shape, weight_shape, out_shape, Pattern.parse(pattern))
