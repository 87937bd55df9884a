"""Timestep schedules: what is switched when, what comes back, and how many MACs a run has."""

import copy

import pytest
import torch
from torch import nn

import sparsedm_compile as sdm
from sparsedm_compile.models import UViT
from sparsedm_compile.pattern import Pattern
from sparsedm_compile.sampling import sample, sampling_times
from sparsedm_compile.timestep_schedule import TimestepSchedule

SCHEDULE = {(0, 200): "dense", (200, 1000): "2:4"}


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = UViT(img_size=4, patch_size=2, in_chans=1, embed_dim=32, depth=2, num_heads=2).eval()
    with torch.no_grad():  # as large as trained weights, so that masks show
        for parameter in model.parameters():
            parameter.mul_(5)
    return model


@pytest.fixture
def noise():
    return torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def patterns(model):
    return {name: str(pattern) for name, pattern in sdm.get_plan(model).patterns().items()}


# --- ranges --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("time", "expected"), [(0, "dense"), (199.99, "dense"), (200, "2:4"), (999.0, "2:4")])
def test_ranges_are_half_open(time, expected):
    schedule = TimestepSchedule({(200, 1000): "2:4", (0, 200): "dense"})
    assert str(schedule.at(time).pattern) == expected
    assert schedule.at(torch.tensor(time)) is schedule.at(time)


@pytest.mark.parametrize(
    ("ranges", "error", "message"),
    [
        ({}, ValueError, "no ranges"),
        ([((0, 1), "2:4")], TypeError, "takes {"),
        ({200: "2:4"}, TypeError, r"a range is a tuple of two numbers such as \(0, 200\), got 200"),
        ({(0, "1"): "2:4"}, TypeError, "two numbers"),
        ({(200, 200): "2:4"}, ValueError, r"range \(200, 200\) is empty"),
        ({(0, float("nan")): "2:4"}, ValueError, "is empty"),
        ({(0, float("inf")): "2:4"}, ValueError, "is empty"),
        ({(100, 1000): "2:4"}, ValueError, r"gap: it starts with \[100, 1000\), not at 0"),
        ({(0, 200): "dense", (300, 1000): "2:4"}, ValueError, r"gap: nothing is said of \[200, 300\)"),
        ({(0, 300): "dense", (200, 1000): "2:4"}, ValueError, r"overlap: \[0, 300\) and \[200, 1000\)"),
        ({(0, 1000): "2-4"}, ValueError, "unknown pattern '2-4'"),
        ({(0, 1000): {"fc1": "4:2"}}, ValueError, "n must be smaller than m"),
        ({(0, 1000): 24}, TypeError, r"range \(0, 1000\) needs a pattern, rules or a plan, got int"),
    ],
)
def test_bad_ranges(ranges, error, message):
    with pytest.raises(error, match=message):
        TimestepSchedule(ranges)


def test_a_time_outside_of_the_schedule():
    for time in (-1, 1000, float("nan")):
        with pytest.raises(ValueError, match=r"is outside of the schedule, \[0, 1000\)"):
            TimestepSchedule(SCHEDULE).at(time)


def test_ranges_given_as_fractions_of_the_run():
    schedule = TimestepSchedule({(0, 0.25): "dense", (0.25, 1): "2:4"})
    assert str(schedule.at(0.5).pattern) == "2:4"  # right for a process whose times are those
    message = (
        r"timestep 999 is outside of the schedule, \[0, 1\): ranges are not fractions of the run but in the units that "
        r"the network is called with, 0 to 999 unless the process says otherwise; for \[0\.25, 1\) write \[250, 1000\)$"
    )
    with pytest.raises(ValueError, match=message):
        schedule.at(999)
    with pytest.raises(ValueError, match=r"schedule, \[0, 1\)$"):
        schedule.at(-1)


# --- switching -----------------------------------------------------------------------------------------------------


def test_switches_and_gives_the_patterns_back(model):
    plan = sdm.sparsify(model, "2:4", rules={"mid_block.*": "1:4"})
    before = patterns(model)
    rules = {"*.fc1": "1:4", "mid_block.attn.qkv": "2:4v2"}
    schedule = TimestepSchedule({(0, 100): rules, (100, 500): plan, (500, 1000): Pattern(1, 2)})
    with schedule.use(model) as switch:
        assert set(patterns(model).values()) == {"1:2"}  # sampling starts at the last range
        switch(torch.tensor(300))
        assert patterns(model) == before
        switch(50)
        found = patterns(model)
        assert {name: pattern for name, pattern in found.items() if not name.endswith("fc1")} == {
            "mid_block.attn.qkv": "2:4v2"
        }
        assert [found[name] for name in before if name.endswith("fc1")] == ["1:4"] * 3
    assert patterns(model) == before
    assert sdm.get_plan(model) == plan


def test_patterns_come_back_after_an_error(model):
    plan = sdm.sparsify(model, "1:4")
    with pytest.raises(ZeroDivisionError), TimestepSchedule(SCHEDULE).use(model):
        raise ZeroDivisionError
    assert sdm.get_plan(model) == plan


def test_ranges_that_do_not_fit_fail_before_the_first_step(model, noise):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.calls = model, 0

        def forward(self, *args):
            self.calls += 1
            return self.inner(*args)

    outer = Counting()
    with pytest.raises(ValueError, match="model is not sparse"):
        sample(outer, noise, steps=3, schedule=TimestepSchedule(SCHEDULE))
    plan = sdm.sparsify(outer, "2:4")
    for ranges, message in (
        ({(0, 10): {"nothing": "2:4"}, (10, 1000): "2:4"}, "rule 'nothing' matches no layer"),
        ({(0, 500): "2:4"}, r"timestep 999 is outside of the schedule, \[0, 500\)"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(outer, noise, steps=3, schedule=TimestepSchedule(ranges))
    assert outer.calls == 0
    assert sdm.get_plan(outer) == plan


# --- sampling ------------------------------------------------------------------------------------------------------


class ByTime(nn.Module):
    """Two models, chosen by time: what a schedule must amount to."""

    def __init__(self, early, late, border):
        super().__init__()
        self.early, self.late, self.border = early, late, border

    def forward(self, x, timesteps):
        return (self.early if timesteps[0] < self.border else self.late)(x, timesteps)


@pytest.mark.parametrize("solver", ["dpm-solver++", "euler-maruyama"])
def test_samples_as_two_models_would(model, noise, masked_dense, solver):
    dense = copy.deepcopy(model)
    plan = sdm.sparsify(model, "2:4")

    def draw(network, **kwargs):
        generator = None if solver == "dpm-solver++" else torch.Generator().manual_seed(2)
        return sample(network, noise, solver=solver, steps=6, generator=generator, **kwargs)

    expected = draw(ByTime(dense, masked_dense(model), 200))
    drawn = draw(model, schedule=TimestepSchedule(SCHEDULE))
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)
    assert sdm.get_plan(model) == plan
    for other in (model, dense):
        assert not torch.allclose(drawn, draw(other), rtol=1e-2)


def test_a_compiled_model_gets_one_graph_a_range_once(model, noise):
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    sdm.sparsify(model, "2:4")
    ranges = {(0, 300): "dense", (300, 600): {"*.attn.*": "1:4"}, (600, 1000): "2:4"}
    schedule = TimestepSchedule(ranges)
    expected = sample(model, noise, steps=6, schedule=schedule)
    compiled = torch.compile(model, backend=backend)
    torch.testing.assert_close(sample(compiled, noise, steps=6, schedule=schedule), expected)
    assert len(graphs) == 3
    sample(compiled, noise, steps=9, schedule=schedule)
    with torch.no_grad():
        compiled(noise, torch.zeros(2))  # at its own pattern, which is that of the last range
    assert len(graphs) == 3


def test_sampling_times_are_those_that_the_model_sees(noise):
    class Recorder(nn.Module):
        def __init__(self):
            super().__init__()
            self.times = []

        def forward(self, x, timesteps):
            self.times.append(timesteps[0].item())
            return x

    for solver, steps in (("dpm-solver++", 7), ("euler-maruyama", 5)):
        recorder = Recorder()
        sample(recorder, noise, solver=solver, steps=steps)
        assert sampling_times(solver=solver, steps=steps) == pytest.approx(recorder.times, rel=1e-6)
    assert sampling_times(solver="euler-maruyama", steps=3) == pytest.approx([999, 666.333, 333.666], abs=1e-3)
    assert sampling_times(process=sdm.VPSDE(time_scale=1.0), steps=5)[0] == pytest.approx(1)


def test_sampling_times_errors():
    with pytest.raises(ValueError, match="unknown solver 'ddim'"):
        sampling_times(solver="ddim")
    with pytest.raises(ValueError, match="steps must be at least 2, got 1"):
        sampling_times(steps=1)


# --- MACs ----------------------------------------------------------------------------------------------------------


def test_macs_of_a_run_are_the_sum_over_its_steps(model, noise):
    plan = sdm.sparsify(model, "2:4", policy="sparsedm")
    times = sampling_times(steps=10)
    early = sum(time < 200 for time in times)
    assert 0 < early < 10
    inputs = (noise[:1], torch.zeros(1))
    # U-ViT, 5 tokens of width 32: in each of 3 blocks qkv, proj, fc1 and fc2 hold 12 * 32^2 weights.
    block = 5 * 12 * 32**2
    skip, rest = 5 * 2 * 32**2, 4 * 4 * 32 + 5 * 32 * 4 + 16 * 9
    report = sdm.count_macs(model, *inputs, schedule=TimestepSchedule(SCHEDULE), times=times)
    assert report.dense == 10 * (3 * block + skip + rest)
    assert report.sparse == report.dense - (10 - early) * 3 * block // 2
    assert report.attention == 10 * 3 * 2 * 5 * 5 * 32
    assert [(row.range, row.steps) for row in report.ranges] == [("[200, 1000)", 10 - early), ("[0, 200)", early)]
    assert report.ranges[1].step.sparse == report.ranges[1].step.dense == report.dense // 10
    assert sdm.get_plan(model) == plan
    assert report.to_dict()["ranges"][0]["step"]["sparse"] == report.ranges[0].step.sparse
    assert "MACs of 10 steps" in str(report)
    assert "[200, 1000)" in str(report)


def test_macs_of_a_run_errors(model, noise):
    schedule, inputs = TimestepSchedule(SCHEDULE), (noise, torch.zeros(2))
    with pytest.raises(ValueError, match="model is not sparse"):
        sdm.count_macs(model, *inputs, schedule=schedule, times=[1])
    plan = sdm.sparsify(model, "2:4")
    with pytest.raises(TypeError, match="times, the timesteps of the run, is missing"):
        sdm.count_macs(model, *inputs, schedule=schedule)
    with pytest.raises(TypeError, match="schedule, the patterns over time, is missing"):
        sdm.count_macs(model, *inputs, times=[1])
    with pytest.raises(TypeError, match="plan or schedule"):
        sdm.count_macs(model, *inputs, schedule=schedule, times=[1], plan=plan)
    with pytest.raises(ValueError, match="times is empty"):
        sdm.count_macs(model, *inputs, schedule=schedule, times=[])
    with pytest.raises(ValueError, match="timestep 1000 is outside"):
        sdm.count_macs(model, *inputs, schedule=schedule, times=[1, 1000])
    with pytest.raises(ValueError, match="failed on tensors of shape"):
        sdm.count_macs(model, noise[:, :, 1:], torch.zeros(2), schedule=schedule, times=[1])
    assert sdm.get_plan(model) == plan
