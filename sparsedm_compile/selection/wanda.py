"""Wanda: weights compete by their magnitude times the norm of the input that they multiply."""

from torch import Tensor


def wanda_score(weight: Tensor, hessian: Tensor) -> Tensor:
    """``w_ij * |x_j|``, of which the largest in magnitude are kept, summed over the rows that share a choice.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695,
    section 3.

    Args:
        weight: matrix ``(out, K)``.
        hessian: ``X^T X``, ``(K, K)``, to any scale, whose diagonal holds the squared norms.

    Returns:
        ``(out, K)``, for :func:`sparsedm_compile.magnitude_mask`.
    """
    return weight * hessian.diagonal().sqrt()
