import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from sparsedm_compile.masks import magnitude_mask
from sparsedm_compile.selection.matrix import input_rows, weight_matrices, weight_of_matrices

pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


def by_matrices(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """``(rows, out)``: the product that the two functions promise."""
    products = input_rows(layer, x) @ weight_matrices(layer).mT  # (groups, rows, out / groups)
    return products.movedim(0, 1).flatten(1)


@settings(deadline=None, max_examples=60)
@given(
    groups=st.sampled_from([1, 2]),
    kernel=pairs,
    stride=pairs,
    dilation=pairs,
    padding=st.one_of(st.tuples(st.integers(0, 2), st.integers(0, 2)), st.sampled_from(["same", "valid"])),
    mode=st.sampled_from(["zeros", "reflect", "circular"]),
)
def test_conv2d_is_the_product_of_its_matrices(groups, kernel, stride, dilation, padding, mode):
    assume(padding != "same" or stride == (1, 1))
    layer = nn.Conv2d(
        4, 6, kernel, stride, padding, dilation, groups, bias=False, padding_mode=mode, dtype=torch.float64
    )
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    expected = layer(x).movedim(1, -1).flatten(0, -2)  # one row a pixel
    torch.testing.assert_close(by_matrices(layer, x), expected)


@pytest.mark.parametrize(("kind", "size"), [(nn.Conv1d, (17,)), (nn.Conv3d, (5, 6, 7))])
def test_convolutions_of_other_dimensions(kind, size):
    layer = kind(8, 6, 3, stride=2, padding=1, dilation=2, groups=2, bias=False, dtype=torch.float64)
    x = torch.randn(2, 8, *size, dtype=torch.float64)
    torch.testing.assert_close(by_matrices(layer, x), layer(x).movedim(1, -1).flatten(0, -2))
    assert torch.equal(weight_of_matrices(weight_matrices(layer), tuple(layer.weight.shape)), layer.weight)


@settings(deadline=None, max_examples=20)
@given(shape=st.lists(st.integers(1, 4), max_size=3))
def test_linear_is_the_product_of_its_matrices(shape):
    layer = nn.Linear(5, 3, bias=False, dtype=torch.float64)
    x = torch.randn(*shape, 5, dtype=torch.float64)
    torch.testing.assert_close(by_matrices(layer, x), layer(x).reshape(-1, 3))


@pytest.mark.parametrize(
    "layer", [nn.Linear(8, 6), nn.Conv2d(8, 6, (2, 3)), nn.Conv2d(8, 6, 3, groups=2)], ids=["linear", "conv", "grouped"]
)
def test_weight_comes_back_and_groups_of_n_m_are_the_same(layer):
    matrices = weight_matrices(layer)
    assert torch.equal(weight_of_matrices(matrices, tuple(layer.weight.shape)), layer.weight)
    mask = torch.stack([magnitude_mask(matrix, "2:4") for matrix in matrices])
    assert torch.equal(weight_of_matrices(mask, tuple(layer.weight.shape)), magnitude_mask(layer.weight, "2:4"))
