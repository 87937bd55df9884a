"""What every test of permutations needs: all the freedom that the analysis grants, taken at random."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparsedm_compile.permutation.capture import find_channels, named_tensors


def _first(result) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


@pytest.fixture(scope="session")
def shuffled():
    """``shuffled(model, *inputs, **kwargs)``: a float64 copy with every family permuted at random, and its difference.

    Returns the solution, the number of elements that moved, and the largest relative difference of the outputs in
    float64: what is left is rounding, so anything above 1e-12 is a wrong permutation.
    """

    def shuffle(model: nn.Module, *inputs, seed: int = 0, **kwargs):
        model = copy.deepcopy(model).double().eval()
        inputs = [value.double() if value.is_floating_point() else value for value in inputs]
        with torch.no_grad():
            before = _first(model(*inputs, **kwargs))
        channels, _unused = find_channels(model, tuple(inputs), kwargs)
        solution = channels.solve()
        generator = np.random.default_rng(seed)
        last = channels.axes[-1]
        content = np.arange(last.start + last.size)
        for family in solution.families:
            content[family] = content[family[generator.permutation(len(family))]]
        tensors = named_tensors(model)
        with torch.no_grad():
            for axis in channels.axes:
                order = content[axis.start : axis.start + axis.size] - axis.start
                assert sorted(order) == list(range(axis.size))
                if axis.tensor:
                    tensor = tensors[axis.tensor]
                    tensor.copy_(tensor.index_select(axis.dim, torch.from_numpy(order)))
            after = _first(model(*inputs, **kwargs))
        assert before.abs().max() > 0, "a zero output shows nothing"
        moved = int((content != np.arange(len(content))).sum())
        return solution, moved, ((after - before).abs().max() / before.abs().max()).item()

    return shuffle


@pytest.fixture(scope="session")
def freedom():
    """``freedom(solution, "fc1.weight[0]")``: ``(channels, free, reasons)`` of the axes tied to that one."""

    def look_up(solution, member: str):
        (coupled,) = [c for c in solution.coupled if member in map(str, c.axes)]
        return len(coupled.classes), coupled.free, "; ".join(coupled.pinned)

    return look_up
