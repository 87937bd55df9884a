"""Channels of parameters and what ties them: which may trade places without changing what the model computes."""

from collections import Counter, defaultdict
from dataclasses import dataclass

import networkx as nx
import numpy as np


@dataclass(frozen=True)
class Axis:
    """One dimension of one parameter or buffer; its channels are the elements ``start`` to ``start + size - 1``.

    Attributes:
        tensor: name of the parameter; empty for positions of a computed value, which have no memory to permute.
    """

    tensor: str
    dim: int
    start: int
    size: int

    def __str__(self) -> str:
        return f"{self.tensor}[{self.dim}]"


@dataclass(frozen=True)
class Coupled:
    """Axes that permute together.

    Attributes:
        axes: all of them, in graph order.
        classes: the independent channels between them, each by its lowest element.
        free: how many of them have another to trade places with.
        pinned: reason -> number of channels that it keeps in place.
    """

    axes: tuple[Axis, ...]
    classes: np.ndarray
    free: int
    pinned: dict[str, int]


@dataclass(frozen=True)
class Solution:
    """What may move.

    Attributes:
        families: arrays ``(units, width, occurrences)`` of elements. Any two units of one array may trade places: all
            their elements do, index by index. ``width`` exceeds 1 where whole normalisation groups move.
        coupled: the connected components of the axes.
    """

    families: tuple[np.ndarray, ...]
    coupled: tuple[Coupled, ...]


class Channels:
    """Collects facts about channels; :meth:`solve` answers which permutations leave every fact true.

    A channel of a parameter dimension is an *element*, an integer. A permutation of the elements keeps the model's
    function if it maps each axis to itself and each operator still sees what it saw, permuted. Operators state what
    they need in four words: ``couple`` (these elements move together, one by one), ``cut`` (each of these sets keeps
    its elements), ``block`` (these sets may trade places, but only whole) and ``pin`` (these stay).

    Every fact is a restriction, so a superfluous one costs freedom, never correctness.
    """

    def __init__(self) -> None:
        self.axes: list[Axis] = []
        self._starts: dict[tuple[str, int], np.ndarray] = {}
        self._size = 0
        self._couplings: list[tuple[np.ndarray, np.ndarray]] = []
        self._cuts: list[tuple[np.ndarray, np.ndarray]] = []
        self._blocks: list[np.ndarray] = []
        self._pins: dict[int, str] = {}

    def axis(self, tensor: str, dim: int, size: int) -> np.ndarray:
        """The elements of a dimension; the same ones each time it is asked for."""
        if (tensor, dim) not in self._starts:
            self._starts[tensor, dim] = self._new(tensor, dim, size)
        return self._starts[tensor, dim]

    def fixed(self, size: int, reason: str) -> np.ndarray:
        """Elements for positions of a computed value that cannot move."""
        elements = self._new("", 0, size)
        self.pin(elements, reason)
        return elements

    def _new(self, tensor: str, dim: int, size: int) -> np.ndarray:
        self.axes.append(Axis(tensor, dim, self._size, size))
        self._size += size
        return np.arange(self._size - size, self._size)

    def couple(self, first: np.ndarray, second: np.ndarray) -> None:
        """``first[i]`` and ``second[i]`` move together."""
        first, second = first.ravel(), second.ravel()
        if np.array_equal(first, second):
            return
        first_times, second_times = _occurrence(first), _occurrence(second)
        if first_times.any() and second_times.any():
            places = self.places(first)
            self.couple(places, second)
            return
        self._couplings.append((first, second))
        # One channel may stand at several places of the other side (cat of a value with itself, a flattened image):
        # its first places answer to each other's first places, and so on.
        if first_times.any():
            self._cuts.append((second, first_times))
        if second_times.any():
            self._cuts.append((first, second_times))

    def places(self, elements: np.ndarray) -> np.ndarray:
        """Distinct elements that stand for the places of an array in which some occur twice.

        Where an element moves to another, its first place moves to the other's first place, in row-major order, and
        so on.
        """
        places = self._new("", 0, elements.size).reshape(elements.shape)
        self.couple(elements, places)
        return places

    def cut(self, rows: np.ndarray) -> None:
        """Elements of a row of ``rows`` ``(sets, elements)`` stay in it."""
        elements = rows.ravel()
        if _occurrence(elements).any():
            elements = self.places(elements)
        self._cuts.append((elements, np.repeat(np.arange(len(rows)), rows[0].size)))

    def block(self, rows: np.ndarray) -> None:
        """Rows of ``rows`` ``(sets, elements)`` stay together: elements trade places within one, or whole rows do."""
        self._blocks.append(rows)

    def pin(self, elements: np.ndarray, reason: str) -> None:
        """These elements stay where they are. The first reason given is the one reported."""
        for element in np.unique(elements).tolist():
            self._pins.setdefault(element, reason)

    def solve(self) -> Solution:
        """Group the elements into classes that move as one, and the classes into families that may trade places."""
        roles = self._roles()
        classes = self._classes()
        order = np.lexsort((roles, classes))
        names, starts = np.unique(classes[order], return_index=True)
        members = dict(zip(names.tolist(), np.split(order, starts[1:]), strict=True))  # class -> elements by role

        pinned = {}  # class -> reason
        for element, reason in self._pins.items():
            pinned.setdefault(int(classes[element]), reason)
        repeated = (np.diff(classes[order]) == 0) & (np.diff(roles[order]) == 0)
        for name in classes[order[1:][repeated]].tolist():
            pinned.setdefault(name, "stands at several places of one axis that nothing tells apart")

        atoms = self._atoms(roles, classes, members, pinned)
        families = [np.stack([members[name] for name in atom])[:, None] for atom in atoms.values() if len(atom) > 1]
        families += [
            np.stack([np.stack([members[name] for name in atom]) for atom in group])
            for group in self._whole_blocks(atoms, roles, members)
        ]
        return Solution(tuple(families), self._coupled(classes, pinned, families))

    def _roles(self) -> np.ndarray:
        """Number the roles: elements of unlike role never trade places. Colour refinement along the couplings."""
        roles = np.repeat(np.arange(len(self.axes)), [axis.size for axis in self.axes])
        for elements, labels in self._cuts:
            _refine(roles, elements, labels)
        before, count = 0, len(np.unique(roles))
        while before < count:
            for first, second in self._couplings:
                _refine(roles, first, roles[second])
                _refine(roles, second, roles[first])
            before, count = count, len(np.unique(roles))
        return roles

    def _classes(self) -> np.ndarray:
        """The smallest element that each one is tied to, over any number of couplings."""
        classes = np.arange(self._size)
        settled = False
        while not settled:
            settled = True
            for first, second in self._couplings:
                if not np.array_equal(classes[first], classes[second]):
                    settled = False
                    lowest = np.minimum(classes[first], classes[second])
                    np.minimum.at(classes, first, lowest)
                    np.minimum.at(classes, second, lowest)
        return classes

    def _atoms(self, roles: np.ndarray, classes: np.ndarray, members: dict, pinned: dict) -> dict[tuple, list[int]]:
        """``(roles, places in blocks) -> classes`` that share both and so may be permuted at will."""
        places = defaultdict(list)  # class -> (block fact, row, role) of each of its elements in a block
        for fact, rows in enumerate(self._blocks):
            for row, elements in enumerate(rows):
                for name, role in zip(classes[elements].tolist(), roles[elements].tolist(), strict=True):
                    places[name].append((fact, row, role))
        atoms = defaultdict(list)
        for name, elements in members.items():
            if name not in pinned:
                atoms[roles[elements].tobytes(), tuple(sorted(places[name]))].append(name)
        return atoms

    def _whole_blocks(self, atoms: dict[tuple, list[int]], roles: np.ndarray, members: dict) -> list[list[list[int]]]:
        """Atoms that are the whole of every block they lie in may trade places with their like."""
        groups = defaultdict(list)
        for (signature, places), atom in atoms.items():
            elements = np.concatenate([members[name] for name in atom])
            whole = all(
                set(self._blocks[fact][row].tolist()) == set(elements[roles[elements] == role].tolist())
                for fact, row, role in places
            )
            if places and whole:
                groups[signature, tuple((fact, role) for fact, _row, role in places), len(atom)].append(atom)
        return [group for group in groups.values() if len(group) > 1]

    def _coupled(self, classes: np.ndarray, pinned: dict[int, str], families: list[np.ndarray]) -> tuple[Coupled, ...]:
        owner = np.repeat(np.arange(len(self.axes)), [axis.size for axis in self.axes])
        graph = nx.Graph()
        graph.add_nodes_from(range(len(self.axes)))
        for first, second in self._couplings:
            graph.add_edges_from(np.unique(np.stack([owner[first], owner[second]], 1), axis=0).tolist())
        free = {int(classes[element]) for family in families for element in family[..., 0].ravel()}
        coupled = []
        for component in nx.connected_components(graph):
            axes = tuple(self.axes[index] for index in sorted(component))
            names = set().union(*(classes[axis.start : axis.start + axis.size].tolist() for axis in axes))
            reasons = Counter(pinned[name] for name in names if name in pinned)
            alone = len(names - free - pinned.keys())
            if alone:
                reasons["no other channel plays the same part"] = alone
            coupled.append(Coupled(axes, np.array(sorted(names)), len(names & free), dict(reasons.most_common())))
        return tuple(coupled)


def _refine(roles: np.ndarray, elements: np.ndarray, labels: np.ndarray) -> None:
    """Split the roles of ``elements`` by ``labels``, in place; elements that are not listed keep theirs."""
    _, split = np.unique(roles[elements] * (labels.max() + 1) + labels, return_inverse=True)
    roles[elements] = roles.max() + 1 + split


def _occurrence(elements: np.ndarray) -> np.ndarray:
    """How often each entry occurred before: ``[7, 7, 3, 7] -> [0, 1, 0, 2]``."""
    order = np.argsort(elements, kind="stable")
    ranks = np.arange(len(elements))
    first = np.maximum.accumulate(np.where(np.diff(elements[order], prepend=-1) != 0, ranks, 0))
    occurrence = np.empty_like(ranks)
    occurrence[order] = ranks - first
    return occurrence
