"""The operator sparsedm::masked_weight: its mask, its gradient, and what Inductor makes of it."""

import pytest
import torch
from torch._inductor.utils import run_and_get_code

import sparsedm_compile as sdm
from sparsedm_compile.masks import magnitude_mask_naive
from sparsedm_compile.pattern import Pattern

PATTERNS = ["2:4", "1:4", "4:8", "31:32", "1:32", "2:4v2", "2:4v4", "1:4v4"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def naive(weight: torch.Tensor, pattern: str) -> torch.Tensor:
    return torch.where(magnitude_mask_naive(weight, Pattern.parse(pattern)), weight, torch.zeros_like(weight))


def weight_of(pattern: str, dtype=torch.float32, conv=False, ties=False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (16, 64, 3, 3) if conv else (16, 96)
    weight = torch.randn(shape, generator=generator)
    return (weight.mul(2).round() if ties else weight).to(dtype)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])
def test_equals_the_naive_mask(pattern, dtype, conv):
    weight = weight_of(pattern, dtype, conv)
    masked = sdm.masked_weight(weight, pattern)
    assert torch.equal(masked, naive(weight, pattern))
    assert (masked.dtype, masked.stride()) == (weight.dtype, weight.stride())


@pytest.mark.parametrize("pattern", ["2:4", "1:32", "2:4v4", "dense"])
@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])
def test_opcheck(pattern, conv):
    weight = weight_of(pattern, conv=conv).requires_grad_()
    torch.library.opcheck(torch.ops.sparsedm.masked_weight.default, (weight, pattern))


@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_opcheck_of_strided_weights(layout):
    weight = {
        "channels_last": weight_of("2:4", conv=True).contiguous(memory_format=torch.channels_last),
        "transposed": weight_of("2:4").t().contiguous().t(),
    }[layout]
    torch.library.opcheck(torch.ops.sparsedm.masked_weight.default, (weight.requires_grad_(), "2:4"))


def test_an_infinite_weight_makes_no_nan():
    weight = torch.tensor([[1.0, float("inf"), float("inf"), float("inf")]])
    assert sdm.masked_weight(weight, "2:4").tolist() == [[0.0, float("inf"), float("inf"), 0.0]]


@pytest.mark.parametrize("pattern", ["2:4", "1:4v4", Pattern(2, 4)])
def test_gradient_passes_straight_through(pattern):
    weight = weight_of("2:4").requires_grad_()
    upstream = torch.randn(16, 96)
    (sdm.masked_weight(weight, pattern) * upstream).sum().backward()
    assert torch.equal(weight.grad, upstream)  # masked weights get theirs too


def test_gradient_of_a_layer_is_that_of_the_masked_weight_given_to_all():
    weight, x = weight_of("2:4").double().requires_grad_(), torch.randn(5, 96, dtype=torch.float64)
    (x @ sdm.masked_weight(weight, "2:4").T).square().sum().backward()
    masked = naive(weight.detach(), "2:4")
    torch.testing.assert_close(weight.grad, 2 * (x @ masked.T).T @ x)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "31:32", "1:32", "2:4v2", "2:4v4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_inductor_computes_the_same_mask_with_no_sort(pattern, dtype):
    # The mask in the training graph: backend and all. Ties are where another order of operations would show.
    class Masked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.random = torch.nn.Parameter(weight_of(pattern, dtype))
            self.ties = torch.nn.Parameter(weight_of(pattern, dtype, ties=True))

        def forward(self):
            return sdm.masked_weight(self.random, pattern), sdm.masked_weight(self.ties, pattern)

    module = Masked()
    (random, ties), codes = run_and_get_code(torch.compile(module, backend="sparsedm", fullgraph=True))
    assert torch.equal(random, naive(module.random.detach(), pattern))
    assert torch.equal(ties, naive(module.ties.detach(), pattern))
    code = "\n".join(codes)
    assert "cpp_fused" in code  # so the words below would be found if they were there
    for opaque in ("masked_weight", "sort(", "topk", "sparsedm."):
        assert opaque not in code.replace("cpp_fused_masked_weight", "")
    random.sum().backward()
    assert torch.equal(module.random.grad, torch.ones_like(module.random))


@pytest.mark.parametrize(
    ("weight", "pattern", "error", "message"),
    [
        (torch.randn(8, 6), "2:4", ValueError, r"\(8, 6\) cannot be 2:4"),
        (torch.randn(8), "2:4", ValueError, "1 dimension"),
        (torch.randn(8, 8), "2:3:4", ValueError, "unknown pattern '2:3:4'"),
        (torch.randn(8, 8), "5:4", ValueError, "n must be smaller than m"),
        (torch.randn(8, 6, device="meta"), "2:4", ValueError, "input width 6"),
    ],
)
def test_bad_input(weight, pattern, error, message):
    with pytest.raises(error, match=message):
        sdm.masked_weight(weight, pattern)


@pytest.mark.parametrize("kernel", ["dense", "cpu"])
def test_channels_last_model_trains_and_runs_as_in_eager(kernel):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(32, 32, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(32, 32, 1))
    model = model.to(memory_format=torch.channels_last)
    sdm.sparsify(model, "2:4v2", policy="all")
    compiled = torch.compile(model, backend="sparsedm", options={"kernel": kernel})
    x = torch.randn(2, 32, 8, 8).contiguous(memory_format=torch.channels_last)
    compiled(x).square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    for got, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        got, want = compiled(x), model(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert got.stride() == want.stride()
