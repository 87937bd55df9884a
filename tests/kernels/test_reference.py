"""The reference kernel: packs what the mask keeps, in a portable form, for every dtype and device."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsedm_compile.kernels import Epilogue, LayerSpec, get_kernel
from sparsedm_compile.masks import magnitude_mask_naive
from sparsedm_compile.pattern import Pattern

reference = get_kernel("reference")


@st.composite
def layers(draw):
    pattern = Pattern.parse(draw(st.sampled_from(["2:4", "1:4", "4:8", "7:8", "2:4v2", "1:4v4", "31:32", "3:5"])))
    kernel = draw(st.sampled_from([(), (1, 1), (3, 2)]))
    shape = (draw(st.integers(1, 3)) * pattern.v, draw(st.integers(1, 3)) * pattern.m, *kernel)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 1000))))
    if draw(st.booleans()):
        weight = weight.round()  # ties and zeros
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    return weight.to(dtype), LayerSpec("conv2d" if kernel else "linear", shape, pattern, dtype)


@settings(max_examples=100, deadline=None)
@given(layers())
def test_pack_and_unpack(layer):
    weight, spec = layer
    values, index = reference.pack(weight, spec)
    masked = weight * magnitude_mask_naive(weight, spec.pattern)
    assert torch.equal(reference.unpack(values, index, spec), masked)
    assert (values.dtype, index.dtype) == (weight.dtype, torch.uint8)
    p = spec.pattern
    assert values.numel() * p.m == weight.numel() * p.n
    assert index.numel() * p.m * p.v == weight.numel() * p.n
    assert (index < p.m).all()


@settings(max_examples=30, deadline=None)
@given(layers())
def test_empty_packed_has_the_shapes_of_pack(layer):
    weight, spec = layer
    for packed, empty in zip(
        reference.pack(weight, spec), reference.empty_packed(spec, torch.device("meta")), strict=True
    ):
        assert (packed.shape, packed.dtype) == (empty.shape, empty.dtype)


def test_values_stand_in_order():
    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0], [9.0, 0.0, 0.0, 8.0]])
    values, index = reference.pack(weight, LayerSpec("linear", (2, 4), Pattern(2, 4)))
    assert values.tolist() == [[-4.0, 3.0], [9.0, 8.0]]
    assert index.tolist() == [[1, 2], [0, 3]]


def test_packing_does_not_depend_on_zeros_among_the_kept():
    # An all-zero group must unpack to zeros and hold n positions, or shapes would depend on values.
    spec = LayerSpec("linear", (1, 8), Pattern(2, 4))
    weight = torch.tensor([[0.0, 0.0, 0.0, 5.0, 0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(reference.unpack(*reference.pack(weight, spec), spec), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("groups", [1, 4])
def test_grouped_convolutions_in_every_dtype(dtype, groups):
    weight = torch.randn(16, 32 // groups, 3, 3).to(dtype)
    spec = LayerSpec("conv2d", tuple(weight.shape), Pattern(2, 4, 4), dtype, "cpu", (2, 1), (1, 1), (1, 1), groups)
    assert reference.refusal(spec) is None
    x, bias = torch.randn(2, 32, 8, 8).to(dtype), torch.randn(16).to(dtype)
    masked = weight * magnitude_mask_naive(weight, spec.pattern)
    want = F.silu(F.conv2d(x, masked, bias, (2, 1), 1, 1, groups))
    got = reference.conv(x, *reference.pack(weight, spec), spec, Epilogue(bias, "silu"))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("shape", "pattern", "groups", "message"),
    [
        ((8, 6), "2:4", 1, "not a multiple of 4"),
        ((8, 8), "dense", 1, "dense"),
        ((12, 8, 1, 1), "2:4v4", 2, "not a multiple of v"),
    ],
)
def test_refusals_give_the_reason(shape, pattern, groups, message):
    op = "linear" if len(shape) == 2 else "conv2d"
    spec = LayerSpec(op, shape, Pattern.parse(pattern), groups=groups)
    assert message in reference.refusal(spec)


def test_skips_nothing_and_says_so():
    assert not reference.skips_zeros
