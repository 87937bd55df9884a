"""SparseGPT: masks chosen group by group from second-order information, later weights compensating as it goes."""

import torch
from torch import Tensor

from sparsedm_compile.masks import magnitude_mask
from sparsedm_compile.pattern import Pattern

# Columns between two updates of all later ones, as in the paper: one product of matrices in place of 128 outer ones.
_BLOCK = 128


def sparsegpt(weight: Tensor, factor: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Drop weights column by column; what each drop does to the outputs, the columns to its right make up for.

    A weight's score is the error that dropping it leaves after the best such compensation, ``w^2 / [H^-1]_jj`` with
    ``H`` restricted to column j and later. The v rows that share a choice see the same inputs, so their errors add.

    Source: Frantar and Alistarh, "SparseGPT", arXiv 2301.00774, section 3 and algorithm 1; oracle: ``naive.py``.

    Args:
        weight: matrix ``(out, K)``, float64.
        factor: of the Hessian, by :func:`inverse_factor`.

    Returns:
        mask, bool ``(out, K)``, and the compensated weight, zero outside of it.
    """
    weight, columns = weight.clone(), weight.shape[1]
    scale = factor.diagonal()  # its square is [H^-1]_jj of column j and later
    kept = torch.empty_like(weight, dtype=torch.bool)
    block = max(pattern.m, _BLOCK // pattern.m * pattern.m)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = weight.new_empty(len(weight), stop - start)
        for column in range(start, stop):
            if column % pattern.m == 0:
                group = slice(column, column + pattern.m)
                kept[:, group] = magnitude_mask((weight[:, group] / scale[group]).square(), pattern)
            error = weight[:, column].masked_fill(kept[:, column], 0) / scale[column]
            weight[:, column:stop] -= torch.outer(error, factor[column, column:stop])
            errors[:, column - start] = error
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return kept, weight.masked_fill_(~kept, 0)


def inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """The upper Cholesky factor of ``(hessian + damping * I)^-1``, and the damping that it took.

    Inputs often span less than K dimensions. Where rounding then leaves the matrix without a factor, the damping grows
    tenfold until there is one.

    Args:
        hessian: positive semidefinite, float64 ``(K, K)``.
        damping: positive.
    """
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    while True:
        lower, failed = torch.linalg.cholesky_ex(hessian + damping * identity)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return upper, damping
        damping *= 10
