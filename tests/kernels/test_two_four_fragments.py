"""The register layout, held against the PTX manual (an emulated instruction) and against torch's CUTLASS format."""

import pytest
import torch
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from sparsedm_compile.kernels.two_four.compress import compress
from sparsedm_compile.kernels.two_four.fragments import from_fragments, packed_shapes, padded_shape, to_fragments
from sparsedm_compile.kernels.two_four.naive import matmul, mma_sp_m16n8k32
from sparsedm_compile.masks import magnitude_mask_naive
from sparsedm_compile.pattern import Pattern

TWO_FOUR = Pattern(2, 4)


def pack(weight, pattern=TWO_FOUR):
    return to_fragments(*compress(weight, pattern))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width", "pattern"), [(32, 64, "2:4"), (64, 128, "1:4"), (40, 72, "2:4v4")])
def test_emulated_instruction_gives_the_dense_product(dtype, rows, width, pattern):
    weight, x = torch.randn(rows, width).to(dtype), torch.randn(8, width).to(dtype)
    pattern = Pattern.parse(pattern)
    masked = weight.double() * magnitude_mask_naive(weight, pattern)
    padded = torch.zeros(8, padded_shape(rows, width)[1], dtype=torch.float64)
    padded[:, :width] = x
    out = matmul(*pack(weight, pattern), padded)
    torch.testing.assert_close(out[:, :rows], x.double() @ masked.T)
    assert not out[:, rows:].any()


def test_every_single_element_lands_where_it_was():
    # one-hot weights against x = 1, 2, 3, ...: the output names the row and its value names the column
    x = torch.arange(1, 65, dtype=torch.float64).expand(8, 64)
    for row in range(32):
        column = row * 37 % 64
        weight = torch.zeros(32, 64, dtype=torch.float16)
        weight[row, column] = 1
        expected = torch.zeros(8, 32, dtype=torch.float64)
        expected[:, row] = column + 1
        assert torch.equal(matmul(*pack(weight), x), expected)


def cutlass_words(dense):
    """torch's reordered metadata, regrouped from (32 rows, 32 columns) a word to (16 rows, 64 columns).

    It is stored column-major with two 16-bit columns interleaved: a word holds both columns of one reordered row. Lanes
    t = 0, 1 of a quad hold the upper 16 rows and t = 2, 3 the lower ones (CUTLASS alternates the selector over rows).
    """
    _, meta = sparse_semi_structured_from_dense_cutlass(dense)
    rows, columns = meta.shape
    words = meta.reshape(columns // 2, rows, 2).contiguous().view(torch.int32)
    words = words.reshape(columns // 4, 2, rows // 32, 8, 2, 2)  # k 64, k 32, block, g, tile, t % 2
    return words.permute(2, 4, 0, 3, 1, 5).reshape(rows // 16, columns // 4, 32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_metadata_words_are_those_that_cutlass_loads(dtype):
    weight = torch.randn(96, 128).to(dtype)
    dense = torch.where(magnitude_mask_naive(weight, TWO_FOUR), weight, 0)
    assert torch.equal(pack(weight)[1], cutlass_words(dense))


def test_metadata_of_every_one_hot_quad_is_that_of_cutlass():
    # every place of one tile, one pair at a time; two values a quad, so that no converter has a choice
    for place in range(0, 32 * 64, 52):
        row, column = place // 64, place % 64 // 4 * 4
        weight = torch.zeros(32, 64, dtype=torch.float16)
        weight[:, 0::4], weight[:, 1::4] = 1, 1
        weight[row, column : column + 4] = torch.tensor([0, 0, 1, 1])
        assert torch.equal(pack(weight)[1], cutlass_words(weight))


@pytest.mark.parametrize(("rows", "width"), [(32, 64), (320, 1280), (8, 36)])
def test_unpacks_exactly(rows, width):
    values, quads = compress(torch.randn(rows, width).bfloat16(), TWO_FOUR)
    packed = to_fragments(values, quads)
    assert tuple(tuple(tensor.shape) for tensor in packed) == packed_shapes(rows, width)
    back_values, back_quads = from_fragments(*packed, rows, width)
    assert torch.equal(back_values, values)
    assert torch.equal(back_quads, quads)


def test_padding_is_valid_metadata():
    values, words = pack(torch.randn(8, 8).half())
    mma_sp_m16n8k32(values[0, 1], torch.zeros(32, 8), words[0, 0], 1)  # raises on equal positions


def test_emulator_rejects_equal_positions():
    with pytest.raises(ValueError, match="positions must ascend"):
        mma_sp_m16n8k32(torch.zeros(32, 8), torch.zeros(32, 8), torch.zeros(32, dtype=torch.int32), 0)


def test_takes_16_bit_values_only():
    with pytest.raises(TypeError, match="16-bit values"):
        to_fragments(*compress(torch.randn(32, 64), TWO_FOUR))
