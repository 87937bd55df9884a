"""The operator ``sparsedm::masked_weight``: a weight with its mask applied, differentiated straight through."""

import torch
from torch import Tensor

from sparsedm_compile.masks import magnitude_mask
from sparsedm_compile.pattern import Pattern

# The pattern travels as its spelling: Dynamo guards a string by value, where it would turn the ints n, m and v of a
# module into symbols the second time they change, and graphs stay readable.
torch.library.define("sparsedm::masked_weight", "(Tensor weight, str pattern) -> Tensor")


def mask_out(weight: Tensor, pattern: str) -> Tensor:
    """``weight`` with what its magnitude mask drops set to zero; also the decomposition that Inductor fuses.

    Filled, not multiplied: zero times an infinite weight would be NaN.
    """
    masked = weight.masked_fill(~magnitude_mask(weight, Pattern.parse(pattern)), 0)
    if masked.stride() == weight.stride():
        return masked
    # masked_fill answers contiguous, and a channels_last weight should stay so. As a permutation, because Inductor
    # accepts no in-place copy in a decomposition.
    order = sorted(range(weight.dim()), key=lambda dim: -weight.stride(dim))
    return masked.permute(order).contiguous().permute([order.index(dim) for dim in range(weight.dim())])


torch.library.impl("sparsedm::masked_weight", "CompositeExplicitAutograd", mask_out)


@torch.library.register_fake("sparsedm::masked_weight")
def _masked_weight_fake(weight: Tensor, pattern: str) -> Tensor:
    refusal = Pattern.parse(pattern).refusal(tuple(weight.shape))
    if refusal is not None:
        raise ValueError(f"weight of shape {tuple(weight.shape)} cannot be {pattern}: {refusal}")
    return torch.empty_like(weight)


torch.library.register_autograd(
    "sparsedm::masked_weight",
    # Straight through: the gradient of the masked weight is the gradient of the dense one.
    lambda _ctx, grad: (grad, None),
)


def masked_weight(weight: Tensor, pattern: "str | Pattern") -> Tensor:
    """Apply the magnitude mask of ``pattern`` to ``weight``; gradients pass straight through (STE).

    The mask is recomputed from the weight at every call, as in SparseDM (arXiv 2404.10445, section 3). The SR-STE
    decay is not part of this gradient: see :class:`sparsedm_compile.SRSTE`.

    Args:
        weight: ``(out, in)`` or ``(C_out, C_in / groups, *kernel)``, any real floating dtype.
        pattern: ``"2:4"`` or a :class:`Pattern`.

    Returns:
        The shape, dtype and strides of ``weight``.

    Raises:
        ValueError: the shape cannot take the pattern, or the pattern cannot be parsed.
    """
    return torch.ops.sparsedm.masked_weight(weight, str(pattern))
