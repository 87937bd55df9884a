"""Samplers: from noise to data with a model that predicts the noise."""

import math
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sparsedm_compile.noise import VPSDE
from sparsedm_compile.timestep_schedule import TimestepSchedule

#: Where sampling stops short of t = 0, where the signal-to-noise ratio is infinite; U-ViT's code stops there too.
_END = 1e-3


def sampling_times(*, process: VPSDE | None = None, solver: str = "dpm-solver++", steps: int = 50) -> tuple[float, ...]:
    """The times at which :func:`sample` calls the model with these arguments, in order, in the network's units.

    With :func:`sparsedm_compile.count_macs` they give the MACs of a whole run under a schedule.

    Raises:
        ValueError: an unknown solver, or fewer than 2 steps.
    """
    if solver not in _SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; valid are {', '.join(_SOLVERS)}")
    if steps < 2:
        raise ValueError(f"steps must be at least 2, got {steps}")
    process = process or VPSDE()
    grid, _ = _SOLVERS[solver]
    return tuple(process.time_scale * t for t in grid(process, steps).tolist())


def sample(
    model: nn.Module,
    noise: Tensor,
    *condition: Tensor,
    process: VPSDE | None = None,
    solver: str = "dpm-solver++",
    steps: int = 50,
    clip: float | None = None,
    generator: torch.Generator | None = None,
    schedule: TimestepSchedule | None = None,
    progress: bool = False,
) -> Tensor:
    """Draw one sample for each element of ``noise``; runs without gradients.

    Args:
        model: called as ``model(x_t, process.time_scale * t, *condition)``, with ``t`` of shape ``(B,)``.
        noise: ``(B, ...)``, standard normal; the start of each sample. The same noise gives comparable samples.
        process: what the model was trained on; the default is that of U-ViT's pixel models.
        solver: ``"dpm-solver++"``, the deterministic second-order multistep solver, good from some 20 steps on; or
            ``"euler-maruyama"``, the stochastic one, with which U-ViT's and SparseDM's code measures pixel models, at
            1000 steps.
        steps: calls of the model.
        clip: keep the data that each step predicts within ``[-clip, clip]``; 1 for pixels in [-1, 1]. At t = 1 an error
            of the predicted noise is multiplied by 1 / alpha = 152, and a step never undoes it: without clipping, 1% of
            the samples of this package's digits model hold pixels of about 30, at 15 steps as at 100.
        generator: of the fresh noise of ``"euler-maruyama"``, on the device of ``noise``.
        schedule: the patterns of a sparsified model over time; it gets its own back at the end, also on error.
        progress: show a progress bar.

    Returns:
        The shape, dtype and device of ``noise``; not clamped.

    Raises:
        ValueError: an unknown solver, fewer than 2 steps, ``clip`` not positive, or a generator that the solver has no
            use for; with a schedule, a model that is not sparse, ranges that do not fit it, or that do not cover the
            times of the run.

    Sources: Lu et al., "DPM-Solver++", arXiv 2211.01095, algorithm 2 (the paper clips too); Song et al.,
    arXiv 2011.13456, appendix D (Euler-Maruyama for the reverse SDE).
    """
    visited = sampling_times(process=process, solver=solver, steps=steps)
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be positive, got {clip}; pass None for no clipping")
    if generator is not None and solver == "dpm-solver++":
        raise ValueError("solver 'dpm-solver++' draws no noise: leave generator out, or use 'euler-maruyama'")
    process = process or VPSDE()
    if schedule is not None:
        for time in visited:
            schedule.at(time)  # a time that no range covers fails now, not half way
    grid, run = _SOLVERS[solver]

    def predict(x: Tensor, t: float) -> Tensor:
        if switch is not None:
            switch(process.time_scale * t)
        times = torch.full((len(x),), t, device=x.device)
        predicted = process.predict_noise(model, x, times, *condition)
        if clip is None:
            return predicted
        alpha, sigma = process.alpha(times[0]).item(), process.sigma(times[0]).item()
        clean = ((x - sigma * predicted) / alpha).clamp(-clip, clip)
        return (x - alpha * clean) / sigma

    following = nullcontext() if schedule is None else schedule.use(model)
    bar = tqdm(total=steps, desc="sample", disable=not progress, leave=False)
    with torch.no_grad(), bar, following as switch:
        return run(predict, process, noise, grid(process, steps), generator, bar)


def _equal_ratios(process: VPSDE, steps: int) -> Tensor:
    # Equal steps of log(alpha / sigma), the paper's lambda: on Gaussian data (std 0.3), 25 of them are as exact as 200
    # equal steps of time, the last of which are far too wide. In float64: small differences lose digits in float32.
    return process.time_at(torch.linspace(*_ends(process), steps, dtype=torch.float64))


def _ends(process: VPSDE) -> tuple[float, float]:
    return tuple(process.log_ratio(torch.tensor([1, _END], dtype=torch.float64)).tolist())


def _dpm_solver(predict, process: VPSDE, x: Tensor, times: Tensor, _generator: None, bar: tqdm) -> Tensor:
    steps = len(times)
    first, last = _ends(process)
    width = (last - first) / (steps - 1)
    alphas, sigmas = process.alpha(times).tolist(), process.sigma(times).tolist()
    previous = None
    for i, t in enumerate(times.tolist()):
        clean = (x - sigmas[i] * predict(x, t)) / alphas[i]
        bar.update(1)
        if i + 1 < steps:
            estimate = clean if previous is None else 1.5 * clean - 0.5 * previous  # at the middle of the step
            x = sigmas[i + 1] / sigmas[i] * x - alphas[i + 1] * math.expm1(-width) * estimate
            previous = clean
    return clean  # the first-order step from the last time to t = 0


def _equal_times(_process: VPSDE, steps: int) -> Tensor:
    return torch.linspace(1, _END, steps + 1, dtype=torch.float64)[:-1]


def _euler_maruyama(
    predict, process: VPSDE, x: Tensor, times: Tensor, generator: torch.Generator | None, bar: tqdm
) -> Tensor:
    steps = len(times)
    betas, sigmas = process.beta(times).tolist(), process.sigma(times).tolist()
    width = (1 - _END) / steps
    for i, t in enumerate(times.tolist()):
        # Backwards in time: dx = (beta / 2 x + beta score) dt + sqrt(beta) dw, and the score is -noise / sigma.
        x = x + width * betas[i] * (0.5 * x - predict(x, t) / sigmas[i])
        bar.update(1)
        if i + 1 < steps:  # noise added last would stay in the sample
            fresh = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
            x = x + math.sqrt(width * betas[i]) * fresh
    return x


_SOLVERS = {"dpm-solver++": (_equal_ratios, _dpm_solver), "euler-maruyama": (_equal_times, _euler_maruyama)}
