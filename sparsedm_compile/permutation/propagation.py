"""The two primitives of which operators are made, and what each asks of the channels of its operands."""

from collections.abc import Sequence

import numpy as np

from sparsedm_compile.permutation.channels import Channels
from sparsedm_compile.permutation.layout import Layout, lead, rows_along, runs, varying


class Propagation:
    """Maps the layouts of an operator's operands to that of its result, and tells :class:`Channels` what this requires.

    Most operators are :meth:`join`, which needs all operands to agree on their channels, and :meth:`reduce`, which does
    not care for the order of what it adds up: a matrix product is the one after the other. The rest moves data about.

    Attributes:
        operator: name of the operator at hand, for reasons.
    """

    def __init__(self, channels: Channels) -> None:
        self.channels = channels
        self.operator = ""

    def pin(self, layout: "Layout | list | None", reason: str) -> None:
        """Keep every channel of a value in place."""
        for part in layout if isinstance(layout, list) else [layout]:
            for array in part.arrays if part is not None else ():
                self.channels.pin(array, reason)

    def cut(self, array: np.ndarray, dims: Sequence[int]) -> None:
        """Channels keep their index along ``dims``."""
        if dims:
            self.channels.cut(rows_along(array, dims))

    def join(self, *operands: Layout) -> Layout:
        """Operands that broadcast together, elementwise: what varies along a dimension must do so in all of them."""
        shape = tuple(np.broadcast_shapes(*(operand.shape for operand in operands)))
        sizes = [(1,) * (len(shape) - len(operand.shape)) + operand.shape for operand in operands]
        pending = [[lead(array, len(shape)) for array in operand.arrays] for operand in operands]
        joined = []
        while any(pending):
            main = max((array for arrays in pending for array in arrays), key=np.size)
            dims = varying(main)
            for operand, size, arrays in zip(operands, sizes, pending, strict=True):
                meeting = [array for array in arrays if any(array.shape[dim] > 1 for dim in dims)]
                # The last dimension is the one that channels share when a block of rows meets a table of rows.
                partner = next((array for array in meeting if array.shape[dims[-1]] > 1), None)
                if partner is not None and not set(varying(partner)) <= set(dims):
                    partner = None
                for array in meeting:
                    if array is not partner:
                        self.channels.pin(array, f"{self.operator} meets channels that lie across it")
                arrays[:] = [array for array in arrays if not any(array is met for met in meeting)]
                self._meet(main, partner, size, operand.why)
            joined.append(main)
        # Of two reasons, that of the operand which varies along the later dimensions, where channels tend to lie: a
        # sinusoid is fixed by its frequencies (1, C), not by its times (B, 1).
        latest = max(operands, key=lambda operand: operand.shape[::-1])
        return Layout(shape, tuple(joined), latest.why)

    def _meet(self, main: np.ndarray, partner: np.ndarray | None, size: tuple[int, ...], why: str) -> None:
        """``main`` meets an operand of ``size``, in which ``partner`` holds the channels."""
        if partner is main:
            return
        dims = varying(main)
        if partner is None:
            fixed = [dim for dim in dims if size[dim] > 1]
            if len(fixed) == len(dims):
                self.channels.pin(main, f"{self.operator} meets a value that cannot be permuted: {why}")
            else:
                self.cut(main, fixed)
            return
        self.cut(main, [dim for dim in dims if partner.shape[dim] == 1])
        self.channels.couple(main, np.broadcast_to(partner, main.shape))

    def reduce(self, layout: Layout, dims: Sequence[int], keepdim: bool = False) -> Layout:
        """A symmetric function over ``dims``."""
        rank = len(layout.shape)
        dims = {dim % rank for dim in dims}
        kept = []
        for array in layout.arrays:
            inside = [dim for dim in varying(array) if dim in dims]
            if inside:
                self.cut(array, [dim for dim in varying(array) if dim not in dims])
            else:
                kept.append(array)
        if keepdim:
            return Layout(tuple(1 if d in dims else s for d, s in enumerate(layout.shape)), tuple(kept), layout.why)
        shape = tuple(size for dim, size in enumerate(layout.shape) if dim not in dims)
        return Layout(shape, tuple(np.squeeze(array, tuple(dims)) for array in kept), layout.why)

    def matmul(self, left: Layout, right: Layout) -> Layout:
        """``(..., M, K) @ (..., K, N) -> (..., M, N)``."""
        return self.reduce(self.join(left.unsqueezed(-1), right.unsqueezed(-3)), [-2])

    def softmax(self, layout: Layout, dim: int) -> Layout:
        """Equivariant along ``dim``."""
        self.reduce(layout, [dim])
        return layout

    def take(self, layout: Layout, dim: int, start: int, stop: int) -> Layout:
        """``layout[start:stop]`` along ``dim``."""
        shape = (*layout.shape[:dim], stop - start, *layout.shape[dim + 1 :])
        arrays = []
        for array in layout.arrays:
            if array.shape[dim] > 1:
                array = np.moveaxis(np.moveaxis(array, dim, 0)[start:stop], 0, dim)
                self.channels.cut(array.reshape(1, -1))
            if array.size > 1:
                arrays.append(array)
        return Layout(shape, tuple(arrays), layout.why)

    def reshape(self, layout: Layout, shape: Sequence[int]) -> Layout:
        """Row-major reshape. Channels that merge with other positions stand at several places of the result."""
        mapped = list(runs(layout.shape, shape))
        arrays = list(layout.arrays)
        for old, _new in mapped:
            meeting = [array for array in arrays if any(array.shape[dim] > 1 for dim in old)]
            if len(meeting) > 1:
                for array in meeting:
                    self.channels.pin(array, f"{self.operator} merges two dimensions of channels")
                arrays = [array for array in arrays if not any(array is met for met in meeting)]
        reshaped = []
        for array in arrays:
            source, target = [], []
            for old, new in mapped:
                covered = any(array.shape[dim] > 1 for dim in old)
                source += [layout.shape[dim] if covered else 1 for dim in old]
                target += [shape[dim] if covered else 1 for dim in new]
            spread = np.broadcast_to(array, source)
            if spread.size > array.size:
                # Here the places of a channel lie in the order of the positions it merges with. In a later slice or
                # transpose they may not, so they are told apart now.
                spread = self.channels.places(spread)
            reshaped.append(spread.reshape(target))
        return Layout(tuple(shape), tuple(reshaped), layout.why)

    def concatenate(self, parts: Sequence[Layout], dim: int) -> Layout:
        """Join ``parts`` end to end along ``dim``; along the other dimensions they must agree."""
        total = sum(part.shape[dim] for part in parts)
        along = [part.covering(dim) for part in parts]
        across = [
            Layout(
                (*part.shape[:dim], 1, *part.shape[dim + 1 :]),
                tuple(array for array in part.arrays if array is not main),
                part.why,
            )
            for part, main in zip(parts, along, strict=True)
        ]
        dims = sorted({dim}.union(*(varying(array) for array in along if array is not None)))
        for part in across:
            for array in part.arrays:
                if set(varying(array)) & set(dims):
                    self.channels.pin(array, f"{self.operator} meets channels that lie across it")
        others = self.join(*(
            Layout(part.shape, tuple(a for a in part.arrays if not set(varying(a)) & set(dims)), part.why)
            for part in across
        ))  # fmt: skip
        arrays = others.arrays
        if any(array is not None for array in along):
            pieces = []
            for part, array in zip(parts, along, strict=True):
                shape = [size if d in dims else 1 for d, size in enumerate(part.shape)]
                if array is None:
                    array = self.channels.fixed(int(np.prod(shape)), f"{self.operator} beside channels: {part.why}")
                    array = array.reshape(shape)
                pieces.append(np.broadcast_to(array, shape))
            if len(np.unique(np.concatenate([piece.ravel() for piece in pieces]))) < sum(p.size for p in pieces):
                pieces = [self.channels.places(piece) for piece in pieces]
            arrays = (np.concatenate(pieces, dim), *arrays)
        shape = (*parts[0].shape[:dim], total, *parts[0].shape[dim + 1 :])
        return Layout(shape, arrays, others.why)
