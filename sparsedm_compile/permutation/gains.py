"""What a mask keeps, and what it would keep if two channels traded places: for all pairs of channels at once."""

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
    there, here, now = (_input_exchange if side.dim == 1 else _output_exchange)(side, rivals)
    group = side.positions[:, 0] // side.weight.unit(side.dim)
    gains = there + here - now.unsqueeze(1) - now[rivals]
    return gains.masked_fill(group.unsqueeze(1) == group[rivals], 0)


def _input_exchange(side: Side, rivals: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the groups of both keep after the exchange, and the group of each unit now.

    Returns:
        ``(units, R)``: the unit's group with the rival in the unit's place; the rival's group with the unit in it;
        ``(units,)``.
    """
    n, m = side.weight.pattern.n, side.weight.pattern.m
    score = group_scores(side.weight.magnitude, side.weight.pattern)  # (out / v, in / m, m, taps)
    score = score.flatten(1, 2).movedim(-1, 1).flatten(0, 1)  # (rows, in)
    position = side.positions[:, 0]
    others = position.unsqueeze(1) // m * m + (position.unsqueeze(1) + torch.arange(1, m, device=position.device)) % m
    best = score[:, others].topk(n, dim=2).values
    threshold = best[:, :, -1].T.contiguous()  # (units, rows): what a newcomer must exceed
    column = score[:, position].T.contiguous()
    without = best.sum((0, 2))

    # A newcomer adds max(0, column - threshold), summed over rows. As (|c - t| + c - t) / 2 that is an l1 distance,
    # which cdist computes without a tensor of units x R x rows.
    columns, thresholds = column.sum(1), threshold.sum(1)
    there = (torch.cdist(threshold, column[rivals], p=1) + columns[rivals] - thresholds.unsqueeze(1)) / 2
    here = (torch.cdist(column, threshold[rivals], p=1) + columns.unsqueeze(1) - thresholds[rivals]) / 2
    now = without + (column - threshold).clamp_min(0).sum(1)
    return there + without.unsqueeze(1), here + without[rivals], now


def _output_exchange(side: Side, rivals: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`_input_exchange`, for rows: a group's score is the sum of its ``v`` rows."""
    n, m, v = side.weight.pattern.n, side.weight.pattern.m, side.weight.pattern.v
    position = side.positions[:, 0]
    magnitude = side.weight.magnitude
    row = magnitude[position]
    others = magnitude.unflatten(0, (-1, v)).sum(1)[position // v] - row

    def by_place(rows: Tensor) -> Tensor:  # (units, in, taps) -> (m, units, in / m * taps)
        return rows.unflatten(1, (-1, m)).movedim(2, 0).flatten(2)

    row, others = by_place(row), by_place(others)

    def together(first: Tensor, second: Tensor) -> Tensor:
        """``(units, R)``: what each of ``first`` keeps with each of ``second``."""
        chunk = max(1, _SCRATCH // second.numel())
        parts = first.split(chunk, dim=1)
        return torch.cat([largest_sum(part.unsqueeze(2) + second.unsqueeze(1), n).sum(-1) for part in parts])

    now = largest_sum(others + row, n).sum(-1)
    return together(others, row[:, rivals]), together(row, others[:, rivals]), now
