"""The search: which channels should trade places so that the masks keep more magnitude.

Channel-swap hill climbing in the manner of "Channel Permutations for N:M Sparsity" (Pool and Yu, NeurIPS 2021), with
every layer that reads or writes an axis counted, and with output channels for vector-wise patterns.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sparsedm_compile.masks import magnitude_mask
from sparsedm_compile.pattern import Pattern
from sparsedm_compile.permutation.channels import Axis
from sparsedm_compile.permutation.gains import Side, SparseWeight, swap_gains

# What one side may cost in one sweep, some tenths of a second on a core (unit: see ``Side.cost``). It bounds how many
# rivals a channel is weighed against at a time. A sample does as well as all of them: 2:4v4 on 512 x 128 and back ends
# within 1e-4 of the same share, in a third of the time.
_WORK = 2**27
_MIN_RIVALS = 8
_SWEEPS = 100
_ROUNDS = 3
# A gain of a smaller share of what is kept is rounding.
_NEGLIGIBLE = 1e-7
# Sweeps over a sample of rivals that gain nothing before the search of a family ends.
_PATIENCE = 3
# Rivals that a channel may still get when a better swap has taken its first choice.
_CHOICES = 4


class Family:
    """Units that may trade places, and the sparse weights that notice.

    Args:
        elements: ``(units, width, occurrences)``, see ``Solution.families``.
        axes: all axes, in element order.
        weights: name of a tensor -> the sparse weights that it is.
        content: for every element, the one whose data lies there now; kept up to date.
    """

    def __init__(
        self,
        elements: np.ndarray,
        axes: Sequence[Axis],
        weights: dict[str, list[SparseWeight]],
        content: np.ndarray,
    ) -> None:
        self._elements, self._content = elements, content
        starts = [axis.start for axis in axes]
        self.sides: list[Side] = []
        for occurrence in range(elements.shape[2]):
            places = elements[:, :, occurrence]
            axis = axes[int(np.searchsorted(starts, places[0, 0], side="right")) - 1]
            for weight in weights.get(axis.tensor, ()):
                if axis.dim < 2 and weight.unit(axis.dim) > 1:
                    positions = torch.from_numpy(places - axis.start).to(weight.magnitude.device)
                    self.sides.append(Side(weight, axis.dim, positions))
        self.weights = list({id(side.weight): side.weight for side in self.sides}.values())

    def __len__(self) -> int:
        return len(self._elements)

    @property
    def width(self) -> int:
        """Channels of a unit."""
        return self._elements.shape[1]

    def kept(self) -> float:
        """What the masks of all its weights keep, exactly."""
        return sum(weight.kept() for weight in self.weights)

    def place(self, slots: np.ndarray, sources: np.ndarray) -> None:
        """Fill each slot with what lies at its source; ``sources`` are ``slots`` in another order."""
        self._content[self._elements[slots]] = self._content[self._elements[sources]]
        for side in self.sides:
            magnitude, device = side.weight.magnitude, side.positions.device
            to = side.positions[torch.from_numpy(slots).to(device)].ravel()
            moved = magnitude.index_select(side.dim, side.positions[torch.from_numpy(sources).to(device)].ravel())
            magnitude.index_copy_(side.dim, to, moved)

    def attempt(self, slots: np.ndarray, sources: np.ndarray, kept: float) -> float:
        """:meth:`place`, taken back unless more is kept than ``kept``. Returns what is kept in the end."""
        self.place(slots, sources)
        after = self.kept()
        if after > kept * (1 + _NEGLIGIBLE):
            return after
        self.place(sources, slots)
        return kept


def search(
    families: Sequence[np.ndarray], axes: Sequence[Axis], weights: dict[str, list[SparseWeight]], seed: int
) -> np.ndarray:
    """Raise the magnitude that all masks keep; never lower it.

    Args:
        families: see ``Solution.families``.
        axes: all axes, in element order.
        weights: name of a tensor -> the sparse weights that it is; their magnitudes are permuted in place.
        seed: of the choice of rivals on long axes.

    Returns:
        int64, for every element the one whose data belongs there.
    """
    content = np.arange(axes[-1].start + axes[-1].size if axes else 0)
    members = [Family(elements, axes, weights, content) for elements in families]
    members = [family for family in members if family.sides]
    generator = torch.Generator().manual_seed(seed)
    for family in members:
        _start(family)
    # Families share the groups of a mask, by their rows or their columns: one's gain may open a gain for another.
    for _ in range(_ROUNDS):
        gained = False
        for family in members:
            gained |= (_climb if family.width == 1 else _climb_wide)(family, generator)
        if not gained:
            break
    return content


def _climb(family: Family, generator: torch.Generator) -> bool:
    """Swap until no swap gains. Each sweep does the best swaps that touch no group twice, whose gains add up."""
    start = kept = family.kept()
    units = len(family)
    rivals_at_most = min(_WORK // (units * side.cost()) for side in family.sides)
    count = min(units, max(_MIN_RIVALS, rivals_at_most))
    idle = 0
    for _ in range(_SWEEPS):
        rivals = torch.randperm(units, generator=generator)[:count].sort().values
        gains = sum(swap_gains(side, rivals).cpu() for side in family.sides)
        swaps = _disjoint(family, gains, rivals, kept * _NEGLIGIBLE)
        before = kept
        for batch in (swaps, swaps[:1]):  # gains add up unless an axis is both input and output of one layer
            if len(batch) and kept == before:
                kept = family.attempt(batch.T.ravel(), batch[:, ::-1].T.ravel(), kept)
        idle = 0 if kept > before else idle + 1
        if idle == (1 if count == units else _PATIENCE):
            break
    return kept > start


def _disjoint(family: Family, gains: Tensor, rivals: Tensor, least: float) -> np.ndarray:
    """The best swaps, best first, no two of which touch one group: int64 ``(swaps, 2)``."""
    values, choice = gains.topk(min(_CHOICES, gains.shape[1]), dim=1)
    unit = torch.arange(len(family)).unsqueeze(1).expand_as(choice)
    order = values.ravel().argsort(descending=True, stable=True)
    order = order[values.ravel()[order] > least]
    touched = [
        {(id(side.weight), side.dim, group) for side, groups in zip(family.sides, groups_of_unit, strict=True)
         for group in groups.tolist()}
        for groups_of_unit in zip(*(side.groups() for side in family.sides), strict=True)
    ]  # fmt: skip
    used: set = set()
    swaps = []
    for first, second in zip(unit.ravel()[order].tolist(), rivals[choice].ravel()[order].tolist(), strict=True):
        groups = touched[first] | touched[second]
        if first != second and not groups & used:
            used |= groups
            swaps.append((first, second))
    return np.array(swaps, dtype=np.int64).reshape(-1, 2)


def _climb_wide(family: Family, generator: torch.Generator) -> bool:
    """Swap whole units while that gains, pair by pair: they are few, as normalisation groups are."""
    if all(family.width % side.weight.unit(side.dim) == 0 for side in family.sides):
        return False  # a unit fills its mask groups and takes them along
    start = kept = family.kept()
    pairs = list(itertools.combinations(range(len(family)), 2))
    affordable = _WORK // sum(weight.magnitude.numel() for weight in family.weights)
    for index in torch.randperm(len(pairs), generator=generator)[: max(_MIN_RIVALS, affordable)].tolist():
        first, second = pairs[index]
        kept = family.attempt(np.array([first, second]), np.array([second, first]), kept)
    return kept > start


def _start(family: Family) -> None:
    """Begin from the better of the order at hand and an arranged one, for the inputs and then for the outputs."""
    if family.width > 1:
        return
    slots = np.arange(len(family))
    for dim, arrange in ((1, _balanced), (0, _matched)):
        sides = [side for side in family.sides if side.dim == dim]
        if sides:
            largest = max(sides, key=lambda side: side.weight.magnitude.numel())
            family.attempt(slots, arrange(largest), family.kept())


def _balanced(side: Side) -> np.ndarray:
    """Deal the channels out by size, one to each group and back again, so that no group holds all the large ones."""
    groups = side.groups()[:, 0]
    turn = np.empty_like(groups)
    for group in np.unique(groups):
        turn[groups == group] = np.arange((groups == group).sum())
    slots = np.lexsort((np.where(turn % 2, -groups, groups), turn))
    sizes = side.weight.magnitude.index_select(1, side.positions[:, 0]).sum((0, 2))
    sources = np.empty_like(slots)
    sources[slots] = sizes.argsort(descending=True, stable=True).cpu().numpy()
    return sources


def _matched(side: Side) -> np.ndarray:
    """Gather rows that want the same inputs: each group of v begins with a row and takes those nearest to it."""
    pattern = side.weight.pattern
    rows = side.weight.magnitude.index_select(0, side.positions[:, 0])
    wanted = rows * magnitude_mask(rows, Pattern(pattern.n, pattern.m))
    likeness = wanted.flatten(1) @ rows.flatten(1).T  # what row j keeps of its own under the mask of row i
    likeness = (likeness + likeness.T).cpu()
    free = torch.ones(len(rows), dtype=torch.bool)
    sources = []
    while free.any():
        first = int(free.nonzero()[0])
        free[first] = False
        near = likeness[first].masked_fill(~free, -torch.inf).topk(min(pattern.v - 1, int(free.sum()))).indices
        free[near] = False
        sources += [first, *near.tolist()]
    return np.array(sources)
