"""permute_channels: in place, checked at run time, undone on any error; what it reports and what it refuses."""

import copy
import itertools
import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparsedm_compile as sdm
from sparsedm_compile.calibration import CalibrationBatch
from sparsedm_compile.permutation import permute, permute_channels
from sparsedm_compile.permutation.propagation import Propagation
from sparsedm_compile.permutation.search import search


class Mlp(nn.Module):
    """Two linears; the hidden channels fade, so that neighbours are alike and 2:4 drops what is large."""

    def __init__(self, hidden=32):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(16, hidden), nn.Linear(hidden, 16)
        self.drop = nn.Dropout(0.5)
        with torch.no_grad():
            self.down.weight.mul_(torch.linspace(2, -2, hidden).exp())

    def forward(self, x):
        return self.down(self.drop(F.gelu(self.up(x))))


@pytest.fixture
def mlp():
    return Mlp()


@pytest.fixture
def x():
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model, state):
    assert model.state_dict().keys() == state.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def in_float64(model, *inputs):
    with torch.no_grad():
        return copy.deepcopy(model).eval().double()(*(value.double() for value in inputs))


def one_shot_error(model, x, pattern):
    sparse = copy.deepcopy(model).eval()
    dense = in_float64(sparse, x)
    sdm.sparsify(sparse, pattern, policy="all")
    with torch.no_grad():
        return ((sparse(x) - dense).norm() / dense.norm()).item()


@pytest.mark.parametrize("pattern", ["2:4", "2:4v4", "1:4"])
def test_the_function_stays_and_the_masks_keep_more(mlp, x, pattern):
    before, error, names = in_float64(mlp, x), one_shot_error(mlp, x, pattern), list(mlp.state_dict())
    report = permute_channels(mlp, x, pattern=pattern, policy="all")
    assert (in_float64(mlp, x) - before).abs().max() < 1e-12
    assert report.kept_after > report.kept_before + 0.02
    assert one_shot_error(mlp, x, pattern) < 0.9 * error
    assert list(mlp.state_dict()) == names


def test_the_report_says_what_is_kept_by_the_masks(mlp, x):
    before = copy.deepcopy(mlp)
    report = permute_channels(mlp, x, policy="all")
    for layer in report.layers:
        for model, share in ((before, layer.before), (mlp, layer.after)):
            weight = model.get_submodule(layer.name).weight.detach().abs().double()
            groups = weight.unflatten(1, (-1, 4)).sort(-1).values
            assert share == pytest.approx((groups[..., 2:].sum() / groups.sum()).item())


def calibration_of(*inputs):
    return [CalibrationBatch((part,), part) for x in inputs for part in x.split(3)]


def pruned_damage(model, x, pattern="2:4", **options):
    sparse = copy.deepcopy(model).eval()
    dense = in_float64(sparse, x)
    sdm.sparsify(sparse, pattern, **options)
    return (in_float64(sparse, x) - dense).square().mean().item()


class TestByCalibration:
    @pytest.fixture
    def even(self, mlp):
        """Weights that are all of one size, behind hidden channels of which every second quarter is loud."""
        with torch.no_grad():
            mlp.down.weight.copy_(torch.randn(mlp.down.weight.shape).sign() * (1 + 0.01 * torch.rand(16, 32)))
            mlp.up.weight.mul_(0.1)
            mlp.up.bias.copy_((torch.arange(32) // 4 % 2) * 4.0)
        return mlp

    @pytest.mark.parametrize("pattern", ["2:4", "2:4v4"])
    def test_the_damage_is_what_pruning_does_and_falls(self, even, x, pattern):
        before, dense = pruned_damage(even, x, pattern, policy="all"), in_float64(even, x)
        report = permute_channels(even, x, pattern=pattern, policy="all", calibration=calibration_of(x))
        assert (in_float64(even, x) - dense).abs().max() < 1e-12
        assert report.damage_before == pytest.approx(before, rel=1e-4)
        assert report.damage_after == pytest.approx(pruned_damage(even, x, pattern, policy="all"), rel=1e-4)
        assert report.damage_after < 0.97 * before
        assert f"{report.damage_before:.4g} -> {report.damage_after:.4g}" in str(report)

    def test_an_order_that_does_harm_is_not_taken(self, mlp, x):
        """Large weights, crowded in one group, multiply silence; spread out they displace what is heard."""
        with torch.no_grad():
            mlp.down.weight.copy_(torch.rand(16, 32) + 0.1)
            mlp.down.weight[:, :4] += 9
            mlp.up.weight[:4], mlp.up.bias[:4] = 0, 0
        options = {"policy": "all", "rules": {"up": "dense"}}
        before, misled = pruned_damage(mlp, x, **options), copy.deepcopy(mlp)
        permute_channels(misled, x, **options)
        assert pruned_damage(misled, x, **options) > 1.2 * before
        report = permute_channels(mlp, x, calibration=calibration_of(x), **options)
        assert pruned_damage(mlp, x, **options) == pytest.approx(report.damage_after, rel=1e-4)
        assert report.damage_after <= before * (1 + 1e-4)

    def test_both_searches_see_the_weights_as_they_lie(self, mlp, x, monkeypatch):
        """The second one too: the first permutes what it is given."""
        seen = []

        def spy(families, axes, weights, seed):
            seen.append({name: weight.magnitude[..., 0].clone() for name, (weight,) in weights.items()})
            return search(families, axes, weights, seed)

        monkeypatch.setattr(permute, "search", spy)
        weight, hidden = mlp.down.weight.detach().clone().abs(), F.gelu(mlp.up(x)).detach()
        permute_channels(mlp, x, calibration=calibration_of(x), policy="all", rules={"up": "dense"})
        torch.testing.assert_close(seen[0]["down.weight"], weight)
        torch.testing.assert_close(seen[1]["down.weight"], weight * hidden.square().mean(0).sqrt())

    def test_scores_of_a_convolution_are_those_of_its_taps(self):
        torch.manual_seed(0)
        model = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2)
        x = torch.randn(6, 8, 5, 5)
        padded = F.pad(x, (1, 1, 1, 1)).double()
        expected = model.weight.detach().double().abs()
        for out, c, i, j in itertools.product(range(8), range(4), range(3), range(3)):
            seen = padded[:, out // 4 * 4 + c, i : i + 5 : 2, j : j + 5 : 2]
            expected[out, c, i, j] *= seen.square().mean().sqrt()
        scores = permute._times_inputs(model, {"": model.weight.detach().abs()}, calibration_of(x))
        torch.testing.assert_close(scores[""].double(), expected, rtol=1e-5, atol=1e-6)

    def test_refused(self, mlp, x):
        state = state_of(mlp)
        with pytest.raises(ValueError, match="calibration is empty"):
            permute_channels(mlp, x, calibration=[])
        with pytest.raises(TypeError, match=r"must be a list of CalibrationBatch, as calibration_set\(batches\) makes"):
            permute_channels(mlp, x, calibration=[x])
        with pytest.raises(ValueError, match="predicts noise that is not finite on the calibration batches"):
            permute_channels(mlp, x, policy="all", calibration=calibration_of(x * torch.inf))
        assert_same_state(mlp, state)


def test_the_report_says_what_moved_and_why_the_rest_did_not(mlp, x):
    report = permute_channels(mlp, x, policy="all")
    hidden, inputs = report.axes  # outputs have no say in a mask without v
    assert hidden.members == ("up.weight[0]", "up.bias[0]", "down.weight[1]")
    assert (hidden.channels, hidden.free, hidden.pinned) == (32, 32, {})
    assert 0 < hidden.moved <= 32
    assert (inputs.channels, inputs.free, inputs.moved) == (16, 0, 0)
    assert list(inputs.pinned) == ["linear meets a value that cannot be permuted: x is an input of the model"]
    assert "x is an input of the model" in str(report)
    assert f"{report.kept_after:.2%}" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["axes"][0]["moved"] == hidden.moved
    assert 0 <= report.difference < 1e-5


def test_a_sparse_model_is_permuted_for_its_own_plan(mlp, x):
    plan = sdm.sparsify(mlp, "2:4", policy="all", rules={"up": "dense"})
    dense = copy.deepcopy(mlp)
    sdm.set_pattern(dense, "dense")
    with torch.no_grad():
        masked_before = mlp.eval()(x)
    report = permute_channels(mlp, x)
    assert [layer.name for layer in report.layers] == ["down"]
    assert report.kept_after > report.kept_before
    assert sdm.get_plan(mlp) is plan
    assert mlp.down.pattern == "2:4"
    after = copy.deepcopy(mlp)
    sdm.set_pattern(after, "dense")
    assert (in_float64(after, x) - in_float64(dense, x)).abs().max() < 1e-12
    with torch.no_grad():
        assert not torch.equal(mlp(x), masked_before)  # the new masks are used, none is remembered


def test_half_precision_is_checked_in_single(x):
    mlp = Mlp().bfloat16()
    before = in_float64(mlp, x)
    report = permute_channels(mlp, x.bfloat16(), policy="all")
    assert report.difference < 1e-5
    assert mlp.down.weight.dtype == torch.bfloat16
    assert (in_float64(mlp, x) - before).abs().max() < 1e-12


def test_the_seed_decides(x):
    orders = [Mlp(), Mlp()]
    for mlp in orders:
        permute_channels(mlp, x, policy="all", seed=7)
    assert_same_state(orders[0], state_of(orders[1]))


def test_training_mode_and_strides_are_left_as_they_were(x):
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.SiLU(), nn.Conv2d(16, 8, 3)).to(memory_format=torch.channels_last)
    net[1].eval()
    permute_channels(net, torch.randn(1, 3, 8, 8), policy="all", rules={"0": "dense"})
    assert [module.training for module in net] == [True, False, True]
    assert net[2].weight.is_contiguous(memory_format=torch.channels_last)


def test_gradients_move_with_their_weights(mlp, x):
    mlp.eval()(x).square().sum().backward()
    permute_channels(mlp, x, policy="all")
    moved = [parameter.grad.clone() for parameter in mlp.parameters()]
    mlp.zero_grad()
    mlp(x).square().sum().backward()
    for parameter, grad in zip(mlp.parameters(), moved, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-4)


def test_tied_weights_move_together(x):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.last(self.first(x).relu() + self.second(-x).relu())

    net = Tied()
    before = in_float64(net, x)
    report = permute_channels(net, x, policy="all")
    assert net.second.weight is net.first.weight
    assert report.axes[0].moved > 0
    assert (in_float64(net, x) - before).abs().max() < 1e-12


class WithBuffer(Mlp):
    def __init__(self, persistent):
        super().__init__()
        self.register_buffer("offset", torch.randn(32), persistent=persistent)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)) + self.offset)


def test_a_buffer_moves_if_checkpoints_hold_it(x):
    net = WithBuffer(persistent=True)
    before, offset = in_float64(net, x), net.offset.clone()
    permute_channels(net, x, policy="all")
    assert not torch.equal(net.offset, offset)
    assert (in_float64(net, x) - before).abs().max() < 1e-12


def test_a_buffer_that_checkpoints_do_not_hold_pins(x):
    net = WithBuffer(persistent=False)
    state, offset = state_of(net), net.offset.clone()
    report = permute_channels(net, x, policy="all")
    assert "offset is a buffer that checkpoints do not hold" in str(report)
    assert_same_state(net, state)
    assert torch.equal(net.offset, offset)


def test_weights_that_share_memory_pin(mlp, x):
    mlp.up.bias = nn.Parameter(mlp.up.weight.data[:, 0])
    state = state_of(mlp)
    report = permute_channels(mlp, x, policy="all")
    assert "shares memory" in str(report)
    assert_same_state(mlp, state)


def test_parameters_that_the_call_does_not_use_are_named(mlp, x):
    mlp.spare = nn.Linear(4, 4)
    report = permute_channels(mlp, x, policy="all", rules={"spare": "dense"})
    assert report.unused == ("spare.weight", "spare.bias")
    assert "spare.weight" in str(report)


def test_a_wrong_rule_is_caught_and_undone(mlp, x, monkeypatch):
    """Exactness is checked, not believed: a join that forgets to couple lets the two linears part."""
    mlp.up.weight.grad = torch.ones_like(mlp.up.weight)
    state = state_of(mlp)
    monkeypatch.setattr(Propagation, "_meet", lambda *_: None)
    with pytest.raises(RuntimeError, match=r"changed its output by a relative .*above 1e-05: everything was put back"):
        permute_channels(mlp, x, policy="all")
    assert_same_state(mlp, state)
    assert mlp.training


def test_an_interruption_leaves_the_model_as_it_was(mlp, x, monkeypatch):
    state, reorder, calls = state_of(mlp), permute._reorder, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        reorder(*arguments)

    monkeypatch.setattr(permute, "_reorder", interrupted)
    with pytest.raises(KeyboardInterrupt):
        permute_channels(mlp, x, policy="all")
    assert len(calls) == 3  # one done, one interrupted, one taken back
    assert_same_state(mlp, state)


def test_a_model_that_draws_noise_draws_the_same(mlp, x):
    mlp.forward = lambda x: mlp.down(F.gelu(mlp.up(x + torch.randn(8, 16))))
    random_state = torch.get_rng_state()
    assert permute_channels(mlp, x, policy="all").difference < 1e-5
    assert torch.equal(torch.get_rng_state(), random_state)


def branches(model, x):
    """A call that cannot be a graph."""
    return model.down(F.gelu(model.up(x))) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda m: sdm.sparsify(m, "2:4", policy="all"), ValueError, "sparse already and its plan decides: leave out"),
        (lambda m: [nn.init.zeros_(p) for p in m.down.parameters()], ValueError, "all zeros, so no"),
        (lambda m: nn.init.constant_(m.down.bias, torch.inf), ValueError, "not finite, so no permutation"),
        (lambda m: nn.init.constant_(m.down.weight, torch.nan), ValueError, "'down' has weights that are not finite"),
        (lambda m: m.double(), TypeError, "torch.float64 weights; N:M layers take"),
        (lambda m: setattr(m, "forward", lambda x: branches(m, x)), RuntimeError, "cannot capture Mlp as a graph"),
        (lambda m: setattr(m, "forward", lambda x: None), ValueError, "returned no floating-point tensor"),
    ],
)
def test_what_cannot_be_permuted_is_refused_and_untouched(mlp, x, change, error, words):
    change(mlp)
    state = state_of(mlp)
    with pytest.raises(error, match=words):
        permute_channels(mlp, x.to(mlp.up.weight.dtype), pattern="2:4", policy="all")
    for name, tensor in mlp.state_dict().items():
        assert np.array_equal(tensor.numpy(), state[name].numpy(), equal_nan=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pattern": "4:2"}, "n must be smaller than m"),
        ({"policy": "everything"}, "everything"),
        ({"rules": {"nothing": "2:4"}}, "matches no layer"),
        ({"pattern": "dense"}, "leaves every layer of Mlp dense"),
    ],
)
def test_bad_options_are_refused(mlp, x, options, words):
    with pytest.raises(ValueError, match=words):
        permute_channels(mlp, x, **options)


def test_a_packed_model_is_refused():
    net = nn.Sequential(nn.Linear(256, 256)).eval()
    sdm.sparsify(net, "2:4", policy="all")
    sdm.pack(net)
    with pytest.raises(ValueError, match="packed: its channels are fixed"):
        permute_channels(net, torch.randn(1, 256))
