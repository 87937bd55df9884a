"""The Pareto curve."""

import json

import pytest

import sparsedm_compile as sdm
from sparsedm_compile.budget import LatencyTable, measure_sensitivity, pareto, pareto_curve, plan_for

CANDIDATES = ["2:4", "1:4"]
LAYERS = ["blocks.0", "blocks.1", "conv", "tail"]


@pytest.fixture
def sensitivity(model, calibration):
    return measure_sensitivity(model, calibration, candidates=CANDIDATES, policy="all")


def test_from_the_cheapest_plan_to_the_dense_model(model, inputs, calibration, sensitivity, unchanged):
    curve = pareto(
        model, inputs, calibration=calibration, candidates=CANDIDATES, policy="all", points=7, sensitivity=sensitivity
    )
    shares = [curve.share(plan) for plan in curve.plans]
    damages = [plan.predicted_damage for plan in curve.plans]
    assert shares == sorted(set(shares))
    assert damages == sorted(damages, reverse=True)
    assert {pattern for name, pattern in curve.plans[0].rules.items() if name in LAYERS} == {"1:4"}
    assert (damages[-1], shares[-1]) == (0, 1)
    assert len(shares) == 7
    for plan in curve.plans[1:-1]:
        macs = float(plan.budget.removeprefix("macs="))
        alone = plan_for(
            model,
            inputs,
            calibration=calibration,
            macs=min(1, macs + 1e-4),  # the curve's own budget is an integer, printed to four digits
            candidates=CANDIDATES,
            policy="all",
            sensitivity=sensitivity,
        )
        assert alone.rules == plan.rules


def test_uniform_plans_are_never_better(model, inputs, calibration, sensitivity):
    curve = pareto(model, inputs, calibration=calibration, candidates=CANDIDATES, policy="all", sensitivity=sensitivity)
    assert list(curve.uniform) == CANDIDATES
    for pattern, uniform in curve.uniform.items():
        assert uniform.patterns().keys() == set(LAYERS)
        assert uniform.macs == sdm.count_macs(model, *inputs, plan=dict.fromkeys(LAYERS, pattern)).sparse
        assert (uniform.bound, uniform.gap) == (None, None)
        share = uniform.macs / uniform.dense_macs
        best = plan_for(
            model,
            inputs,
            calibration=calibration,
            macs=share,
            candidates=CANDIDATES,
            policy="all",
            sensitivity=sensitivity,
        )
        assert best.predicted_damage <= uniform.predicted_damage
    assert curve.plans[0].measured_damage == curve.uniform["1:4"].measured_damage


def test_over_time(model, inputs, calibration, sensitivity):
    table = LatencyTable(8.0, {name: {"dense": 1.0, "2:4": 0.75, "1:4": 0.5} for name in LAYERS})
    curve = pareto(
        model,
        inputs,
        calibration=calibration,
        budget="latency",
        points=9,
        candidates=CANDIDATES,
        policy="all",
        sensitivity=sensitivity,
        latency_table=table,
    )
    assert [plan.ms for plan in curve.plans] == pytest.approx([6 + k / 4 for k in range(9)])
    assert [curve.share(plan) for plan in curve.plans] == pytest.approx([(6 + k / 4) / 8 for k in range(9)])


def test_files(model, inputs, calibration, sensitivity, tmp_path):
    curve = pareto(
        model, inputs, calibration=calibration, candidates=CANDIDATES, policy="all", points=3, sensitivity=sensitivity
    )
    stored = json.loads(json.dumps(curve.to_dict()))
    assert [plan["macs"] for plan in stored["plans"]] == [plan.macs for plan in curve.plans]
    assert stored["uniform"]["2:4"]["measured_damage"] == curve.uniform["2:4"].measured_damage
    curve.plot(tmp_path / "curve.svg")
    drawn = (tmp_path / "curve.svg").read_text()
    assert "uniform 1:4, measured" in drawn
    assert "uniform 2:4" in str(curve)


def test_the_sensitivity_is_measured_once(model, inputs, calibration, monkeypatch):
    calls = []

    def counting(*args, **kwargs):
        calls.append(args)
        return measure_sensitivity(*args, **kwargs)

    monkeypatch.setattr(pareto_curve, "measure_sensitivity", counting)
    pareto(model, inputs, calibration=calibration, candidates=CANDIDATES, policy="all", points=4)
    assert len(calls) == 1


def test_errors(model, inputs, calibration, unchanged):
    def curve(**kwargs):
        return pareto(model, inputs, **{"calibration": calibration, "policy": "all", **kwargs})

    with pytest.raises(ValueError, match="unknown budget 'latency_ms': 'macs' or 'latency'"):
        curve(budget="latency_ms")
    with pytest.raises(ValueError, match=r"points must be at least 2, .*; got 1"):
        curve(points=1)
    with pytest.raises(ValueError, match="unknown pattern '2/4'"):
        curve(candidates=["2/4"])
    with pytest.raises(ValueError, match="calibration is empty"):
        curve(calibration=[])
