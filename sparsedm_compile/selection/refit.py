"""Least squares for the kept weights: the best outputs that a given mask allows."""

import torch
from torch import Tensor

# Digits U-ViT at 1:4: 10 iterations gave a denoising loss of 0.0966, 30 gave 0.0957, 100 gave 0.0958.
_MAX_ITERATIONS = 64
_TOLERANCE = 1e-6


def least_squares(weight: Tensor, kept: Tensor, hessian: Tensor, damping: float, start: Tensor) -> Tensor:
    """The matrix w, zero outside ``kept``, that minimises ``trace((w - weight) @ H @ (w - weight).T)``.

    ``H`` is ``hessian + damping * I``: the error of the outputs, with a pull towards the dense weight.

    Every row is a least-squares problem over kept columns of its own, so a factorisation each would cost ``out`` times
    ``K^3``. Conjugate gradients, preconditioned by the diagonal, solve all rows at once with one product by the
    Hessian an iteration, and the error falls at every iteration, so stopping early is safe.

    Source: Hestenes and Stiefel, "Methods of Conjugate Gradients for Solving Linear Systems", 1952.

    Args:
        weight: the dense matrix ``(out, K)``, float64.
        kept: bool ``(out, K)``.
        hessian: positive semidefinite ``(K, K)``, float64.
        damping: positive.
        start: where to start from, ``(out, K)``, zero outside ``kept``.
    """
    solution, diagonal = start, hessian.diagonal() + damping

    def energy(residual: Tensor) -> Tensor:
        return (residual.square() / diagonal).sum(1, keepdim=True)

    def restricted(matrix: Tensor) -> Tensor:
        return (matrix @ hessian + damping * matrix).masked_fill_(~kept, 0)

    residual = restricted(weight - solution)
    direction, current = residual / diagonal, energy(residual)
    goal = _TOLERANCE**2 * energy(restricted(weight))
    for _ in range(_MAX_ITERATIONS):
        if (current <= goal).all():
            break
        image = restricted(direction)
        # A row that has arrived has direction 0, and stays where it is instead of becoming 0 / 0.
        step = current / (direction * image).sum(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
        solution = solution + step * direction
        residual = residual - step * image
        previous, current = current, energy(residual)
        direction = residual / diagonal + current / previous.clamp_min(torch.finfo(weight.dtype).tiny) * direction
    return solution
