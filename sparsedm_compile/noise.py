"""The noise process that a diffusion model is trained on and sampled from: the variance-preserving SDE."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class VPSDE:
    """The variance-preserving SDE with a linear rate of noise, in continuous time t from 0 (data) to 1 (noise).

    ``x_t = alpha(t) x_0 + sigma(t) noise``, with ``alpha^2 + sigma^2 = 1`` and ``log alpha`` minus half the integral of
    ``beta``. The defaults are those of U-ViT's published pixel models (CIFAR-10, CelebA, ImageNet 64), whose networks
    predict the noise and take the time as ``999 t``.

    Args:
        beta_min, beta_max: rate of noise at t = 0 and t = 1.
        time_scale: what the network is called with is ``time_scale * t``.

    Raises:
        ValueError: not ``0 < beta_min <= beta_max``, or ``time_scale`` is not positive.

    Source: Song et al., "Score-Based Generative Modeling through SDEs", arXiv 2011.13456, section 3.4 and appendix C.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    time_scale: float = 999.0

    def __post_init__(self) -> None:
        if not 0 < self.beta_min <= self.beta_max < math.inf:
            raise ValueError(f"VPSDE needs 0 < beta_min <= beta_max, got {self.beta_min} and {self.beta_max}")
        if not 0 < self.time_scale < math.inf:
            raise ValueError(f"VPSDE: time_scale must be positive, got {self.time_scale}")

    def beta(self, t: Tensor) -> Tensor:
        """The rate of noise at ``t``, any shape."""
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def log_alpha(self, t: Tensor) -> Tensor:
        """The logarithm of the share of the data in ``x_t``, any shape."""
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def alpha(self, t: Tensor) -> Tensor:
        """The share of the data in ``x_t``, any shape."""
        return self.log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        """The share of the noise in ``x_t``, any shape; exact also near t = 0."""
        return (-torch.expm1(2 * self.log_alpha(t))).sqrt()

    def log_ratio(self, t: Tensor) -> Tensor:
        """``log(alpha / sigma)``, half the log of the signal-to-noise ratio; falls with ``t``."""
        return self.log_alpha(t) - self.sigma(t).log()

    def time_at(self, log_ratio: Tensor) -> Tensor:
        """The time at which ``log(alpha / sigma)`` has this value: the inverse of :meth:`log_ratio`."""
        slope = self.beta_max - self.beta_min
        # -2 log alpha = log(1 + exp(-2 log_ratio)) is a quadratic in t, solved so that no digits cancel near t = 0.
        decay = torch.nn.functional.softplus(-2 * log_ratio)
        return 2 * decay / (self.beta_min + (self.beta_min**2 + 2 * slope * decay).sqrt())

    def sample_times(self, batch: int, *, device: torch.device | str = "cpu", generator: torch.Generator | None = None):
        """Uniform times in (0, 1], float32 ``(batch,)``; ``generator`` lives on ``device``."""
        return 1 - torch.rand(batch, device=device, generator=generator)

    def perturb(self, clean: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """``x_t``: ``clean`` and ``noise`` are ``(B, ...)``, ``t`` is ``(B,)``; the dtype of ``clean``.

        Raises:
            ValueError: ``noise`` has another shape, or ``t`` is not one time an element of the batch.
        """
        if noise.shape != clean.shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, the data {tuple(clean.shape)}; they must be equal")
        if t.shape != clean.shape[:1]:
            raise ValueError(f"t has shape {tuple(t.shape)}, expected one time an element: ({clean.shape[0]},)")
        shape = (-1, *[1] * (clean.dim() - 1))
        alpha, sigma = self.alpha(t).reshape(shape), self.sigma(t).reshape(shape)
        return (alpha * clean + sigma * noise).to(clean.dtype)

    def predict_noise(self, model: nn.Module, x_t: Tensor, t: Tensor, *condition: Tensor) -> Tensor:
        """Call ``model(x_t, time_scale * t, *condition)``; ``t`` is ``(B,)``, the result has the shape of ``x_t``."""
        return model(x_t, self.time_scale * t, *condition)
