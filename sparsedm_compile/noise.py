"""The noise processes that a diffusion model is trained on: the variance-preserving SDE, or a diffusers scheduler's."""

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class NoiseProcess(Protocol):
    """What training asks of a process: draw times, add noise, call the model. Its ``repr`` tells it from others."""

    def sample_times(
        self, batch: int, *, device: torch.device | str = "cpu", generator: torch.Generator | None = None
    ) -> Tensor:
        """Times to train at, ``(batch,)``; ``generator`` lives on ``device``."""

    def perturb(self, clean: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """``x_t``: ``clean`` and ``noise`` are ``(B, ...)``, ``t`` is ``(B,)``; the dtype of ``clean``.

        Raises:
            ValueError: ``noise`` has another shape, or ``t`` is not one time an element of the batch.
        """

    def predict_noise(self, model: nn.Module, x_t: Tensor, t: Tensor, *condition: Tensor) -> Tensor:
        """The noise that ``model`` sees in ``x_t``; the shape of ``x_t``.

        Raises:
            ValueError: the model does not take these inputs, or answers another shape. What fails inside it for
                other reasons is raised as it is.
            TypeError: it answers no tensor.
        """


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

    def sample_times(
        self, batch: int, *, device: torch.device | str = "cpu", generator: torch.Generator | None = None
    ) -> Tensor:
        """Uniform times in (0, 1], float32 ``(batch,)``; ``generator`` lives on ``device``."""
        return 1 - torch.rand(batch, device=device, generator=generator)

    def perturb(self, clean: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """``x_t``, as :class:`NoiseProcess` says."""
        return _mix(clean, noise, t, self.alpha, self.sigma)

    def predict_noise(self, model: nn.Module, x_t: Tensor, t: Tensor, *condition: Tensor) -> Tensor:
        """Call ``model(x_t, time_scale * t, *condition)``, as :class:`NoiseProcess` says; ``t`` is ``(B,)``."""
        return _predict(model, x_t, self.time_scale * t, condition)


class SchedulerProcess:
    """The discrete process of a diffusers scheduler, ``x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise``, at integer times.

        process = SchedulerProcess(DDPMScheduler.from_pretrained(...))

    Args:
        scheduler: any object with ``alphas_cumprod``, a tensor ``(T,)``, and ``config.prediction_type``: DDPM, DDIM,
            DPM-Solver and the like. It is only read.

    Raises:
        ValueError: no ``alphas_cumprod`` (flow matching, Karras sigmas), or the model predicts something else than the
            noise.

    Source: Ho et al., "Denoising Diffusion Probabilistic Models", arXiv 2006.11239, equation 4.
    """

    def __init__(self, scheduler: Any) -> None:
        cumulative = getattr(scheduler, "alphas_cumprod", None)
        if not isinstance(cumulative, Tensor):
            raise ValueError(
                f"SchedulerProcess: {type(scheduler).__name__} has no alphas_cumprod; pass a DDPM-like scheduler"
            )
        predicts = scheduler.config.prediction_type
        if predicts != "epsilon":
            raise ValueError(f"SchedulerProcess: the model must predict the noise ('epsilon'), not {predicts!r}")
        cumulative = cumulative.to("cpu", torch.float64)
        self._alpha, self._sigma = cumulative.sqrt().float(), (1 - cumulative).sqrt().float()

    def sample_times(
        self, batch: int, *, device: torch.device | str = "cpu", generator: torch.Generator | None = None
    ) -> Tensor:
        """Uniform integers in [0, T), int64 ``(batch,)``; ``generator`` lives on ``device``."""
        return torch.randint(len(self._alpha), (batch,), device=device, generator=generator)

    def alpha(self, t: Tensor) -> Tensor:
        """The share of the data in ``x_t``, float32, any shape; ``t`` holds integers."""
        return self._alpha.to(t.device)[t]

    def sigma(self, t: Tensor) -> Tensor:
        """The share of the noise in ``x_t``, float32, any shape; ``t`` holds integers."""
        return self._sigma.to(t.device)[t]

    def perturb(self, clean: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """``x_t``, as :class:`NoiseProcess` says."""
        return _mix(clean, noise, t, self.alpha, self.sigma)

    def predict_noise(self, model: nn.Module, x_t: Tensor, t: Tensor, *condition: Tensor) -> Tensor:
        """Call ``model(x_t, t, *condition)``, as :class:`NoiseProcess` says; ``t`` holds integers, ``(B,)``."""
        return _predict(model, x_t, t, condition)

    def __repr__(self) -> str:
        first, last = self._alpha[0].item(), self._alpha[-1].item()
        return f"SchedulerProcess({len(self._alpha)} steps, alpha {first:.9g} to {last:.9g})"


def _mix(
    clean: Tensor, noise: Tensor, t: Tensor, alpha: Callable[[Tensor], Tensor], sigma: Callable[[Tensor], Tensor]
) -> Tensor:
    if noise.shape != clean.shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}, the data {tuple(clean.shape)}; they must be equal")
    if t.shape != clean.shape[:1]:
        raise ValueError(f"t has shape {tuple(t.shape)}, expected one time an element: ({clean.shape[0]},)")
    shape = (-1, *[1] * (clean.dim() - 1))
    return (alpha(t).reshape(shape) * clean + sigma(t).reshape(shape) * noise).to(clean.dtype)


#: What torch's operators say of inputs whose shapes do not fit.
_MISMATCH = re.compile(
    r"expected input.* channels, but got"  # convolutions
    r"|Expected \dD .*input to conv|Kernel size can't be greater than actual input size"
    r"|shapes cannot be multiplied|size mismatch"  # matrix products
    r"|must match the (size of tensor|existing size)|Sizes of tensors must match"  # broadcast, expand, cat
    r"|normalized_shape=.*but got input|equal to the number of channels|running_mean should contain"  # norms
    r"|shape '.*' is invalid for input of size"  # reshape
)


def _remedy(model: nn.Module, arguments: tuple[Tensor, ...], error: Exception) -> str | None:
    """What to do about a call that the model cannot take; None where the error is no proof of a wrong call.

    The exact types, as Dynamo, out of memory and a lost process raise kinds of ``RuntimeError`` that quote anything.
    """
    if type(error) is TypeError and not _takes(model, arguments):
        return (
            "what follows the data in a batch is passed on as conditions: "
            "give those that the model needs, drop those it does not take, as labels"
        )
    if type(error) is RuntimeError and _MISMATCH.search(str(error)):
        return "the data and its conditions must have the shape that the model was made for"
    return None


def _takes(model: nn.Module, arguments: tuple[Tensor, ...]) -> bool:
    try:
        signature = inspect.signature(getattr(model, "forward", model))
    except ValueError:  # compiled code has none
        return True
    try:
        signature.bind(*arguments)
    except TypeError:
        return False
    return True


def _predict(model: nn.Module, x_t: Tensor, time: Tensor, condition: tuple[Tensor, ...]) -> Tensor:
    try:
        output = model(x_t, time, *condition)
    except (TypeError, RuntimeError) as error:
        remedy = _remedy(model, (x_t, time, *condition), error)
        if remedy is None:
            raise
        conditions = "".join(f", a condition {tuple(value.shape)} of {value.dtype}" for value in condition)
        raise ValueError(
            f"the model cannot be called with x_t {tuple(x_t.shape)}, times {tuple(time.shape)}"
            f"{conditions or ' and no condition'}: {error}; {remedy}"
        ) from error
    prediction = getattr(output, "sample", output)  # the field of diffusers' outputs
    if not isinstance(prediction, Tensor):
        raise TypeError(
            f"the model answers {type(output).__name__}: wrap it in a module that returns the predicted noise, a tensor"
        )
    if prediction.shape != x_t.shape:
        raise ValueError(
            f"the model answers {tuple(prediction.shape)} for x_t {tuple(x_t.shape)}, and must answer one noise value "
            "for each value: wrap one that also predicts variances in a module that returns the noise alone"
        )
    return prediction
