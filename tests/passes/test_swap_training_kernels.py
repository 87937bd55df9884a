"""swap_training_kernels: which layers of a training graph get cuSPARSELt, and gradients as in eager."""

import contextlib
import copy
import logging
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsedm_compile as sdm
from sparsedm_compile.backend import _copy
from sparsedm_compile.kernels.cusparselt import kernel as cusparselt
from sparsedm_compile.options import parse_options
from sparsedm_compile.passes import Lowering, run_passes

ASKED = {"train_kernel": "cusparselt"}
ROUNDED = {"rtol": 2**-6, "atol": 2**-6}  # products in bfloat16, summed in an order of their own


@pytest.fixture
def as_on_cuda(monkeypatch):
    """The kernel takes layers on the CPU as it would on a GPU: there the operator is dense, so graphs can run."""
    refusal = cusparselt.CuSparseLtKernel.refusal
    monkeypatch.setattr(cusparselt, "_unavailable", lambda: None)
    monkeypatch.setattr(
        cusparselt.CuSparseLtKernel, "refusal", lambda self, spec: refusal(self, replace(spec, device="cuda"))
    )


def lowered(model, *inputs, context=contextlib.nullcontext, **options):
    """``(lowering, output)`` of a training graph; the output has its gradients."""
    caught = []

    def backend(gm, example_inputs):
        lowering = Lowering(_copy(gm), list(example_inputs), parse_options(options), inference=False)
        run_passes(lowering)
        caught.append(lowering)
        return lowering.gm

    with context():
        output = torch.compile(model, backend=backend, fullgraph=True)(*inputs)
    return caught[0], output


def sparse(*layers, pattern="2:4", dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(*layers).to(dtype)
    sdm.sparsify(model, pattern, policy="all")
    return model


def calls(lowering):
    """The operators of the package in the graph, in order."""
    names = [str(node.target).removesuffix(".default") for node in lowering.gm.graph.nodes]
    return [name.removeprefix("sparsedm.") for name in names if name.startswith("sparsedm.")]


def bfloat16():
    return torch.autocast("cpu", torch.bfloat16)


class Autocast(nn.Module):
    """Enters autocast in its forward, so that the graph does."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        with bfloat16():
            return self.inner(x)


@pytest.mark.parametrize(
    ("pattern", "x_shape", "autocast"),
    [
        ("2:4", (5, 32), "none"),
        ("2:4v4", (2, 3, 5, 32), "none"),
        ("1:4", (32,), "none"),
        ("2:4", (2, 5, 32), "around"),
        ("2:4", (2, 5, 32), "inside"),
    ],
    ids=str,
)
def test_gradients_are_those_of_eager(as_on_cuda, pattern, x_shape, autocast):
    dtype = torch.bfloat16 if autocast == "none" else torch.float32
    model = sparse(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 16, bias=False), pattern=pattern, dtype=dtype)
    with torch.no_grad():  # ties in bfloat16 that are none in float32: the mask must be the weight's own
        model[0].weight[:, 1::4] = model[0].weight[:, 0::4] * (1 + 2**-12)
    linears = [model[0], model[2]]
    model = Autocast(model) if autocast == "inside" else model
    twin = copy.deepcopy(model)
    x, context = torch.randn(x_shape, dtype=dtype), bfloat16 if autocast == "around" else contextlib.nullcontext
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    lowering, got = lowered(model, mine, context=context, **ASKED)
    with context():
        want = twin(theirs)
    assert calls(lowering) == ["masked_weight", "two_four_linear"] * 2
    assert [layer.verdict.kernel for layer in lowering.layers] == ["cusparselt", "cusparselt"]
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want)
    upstream = torch.randn_like(want)
    got.backward(upstream)
    want.backward(upstream)
    torch.testing.assert_close(mine.grad, theirs.grad, **ROUNDED)
    for (name, one), two in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert one.grad.dtype == two.grad.dtype, name
        torch.testing.assert_close(one.grad, two.grad, **ROUNDED)
    assert all(
        linear.weight.grad.count_nonzero() > 0.9 * linear.weight.numel() for linear in linears
    )  # dropped ones too


def test_keyword_operands_and_a_mask_that_has_other_uses(as_on_cuda):
    layer = sparse(nn.Linear(32, 32), dtype=torch.bfloat16)[0]

    def regularized(x):
        weight = sdm.masked_weight(layer.weight, "2:4")
        return F.linear(input=x, weight=weight, bias=layer.bias) + weight.abs().sum()

    x = torch.randn(3, 32, dtype=torch.bfloat16)
    lowering, got = lowered(regularized, x, **ASKED)
    assert calls(lowering) == ["masked_weight", "two_four_linear"]
    torch.testing.assert_close(got, regularized(x))


def test_the_option_that_masks_a_dense_model(as_on_cuda):
    model = nn.Sequential(nn.Linear(32, 32)).bfloat16()
    lowering, _ = lowered(model, torch.randn(3, 32).bfloat16(), pattern="2:4v4", policy="all", **ASKED)
    assert lowering.layers[0].verdict.kernel == "cusparselt"


@pytest.mark.parametrize(
    ("layer", "pattern", "x_shape", "dtype", "reason"),
    [
        (nn.Linear(32, 32), "2:4", (3, 32), torch.float32, "runs bfloat16 and float16 here, not float32"),
        (nn.Linear(32, 24), "2:4", (3, 32), torch.bfloat16, "multiples of 16, not 24 x 32"),
        (nn.Linear(32, 32), "4:8", (3, 32), torch.bfloat16, "4:8 does not fit into 2:4"),
        (nn.Conv2d(32, 32, 1), "2:4", (1, 32, 4, 4), torch.bfloat16, "linear layers, not convolutions"),
    ],
    ids=["dtype", "size", "pattern", "conv"],
)
def test_what_it_cannot_take_stays_dense_and_says_why(as_on_cuda, caplog, layer, pattern, x_shape, dtype, reason):
    model = sparse(layer, pattern=pattern, dtype=dtype)
    with caplog.at_level(logging.WARNING):
        lowering, _ = lowered(model, torch.randn(x_shape, dtype=dtype), **ASKED)
    (verdict,) = [layer.verdict for layer in lowering.layers]
    assert calls(lowering) == ["masked_weight"]
    assert verdict.kernel == "dense"
    assert reason in verdict.reason
    assert f"cannot take layer '0': {verdict.reason.split(': ', 1)[1]}; dense instead" in caplog.text


def test_on_a_cpu_it_stays_dense_and_says_why(caplog):
    lowering, _ = lowered(sparse(nn.Linear(32, 32)), torch.randn(3, 32), **ASKED)
    assert calls(lowering) == ["masked_weight"]
    assert "does not run on cpu" in lowering.layers[0].verdict.reason
    assert "does not run on cpu; dense instead" in caplog.text


@pytest.mark.parametrize(("pattern", "options"), [("2:4", {}), ("2:4", {"train_kernel": "dense"}), ("dense", ASKED)])
def test_nothing_to_do(as_on_cuda, caplog, pattern, options):
    model = sparse(nn.Linear(32, 32), pattern=pattern, dtype=torch.bfloat16)
    lowering, _ = lowered(model, torch.randn(3, 32).bfloat16(), **options)
    assert "two_four_linear" not in calls(lowering)
    assert lowering.layers[0].verdict is None
    assert "dense instead" not in caplog.text


def test_through_the_backend(as_on_cuda):
    model = sparse(nn.Linear(32, 32), dtype=torch.bfloat16)
    twin, x = copy.deepcopy(model), torch.randn(3, 32).bfloat16()
    compiled = torch.compile(model, backend="sparsedm", options={**ASKED, "kernel": "dense"})
    want = twin(x)
    with sdm.backend.record_calls() as recorded:
        got = compiled(x)
    assert recorded[0][0].layers[0].verdict.kernel == "cusparselt"
    torch.testing.assert_close(got, want)
    got.square().sum().backward()
    want.square().sum().backward()
    torch.testing.assert_close(model[0].weight.grad, twin[0].weight.grad, **ROUNDED)
    with torch.no_grad():  # inference is the other option's
        torch.testing.assert_close(compiled(x), want)
