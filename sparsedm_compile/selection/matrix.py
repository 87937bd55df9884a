"""A layer as products of matrices: ``output[g] = input_rows(x)[g] @ weight_matrices(layer)[g].T`` for each group g."""

import torch.nn.functional as F
from torch import Tensor, nn


def weight_matrices(layer: nn.Module) -> Tensor:
    """The weight of a linear layer or convolution as ``(groups, out / groups, K)``, groups being those of the latter.

    K is ``in_features``, or ``taps * C_in / groups`` with C_in running fastest: so the m weights that compete in
    N:M are neighbours in both.
    """
    return layer.weight.detach().movedim(1, -1).flatten(1).unflatten(0, (getattr(layer, "groups", 1), -1))


def weight_of_matrices(matrices: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The weight of this shape that :func:`weight_matrices` turns into ``matrices``."""
    out, channels, *kernel = shape
    return matrices.reshape(out, *kernel, channels).movedim(-1, 1)


def input_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """What each output element of ``layer`` is a weighted sum of.

    Args:
        layer: linear or convolution of one to three dimensions, any stride, padding, dilation and groups.
        x: ``(..., in)``, or ``(B, C_in, *size)``.

    Returns:
        ``(groups, rows, K)`` with the columns of :func:`weight_matrices`: one row a token, or a pixel of the output.
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, layer.in_features)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)  # the one that also knows padding="same"
    patches = padded
    for axis, (taps, stride, dilation) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        patches = patches.unfold(2 + axis, dilation * (taps - 1) + 1, stride)[..., ::dilation]
    patches = patches.unflatten(1, (layer.groups, -1)).movedim(1, 0).movedim(2, -1)  # (groups, B, *out, *taps, C)
    return patches.flatten(1, 1 + len(layer.stride)).flatten(2)
