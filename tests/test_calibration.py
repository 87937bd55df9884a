import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from sparsedm_compile.calibration import CalibrationBatch, calibration_set
from sparsedm_compile.noise import VPSDE


def images(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 2, 3, 3, generator=torch.Generator().manual_seed(seed))


def joined(batches: list[CalibrationBatch]) -> tuple[torch.Tensor, ...]:
    inputs = [torch.cat(parts) for parts in zip(*(b.inputs for b in batches), strict=True)]
    return (*inputs, torch.cat([b.noise for b in batches]))


class TestContents:
    def test_is_the_data_noised_by_the_formula(self):
        data, process = images(10), VPSDE(time_scale=50.0)
        noisy, scaled, noise = joined(calibration_set([data[:6], data[6:]], process=process, samples=10, batch=4))
        t = scaled.double() / 50
        log_alpha = -0.25 * t**2 * 19.9 - 0.5 * t * 0.1
        alpha = log_alpha.exp().view(-1, 1, 1, 1)
        expected = alpha * data + (1 - alpha**2).sqrt() * noise
        torch.testing.assert_close(noisy.double(), expected, atol=1e-5, rtol=1e-5)
        assert noise.std() == pytest.approx(1, abs=0.25)

    @settings(deadline=None, max_examples=25)
    @given(held=st.integers(1, 9), samples=st.integers(1, 20), batch=st.integers(1, 8), seed=st.integers(0, 99))
    def test_sizes_and_order_for_any_numbers(self, held, samples, batch, seed):
        data, labels = images(held), torch.arange(held)
        loader = DataLoader(TensorDataset(data, labels), 2)
        result = calibration_set(loader, samples=samples, batch=batch, seed=seed)
        sizes = [len(b.noise) for b in result]
        assert sum(sizes) == samples
        assert sizes[:-1] == [batch] * (len(sizes) - 1)
        assert all(len(part) == len(b.noise) for b in result for part in b.inputs)
        assert joined(result)[2].tolist() == [i % held for i in range(samples)]  # again from the start, if too few

    @pytest.mark.parametrize("samples", [16, 250])
    def test_times_fill_every_stratum(self, samples):
        times = joined(calibration_set([images(4)], samples=samples))[1] / 999
        assert ((times > 0) & (times <= 1)).all()
        grid = (torch.arange(samples) + 0.5) / samples
        # 5 standard errors of a quantile; of independent draws the largest distance would be ten times that.
        assert (times.sort().values - grid).abs().max() < 5 * 0.5 / (samples * 1024) ** 0.5 + 1 / samples / 100
        assert not torch.equal(times, times.sort().values)

    def test_a_seed_decides_all(self):
        one, same, other = (joined(calibration_set([images(8)], samples=8, seed=s)) for s in (3, 3, 4))
        assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    def test_reads_no_further_than_needed(self):
        def endless():
            for seed in range(3):
                yield images(5, seed)
            raise AssertionError("read too far")

        assert sum(len(b.noise) for b in calibration_set(endless(), samples=15)) == 15

    def test_dtype_of_the_data_is_kept_and_a_batch_is_frozen(self):
        (only,) = calibration_set([images(2).bfloat16()], samples=2)
        assert only.noise.dtype == only.inputs[0].dtype == torch.bfloat16
        with pytest.raises(dataclasses.FrozenInstanceError):
            only.noise = None


class TestProcess:
    def test_any_process_that_draws_perturbs_and_calls(self):
        """Discrete times, a scale before the network and a conversion after it, as a diffusers scheduler has."""

        class Discrete:
            def sample_times(self, batch, *, device="cpu", generator=None):
                return torch.randint(0, 10, (batch,), device=device, generator=generator)

            def perturb(self, clean, t, noise):
                return clean + t.view(-1, 1, 1, 1) * noise

            def predict_noise(self, model, x_t, t, *condition):
                return x_t - 0.5 * model(x_t / 2, t, *condition)

        data = images(20)
        noisy, times, noise = joined(calibration_set([data], process=Discrete(), samples=20))
        assert times.sort().values.tolist() == [i // 2 for i in range(20)]
        torch.testing.assert_close(noisy, (data + times.view(-1, 1, 1, 1) * noise) / 2)


class TestErrors:
    @pytest.mark.parametrize("batches", [[], [torch.empty(0, 3)]])
    def test_no_data(self, batches):
        with pytest.raises(ValueError, match="batches is empty"):
            calibration_set(batches)

    @pytest.mark.parametrize(
        ("batches", "error", "message"),
        [
            (torch.zeros(4, 3), TypeError, r"pass \[tensor\]"),
            (["abc"], TypeError, "batch 0 must be a tensor"),
            ([{"x": 1}], TypeError, "batch 0 must be a tensor"),
            ([torch.zeros(2, 3, dtype=torch.uint8)], TypeError, "batch 0 holds torch.uint8 data"),
            ([torch.zeros(())], ValueError, r"batch 0 has shapes \[\(\)\]"),
            ([(torch.zeros(2, 3), torch.zeros(3))], ValueError, r"\[\(2, 3\), \(3,\)\]; the first dimension"),
            ([torch.zeros(2, 3), torch.zeros(2, 4)], ValueError, r"batch 1 has shapes \[\(2, 4\)\], batch 0"),
            ([(torch.zeros(2, 3), torch.zeros(2)), torch.zeros(2, 3)], ValueError, "they must be alike"),
            ([torch.full((2, 3), float("nan"))], ValueError, "batch 0 holds data that is not finite"),
        ],
    )
    def test_misshaped_data(self, batches, error, message):
        with pytest.raises(error, match=message):
            calibration_set(batches)

    @pytest.mark.parametrize("name", ["samples", "batch"])
    def test_numbers(self, name):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            calibration_set([torch.zeros(2, 3)], **{name: 0})
