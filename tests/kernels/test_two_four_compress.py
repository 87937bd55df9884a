"""Compression to 2:4 against torch's own converter and the definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from sparsedm_compile.kernels.two_four.compress import as_matrix, carry_refusal, compress, expand, from_matrix
from sparsedm_compile.masks import magnitude_mask_naive
from sparsedm_compile.pattern import Pattern


@pytest.mark.parametrize("pattern", ["2:4", "2:4v4", "1:4", "1:4v2", "2:8", "1:8", "2:16v4", "1:32"])
def test_expands_to_the_masked_weight(pattern):
    weight = torch.randn(16, 64, dtype=torch.float64)
    values, quads = compress(weight, Pattern.parse(pattern))
    assert values.shape == (16, 32)
    assert quads.shape == (16, 16)
    torch.testing.assert_close(
        expand(values, quads), weight * magnitude_mask_naive(weight, Pattern.parse(pattern)), rtol=0, atol=0
    )


def test_values_are_those_of_torchs_converter():
    weight = torch.randn(32, 64).half()
    dense = weight * magnitude_mask_naive(weight, Pattern(2, 4))
    theirs, _ = sparse_semi_structured_from_dense_cutlass(dense)
    assert torch.equal(compress(weight, Pattern(2, 4))[0], theirs)


@given(st.integers(0, 2**32 - 1), st.sampled_from(["2:4", "1:4", "2:8", "1:16"]))
def test_positions_are_ordered_even_among_zeros_and_ties(seed, pattern):
    # 0b0000, 0b0101, 0b1010, 0b1111 are undefined behaviour on the hardware
    weight = torch.randint(-1, 2, (4, 32), generator=torch.Generator().manual_seed(seed)).float()
    _, quads = compress(weight, Pattern.parse(pattern))
    assert ((quads & 3) < (quads >> 2)).all()
    assert (quads < 16).all()


def test_convolution_goes_tap_by_tap():
    weight = torch.randn(8, 16, 3, 2)
    matrix = as_matrix(weight)
    for tap in range(6):
        assert torch.equal(matrix[:, tap * 16 : (tap + 1) * 16], weight[:, :, tap // 2, tap % 2])
    assert torch.equal(from_matrix(matrix, tuple(weight.shape)), weight)
    values, quads = compress(weight, Pattern(2, 4))
    masked = weight * magnitude_mask_naive(weight, Pattern(2, 4))
    assert torch.equal(from_matrix(expand(values, quads), tuple(weight.shape)), masked)


def test_a_dropped_infinity_leaves_no_nan():
    weight = torch.tensor([[float("inf"), float("inf"), float("inf"), 1.0]])
    values, quads = compress(weight, Pattern(2, 4))
    assert not expand(values, quads).isnan().any()


@pytest.mark.parametrize(
    ("pattern", "shape", "reason"),
    [
        ("dense", (8, 8), "dense"),
        ("3:4", (8, 8), "does not fit into 2:4"),
        ("4:8", (8, 8), "does not fit into 2:4"),
        ("1:2", (8, 8), "does not fit into 2:4"),
        ("2:4", (8, 6), "not a multiple of 4"),
        ("2:4v4", (6, 8), "not a multiple of v"),
    ],
)
def test_refuses_what_does_not_fit(pattern, shape, reason):
    assert reason in carry_refusal(Pattern.parse(pattern), shape)
    with pytest.raises(ValueError, match=reason):
        compress(torch.randn(shape), Pattern.parse(pattern))
