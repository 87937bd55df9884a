"""Pattern: parsing, validation, printing, and which weight shapes it can take."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsedm_compile import Pattern

# What SparseDM's official code has, and the vector-wise forms.
SPELLINGS = [
    "31:32",
    "15:16",
    "7:8",
    "3:4",
    "2:4",
    "4:8",
    "1:4",
    "1:8",
    "1:16",
    "1:32",
    "1:2",
    "2:4v2",
    "2:4v4",
    "1:4v8",
]


def valid_patterns():
    numbers = st.integers(2, 32).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m)))
    return st.builds(lambda nm, e: Pattern(*nm, 2**e), numbers, st.integers(0, 6))


@pytest.mark.parametrize("spelling", [*SPELLINGS, "dense"])
def test_prints_as_it_was_written(spelling):
    assert str(Pattern.parse(spelling)) == spelling


@given(valid_patterns())
def test_roundtrip(pattern):
    assert Pattern.parse(str(pattern)) == pattern
    assert Pattern.parse(pattern) is pattern


def test_fields():
    pattern = Pattern.parse("2:4v8")
    assert (pattern.n, pattern.m, pattern.v) == (2, 4, 8)
    assert pattern.density == 0.5
    assert not pattern.is_dense


def test_dense():
    assert Pattern.parse("dense").is_dense
    assert Pattern.parse("dense").density == 1
    assert Pattern.parse("dense") == Pattern(1, 1)


def test_v_of_one_is_the_plain_pattern():
    assert Pattern.parse("2:4v1") == Pattern.parse("2:4")
    assert str(Pattern.parse("2:4v1")) == "2:4"


def test_is_hashable_and_frozen():
    pattern = Pattern(2, 4)
    assert {pattern: 1}[Pattern(2, 4)] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        pattern.n = 3


@pytest.mark.parametrize(
    "spelling",
    [
        "",
        "2",
        "2:",
        ":4",
        "2:4v",
        "2:4x4",
        "2/4",
        " 2:4",
        "2:4 ",
        "2:4\n",
        "-2:4",
        "2.0:4",
        "Dense",
        "2:4V4",
        "1:1",
        "2:4v4v4",
    ],
)
def test_unknown_spelling_is_named(spelling):
    with pytest.raises(ValueError, match="unknown pattern") as caught:
        Pattern.parse(spelling)
    assert repr(spelling) in str(caught.value)
    assert "dense" in str(caught.value)  # tells what to write


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        ("4:2", "n must be smaller than m"),
        ("4:4", "write 'dense'"),
        ("0:4", "n must be at least 1"),
        ("2:64", "m must be at most 32"),
        ("2:4v3", "power of two"),
        ("2:4v0", "power of two"),
    ],
)
def test_impossible_numbers_are_explained(spelling, message):
    with pytest.raises(ValueError, match=message) as caught:
        Pattern.parse(spelling)
    assert spelling.split("v")[0] in str(caught.value)


@pytest.mark.parametrize("arguments", [(2.0, 4), ("2", 4), (True, 4), (2, 4, None)])
def test_numbers_must_be_ints(arguments):
    with pytest.raises(TypeError, match="must be an int"):
        Pattern(*arguments)


def test_dense_has_no_v():
    with pytest.raises(ValueError, match="dense"):
        Pattern(1, 1, 4)


@pytest.mark.parametrize("value", [24, None, (2, 4), b"2:4"])
def test_other_types_are_refused(value):
    with pytest.raises(TypeError, match=type(value).__name__):
        Pattern.parse(value)


@pytest.mark.parametrize(
    ("pattern", "shape", "groups", "refused"),
    [
        ("2:4", (8, 16), 1, None),
        ("2:4", (8, 6), 1, "input width 6 is not a multiple of 4"),
        ("2:4", (8, 3, 3, 3), 1, "input width 3 is not a multiple of 4"),  # the first conv of a UNet; numel / m = 54
        ("2:4", (8, 6, 2, 2), 1, "input width 6"),  # numel of a row is 24, a multiple of 4: still refused
        ("2:4v4", (6, 16), 1, "output width 6 is not a multiple of v = 4"),
        ("2:4v4", (16, 8, 3, 3), 2, None),
        ("2:4v4", (12, 8, 3, 3), 2, "output width 6 is not a multiple of v = 4"),  # v must not cross a conv group
        ("2:4v8", (16, 8), 1, None),
        ("dense", (7, 5), 1, None),
        ("2:4", (16,), 1, "1 dimension"),
    ],
)
def test_refusal(pattern, shape, groups, refused):
    answer = Pattern.parse(pattern).refusal(shape, groups)
    assert answer is None if refused is None else refused in answer
