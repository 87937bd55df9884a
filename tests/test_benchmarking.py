"""bench_model: what it reports, and that it leaves the model alone."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsedm_compile import benchmarking
from sparsedm_compile.bench_report.graph_times import ProfiledCall
from sparsedm_compile.bench_report.model_results import model_results
from sparsedm_compile.benchmarking import PatternBench, bench_model
from sparsedm_compile.layers import sparse_layers
from sparsedm_compile.sparsify import sparsify


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(32, 64, 3, padding=1)
        self.linear = nn.Linear(64, 128)
        self.out = nn.Linear(128, 64)

    def forward(self, x, *, scale=1.0):
        x = self.conv(x).flatten(2).transpose(1, 2)
        return {"y": self.out(F.gelu(self.linear(x))) * scale}


@pytest.fixture(scope="module")
def bench():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 32, 8, 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    steps = []
    report = bench_model(
        model, (x,), {"scale": 2.0}, patterns=["2:4", "1:4"], policy="all", seconds=0, progress=steps.append
    )
    return model, before, report, steps


def test_every_pattern_is_measured_and_right(bench):
    _, _, report, _ = bench
    assert [row.pattern for row in report.patterns] == ["2:4", "1:4"]
    assert report.rounds >= 5
    for row in report.patterns:
        assert 0 <= row.relative_error < 1e-5
        assert row.ms > 0
        assert row.speedup > 0
        assert sum(row.kernels.values()) == 3
        assert row.graphs == 1
    tokens = 2 * 64
    assert report.dense_macs == tokens * (32 * 64 * 9 + 64 * 128 + 128 * 64)
    assert [row.macs for row in report.patterns] == [report.dense_macs // 2, report.dense_macs // 4]


def test_the_baseline_is_the_faster_dense_compilation(bench):
    _, _, report, _ = bench
    assert list(report.dense_ms) == ["inductor", "inductor, freezing"]
    assert report.baseline == min(report.dense_ms, key=report.dense_ms.get)


def test_results_have_a_row_a_pattern_whose_parts_add_up(bench):
    _, _, report, _ = bench
    assert report.model == "Net"
    assert report.attention_ms == 0.0
    results = model_results(report, "net", "Net, batch 2")
    assert [row["pattern"] for row in results.rows] == ["2:4", "1:4"]
    for row, one in zip(results.rows, report.patterns, strict=True):
        assert row["ratio"] == one.speedup
        assert row["dense_ms"] == min(report.dense_ms.values())
        assert sum(row["waterfall"]["dense"].values()) == pytest.approx(row["dense_ms"])
        assert sum(row["waterfall"]["sparse"].values()) == pytest.approx(row["ms"])
        assert row["explained_ms"] == one.explained_ms(row["dense_ms"])
        assert one.dense_layer_ms["conv"] > 0
        assert one.dense_layer_ms["linear"] > 0


def test_explained_is_the_rest_of_dense_and_the_kernels_that_ran():
    row = PatternBench(
        pattern="2:4",
        ms=1234.0,
        speedup=1.0,
        spread=0.0,
        relative_error=0.0,
        macs=1,
        kernels={},
        least_gain=None,
        graphs=1,
        compile_seconds=1.0,
        layer_ms={"linear": 30.0, "conv": 5.0},
        dense_layer_ms={"linear": 60.0, "conv": 8.0},
        fused_ms=4.0,
    )
    assert row.explained_ms(100.0) == 100 - 68 - 4 + 35
    assert replace(row, ms=1.0).explained_ms(100.0) == row.explained_ms(100.0)  # not by construction


@pytest.mark.parametrize("faster", ["inductor", "inductor, freezing"])
def test_dense_layers_are_timed_in_the_graph_of_the_faster_dense_compilation(monkeypatch, faster):
    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Linear(64, 32)).eval(), torch.randn(8, 64)
    profiled = []

    def profile(run):
        profiled.append(run)
        return [ProfiledCall(2.0, {(32, 64): [0.5], (9, 9): [1.0]})]

    monkeypatch.setattr(
        benchmarking, "paired_times", lambda runs, **_: {name: [1.0 if name == faster else 3.0] * 5 for name in runs}
    )
    monkeypatch.setattr(benchmarking, "profile_calls", profile)
    monkeypatch.setattr(benchmarking, "kernel_share", lambda layer, freezing: 0.5 if freezing else 0.25)
    report = bench_model(model, (x,), patterns=["2:4", "1:4"], policy="all", seconds=0)
    assert report.baseline == faster
    for row in report.patterns:
        assert row.dense_layer_ms == {"linear": pytest.approx(250.0), "conv": 0.0}  # a quarter of 1 s
        assert row.layer_ms["linear"] == pytest.approx(125.0 if faster == "inductor, freezing" else 62.5)
    (run,) = profiled
    with torch.no_grad():
        before = run().clone()
        model[0].weight.zero_()
        assert torch.equal(run(), before) == (faster == "inductor, freezing")


def test_the_model_is_left_as_it_was(bench):
    model, before, _, _ = bench
    assert not sparse_layers(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_freezing_folds_the_weights(bench):
    """The frozen baseline keeps its answer when the weights change; otherwise it was never frozen."""
    torch._dynamo.reset()
    model, x = nn.Linear(64, 32).eval(), torch.randn(8, 64)
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        frozen = torch.compile(model, options={"freezing": True})
        before = frozen(x).clone()
        model.weight.zero_()
        assert torch.equal(frozen(x), before)


def test_prints_and_turns_into_json(bench):
    _, _, report, steps = bench
    text = str(report)
    assert "speedup" in text
    assert "2:4" in text
    assert report.to_dict()["patterns"][0]["pattern"] == "2:4"
    assert report.shapes == ((2, 32, 8, 8),)
    assert steps[-1] == "time in turn"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patterns": []}, "patterns is empty"),
        ({"patterns": ["2:4", "9:4"]}, "n must be smaller than m"),
        ({"policy": "none"}, "unknown policy"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_compiled(arguments, message):
    steps = []
    with pytest.raises(ValueError, match=message):
        bench_model(Net(), (torch.randn(1, 32, 8, 8),), progress=steps.append, **arguments)
    assert steps == []


def test_a_sparse_model_is_refused():
    model = Net()
    sparsify(model, "2:4", policy="all")
    with pytest.raises(ValueError, match="sparse already"):
        bench_model(model, (torch.randn(1, 32, 8, 8),), policy="all")


def test_what_no_layer_takes_is_refused_before_anything_is_compiled():
    model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(2, 64)
    with pytest.raises(ValueError, match=r"no layer takes 2:4: rule '\*'"):
        bench_model(model, (x,), patterns=["2:4"], policy="all", rules={"*": "dense"})
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer '0' has weights that are not finite"):
        bench_model(model, (x,), patterns=["2:4"], policy="all")
