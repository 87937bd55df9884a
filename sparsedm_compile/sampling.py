"""Samplers: from noise to data with a model that predicts the noise."""

import math

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sparsedm_compile.noise import VPSDE

#: Where sampling stops short of t = 0, where the signal-to-noise ratio is infinite; U-ViT's code stops there too.
_END = 1e-3


def sample(
    model: nn.Module,
    noise: Tensor,
    *condition: Tensor,
    process: VPSDE | None = None,
    solver: str = "dpm-solver++",
    steps: int = 50,
    clip: float | None = None,
    generator: torch.Generator | None = None,
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
        progress: show a progress bar.

    Returns:
        The shape, dtype and device of ``noise``; not clamped.

    Raises:
        ValueError: an unknown solver, fewer than 2 steps, ``clip`` not positive, or a generator that the solver has no
            use for.

    Sources: Lu et al., "DPM-Solver++", arXiv 2211.01095, algorithm 2 (the paper clips too); Song et al.,
    arXiv 2011.13456, appendix D (Euler-Maruyama for the reverse SDE).
    """
    if solver not in _SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; valid are {', '.join(_SOLVERS)}")
    if steps < 2:
        raise ValueError(f"steps must be at least 2, got {steps}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be positive, got {clip}; pass None for no clipping")
    if generator is not None and solver == "dpm-solver++":
        raise ValueError("solver 'dpm-solver++' draws no noise: leave generator out, or use 'euler-maruyama'")
    process = process or VPSDE()

    def predict(x: Tensor, t: float) -> Tensor:
        times = torch.full((len(x),), t, device=x.device)
        predicted = process.predict_noise(model, x, times, *condition)
        if clip is None:
            return predicted
        alpha, sigma = process.alpha(times[0]).item(), process.sigma(times[0]).item()
        clean = ((x - sigma * predicted) / alpha).clamp(-clip, clip)
        return (x - alpha * clean) / sigma

    with torch.no_grad(), tqdm(total=steps, desc="sample", disable=not progress, leave=False) as bar:
        return _SOLVERS[solver](predict, process, noise, steps, generator, bar)


def _dpm_solver(predict, process: VPSDE, x: Tensor, steps: int, _generator: None, bar: tqdm) -> Tensor:
    # Equal steps of log(alpha / sigma), the paper's lambda: on Gaussian data (std 0.3), 25 of them are as exact as 200
    # equal steps of time, the last of which are far too wide. In float64: small differences lose digits in float32.
    ends = process.log_ratio(torch.tensor([1, _END], dtype=torch.float64)).tolist()
    width = (ends[1] - ends[0]) / (steps - 1)
    times = process.time_at(torch.linspace(*ends, steps, dtype=torch.float64))
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


def _euler_maruyama(
    predict, process: VPSDE, x: Tensor, steps: int, generator: torch.Generator | None, bar: tqdm
) -> Tensor:
    times = torch.linspace(1, _END, steps + 1, dtype=torch.float64)[:-1]
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


_SOLVERS = {"dpm-solver++": _dpm_solver, "euler-maruyama": _euler_maruyama}
