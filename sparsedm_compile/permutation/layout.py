"""Where the channels lie in a tensor, and how reshaping, slicing and joining tensors moves them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Layout:
    """The elements along a tensor's dimensions.

    Attributes:
        shape: of the tensor.
        arrays: each of the tensor's rank, of size 1 where it does not vary; where it has the tensor's size, entry
            ``[i, j]`` is the element (see ``Channels``) that those indices address. No two vary along one dimension.
            Dimensions along which no array varies keep their order. No element occurs twice in an array: where a
            channel stands at several places, as in a cat with itself, each place is an element, coupled to it.
        why: why those dimensions are fixed.
    """

    shape: tuple[int, ...]
    arrays: tuple[np.ndarray, ...] = ()
    why: str = "positions, not channels"

    def covering(self, dim: int) -> np.ndarray | None:
        """The array that varies along ``dim``."""
        return next((array for array in self.arrays if array.shape[dim] > 1), None)

    def permuted(self, order: Sequence[int]) -> "Layout":
        """Dimension ``i`` of the result is ``order[i]`` of this one."""
        arrays = tuple(array.transpose(order) for array in self.arrays)
        return Layout(tuple(self.shape[dim] for dim in order), arrays, self.why)

    def unsqueezed(self, dim: int) -> "Layout":
        """With a new dimension of size 1 at ``dim`` (of the result; may be negative)."""
        dim %= len(self.shape) + 1
        arrays = tuple(np.expand_dims(array, dim) for array in self.arrays)
        return Layout((*self.shape[:dim], 1, *self.shape[dim:]), arrays, self.why)

    def expanded(self, shape: tuple[int, ...]) -> "Layout":
        """Broadcast to ``shape``."""
        return Layout(shape, tuple(lead(array, len(shape)) for array in self.arrays), self.why)


def lead(array: np.ndarray, rank: int) -> np.ndarray:
    """``array`` with leading dimensions of size 1 up to ``rank``."""
    return array.reshape((1,) * (rank - array.ndim) + array.shape)


def varying(array: np.ndarray) -> list[int]:
    """The dimensions along which an array varies."""
    return [dim for dim, size in enumerate(array.shape) if size > 1]


def rows_along(array: np.ndarray, dims: Sequence[int]) -> np.ndarray:
    """``(indices of dims, all else)``: one row of elements for each index of ``dims``."""
    moved = np.moveaxis(array, list(dims), range(len(dims)))
    return moved.reshape(int(np.prod(moved.shape[: len(dims)])), -1)


def runs(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[range, range]]:
    """The shortest runs of dimensions that a reshape from ``old`` to ``new`` maps onto each other.

    ``(2, 6, 5) -> (2, 2, 3, 5)`` gives 2 onto 2, 6 onto 2 x 3, 5 onto 5.
    """
    i = j = 0
    while i < len(old) or j < len(new):
        first_i, first_j = i, j
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while (mine := int(np.prod(old[first_i:i]))) != (other := int(np.prod(new[first_j:j]))):
            if mine < other:
                i += 1
            else:
                j += 1
        yield range(first_i, i), range(first_j, j)
