"""What a dense model spends in its layers, as its graph runs them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsedm_compile.bench_report.graph_times import ProfiledCall, graph_layer_ms, kernel_share, profile_calls
from sparsedm_compile.explain import LayerReport


def layer(kind, *shape, calls=1):
    return LayerReport("a", kind, shape, "2:4", "cpu", 1.0, 2.0, "", calls=calls)


class TestShares:
    def test_the_layers_share_of_the_profiled_calls_is_taken_of_the_total(self):
        call = ProfiledCall(10.0, {(8, 4): [1.0, 2.0], (4, 8): [3.0], (8, 4, 3, 3): [1.5]})
        layers = [layer("linear", 8, 4, calls=2), layer("linear", 4, 8), layer("conv2d", 8, 4, 3, 3)]
        assert graph_layer_ms([call], layers, 200.0) == {"linear": pytest.approx(120.0), "conv": pytest.approx(30.0)}

    def test_a_disturbed_call_does_not_count(self):
        calls = [ProfiledCall(seconds, {(8, 4): [1.0]}) for seconds in (10.0, 900.0, 10.0)]
        assert graph_layer_ms(calls, [layer("linear", 8, 4)], 10.0)["linear"] == pytest.approx(1.0)

    @pytest.mark.parametrize(("times", "expected"), [([1.0, 3.0], 2.0), ([1.0], 1.0), ([], 0.0)])
    def test_as_many_operators_count_as_there_are_calls(self, times, expected):
        call = ProfiledCall(10.0, {(8, 4): times, (9, 9): [5.0]} if times else {})
        assert graph_layer_ms([call], [layer("linear", 8, 4)], 10.0)["linear"] == pytest.approx(expected)

    def test_each_layer_counts_at_its_scale(self):
        call = ProfiledCall(10.0, {(8, 4): [1.0, 3.0], (4, 8): [4.0]})
        layers = [layer("linear", 8, 4), layer("linear", 8, 4), layer("linear", 4, 8)]
        scales = dict(zip(map(id, layers), (0.5, 0.25, 0.125), strict=True))
        scaled = graph_layer_ms([call], layers, 10.0, lambda one: scales[id(one)])
        assert scaled["linear"] == pytest.approx(2 * 0.5 + 2 * 0.25 + 4 * 0.125)

    @pytest.mark.parametrize(
        ("kind", "kernel", "freezing", "share"),
        [
            ("linear", "cpu", False, 1 / 8),  # of torch's own operator, not of the fastest
            ("linear", "cpu", True, 1 / 8),
            ("linear", "onednn", False, 2 / 8),
            ("conv2d", "cpu", False, 1 / 8),
            ("conv2d", "cpu", True, 1 / 2),
        ],
    )
    def test_a_kernels_share_is_of_the_operator_that_the_dense_model_calls(self, kind, kernel, freezing, share):
        told = LayerReport("a", kind, (8, 4), "2:4", kernel, 1.0, 2.0, "", native_ms=8.0)
        assert kernel_share(told, freezing) == share

    def test_a_layer_that_was_not_called(self):
        call = ProfiledCall(10.0, {(8, 4): [1.0]})
        assert graph_layer_ms([call], [layer("linear", 8, 4, calls=0)], 10.0)["linear"] == 0.0


class Net(nn.Module):
    """Of all orders: with and without bias, one token and many, an activation and a residual behind it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 32, 3, padding=1)
        self.point = nn.Conv2d(32, 32, 1)
        self.up, self.down = nn.Linear(32, 128), nn.Linear(128, 32, bias=False)
        self.scale = nn.Linear(32, 64)

    def forward(self, x):
        x = F.silu(self.conv(x))
        x = x + F.silu(self.point(x))
        x = x.flatten(2).transpose(1, 2)
        for _ in range(2):
            x = x + self.down(F.gelu(self.up(x)))
        return self.scale(x.mean(1)) @ self.scale.weight


def compiled(model, x, freezing):
    torch._dynamo.reset()
    run = torch.compile(model, options={"freezing": freezing})
    with torch._inductor.config.patch(freezing=freezing):
        run(x)
    return lambda: run(x)


@pytest.mark.parametrize("freezing", [False, True])
@torch.no_grad()
def test_every_layer_of_the_graph_is_found_by_its_weight(freezing):
    run = compiled(Net().eval(), torch.randn(3, 16, 12, 12), freezing)
    calls = profile_calls(run, 3)
    assert len(calls) == 3
    for call in calls:
        counts = {shape: len(times) for shape, times in call.operators.items()}
        expected = {(32, 16, 3, 3): 1, (32, 32, 1, 1): 1, (128, 32): 2, (32, 128): 2, (64, 32): 1}
        assert {shape: counts.get(shape, 0) for shape in expected} == expected
        assert 0 < sum(map(sum, call.operators.values())) < call.seconds


@pytest.mark.parametrize("freezing", [False, True])
@torch.no_grad()
def test_what_the_layers_take_is_told_from_the_rest(freezing):
    """A product of 0.5 GMACs beside next to nothing, and the same beside a sort of as many seconds and more."""

    class Busy(nn.Module):
        def __init__(self, sorts):
            super().__init__()
            self.linear, self.sorts = nn.Linear(1024, 1024), sorts

        def forward(self, x):
            out = self.linear(x)
            return out.flatten().sort().values if self.sorts else out

    def share(sorts):
        run = compiled(Busy(sorts).eval(), torch.randn(512, 1024), freezing)
        return graph_layer_ms(profile_calls(run), [layer("linear", 1024, 1024)], 1.0)["linear"]

    assert 0.8 < share(False) <= 1.0
    assert 0.0 < share(True) < 0.6
