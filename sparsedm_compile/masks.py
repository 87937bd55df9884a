"""Magnitude masks: which weights of each group are kept. Everything else in the package asks this file."""

import torch
from torch import Tensor

from sparsedm_compile.pattern import Pattern


def group_scores(weight: Tensor, pattern: Pattern) -> Tensor:
    """The score by which weights compete: magnitudes, summed over the ``v`` output channels that share a choice.

    The sum is a chain of fp32 additions in channel order. Additions in a fixed order round the same in eager, in
    Inductor and in C++, so every consumer derives bit for bit the same mask; ``Tensor.sum`` promises no order.

    Args:
        weight: ``(out, in, *kernel)``, any floating dtype.

    Returns:
        float32, ``(out / v, in / m, m, *kernel)``.
    """
    out_features, in_features, *kernel = weight.shape
    n_groups = in_features // pattern.m
    magnitude = weight.detach().abs().float()
    magnitude = magnitude.reshape(out_features // pattern.v, pattern.v, n_groups, pattern.m, *kernel)
    score = magnitude[:, 0]
    for channel in range(1, pattern.v):
        score = score + magnitude[:, channel]
    return score


def magnitude_mask(weight: Tensor, pattern: "str | Pattern") -> Tensor:
    """Keep, of every ``m`` consecutive inputs, the ``n`` of largest magnitude; among equals the lower index wins.

    A weight is kept when fewer than n weights of its group beat it. That is elementwise compares and a sum over m, with
    no sort, so Inductor fuses the whole mask into its consumer.

    Source: SparseDM, arXiv 2404.10445, section 3 (mask); the tie rule is ours, the paper leaves it open.

    Args:
        weight: ``(out, in)`` or ``(C_out, C_in / groups, *kernel)``, any floating dtype.
        pattern: one that the shape can take.

    Returns:
        bool, the shape of ``weight``.

    Raises:
        ValueError: an unknown pattern, or the shape cannot take it.
    """
    pattern = Pattern.parse(pattern)
    if pattern.is_dense:
        return torch.ones_like(weight, dtype=torch.bool)
    refusal = pattern.refusal(tuple(weight.shape))
    if refusal is not None:
        raise ValueError(f"weight of shape {tuple(weight.shape)} cannot be {pattern}: {refusal}")
    score = group_scores(weight, pattern)
    index = torch.arange(pattern.m, device=weight.device)
    lower = (index.unsqueeze(0) < index.unsqueeze(1)).reshape(pattern.m, pattern.m, *[1] * (weight.dim() - 2))
    mine, rival = score.unsqueeze(3), score.unsqueeze(2)  # (out / v, in / m, m, m, *kernel): [..., i, j, ...]
    beaten_by = ((rival > mine) | ((rival == mine) & lower)).sum(3)
    keep = (beaten_by < pattern.n).unsqueeze(1)
    return keep.expand(-1, pattern.v, *[-1] * (score.dim() - 1)).reshape(weight.shape)


def magnitude_mask_naive(weight: Tensor, pattern: Pattern) -> Tensor:
    """The oracle of :func:`magnitude_mask`: the definition, group by group, with Python's stable sort."""
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    out_features, in_features, *_ = weight.shape
    flat_weight = weight.detach().float().reshape(out_features, in_features, -1)
    flat_mask = mask.view(out_features, in_features, -1)
    for row in range(0, out_features, pattern.v):
        for start in range(0, in_features, pattern.m):
            for tap in range(flat_weight.shape[2]):
                block = flat_weight[row : row + pattern.v, start : start + pattern.m, tap].abs()
                score = block[0].clone()
                for other in block[1:]:
                    score += other
                order = sorted(range(pattern.m), key=lambda i: -score[i].item())
                flat_mask[row : row + pattern.v, [start + i for i in order[: pattern.n]], tap] = True
    return mask
