"""The oracle of the Triton kernels: sums over what the packed weight holds, in float64, one kept weight at a time."""

import torch
from torch import Tensor

from sparsedm_compile.kernels.registry import LayerSpec


def vector_naive(x: Tensor, values: Tensor, index: Tensor, spec: LayerSpec) -> Tensor:
    """Linear or convolution by vector-wise N:M, from the packed weight of ``TritonVectorKernel``.

    Args:
        x: ``(rows, in)`` or ``(B, C_in, H, W)``.
        values: ``(out / v, taps, in / m, n, v)``.
        index: ``(out / v, taps, n, in / m)``, 16 times the position in the group.

    Returns:
        The product alone, float64: ``(rows, out)`` or ``(B, out, H', W')``.
    """
    blocks, taps, groups, slots, _ = values.shape
    out = []
    for block in range(blocks):
        z = 0
        for tap in range(taps):
            shifted = x if spec.op == "linear" else _shift(x, tap, spec)
            for slot in range(slots):
                for group in range(groups):
                    k = group * spec.pattern.m + int(index[block, tap, slot, group]) // 16
                    column = shifted.select(1, k).double()
                    z = z + torch.stack([column * float(w) for w in values[block, tap, group, slot]], dim=1)
        out.append(z)
    return torch.cat(out, dim=1)


def _shift(x: Tensor, tap: int, spec: LayerSpec) -> Tensor:
    """What tap ``tap`` of the convolution window sees, for every output pixel."""
    kernel_h, kernel_w = spec.weight_shape[2:]
    (pad_h, pad_w), (step_h, step_w), (dilation_h, dilation_w) = spec.padding, spec.stride, spec.dilation
    padded = torch.nn.functional.pad(x, (pad_w, pad_w, pad_h, pad_h))
    height = (padded.shape[2] - dilation_h * (kernel_h - 1) - 1) // step_h + 1
    width = (padded.shape[3] - dilation_w * (kernel_w - 1) - 1) // step_w + 1
    top, left = tap // kernel_w * dilation_h, tap % kernel_w * dilation_w
    return padded[:, :, top : top + step_h * height : step_h, left : left + step_w * width : step_w]


def packed_naive(x: Tensor, values: Tensor, index: Tensor, spec: LayerSpec) -> Tensor:
    """Linear by any N:M, from the packed weight of ``TritonPackedKernel``.

    Args:
        x: ``(rows, in)``.
        values: ``(out, n, stored groups)``.
        index: int32 ``(out / v, n, words)``, positions in the group, several to a word, the first in its low bits.

    Returns:
        The product alone, float64 ``(rows, out)``.
    """
    out_features, in_features = spec.weight_shape
    n, m, v = spec.pattern.n, spec.pattern.m, spec.pattern.v
    bits = next(b for b in (1, 2, 4, 8) if 2**b >= m)
    out = torch.zeros(x.shape[0], out_features, dtype=torch.float64)
    for channel in range(out_features):
        for slot in range(n):
            for group in range(in_features // m):
                word, place = divmod(group, 32 // bits)
                position = int(index[channel // v, slot, word]) >> (bits * place) & (2**bits - 1)
                out[:, channel] += x[:, group * m + position].double() * float(values[channel, slot, group])
    return out
