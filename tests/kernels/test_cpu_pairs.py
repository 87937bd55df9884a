"""Channels of a plain N:M weight whose masks coincide are found, wherever they lie, and share loads of activations."""

import pytest
import torch

from sparsedm_compile.kernels.cpu.kernel import CpuKernel
from sparsedm_compile.kernels.registry import Epilogue, LayerSpec
from sparsedm_compile.masks import magnitude_mask
from sparsedm_compile.pattern import Pattern

KERNEL = CpuKernel()
OUT, WIDTH = 96, 64  # one unit of channels, one block of the reduction axis
SPEC = LayerSpec("linear", (OUT, WIDTH), Pattern(2, 4))
KEPT = WIDTH // 2

pytestmark = pytest.mark.skipif(KERNEL.refusal(SPEC) is not None, reason="no C++ compiler here")


def pairs(index: torch.Tensor) -> list[tuple[int, set[int]]]:
    """Of each pair of channels: rows shared, and the two channels (layout.h, "Pairs")."""
    groups = index.view(OUT // 2, 4 + 2 * KEPT)
    return [(int(group[0]), {int(group[1]), int(group[2])}) for group in groups]


def coinciding(seed: int) -> torch.Tensor:
    """A 2:4 weight whose masks agree two by two, the channels in random order."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, WIDTH, generator=generator)
    weight *= magnitude_mask(weight, Pattern(2, 4, 2))
    return weight[torch.randperm(OUT, generator=generator)]


@pytest.mark.parametrize("seed", range(3))
def test_masks_that_coincide_share_every_row(seed: int) -> None:
    weight = coinciding(seed)
    values, index = KERNEL.pack(weight, SPEC)
    found = pairs(index)
    assert [shared for shared, _ in found] == [KEPT] * (OUT // 2)
    assert sorted(channel for _, pair in found for channel in pair) == list(range(OUT))
    for _, pair in found:
        first, second = (weight[channel] != 0 for channel in pair)
        assert torch.equal(first, second)
    # The way back to the caller's order costs nothing and is right: each channel is written to its own place.
    x = torch.randn(5, WIDTH)
    exact = x.double() @ weight.double().T
    assert ((KERNEL.linear(x, values, index, SPEC, Epilogue()) - exact).abs() < 1e-5).all()
    assert torch.equal(KERNEL.unpack(values, index, SPEC), weight)


def test_partners_are_chosen_by_the_rows_they_share() -> None:
    """Of random 2:4 masks neighbours share half of what is kept; partners share more."""
    weight = torch.randn(OUT, WIDTH, generator=torch.Generator().manual_seed(0))
    mask = magnitude_mask(weight, SPEC.pattern).bool()
    neighbours = sum(int((mask[i] & mask[i + 1]).sum()) for i in range(0, OUT, 2))
    found = pairs(KERNEL.pack(weight, SPEC)[1])
    for shared, pair in found:
        first, second = (mask[channel] for channel in pair)
        assert shared == int((first & second).sum())
    assert sum(shared for shared, _ in found) > 1.15 * neighbours
