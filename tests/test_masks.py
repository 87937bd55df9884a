"""Magnitude masks against the definition, over random, tie-heavy and edge shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsedm_compile import Pattern, magnitude_mask
from sparsedm_compile.masks import magnitude_mask_naive

PATTERNS = [
    "2:4",
    "1:4",
    "3:4",
    "4:8",
    "7:8",
    "1:2",
    "2:4v2",
    "2:4v4",
    "1:8v2",
    "15:16",
    "31:32",
    "1:32",
    "2:5",
    "3:7v4",
]


@st.composite
def weights(draw):
    pattern = Pattern.parse(draw(st.sampled_from(PATTERNS)))
    rows, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel = draw(st.sampled_from([(), (1, 1), (3, 3), (2, 1)]))
    shape = (rows * pattern.v, groups * pattern.m, *kernel)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(["normal", "ties", "zeros", "tiny", "huge"]))
    weight = torch.randn(shape, generator=generator)
    if kind == "ties":  # few distinct magnitudes, both signs
        weight = torch.randint(-2, 3, shape, generator=generator).float()
    elif kind == "zeros":
        weight = weight * 0
    elif kind == "tiny":
        weight = weight * 1e-7
    elif kind == "huge":
        weight = weight * 1e4
    return weight.to(dtype), pattern


@settings(max_examples=150, deadline=None)
@given(weights())
def test_equals_the_definition(case):
    weight, pattern = case
    mask = magnitude_mask(weight, pattern)
    assert mask.dtype == torch.bool
    assert mask.shape == weight.shape
    assert torch.equal(mask, magnitude_mask_naive(weight, pattern))


@settings(max_examples=60, deadline=None)
@given(weights())
def test_every_group_keeps_exactly_n(case):
    weight, pattern = case
    mask = magnitude_mask(weight, pattern)
    out_features, in_features, *kernel = weight.shape
    kept = mask.reshape(out_features, in_features // pattern.m, pattern.m, *kernel).sum(2)
    assert (kept == pattern.n).all()
    shared = mask.reshape(out_features // pattern.v, pattern.v, in_features, *kernel)
    assert (shared == shared[:, :1]).all()


def test_among_equals_the_lower_index_wins():
    weight = torch.tensor([[1.0, -1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.0, -2.0, 2.0]])
    want = torch.tensor([[1, 1, 0, 0, 1, 1, 0, 0, 0, 1, 1, 0]], dtype=torch.bool)
    assert torch.equal(magnitude_mask(weight, Pattern(2, 4)), want)


def test_a_hand_made_vector_group():
    # Columns 0 and 2 lose row by row but win in the sum over the two rows.
    weight = torch.tensor([[3.0, 4.0, 3.0, 0.0], [3.0, 0.0, 3.0, 4.0]])
    want = torch.tensor([[1, 0, 1, 0]] * 2, dtype=torch.bool)
    assert torch.equal(magnitude_mask(weight, Pattern(2, 4, 2)), want)


def test_conv_groups_run_along_input_channels():
    weight = torch.zeros(1, 4, 1, 2)
    weight[0, :, 0, 0] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    weight[0, :, 0, 1] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    mask = magnitude_mask(weight, Pattern(2, 4))
    assert mask[0, :, 0, 0].tolist() == [True, True, False, False]
    assert mask[0, :, 0, 1].tolist() == [False, False, True, True]


def test_conv_equals_linear_tap_by_tap():
    weight = torch.randn(8, 16, 3, 3)
    mask = magnitude_mask(weight, Pattern(4, 8, 2))
    for i in range(3):
        for j in range(3):
            assert torch.equal(mask[:, :, i, j], magnitude_mask(weight[:, :, i, j], Pattern(4, 8, 2)))


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided"])
def test_strides_do_not_matter(layout):
    weight = torch.randn(8, 16, 3, 3)
    other = {
        "channels_last": lambda: weight.contiguous(memory_format=torch.channels_last),
        "transposed": lambda: weight.transpose(0, 1).contiguous().transpose(0, 1),
        "strided": lambda: torch.stack([weight, weight], -1)[..., 0],
    }[layout]()
    assert torch.equal(magnitude_mask(other, Pattern(2, 4)), magnitude_mask(weight, Pattern(2, 4)))


def test_keeps_the_largest_sum_of_magnitudes():
    weight = torch.randn(16, 64)
    kept = (weight.abs() * magnitude_mask(weight, "2:4")).sum()
    best = weight.abs().reshape(16, 16, 4).topk(2, dim=2).values.sum()
    torch.testing.assert_close(kept, best)


def test_every_vector_mask_is_a_valid_plain_mask():
    mask = magnitude_mask(torch.randn(16, 64), "2:4v4")
    assert (mask.reshape(16, 16, 4).sum(2) == 2).all()


def test_masking_twice_changes_nothing():
    weight = torch.randn(8, 32)
    masked = weight * magnitude_mask(weight, "2:4v2")
    assert torch.equal(masked * magnitude_mask(masked, "2:4v2"), masked)


def test_infinite_weights_are_kept():
    weight = torch.tensor([[1.0, float("inf"), 2.0, float("-inf")]])
    assert magnitude_mask(weight, "2:4").tolist() == [[False, True, False, True]]


def test_dense_keeps_all_and_takes_any_shape():
    assert magnitude_mask(torch.zeros(3, 5), "dense").all()


def test_empty_weight():
    assert magnitude_mask(torch.empty(0, 8), "2:4").shape == (0, 8)


@pytest.mark.parametrize(
    ("shape", "pattern", "message"),
    [
        ((8, 6), "2:4", r"\(8, 6\) cannot be 2:4: input width 6 is not a multiple of 4"),
        ((8, 3, 3, 3), "2:4", "input width 3"),  # 216 weights divide by 4; groups would cross rows
        ((6, 8), "2:4v4", "output width 6 is not a multiple of v = 4"),
        ((8,), "2:4", "1 dimension"),
        ((8, 8), "4:2", "n must be smaller than m"),
    ],
)
def test_what_cannot_be_masked_is_refused(shape, pattern, message):
    with pytest.raises(ValueError, match=message):
        magnitude_mask(torch.randn(shape), pattern)
