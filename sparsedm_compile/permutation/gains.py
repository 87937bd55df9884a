"""What a mask keeps, and what it would keep if two channels traded places: for all pairs of channels at once."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsedm_compile.masks import group_scores
from sparsedm_compile.pattern import Pattern

# Elements of a scratch tensor: 4 MB of float32 stay in a core's cache.
_SCRATCH = 2**20


@dataclass(frozen=True)
class SparseWeight:
    """A weight whose mask counts: that of one layer, under its pattern.

    Attributes:
        magnitude: float32 ``(out, in, taps)``.
    """

    pattern: Pattern
    magnitude: Tensor

    def kept(self) -> float:
        """The magnitude that the mask keeps."""
        scores = group_scores(self.magnitude, self.pattern).movedim(2, 0)
        return largest_sum(scores, self.pattern.n).sum(dtype=torch.float64).item()

    def unit(self, dim: int) -> int:
        """How many adjacent channels of ``dim`` lie in one group of the mask: order within it does not matter."""
        return self.pattern.v if dim == 0 else self.pattern.m


@dataclass(frozen=True)
class Side:
    """One dimension of one sparse weight, as far as a family of channels lies along it.

    Attributes:
        positions: int64 ``(units, width)``, where the channels of each unit lie along ``dim``.
    """

    weight: SparseWeight
    dim: int
    positions: Tensor

    def groups(self) -> np.ndarray:
        """``(units, width)``: the group of the mask that each channel lies in."""
        return (self.positions // self.weight.unit(self.dim)).cpu().numpy()

    def cost(self) -> int:
        """What weighing one swap costs, in additions of ``cdist``; passes of minimum and maximum cost many each."""
        if self.dim == 1:
            return self.weight.magnitude[:, 0].numel() // self.weight.pattern.v
        return self.weight.magnitude[0].numel() * 64 * self.weight.pattern.n


def largest_sum(values: Tensor, n: int) -> Tensor:
    """The sum of the ``n`` largest along dimension 0; faster than ``topk`` where that dimension has a few entries."""
    rest = list(values.unbind(0))
    total = torch.zeros_like(rest[0])
    for _ in range(n):
        largest, smaller = rest[0], []
        for value in rest[1:]:
            smaller.append(torch.minimum(largest, value))
            largest = torch.maximum(largest, value)
        total, rest = total + largest, smaller
    return total


def swap_gains(side: Side, rivals: Tensor) -> Tensor:
    """How much more the mask keeps if a unit trades places with a rival, for units of width 1.

    Args:
        rivals: int64 ``(R,)``, indices of units.

    Returns:
        float32 ``(units, R)``; 0 where both lie in one group.
    """
    rivals = rivals.to(side.positions.device)
    units = torch.arange(len(side.positions), device=rivals.device)
    joined, now = (_joined_inputs if side.dim == 1 else _joined_outputs)(side)
    there = joined(units, rivals)
    here = there.T if torch.equal(rivals, units) else joined(rivals, units).T
    gains = there + here - now.unsqueeze(1) - now[rivals]
    group = side.positions[:, 0] // side.weight.unit(side.dim)
    return gains.masked_fill(group.unsqueeze(1) == group[rivals], 0)


def _joined_inputs(side: Side) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor]:
    """What the group of one unit keeps with another in the unit's place.

    Returns:
        A function of indices of units ``(A,)`` and ``(B,)``, for all pairs ``(A, B)``; what the group of each unit
        keeps now, ``(units,)``.
    """
    n, m = side.weight.pattern.n, side.weight.pattern.m
    score = group_scores(side.weight.magnitude, side.weight.pattern)  # (out / v, in / m, m, taps)
    score = score.flatten(1, 2).movedim(-1, 1).flatten(0, 1)  # (rows, in)
    position = side.positions[:, 0]
    others = position.unsqueeze(1) // m * m + (position.unsqueeze(1) + torch.arange(1, m, device=position.device)) % m
    best = score[:, others].topk(n, dim=2).values
    threshold = best[:, :, -1].T.contiguous()  # (units, rows): what a newcomer must exceed
    column = score[:, position].T.contiguous()
    without, columns, thresholds = best.sum((0, 2)), column.sum(1), threshold.sum(1)

    def joined(first: Tensor, second: Tensor) -> Tensor:
        # A newcomer adds max(0, column - threshold), summed over rows. As (|c - t| + c - t) / 2 that is an l1 distance,
        # which cdist computes without a tensor of A x B x rows.
        distance = torch.cdist(threshold[first], column[second], p=1)
        return (distance + columns[second] - thresholds[first].unsqueeze(1)) / 2 + without[first].unsqueeze(1)

    return joined, without + (column - threshold).clamp_min(0).sum(1)


def _joined_outputs(side: Side) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor]:
    """As :func:`_joined_inputs`, for rows: the score of a group is the sum of its ``v`` rows."""
    n, m, v = side.weight.pattern.n, side.weight.pattern.m, side.weight.pattern.v
    position = side.positions[:, 0]
    row = side.weight.magnitude[position]
    others = side.weight.magnitude.unflatten(0, (-1, v)).sum(1)[position // v] - row

    def by_place(rows: Tensor) -> Tensor:  # (units, in, taps) -> (m, units, in / m * taps)
        return rows.unflatten(1, (-1, m)).movedim(2, 0).flatten(2)

    row, others = by_place(row), by_place(others)

    def joined(first: Tensor, second: Tensor) -> Tensor:
        newcomers = row[:, second].unsqueeze(1)
        parts = others[:, first].unsqueeze(2).split(max(1, _SCRATCH // newcomers.numel()), dim=1)
        return torch.cat([largest_sum(part + newcomers, n).sum(-1) for part in parts])

    return joined, largest_sum(others + row, n).sum(-1)
