"""bench_model: what it reports, and that it leaves the model alone."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsedm_compile.bench_report.model_results import model_results
from sparsedm_compile.benchmarking import bench_model
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
        saved = sum(one.dense_layer_ms.values()) - sum(one.layer_ms.values()) + one.fused_ms
        assert row["dense_ms"] - row["explained_ms"] == pytest.approx(saved)
        (fusing,) = model_results(replace(report, patterns=(replace(one, fused_ms=3.0),)), "net", "Net").rows
        assert row["explained_ms"] - fusing["explained_ms"] == pytest.approx(3.0 - one.fused_ms)
        assert one.dense_layer_ms["conv"] > 0
        assert one.dense_layer_ms["linear"] > 0


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
