"""The algebra of channels: whatever may move leaves every fact true, by the facts' definitions."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsedm_compile.permutation.channels import Channels


def holds(fact, sigma) -> bool:
    """Whether a permutation of the elements leaves a fact true, by definition."""
    kind, *arrays = fact
    if kind == "couple":
        first, second = (array.ravel() for array in arrays)
        before = Counter(zip(first.tolist(), second.tolist(), strict=True))
        return before == Counter(zip(sigma[first].tolist(), sigma[second].tolist(), strict=True))
    if kind == "pin":
        return (sigma[arrays[0]] == arrays[0]).all()
    rows = [frozenset(row.tolist()) for row in arrays[0]]
    images = [frozenset(sigma[row].tolist()) for row in arrays[0]]
    return rows == images if kind == "cut" else Counter(rows) == Counter(images)


@st.composite
def systems(draw):
    """Some axes of 4 or 6 channels, and facts about arrays drawn from them, repeated channels included."""
    sizes = draw(st.lists(st.sampled_from([4, 6]), min_size=1, max_size=4))
    channels = Channels()
    axes = [channels.axis(f"w{i}", 0, size) for i, size in enumerate(sizes)]
    facts = []

    def array(length):
        pool = np.concatenate([draw(st.sampled_from(axes)) for _ in range(2)])
        start = draw(st.integers(0, len(pool) - length)) if draw(st.booleans()) else 0
        return pool[start : start + length]

    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(["couple", "couple", "cut", "block", "pin"]))
        length = draw(st.sampled_from([4, 6, 8]))
        if kind == "couple":
            first, second = array(length), array(length)
            if not np.array_equal(first, second):  # a value joined with itself: no fact
                facts.append((kind, first, second))
        elif kind == "pin":
            facts.append((kind, array(2)))
        else:
            facts.append((kind, array(length).reshape(2, -1)))
    for kind, *arrays in facts:
        getattr(channels, kind)(*arrays, *(["pinned"] if kind == "pin" else []))
    return channels, axes, facts


@given(systems())
@settings(max_examples=120, deadline=None)
def test_whatever_may_trade_places_leaves_every_fact_true(system):
    channels, axes, facts = system
    for family in channels.solve().families:
        for other in range(1, len(family)):
            sigma = np.arange(sum(axis.size for axis in channels.axes))
            sigma[family[0]], sigma[family[other]] = family[other], family[0]
            assert all(set(sigma[axis]) == set(axis) for axis in axes)
            assert all(holds(fact, sigma) for fact in facts)


def families(channels) -> list[list[list[int]]]:
    """The first occurrence of each unit's channels."""
    return sorted(family[:, :, 0].tolist() for family in channels.solve().families)


def test_coupled_axes_move_as_one():
    channels = Channels()
    first, second = channels.axis("a", 0, 3), channels.axis("b", 1, 3)
    channels.couple(first, second)
    (family,) = channels.solve().families
    assert family.tolist() == [[[0, 3]], [[1, 4]], [[2, 5]]]


def test_a_cut_separates():
    channels = Channels()
    channels.cut(channels.axis("a", 0, 6).reshape(2, 3))
    assert families(channels) == [[[0], [1], [2]], [[3], [4], [5]]]


def test_a_cut_of_one_axis_holds_for_those_coupled_to_it():
    channels = Channels()
    halves, narrow, wide = channels.axis("a", 0, 4), channels.axis("b", 0, 2), channels.axis("c", 0, 4)
    channels.couple(wide, halves)
    channels.couple(halves.reshape(2, 2), np.broadcast_to(narrow, (2, 2)))
    channels.cut(halves.reshape(2, 2))
    (family,) = channels.solve().families
    assert np.sort(family[:, 0]).tolist() == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]


def test_blocks_move_whole_and_within():
    channels = Channels()
    channels.block(channels.axis("a", 0, 6).reshape(3, 2))
    assert families(channels) == [[[0], [1]], [[0, 1], [2, 3], [4, 5]], [[2], [3]], [[4], [5]]]


def test_a_block_that_straddles_two_axes_does_not_move():
    channels = Channels()
    both = np.concatenate([channels.axis("a", 0, 6), channels.axis("b", 0, 2)])
    channels.block(both.reshape(2, 4))
    assert families(channels) == [[[0], [1], [2], [3]], [[4], [5]], [[6], [7]]]


def test_a_pin_holds_for_the_whole_class_and_gives_its_first_reason():
    channels = Channels()
    first, second = channels.axis("a", 0, 3), channels.axis("b", 0, 3)
    channels.couple(first, second)
    channels.pin(second[:1], "said first")
    channels.pin(second[:1], "said later")
    solution = channels.solve()
    (coupled,) = solution.coupled
    assert (len(coupled.classes), coupled.free, coupled.pinned) == (3, 2, {"said first": 1})


@pytest.mark.parametrize("repeats", [np.tile, np.repeat])
def test_a_channel_that_stands_twice_moves_with_both_places(repeats):
    channels = Channels()
    narrow, wide = channels.axis("a", 0, 3), channels.axis("b", 0, 6)
    channels.couple(repeats(narrow, 2), wide)
    (family,) = channels.solve().families
    expected = (
        [[[0, 3, 6]], [[1, 4, 7]], [[2, 5, 8]]] if repeats is np.tile else [[[0, 3, 4]], [[1, 5, 6]], [[2, 7, 8]]]
    )
    assert family.tolist() == expected


def test_a_channel_that_nothing_tells_apart_from_its_twin_stays():
    channels = Channels()
    first, second = channels.axis("a", 0, 4), channels.axis("b", 0, 4)
    channels.couple(first, second)
    channels.couple(first, np.roll(second, 1))  # ties every channel to every other
    (coupled,) = channels.solve().coupled
    assert coupled.free == 0
    assert "several places" in next(iter(coupled.pinned))


def test_no_other_channel_is_a_reason_too():
    channels = Channels()
    axis = channels.axis("a", 0, 3)
    channels.cut(axis[:1].reshape(1, 1))
    (coupled,) = channels.solve().coupled
    assert (coupled.free, coupled.pinned) == (2, {"no other channel plays the same part": 1})
