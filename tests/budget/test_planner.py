"""plan_for: against every plan there is, and its errors."""

import copy
import itertools
import json

import pytest
import torch

import sparsedm_compile as sdm
from sparsedm_compile.budget import LatencyTable, Sensitivity, measure_sensitivity, plan_for
from sparsedm_compile.pattern import Pattern

CANDIDATES = ["2:4", "1:4", "2:4v4"]
LAYERS = ["blocks.0", "blocks.1", "conv", "tail"]
# 2:4v4 is the fastest and 1:4 no faster than 2:4; the layers that can be sparse are 4 of the 10 ms.
TIMES = {"dense": 1.0, "2:4": 0.7, "1:4": 0.7, "2:4v4": 0.6}
LATENCY = LatencyTable(10.0, dict.fromkeys(LAYERS, TIMES))


@pytest.fixture
def sensitivity(model, calibration):
    return measure_sensitivity(model, calibration, candidates=CANDIDATES, policy="all")


def every_plan(cost, sensitivity):
    """(cost, predicted damage) of every assignment of patterns."""
    for patterns in itertools.product(["dense", *CANDIDATES], repeat=len(LAYERS)):
        plan = dict(zip(LAYERS, patterns, strict=True))
        damage = sum(sensitivity.damage[name][p] for name, p in plan.items() if p != "dense")
        yield cost(plan), damage


@pytest.mark.parametrize("share", [0.3, 0.5, 0.77, 1.0])
def test_least_predicted_damage_within_the_macs(model, inputs, calibration, sensitivity, masked_dense, share):
    before = copy.deepcopy(model)
    plan = plan_for(
        model, inputs, calibration=calibration, macs=share, candidates=CANDIDATES, policy="all", sensitivity=sensitivity
    )
    # A batch of 2: 2 x 32 weights stay dense, four layers have 32 x 32 each.
    dense = 2 * (64 + 4 * 1024)
    plans = every_plan(lambda plan: 2 * (64 + sum(1024 * Pattern.parse(p).density for p in plan.values())), sensitivity)
    best = min(damage for macs, damage in plans if macs <= share * dense)
    assert plan.predicted_damage == pytest.approx(best, rel=1e-9)
    assert plan.bound == pytest.approx(best, rel=1e-9)
    assert plan.gap == pytest.approx(0, abs=1e-9)
    assert (plan.dense_macs, plan.macs) == (dense, sdm.count_macs(model, *inputs, plan=plan).sparse)
    assert plan.macs <= share * dense
    assert (plan.ms, plan.dense_ms, plan.budget) == (None, None, f"macs={share:g}")

    if plan.patterns():
        sdm.sparsify(before, rules=plan.rules)
        assert sdm.get_plan(before).patterns() == plan.patterns()
        reference, dense_model = masked_dense(before).eval(), copy.deepcopy(model).eval()
        squares = [(reference(*b.inputs) - dense_model(*b.inputs)).square().flatten() for b in calibration]
        assert plan.measured_damage == pytest.approx(torch.cat(squares).mean().item(), rel=1e-4)
    else:
        assert plan.predicted_damage == plan.measured_damage == 0


@pytest.mark.parametrize("budget", [{"latency_ms": 8.9}, {"latency": 0.89}, {"latency": 0.84}, {"latency": 0.97}])
def test_least_predicted_damage_within_the_time(model, inputs, calibration, sensitivity, budget):
    tables = {"sensitivity": sensitivity, "latency_table": LATENCY}
    plan = plan_for(model, inputs, calibration=calibration, candidates=CANDIDATES, policy="all", **tables, **budget)
    limit = 10 * budget["latency"] if "latency" in budget else budget["latency_ms"]
    plans = every_plan(lambda plan: 10 - sum(1 - TIMES[pattern] for pattern in plan.values()), sensitivity)
    best = min(damage for ms, damage in plans if ms <= limit + 1e-9)
    assert plan.predicted_damage == pytest.approx(best, rel=1e-9)
    assert plan.ms <= limit + 1e-9
    assert plan.dense_ms == 10
    assert plan.ms == pytest.approx(10 - sum(1 - TIMES[pattern] for pattern in plan.rules.values()))


def test_the_model_is_left_as_it_was(model, inputs, calibration, unchanged):
    plan_for(model, inputs, calibration=calibration, macs=0.5, policy="all")


def test_policy_and_rules_bind_the_plan(model, inputs, calibration):
    plan = plan_for(
        model,
        inputs,
        calibration=calibration,
        macs=0.7,
        policy=lambda layer: layer.name != "conv",
        rules={"blocks.0": "1:4", "tail": "dense"},
    )
    assert plan.rules["blocks.0"] == "1:4"
    assert (plan.rules["conv"], plan.rules["tail"], plan.rules["embed"]) == ("dense",) * 3
    assert plan.rules["blocks.1"] != "dense"  # alone it can save what is left


def test_tied_layers_take_one_pattern(make_model, inputs, calibration):
    model = make_model(tied=True)
    plan = plan_for(model, inputs, calibration=calibration, macs=0.4, policy="all")
    assert plan.rules["tail"] == plan.rules["blocks.1"]
    assert sum(layer.damage for layer in plan.layers) == pytest.approx(plan.predicted_damage)
    assert plan.macs == sdm.count_macs(model, *inputs, plan=plan).sparse
    sdm.sparsify(model, rules=plan.rules)  # which refuses two patterns of one weight
    assert sdm.get_plan(model).patterns() == plan.patterns()


def test_compiled_blocks_keep_their_names(model, inputs, calibration):
    expected = plan_for(model, inputs, calibration=calibration, macs=0.5, policy="all")
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    assert plan_for(model, inputs, calibration=calibration, macs=0.5, policy="all").rules == expected.rules


def test_json_and_table(model, inputs, calibration, sensitivity):
    tables = {"sensitivity": sensitivity, "latency_table": LATENCY}
    plan = plan_for(model, inputs, calibration=calibration, candidates=CANDIDATES, policy="all", latency=0.9, **tables)
    stored = json.loads(json.dumps(plan.to_dict()))
    assert {layer["name"]: layer["pattern"] for layer in stored["layers"]} == plan.rules
    assert (stored["gap"], stored["ms"]) == (plan.gap, plan.ms)
    text = " ".join(str(plan).split())
    for part in ("plan for latency=0.9", "blocks.0", "dense 10.000 ms", f"{plan.measured_damage:.4g} measured"):
        assert part in text


def test_a_plan_serves_set_pattern_and_a_schedule(model, inputs, calibration):
    plan = plan_for(model, inputs, calibration=calibration, macs=0.5, policy="all")
    sdm.sparsify(model, "2:4", policy="all")
    with sdm.TimestepSchedule({(0, 500): plan, (500, 1000): "1:4"}).use(model) as switch:
        switch(100)
        assert sdm.get_plan(model).patterns() == plan.patterns()
    assert set(sdm.get_plan(model).patterns().values()) == {Pattern(2, 4)}


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "error", "message"),
    [
        ({}, ValueError, r"give exactly one budget, macs=..., latency_ms=... or latency=...; got none"),
        ({"macs": 0.5, "latency": 0.5}, ValueError, "exactly one budget.*; got macs=0.5, latency=0.5"),
        ({"macs": 0}, ValueError, "macs=0: a budget is a share of the dense model, above 0 and at most 1"),
        ({"macs": 1.5}, ValueError, "macs=1.5: a budget is a share"),
        ({"macs": float("nan")}, ValueError, "macs=nan"),
        ({"latency": 2}, ValueError, "latency=2: a budget is a share"),
        ({"latency_ms": -3}, ValueError, "latency_ms=-3: a budget is milliseconds, above 0"),
        ({"macs": "half"}, TypeError, "macs must be a number, got 'half'"),
        ({"macs": True}, TypeError, "macs must be a number, got True"),
    ],
)
def test_bad_budgets(model, inputs, calibration, unchanged, budget, error, message):
    with pytest.raises(error, match=message):
        plan_for(model, inputs, calibration=calibration, **budget)


@pytest.mark.parametrize("budget", [{"macs": 0.2}, {"latency": 0.8}, {"latency_ms": 5.0}])
def test_an_impossible_budget_names_the_nearest(model, inputs, calibration, unchanged, budget):
    def plan(**budget):
        return plan_for(
            model,
            inputs,
            calibration=calibration,
            candidates=CANDIDATES,
            policy="all",
            latency_table=LATENCY,
            sensitivity=Sensitivity({name: dict.fromkeys(CANDIDATES, 1.0) for name in LAYERS}),
            **budget,
        )

    (name,) = budget
    # MACs: embed is 2 * 32 of 2 * 32 + 4 * 32^2 and stays dense, the others keep a quarter. Time: all at 2:4v4.
    nearest = {"macs": "0.2616", "latency": "0.84", "latency_ms": "8.4"}[name]
    amounts = "2,176 of 8,320 MACs" if name == "macs" else "8.4 of 10 ms"
    with pytest.raises(ValueError, match=f"meets {name}={budget[name]:g}: the nearest is {name}={nearest} .{amounts}"):
        plan(**budget)
    reached = plan(**{name: float(nearest)})
    assert set(reached.rules.values()) == {"dense", "1:4" if name == "macs" else "2:4v4"}


def test_other_errors(model, inputs, calibration, unchanged):
    def plan(inputs=inputs, calibration=calibration, **kwargs):
        return plan_for(model, inputs, calibration=calibration, macs=0.5, **{"policy": "all", **kwargs})

    with pytest.raises(ValueError, match="unknown pattern '2/4'"):
        plan(candidates=["2/4"])
    with pytest.raises(ValueError, match="no layer of Denoiser takes any of 2:4, 1:4"):
        plan(policy=lambda layer: False)
    with pytest.raises(ValueError, match="calibration is empty"):
        plan(calibration=[])
    with pytest.raises(TypeError, match=r"inputs must be a tuple, .* got Tensor"):
        plan(inputs=inputs[0])
    with pytest.raises(ValueError, match=r"the inputs do not fit Denoiser\.forward"):
        plan(inputs=inputs[:1])
    with pytest.raises(ValueError, match="the sensitivity holds no damage of layer"):
        plan(sensitivity=Sensitivity({}))


def test_a_sparse_model_is_refused(model, inputs, calibration):
    plan = sdm.sparsify(model, "2:4", policy="all")
    with pytest.raises(ValueError, match="model is sparse already"):
        plan_for(model, inputs, calibration=calibration, macs=0.5)
    assert sdm.get_plan(model) == plan
