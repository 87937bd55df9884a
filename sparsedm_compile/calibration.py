"""Calibration data: noisy inputs with their noise, the times spread evenly over the noise process."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsedm_compile.noise import VPSDE, NoiseProcess

# Draws of time for each sample: their quantiles then lie within a stratum of the exact ones.
_DRAWS_PER_SAMPLE = 1024


@dataclass(frozen=True)
class CalibrationBatch:
    """What a noise predictor is called with, and what it should answer.

    Attributes:
        inputs: of ``model(*inputs)``: ``x_t`` of shape ``(B, ...)``, the times ``(B,)`` in the network's own scale, and
            the conditions, each ``(B, ...)``.
        noise: what was added to the clean data, the shape of ``x_t``; the model should predict it.
    """

    inputs: tuple[Tensor, ...]
    noise: Tensor


def calibration_set(
    batches: Iterable[Tensor | Sequence[Tensor]],
    *,
    process: NoiseProcess | None = None,
    samples: int = 256,
    batch: int = 32,
    seed: int = 0,
) -> list[CalibrationBatch]:
    """Noisy inputs on which to measure a model: the first ``samples`` of the data, each at a time of its own.

    Times are stratified: the quantiles of the process's own distribution of times, evenly spaced in probability and
    shuffled over the samples. Independent draws would leave gaps that differ from seed to seed, and the noise level
    decides what a layer sees.

    Args:
        batches: of clean data ``(B, ...)``, or of ``(data, *condition)``, as :func:`sparsedm_compile.finetune` takes
            them. Read no further than needed; where they hold fewer samples, these come again with other noise.
        process: the noise process that the model was trained on; the default is that of U-ViT's pixel models.
        samples: how many.
        batch: samples in each result but the last, which may be smaller.
        seed: of times and noise.

    Returns:
        Batches on the CPU, the same for a seed on every machine; data and noise in the data's dtype.

    Raises:
        ValueError: no data; shapes that do not fit together; values that are not finite; ``samples`` or ``batch`` is
            not positive.
        TypeError: a batch that holds no tensors, or data that is not floating point.
    """
    for name, value in (("samples", samples), ("batch", batch)):
        if value < 1:
            raise ValueError(f"calibration: {name} must be at least 1, got {value}")
    process = process or VPSDE()
    clean, *conditions = _take(batches, samples)
    generator = torch.Generator().manual_seed(seed)
    times = _stratified_times(process, samples, generator)
    noise = torch.randn(clean.shape, dtype=clean.dtype, generator=generator)
    noisy = process.perturb(clean, times, noise)
    return [
        CalibrationBatch(_network_inputs(process, *parts), part_noise)
        for *parts, part_noise in zip(*(t.split(batch) for t in (noisy, times, *conditions, noise)), strict=True)
    ]


def check_calibration(calibration: Sequence[CalibrationBatch]) -> None:
    """Refuse what is no calibration data.

    Raises:
        TypeError: not a list of :class:`CalibrationBatch`.
        ValueError: it is empty.
    """
    if not isinstance(calibration, Sequence) or not all(isinstance(batch, CalibrationBatch) for batch in calibration):
        raise TypeError("calibration must be a list of CalibrationBatch, as calibration_set(batches) makes it")
    if not calibration:
        raise ValueError("calibration is empty: there is nothing to measure on; see calibration_set(batches)")


def _stratified_times(process: NoiseProcess, samples: int, generator: torch.Generator) -> Tensor:
    # By quantiles of draws, which needs nothing of a process but that it draws times: discrete and non-uniform ones
    # are served alike.
    draws = process.sample_times(samples * _DRAWS_PER_SAMPLE, generator=generator).sort().values
    times = draws[_DRAWS_PER_SAMPLE // 2 :: _DRAWS_PER_SAMPLE]
    return times[torch.randperm(samples, generator=generator)]


def _network_inputs(process: NoiseProcess, noisy: Tensor, times: Tensor, *conditions: Tensor) -> tuple[Tensor, ...]:
    """What ``process`` calls a network with; only the process knows, so it calls one that writes it down."""
    calls: list[tuple[Tensor, ...]] = []

    def network(*inputs: Tensor) -> Tensor:
        calls.append(inputs)
        return inputs[0]

    process.predict_noise(network, noisy, times, *conditions)
    return calls[0]


def _take(batches: Iterable[Tensor | Sequence[Tensor]], samples: int) -> list[Tensor]:
    """The first ``samples`` of the data and of each condition, on the CPU; repeated where there are fewer."""
    if isinstance(batches, Tensor):
        raise TypeError(
            "calibration: batches must be an iterable of batches, got one tensor; pass [tensor] if it is one batch"
        )
    taken: list[list[Tensor]] = []
    have = 0
    for index, item in enumerate(batches):
        parts = [item] if isinstance(item, Tensor) else list(item) if isinstance(item, Sequence) else []
        _check_batch(index, parts, taken[0] if taken else parts)
        taken.append([part.detach().cpu() for part in parts])
        have += len(parts[0])
        if have >= samples:
            break
    if have == 0:
        raise ValueError("calibration: batches is empty: there is nothing to calibrate on")
    order = torch.arange(samples) % have
    return [torch.cat(parts)[order] for parts in zip(*taken, strict=True)]


def _check_batch(index: int, parts: list, first: list[Tensor]) -> None:
    where = f"calibration: batch {index}"
    if not parts or not all(isinstance(part, Tensor) for part in parts):
        raise TypeError(f"{where} must be a tensor or a sequence (data, *condition) of tensors")
    clean = parts[0]
    if not clean.is_floating_point():
        raise TypeError(f"{where} holds {clean.dtype} data; scale it to floats as the model was trained on")
    shapes = [tuple(part.shape) for part in parts]
    if any(not shape for shape in shapes) or len({shape[0] for shape in shapes}) != 1:
        raise ValueError(f"{where} has shapes {shapes}; the first dimension of data and conditions must be one length")
    if [shape[1:] for shape in shapes] != [tuple(part.shape[1:]) for part in first]:
        raise ValueError(f"{where} has shapes {shapes}, batch 0 {[tuple(p.shape) for p in first]}; they must be alike")
    if not torch.isfinite(clean).all():
        raise ValueError(f"{where} holds data that is not finite")
