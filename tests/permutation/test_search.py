"""The search against brute force, and what it promises: never worse, the same each time, groups that agree."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsedm_compile.masks import magnitude_mask_naive
from sparsedm_compile.pattern import Pattern
from sparsedm_compile.permutation import search as search_module
from sparsedm_compile.permutation.channels import Channels
from sparsedm_compile.permutation.gains import SparseWeight
from sparsedm_compile.permutation.search import search


def kept(magnitude, pattern) -> float:
    return (magnitude.double() * magnitude_mask_naive(magnitude, Pattern.parse(pattern))).sum().item()


def run(magnitude, pattern, dim=1, seed=0, prepare=lambda channels, axis: None):
    """Search one dimension of one weight. Returns the permuted magnitude and the order."""
    channels = Channels()
    axis = channels.axis("w", dim, magnitude.shape[dim])
    prepare(channels, axis)
    weight = SparseWeight(Pattern.parse(pattern), magnitude.clone())
    order = search(channels.solve().families, channels.axes, {"w": [weight]}, seed)
    torch.testing.assert_close(weight.magnitude, magnitude.index_select(dim, torch.from_numpy(order)), rtol=0, atol=0)
    return weight.magnitude, order


def random_magnitude(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    scale = (2 * torch.randn(1, shape[1], 1, generator=generator)).exp()
    return torch.randn(shape, generator=generator).abs() * scale


@pytest.mark.parametrize(
    ("pattern", "dim", "share"), [("2:4", 1, 0.99), ("1:4", 1, 0.99), ("2:4v2", 0, 0.99), ("1:4v4", 0, 0.99)]
)
def test_near_the_optimum_of_all_permutations(pattern, dim, share):
    for seed in range(3):
        magnitude = random_magnitude((8, 8, 1), seed)
        # Order within a group does not matter, nor that of the groups: 105 partitions into pairs, 35 into fours.
        size = Pattern.parse(pattern).v if dim == 0 else Pattern.parse(pattern).m
        best = max(
            kept(magnitude.index_select(dim, torch.tensor(order)), pattern)
            for order in partitions(list(range(8)), size)
        )
        found = kept(run(magnitude, pattern, dim)[0], pattern)
        assert share * best <= found <= best * (1 + 1e-6)


def partitions(items, size):
    """Every way to split ``items`` into groups of ``size``, laid end to end."""
    if not items:
        yield []
        return
    first, *rest = items
    for others in itertools.combinations(rest, size - 1):
        left = [item for item in rest if item not in others]
        for tail in partitions(left, size):
            yield [first, *others, *tail]


@given(st.sampled_from(["2:4", "1:4", "2:4v2", "2:8v4"]), st.sampled_from([0, 1]), st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_never_worse(pattern, dim, seed):
    magnitude = random_magnitude((8, 16, 2), seed)
    assert kept(run(magnitude, pattern, dim, seed)[0], pattern) >= kept(magnitude, pattern) * (1 - 1e-6)


def test_a_crowded_group_is_spread():
    magnitude = torch.tensor([[[8.0], [8.0], [8.0], [8.0], [1.0], [1.0], [1.0], [1.0]]])
    assert kept(run(magnitude, "2:4")[0], "2:4") == 32


def test_rows_that_want_the_same_inputs_come_together():
    magnitude = torch.tensor([[5.0, 5, 0, 0], [0, 0, 5, 5]]).repeat(4, 1).unsqueeze(2)
    assert kept(magnitude, "2:4v4") == 40
    assert kept(run(magnitude, "2:4v4", dim=0)[0], "2:4v4") == 80


def test_both_dimensions_of_a_square_weight_at_once():
    """A residual linear: its inputs and outputs are one axis, so a swap moves a row and a column."""
    magnitude = random_magnitude((16, 16, 1), 0)
    channels = Channels()
    channels.couple(channels.axis("w", 0, 16), channels.axis("w", 1, 16))
    weight = SparseWeight(Pattern.parse("2:4v2"), magnitude.clone())
    order = torch.from_numpy(search(channels.solve().families, channels.axes, {"w": [weight]}, 0)[:16])
    assert torch.equal(weight.magnitude, magnitude[order][:, order])
    assert kept(weight.magnitude, "2:4v2") > kept(magnitude, "2:4v2")


def test_whole_blocks_move_where_single_channels_cannot_help():
    """Normalisation groups of two: a group of four is crowded until two of them trade places."""
    magnitude = torch.tensor([[[8.0], [8.0], [8.0], [8.0], [1.0], [1.0], [1.0], [1.0]]])
    found, order = run(magnitude, "2:4", prepare=lambda channels, axis: channels.block(axis.reshape(4, 2)))
    assert kept(found, "2:4") == 32
    assert {frozenset(pair) for pair in order.reshape(4, 2).tolist()} == {frozenset((i, i + 1)) for i in (0, 2, 4, 6)}


@pytest.mark.parametrize("work", [2**27, 1])
def test_the_same_seed_gives_the_same_order(monkeypatch, work):
    monkeypatch.setattr(search_module, "_WORK", work)  # 1: rivals are sampled
    magnitude = random_magnitude((8, 32, 1), 1)
    first, again = run(magnitude, "2:4", seed=3)[1], run(magnitude, "2:4", seed=3)[1]
    assert np.array_equal(first, again)
    assert kept(magnitude[:, first], "2:4") > kept(magnitude, "2:4")


def test_nothing_sparse_nothing_moves():
    channels = Channels()
    channels.axis("w", 1, 8)
    assert search(channels.solve().families, channels.axes, {}, 0).tolist() == list(range(8))
