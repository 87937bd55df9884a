"""The oracle of :func:`sparsegpt`: its definition, one weight at a time, every inverse computed afresh."""

import torch
from torch import Tensor

from sparsedm_compile.pattern import Pattern


def sparsegpt_naive(weight: Tensor, hessian: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """As :func:`sparsegpt`, by the optimal brain surgeon's update of the columns to the right of each dropped weight.

    Source: Frantar and Alistarh, "SparseGPT", arXiv 2301.00774, equations 2 and 5.
    """
    weight, kept = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    columns = weight.shape[1]
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    for row in range(0, len(weight), pattern.v):
        rows = range(row, row + pattern.v)
        for j in range(columns):
            if j % pattern.m == 0:
                scores = [
                    sum(weight[r, i].item() ** 2 for r in rows) / inverses[i][0, 0].item()
                    for i in range(j, j + pattern.m)
                ]
                order = sorted(range(pattern.m), key=lambda i: -scores[i])
                kept[row : row + pattern.v, [j + i for i in order[pattern.n :]]] = False
            for r in rows:
                if not kept[r, j]:
                    weight[r, j:] -= weight[r, j] / inverses[j][0, 0] * inverses[j][0]
                    weight[r, j] = 0
    return kept, weight
