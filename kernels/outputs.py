"""What a layer's operator gives, for tracing and counting: the output without its numbers, and the FLOPs done."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count

from sparsedm_compile.kernels.registry import LayerSpec, convolve
from sparsedm_compile.pattern import Pattern


def linear_output(x: Tensor, weight_shape: Sequence[int], activation: str) -> Tensor:
    """Uninitialised ``(..., out)``, or half as wide behind a gate."""
    torch._check(
        x.shape[-1] == weight_shape[1],
        lambda: f"sparsedm linear: the last dimension of x is {x.shape[-1]}, the weight takes {weight_shape[1]}",
    )
    return x.new_empty(*x.shape[:-1], weight_shape[0] // (2 if activation == "geglu" else 1))


def conv_output(x: Tensor, spec: LayerSpec) -> Tensor:
    """``(B, C_out, *size')``: dense decides the size and the memory format, so that no swap shows downstream."""
    return convolve(x, x.new_empty(spec.weight_shape), None, spec)


# FLOPs that are done, not FLOPs that a dense layer would do: a count that ignores the zeros is the commonest complaint.
def linear_flops(x_shape: Sequence[int], weight_shape: Sequence[int], pattern: Pattern) -> int:
    """Of ``x (..., in)`` and a weight ``(out, in)``; two for each kept weight and token."""
    tokens = torch.Size(x_shape[:-1]).numel()
    return 2 * tokens * weight_shape[0] * weight_shape[1] * pattern.n // pattern.m


def conv_flops(x_shape: Sequence[int], weight_shape: Sequence[int], out_shape: Sequence[int], pattern: Pattern) -> int:
    """Of the shapes of a dense convolution; two for each kept weight and output pixel."""
    return conv_flop_count(x_shape, weight_shape, out_shape) * pattern.n // pattern.m
