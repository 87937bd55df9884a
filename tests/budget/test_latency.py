"""The latency table: from the backend's measured choices, here replaced by choices of known times."""

import json

import pytest
import torch
from torch import nn

from sparsedm_compile.budget import LatencyTable, latency, measure_latency
from sparsedm_compile.budget.choices import layer_choices
from sparsedm_compile.kernels.verdicts import Verdict
from sparsedm_compile.pattern import DENSE, Pattern

CANDIDATES = ["2:4", "1:4"]


@pytest.fixture
def known_times(monkeypatch):
    """1 s a dense call of a linear, 2 s of a convolution; the whole model 100 s. 2:4 halves it, at 1:4 dense wins."""
    asked = []

    def choose(spec, x, has_bias, unusual=""):
        assert x.device.type == "meta"  # a whole model's activations would not fit in memory
        asked.append((spec, tuple(x.shape), has_bias))
        dense, at = 1.0 if spec.op == "linear" else 2.0, (4, *x.shape[1:]) if len(x) == 3 else tuple(x.shape)
        if spec.pattern == Pattern(2, 4):
            # The times of one verdict and another's were taken apart: only the ratio counts.
            return Verdict(
                "cpu", "faster", sparse_seconds=30 * dense, dense_seconds=60 * dense, ratio=2.0, measured_at=at
            )
        if spec.pattern.is_dense:
            return Verdict("onednn", "dense", dense_seconds=dense, measured_at=at)
        return Verdict("dense", "slower", sparse_seconds=9 * dense, dense_seconds=dense, ratio=1 / 9, measured_at=at)

    monkeypatch.setattr(latency, "choose", choose)
    monkeypatch.setattr(torch, "compile", lambda model, backend: model)
    monkeypatch.setattr(latency, "paired_times", lambda candidates, **_: {"dense": [300.0, 100.0, 200.0]})
    return asked


def test_times_of_layers_come_from_the_choice(model, inputs, known_times, unchanged):
    table = measure_latency(model, inputs, candidates=CANDIDATES, policy="all")
    linear, conv = {"dense": 1e3, "2:4": 500.0, "1:4": 1e3}, {"dense": 2e3, "2:4": 1e3, "1:4": 2e3}
    assert table == LatencyTable(1e5, {"blocks.0": linear, "blocks.1": linear, "conv": conv, "tail": linear})
    spec, shape, has_bias = known_times[0]
    assert (spec.op, spec.weight_shape, spec.dtype, spec.device) == ("linear", (32, 32), torch.float32, "cpu")
    assert (shape, has_bias) == ((2, 32), True)
    assert {shape for spec, shape, _ in known_times if spec.op == "conv2d"} == {(2, 32, 1, 1)}


def test_times_are_scaled_to_the_batch(model, known_times):
    # The verdict for 3 images was measured at 4.
    table = measure_latency(model, (torch.zeros(3, 32), torch.zeros(3)), candidates=CANDIDATES, policy="all")
    assert table.layers["conv"]["2:4"] == 750.0


def test_a_layer_called_twice_takes_twice_as_long(known_times):
    layer = nn.Linear(32, 32)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    table = measure_latency(model, (torch.zeros(1, 32),), candidates=CANDIDATES, policy="all")
    assert table.layers == {"0": {"dense": 2e3, "2:4": 1e3, "1:4": 2e3}}


def test_a_layer_that_is_not_timed_is_left_out(model, inputs, known_times, monkeypatch):
    monkeypatch.setattr(latency, "choose", lambda *_, **__: Verdict("dense", "no kernel runs here"))
    assert measure_latency(model, inputs, candidates=CANDIDATES, policy="all").layers == {}


def test_savings_of_tied_layers_add_up(make_model, inputs, known_times):
    model = make_model(tied=True)
    table = measure_latency(model, inputs, candidates=CANDIDATES, policy="all")
    choices = {choice.name: choice for choice in layer_choices(model, CANDIDATES, policy="all")}
    assert table.savings(choices["blocks.1"]) == [0, 1e3, 0]
    assert table.savings(choices["conv"]) == [0, 1e3, 0]
    assert table.savings(choices["embed"]) == [0]
    assert table.of("tail", Pattern(2, 4)) == (1e3, 500.0)
    assert table.of("embed", DENSE) == (None, None)


def test_a_table_of_other_candidates_is_refused(model):
    table = LatencyTable(1.0, {"conv": {"dense": 1.0, "2:4": 0.5}})
    (choice,) = (choice for choice in layer_choices(model, CANDIDATES, policy="all") if choice.name == "conv")
    with pytest.raises(ValueError, match="holds no time of layer 'conv' at 1:4: measure it with"):
        table.savings(choice)


def test_json_and_table(model, inputs, known_times):
    table = measure_latency(model, inputs, candidates=CANDIDATES, policy="all")
    assert LatencyTable(**json.loads(json.dumps(table.to_dict()))) == table
    assert "100000.000 ms" in str(table)


def test_measured_for_real(inputs):
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    table = measure_latency(model, inputs[:1], candidates=CANDIDATES, policy="all", seconds=0.01)
    assert table.dense_ms > 0
    for row in table.layers.values():  # empty where no kernel is timed, as without a compiler
        assert all(0 < row[pattern] <= row["dense"] for pattern in CANDIDATES)


def test_an_image_without_a_batch_dimension_is_no_layer_to_time():
    model = nn.Conv2d(64, 64, 3, padding=1)
    table = measure_latency(model, (torch.randn(64, 8, 8),), candidates=["2:4"], policy="all", seconds=0.1)
    assert table.layers == {}
