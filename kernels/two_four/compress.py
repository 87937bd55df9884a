"""Any pattern that keeps at most two of every four weights, as values and two-bit positions."""

import torch
from torch import Tensor

from sparsedm_compile.masks import magnitude_mask
from sparsedm_compile.pattern import Pattern


def carry_refusal(pattern: Pattern, weight_shape: tuple[int, ...], groups: int = 1) -> str | None:
    """Why sparse tensor cores cannot carry a masked weight of this shape, or None if they can.

    They want at most two of every four consecutive weights of a row. ``2:m`` and ``1:m`` give that for every m that
    is a multiple of four, whatever v is; a quad with fewer than two carries explicit zeros.
    """
    if pattern.is_dense:
        return "the pattern is dense"
    if pattern.n > 2 or pattern.m % 4:
        return f"sparse tensor cores keep two of four: {pattern} does not fit into 2:4"
    return pattern.refusal(weight_shape, groups)


def as_matrix(weight: Tensor) -> Tensor:
    """``(out, in)`` as it is; ``(C_out, C_in, kh, kw)`` as ``(C_out, kh * kw * C_in)``, the order of NHWC patches."""
    if weight.dim() == 2:
        return weight
    return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)


def from_matrix(matrix: Tensor, weight_shape: tuple[int, ...]) -> Tensor:
    """The inverse of :func:`as_matrix`; contiguous."""
    if len(weight_shape) == 2:
        return matrix.reshape(weight_shape)
    out_channels, in_channels, height, width = weight_shape
    return matrix.reshape(out_channels, height, width, in_channels).permute(0, 3, 1, 2).contiguous()


def masked_matrix(weight: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Mask ``weight`` by magnitude and flatten it.

    Returns:
        ``(rows, K)`` with zeros where nothing is kept, and the bool mask of the same shape.

    Raises:
        ValueError: the pattern or the shape does not fit into 2:4.
    """
    refusal = carry_refusal(pattern, tuple(weight.shape))
    if refusal is not None:
        raise ValueError(f"weight of shape {tuple(weight.shape)} cannot be packed as 2:4: {refusal}")
    keep = magnitude_mask(weight, pattern)
    # where, not a product: 0 * inf is NaN, and a dropped weight must not be able to poison the layer.
    masked = torch.where(keep, weight.detach(), weight.new_zeros(()))
    return as_matrix(masked), as_matrix(keep)


def compress(weight: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Mask ``weight`` by magnitude and keep two of every four.

    Args:
        weight: ``(out, in)`` or ``(C_out, C_in, kh, kw)``, any dtype and device.
        pattern: one that :func:`carry_refusal` accepts.

    Returns:
        values ``(rows, K / 2)`` in the weight's dtype, where K is ``in`` or ``kh * kw * C_in``, tap by tap; and
        quads ``(rows, K / 4)`` uint8, ``first | second << 2`` with ``first < second``: the positions of the two values
        of each four, as ``mma.sp::ordered_metadata`` wants them (PTX ISA, "sparse matrix storage").

    Raises:
        ValueError: the pattern or the shape does not fit into 2:4.
    """
    matrix, keep = masked_matrix(weight, pattern)
    rows, width = matrix.shape
    keep = keep.reshape(rows, width // 4, 4)
    # A stable sort of "dropped" puts the kept positions first, then the lowest dropped ones, whose values are zero.
    position = keep.logical_not().to(torch.uint8).argsort(dim=2, stable=True)[:, :, :2].sort(dim=2).values
    values = matrix.reshape(rows, width // 4, 4).gather(2, position)
    quads = (position[:, :, 0] | position[:, :, 1] << 2).to(torch.uint8)
    return values.reshape(rows, width // 2), quads


def expand(values: Tensor, quads: Tensor) -> Tensor:
    """The ``(rows, K)`` matrix that :func:`compress` compressed."""
    rows, width = quads.shape
    position = torch.stack((quads & 3, quads >> 2), dim=2).long()
    matrix = values.new_zeros(rows, width, 4)
    return matrix.scatter_(2, position, values.reshape(rows, width, 2)).reshape(rows, width * 4)
