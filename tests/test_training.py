import itertools
import math

import pytest
import torch
from torch import nn

from sparsedm_compile.ema import EMA
from sparsedm_compile.training import train


class Regression:
    """y = 3 x, with a linear model."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(1, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.batches = [torch.randn(16, 1) for _ in range(3)]
        self.rates: list[float] = []

    def loss(self, x):
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        return (self.model(x) - 3 * x).square().mean()

    def train(self, loss=None, batches=None, **options):
        options = {"progress": False, "ema": EMA(self.model), **options}
        return train(self.model, self.optimizer, loss or self.loss, batches or self.batches, **options)


def test_learns_over_several_passes_of_the_data():
    task = Regression()
    record = task.train(steps=200, max_grad_norm=math.inf)
    assert record.steps == len(record.losses) == 200
    assert record.losses[-1] < 1e-4
    assert task.model.weight.item() == pytest.approx(3, abs=0.01)


def test_the_averaged_weights_are_left_in_the_model():
    task = Regression()
    ema = EMA(task.model)
    task.train(steps=5, ema=ema)
    assert ema.updates == 5
    assert torch.equal(task.model.weight, ema.shadow["weight"])


def test_learning_rate_warms_up_linearly_and_then_stays():
    task = Regression()
    task.train(steps=8, warmup_steps=4)
    assert task.rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1, 0.1, 0.1])


def test_gradients_are_clipped():
    task = Regression()
    before = task.model.weight.detach().clone(), task.model.bias.detach().clone()
    task.train(loss=lambda x: 1e6 * task.loss(x), steps=1, max_grad_norm=0.5, warmup_steps=0, ema=EMA(task.model, 0.0))
    moved = math.hypot((task.model.weight - before[0]).item(), (task.model.bias - before[1]).item())
    assert moved == pytest.approx(0.1 * 0.5, rel=1e-3)


def test_a_time_limit_ends_the_run():
    record = Regression().train(seconds=0.2)
    assert record.steps >= 1
    assert 0.2 <= record.seconds < 2


def test_mode_is_put_back():
    task = Regression()
    task.model = nn.Sequential(task.model, nn.Dropout(0.5).eval())
    modes = []
    task.train(loss=lambda x: (modes.append(task.model[1].training), task.loss(x))[1], steps=1)
    assert modes == [True]
    assert task.model.training
    assert not task.model[1].training


@pytest.mark.parametrize(("poison", "message"), [("loss", "the loss is nan"), ("gradient", "the gradient norm is inf")])
def test_bad_numbers_stop_the_run_with_good_weights(poison, message):
    task = Regression()
    ema = EMA(task.model)
    calls = []

    def loss(x):
        calls.append(1)
        value = task.loss(x)
        if len(calls) == 4:
            # The square root of 0 is finite, its slope is not.
            zero = task.model.weight.sum() - task.model.weight.detach().sum()
            value = value * math.nan if poison == "loss" else value + zero.sqrt()
        return value

    with pytest.raises(FloatingPointError, match=rf"{message}.* at step 4; .* averaged weights of the 3 steps before"):
        task.train(loss=loss, steps=10, ema=ema)
    assert ema.updates == 3
    assert torch.isfinite(task.model.weight).all()
    assert torch.equal(task.model.weight, ema.shadow["weight"])
    assert task.model.weight.grad is None


def test_an_interrupted_run_keeps_what_it_learned():
    task = Regression()
    ema = EMA(task.model)

    def loss(x):
        if ema.updates == 3:
            raise KeyboardInterrupt
        return task.loss(x)

    with pytest.raises(KeyboardInterrupt):
        task.train(loss=loss, steps=10, ema=ema)
    assert torch.equal(task.model.weight, ema.shadow["weight"])


def test_before_step_sees_every_step_before_its_loss():
    task, order = Regression(), []
    task.train(loss=lambda x: (order.append("loss"), task.loss(x))[1], before_step=order.append, steps=3)
    assert order == [0, "loss", 1, "loss", 2, "loss"]


class TestLossScale:
    def test_does_not_matter(self):
        """Clipping included: gradients are unscaled before it. Scales are powers of two, hence exact."""
        results = []
        for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**12)):
            task = Regression()
            record = task.train(steps=20, scaler=scaler, max_grad_norm=0.5)
            results.append((record.losses, task.model.weight.item()))
        assert results[0] == results[1]

    def test_an_overflow_leaves_the_step_out_and_lowers_the_scale(self):
        task = Regression()
        ema = EMA(task.model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)  # times a gradient of 6, this is infinite
        weights = []
        task.train(
            loss=lambda x: (weights.append(task.model.weight.item()), 100 * task.loss(x))[1],
            batches=task.batches[:1],
            steps=20,
            scaler=scaler,
            ema=ema,
            warmup_steps=4,
        )
        assert weights[0] == weights[1] != weights[-1]
        assert scaler.get_scale() < 2.0**127
        left_out = sum(a == b for a, b in itertools.pairwise(weights))
        assert ema.updates == 20 - left_out  # neither average nor warm-up moved on
        assert task.rates[left_out : left_out + 4] == pytest.approx([0.025, 0.05, 0.075, 0.1])

    def test_a_gradient_that_no_scale_can_save_is_an_error(self):
        task = Regression()
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

        def loss(x):
            zero = task.model.weight.sum() - task.model.weight.detach().sum()
            return task.loss(x) + zero.sqrt()  # finite, with an infinite slope

        with pytest.raises(FloatingPointError, match=r"gradient norm is inf .* at step 4;"):  # scales 8, 4, 2, 1
            task.train(loss=loss, steps=100, scaler=scaler)
        assert torch.isfinite(task.model.weight).all()


def test_progress_bar_shows_loss_and_time_left(capsys):
    Regression().train(steps=3, progress=True)
    Regression().train(seconds=0.3, progress=True)
    shown = capsys.readouterr().err
    assert "loss" in shown
    assert "s [" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs a limit"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"seconds": 0.0}, "seconds must be positive, got 0.0"),
        ({"steps": 1, "warmup_steps": -1}, "warmup_steps must be 0 or more, got -1"),
        ({"steps": 1, "max_grad_norm": 0}, "max_grad_norm must be positive"),
    ],
)
def test_bad_limits(options, message):
    with pytest.raises(ValueError, match=message):
        Regression().train(**options)


def test_data_that_is_empty_or_ends():
    task = Regression()
    with pytest.raises(ValueError, match="batches is empty"):
        task.train(batches=iter(()), steps=1)
    with pytest.raises(ValueError, match="batches ended after 3 and cannot be gone through again"):
        task.train(batches=iter(task.batches), steps=5)
    assert task.train(batches=iter(task.batches), steps=3).steps == 3
