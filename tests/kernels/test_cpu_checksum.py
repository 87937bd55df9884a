"""The sampled checksum: what it must notice, with and without a compiler."""

import pytest
import torch

from sparsedm_compile.kernels.cpu import build
from sparsedm_compile.kernels.cpu.checksum import sampled_checksum


@pytest.fixture(params=["c++", "torch"])
def checksum(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    if request.param == "torch":
        monkeypatch.setattr(build, "load", lambda: "no C++ compiler")
    elif build.load() is not None:
        pytest.skip("no C++ compiler here")
    return sampled_checksum


def test_notices_what_no_version_counter_does(checksum) -> None:
    weight = torch.nn.Parameter(torch.randn(300, 200))
    identity = (id(weight), weight._version, weight.data_ptr())
    before = checksum([weight])
    delta = 1e-3 * torch.randn(300, 4) @ torch.randn(4, 200)
    weight.data += delta  # LoRA, fused
    assert (id(weight), weight._version, weight.data_ptr()) == identity
    fused = checksum([weight])
    assert fused != before
    weight.data -= 2 * delta
    assert checksum([weight]) not in (before, fused)


def test_tells_which_weight_changed(checksum) -> None:
    weights = [torch.randn(64, 64) for _ in range(9)]
    before = checksum(weights)
    assert checksum(weights) == before
    weights[4].data.mul_(1.01)
    assert [i for i, (a, b) in enumerate(zip(before, checksum(weights), strict=True)) if a != b] == [4]


def test_every_element_of_a_small_weight_counts(checksum) -> None:
    weight = torch.zeros(8, 8)
    seen = {checksum([weight])[0]}
    for position in range(64):
        changed = weight.clone()
        changed.view(-1)[position] = 1
        seen.add(checksum([changed])[0])
    assert len(seen) == 65


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.complex64]
)
def test_any_dtype(checksum, dtype: torch.dtype) -> None:
    weight = torch.arange(1000).to(dtype)
    before = checksum([weight])
    assert checksum([weight.clone()]) == before
    weight.data += 1
    assert checksum([weight]) != before


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.T,
        lambda t: t[:, ::3],
        lambda t: t[:1].expand(50, 60),
        lambda t: t.view(5, 10, 6, 10).contiguous(memory_format=torch.channels_last),
        lambda t: t[0, 0],
        lambda t: t[:0],
    ],
    ids=["transposed", "strided", "expanded", "channels_last", "scalar", "empty"],
)
def test_any_strides(checksum, view) -> None:
    weight = view(torch.randn(50, 60))
    before = checksum([weight])
    assert checksum([weight]) == before
    if weight.numel():
        weight.untyped_storage().copy_(
            (torch.as_strided(weight, (weight.untyped_storage().nbytes() // 4,), (1,), 0) + 1).untyped_storage()
        )
        assert checksum([weight]) != before


def test_no_weights(checksum) -> None:
    assert checksum([]) == []
