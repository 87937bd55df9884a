import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed, Unsupported

from sparsedm_compile import pack, sparsify
from sparsedm_compile.noise import VPSDE, SchedulerProcess


@given(t=st.floats(1e-4, 1.0))
def test_alpha_is_the_integral_of_beta(t):
    process = VPSDE()
    integral, _ = quad(lambda s: 0.1 + s * 19.9, 0, t)
    alpha = process.alpha(torch.tensor(t, dtype=torch.float64)).item()
    sigma = process.sigma(torch.tensor(t, dtype=torch.float64)).item()
    assert alpha == pytest.approx(math.exp(-integral / 2), rel=1e-9)
    assert alpha**2 + sigma**2 == pytest.approx(1, rel=1e-12)


def test_sigma_keeps_its_digits_near_zero():
    """``sqrt(1 - alpha^2)`` in float32 is off by percents here."""
    exact = VPSDE().sigma(torch.tensor(1e-5, dtype=torch.float64)).item()
    assert VPSDE().sigma(torch.tensor(1e-5)).item() == pytest.approx(exact, rel=1e-5)


@given(t=st.floats(1e-4, 1.0))
def test_time_at_inverts_the_log_ratio(t):
    process = VPSDE()
    t = torch.tensor(t, dtype=torch.float64)
    alpha, sigma = process.alpha(t).item(), process.sigma(t).item()
    assert process.log_ratio(t).item() == pytest.approx(math.log(alpha / sigma), abs=1e-9)
    assert process.time_at(process.log_ratio(t)).item() == pytest.approx(t.item(), rel=1e-6)


def test_perturb_has_the_marginal_of_the_forward_sde():
    """Against a simulation of dx = -beta/2 x dt + sqrt(beta) dw."""
    process, end, n = VPSDE(), 0.3, 2000
    generator = torch.Generator().manual_seed(0)
    x = torch.full((4000,), 1.5, dtype=torch.float64)
    for i in range(n):
        beta = 0.1 + 19.9 * end * i / n
        dt = end / n
        x = x - 0.5 * beta * x * dt + math.sqrt(beta * dt) * torch.randn(x.shape, dtype=x.dtype, generator=generator)
    start, t = torch.full((4000, 1), 1.5), torch.full((4000,), end)
    perturbed = process.perturb(start, t, torch.randn(4000, 1, generator=generator))
    assert perturbed.mean().item() == pytest.approx(x.mean().item(), abs=0.05)
    assert perturbed.std().item() == pytest.approx(x.std().item(), rel=0.05)


def test_perturb_takes_each_element_to_its_own_time():
    process = VPSDE()
    clean, noise, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0.1, 0.5, 1.0])
    together = process.perturb(clean, t, noise)
    for i in range(3):
        expected = process.alpha(t[i]) * clean[i] + process.sigma(t[i]) * noise[i]
        torch.testing.assert_close(together[i], expected)
    assert process.perturb(clean.bfloat16(), t, noise.bfloat16()).dtype == torch.bfloat16


def test_times_are_in_the_half_open_interval_and_uniform():
    t = VPSDE().sample_times(10_000, generator=torch.Generator().manual_seed(0))
    assert t.min() > 0
    assert t.max() <= 1
    assert t.mean().item() == pytest.approx(0.5, abs=0.02)


def test_the_model_is_called_with_scaled_times_and_the_condition():
    class Probe(nn.Module):
        def forward(self, x, timesteps, y):
            return torch.stack([timesteps, y], 1)

    answer = VPSDE().predict_noise(Probe(), torch.zeros(2, 2), torch.tensor([0.5, 1.0]), torch.tensor([3, 4]))
    assert answer.tolist() == [[499.5, 3], [999, 4]]


def processes():
    scheduler = SimpleNamespace(
        alphas_cumprod=torch.tensor([0.9, 0.5]), config=SimpleNamespace(prediction_type="epsilon")
    )
    return [(VPSDE(), torch.rand(2)), (SchedulerProcess(scheduler), torch.tensor([0, 1]))]


class TestCallsThatCannotWork:
    class Denoiser(nn.Conv2d):
        def forward(self, x, timesteps):
            return super().forward(x)

    @pytest.mark.parametrize(("process", "t"), processes())
    def test_labels_of_an_unconditional_model(self, process, t):
        message = (
            r"x_t \(2, 3, 4, 4\), times \(2,\), a condition \(2,\) of torch.int64: .*takes 3 positional arguments "
            r"but 4 were given.* drop those it does not take, as labels"
        )
        with pytest.raises(ValueError, match=message):
            process.predict_noise(self.Denoiser(3, 3, 1), torch.zeros(2, 3, 4, 4), t, torch.tensor([1, 2]))

    @pytest.mark.parametrize(("process", "t"), processes())
    def test_data_of_other_channels(self, process, t):
        with pytest.raises(ValueError, match=r"x_t \(2, 1, 4, 4\).*no condition.*shape that the model was made for"):
            process.predict_noise(self.Denoiser(3, 3, 1), torch.zeros(2, 1, 4, 4), t)

    def test_variances_beside_the_noise(self):
        with pytest.raises(ValueError, match=r"answers \(2, 6, 4, 4\) for x_t \(2, 3, 4, 4\).*returns the noise alone"):
            VPSDE().predict_noise(self.Denoiser(3, 6, 1), torch.zeros(2, 3, 4, 4), torch.rand(2))

    def test_no_tensor(self):
        with pytest.raises(TypeError, match="answers tuple: wrap it"):
            VPSDE().predict_noise(lambda x, t: (x, t), torch.zeros(2, 3), torch.rand(2))

    @pytest.mark.parametrize(
        ("layer", "shape", "said"),
        [
            (nn.Conv2d(3, 3, 1), (2, 3, 4, 4, 1), "Expected 3D"),
            (nn.Conv2d(3, 3, 3), (2, 3, 2, 2), "Kernel size can't"),
            (nn.Linear(4, 4), (2, 3), "cannot be multiplied"),
            (nn.LayerNorm(4), (2, 3), "normalized_shape"),
            (nn.GroupNorm(2, 4), (2, 6, 4), "number of channels"),
        ],
    )
    def test_shapes_that_an_operator_refuses(self, layer, shape, said):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = layer

            def forward(self, x, timesteps):
                return self.layer(x)

        with pytest.raises(ValueError, match=f"{said}.*; the data and its conditions must have the shape"):
            VPSDE().predict_noise(Model(), torch.zeros(shape), torch.rand(2))


class TestFailuresInsideTheModel:
    """Of which the caller must read what the model said, not advice on how to call it."""

    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError("no memory"),
            torch.distributed.DistError("a process is gone"),
            BackendCompilerFailed(lambda: None, ValueError("no compiler"), None),
            Unsupported("a graph break at mat1 and mat2 shapes cannot be multiplied"),
            TypeError("takes 3 positional arguments but 4 were given"),
            RuntimeError("view size is not compatible with input tensor's size and stride"),
            IndexError("index out of range in self"),
        ],
    )
    def test_the_exception_passes_unchanged(self, error):
        def model(x, t):
            raise error

        with pytest.raises(type(error)) as caught:
            VPSDE().predict_noise(model, torch.zeros(2, 3), torch.rand(2))
        assert caught.value is error

    def test_a_missing_attribute(self):
        class Unfinished(nn.Module):
            def forward(self, x, timesteps):
                return self.missing(x)

        with pytest.raises(AttributeError, match="no attribute 'missing'"):
            VPSDE().predict_noise(Unfinished(), torch.zeros(2, 3), torch.rand(2))

    def test_a_packed_model_that_trains(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(128, 128)

            def forward(self, x, timesteps):
                return self.layer(x)

        model = Model()
        sparsify(model, "2:4")
        pack(model)
        with pytest.raises(RuntimeError, match=r"^a packed model cannot be trained"):
            VPSDE().predict_noise(model.train(), torch.zeros(2, 128), torch.rand(2))


@pytest.mark.parametrize("arguments", [{"beta_min": 0.0}, {"beta_min": 2.0, "beta_max": 1.0}, {"beta_max": math.inf}])
def test_bad_rates(arguments):
    with pytest.raises(ValueError, match="beta_min <= beta_max"):
        VPSDE(**arguments)


def test_bad_time_scale():
    with pytest.raises(ValueError, match="time_scale must be positive, got 0"):
        VPSDE(time_scale=0)


def test_shapes_that_would_broadcast_are_refused():
    process = VPSDE()
    with pytest.raises(ValueError, match=r"noise has shape \(1, 4\), the data \(2, 4\)"):
        process.perturb(torch.zeros(2, 4), torch.zeros(2), torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"one time an element: \(2,\)"):
        process.perturb(torch.zeros(2, 4), torch.zeros(1), torch.zeros(2, 4))


class TestScheduler:
    """Against diffusers' own ``add_noise``."""

    @pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
    def test_perturb_is_add_noise(self, schedule):
        diffusers = pytest.importorskip("diffusers")
        scheduler = diffusers.DDPMScheduler(num_train_timesteps=100, beta_schedule=schedule)
        process = SchedulerProcess(scheduler)
        t = torch.arange(100)
        clean, noise = torch.randn(100, 1, 2, 2), torch.randn(100, 1, 2, 2)
        # diffusers forms 1 - alphas_cumprod in float32.
        expected = scheduler.add_noise(clean, noise, t)
        torch.testing.assert_close(process.perturb(clean, t, noise), expected, rtol=1e-5, atol=1e-5)

    def test_times_are_the_integers_of_the_scheduler(self):
        diffusers = pytest.importorskip("diffusers")
        process = SchedulerProcess(diffusers.DDIMScheduler(num_train_timesteps=10))
        t = process.sample_times(2000, generator=torch.Generator().manual_seed(0))
        assert t.dtype == torch.int64
        counts = t.bincount()
        assert len(counts) == 10
        assert (counts - 200).abs().max() < 5 * math.sqrt(180)  # binomial

    def test_a_diffusers_model_is_called_as_it_wants(self):
        diffusers = pytest.importorskip("diffusers")
        torch.manual_seed(0)
        model = diffusers.UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
        )
        process = SchedulerProcess(diffusers.DDPMScheduler())
        x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
        with torch.no_grad():
            expected = model(x, t, return_dict=False)[0]
            assert torch.equal(process.predict_noise(model, x, t), expected)
            expected = model(x, t * 999.0, return_dict=False)[0]
            assert torch.equal(VPSDE().predict_noise(model, x, t.float()), expected)

    def test_schedulers_that_cannot_serve(self):
        diffusers = pytest.importorskip("diffusers")
        with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler has no alphas_cumprod"):
            SchedulerProcess(diffusers.FlowMatchEulerDiscreteScheduler())
        with pytest.raises(ValueError, match=r"must predict the noise \('epsilon'\), not 'v_prediction'"):
            SchedulerProcess(diffusers.DDPMScheduler(prediction_type="v_prediction"))

    def test_repr_tells_processes_apart(self):
        diffusers = pytest.importorskip("diffusers")
        kinds = [diffusers.DDPMScheduler(), diffusers.DDPMScheduler(beta_end=0.01), diffusers.DDIMScheduler()]
        texts = [repr(SchedulerProcess(kind)) for kind in kinds]
        assert texts[0] != texts[1]
        assert texts[0] == texts[2]  # the same process, sampled in another way

    def test_shapes_that_would_broadcast_are_refused(self):
        diffusers = pytest.importorskip("diffusers")
        process = SchedulerProcess(diffusers.DDPMScheduler())
        with pytest.raises(ValueError, match=r"one time an element: \(2,\)"):
            process.perturb(torch.zeros(2, 4), torch.zeros(1, dtype=torch.int64), torch.zeros(2, 4))
