"""The gain of every swap against the definition: swap, mask by sorting, count."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsedm_compile.masks import magnitude_mask_naive
from sparsedm_compile.pattern import Pattern
from sparsedm_compile.permutation.gains import Side, SparseWeight, largest_sum, swap_gains


def kept(magnitude, pattern) -> float:
    return (magnitude.double() * magnitude_mask_naive(magnitude, pattern)).sum().item()


def random_weight(shape, pattern, seed=0):
    generator = torch.Generator().manual_seed(seed)
    magnitude = torch.rand(shape, generator=generator) * torch.rand(1, shape[1], 1, generator=generator) ** 2
    return SparseWeight(Pattern.parse(pattern), magnitude)


@given(
    st.sampled_from(
        [("2:4", 1), ("1:4", 1), ("3:4", 1), ("2:8", 1), ("2:4v2", 1), ("2:4v2", 0), ("1:4v4", 0), ("5:8v2", 0)]
    ),
    st.integers(1, 2),
    st.integers(0, 99),
)
@settings(max_examples=12, deadline=None)
def test_gains_are_what_the_masks_keep_after_the_swap(case, taps, seed):
    pattern, dim = case
    weight = random_weight((8, 16, taps), pattern, seed)
    generator = torch.Generator().manual_seed(seed)
    # The family need not be the whole axis.
    units = torch.randperm(weight.magnitude.shape[dim], generator=generator)[:6]
    rivals = torch.tensor([5, 0, 3])
    gains = swap_gains(Side(weight, dim, units.unsqueeze(1)), rivals)
    before = kept(weight.magnitude, weight.pattern)
    for unit in range(len(units)):
        for column, rival in enumerate(rivals.tolist()):
            order = torch.arange(weight.magnitude.shape[dim])
            order[units[unit]], order[units[rival]] = units[rival], units[unit]
            swapped = weight.magnitude.index_select(dim, order)
            expected = kept(swapped, weight.pattern) - before
            assert gains[unit, column].item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("pattern", ["2:4", "1:4v4", "3:8v2"])
def test_kept_is_what_the_mask_keeps(pattern):
    weight = random_weight((8, 16, 2), pattern)
    assert weight.kept() == pytest.approx(kept(weight.magnitude, weight.pattern), rel=1e-6)


@given(st.integers(1, 5), st.data())
def test_largest_sum_sorts(m, data):
    n = data.draw(st.integers(1, m))
    values = torch.tensor(
        data.draw(st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=m, max_size=m))
    )
    expected = [sum(sorted(column, reverse=True)[:n]) for column in values.T.tolist()]
    assert largest_sum(values, n).tolist() == expected
