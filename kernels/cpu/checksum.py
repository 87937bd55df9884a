"""Noticing that a weight was changed behind autograd's back."""

import functools

import torch
from torch import Tensor

from sparsedm_compile.kernels.cpu import build

_SAMPLES = 64
_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def sampled_checksum(weights: list[Tensor]) -> list[int]:
    """One 64-bit hash per weight over 64 of its elements, at nearly even distances that depend on ``numel`` alone.

    ``weight.data += delta``, which is how LoRA is fused, changes neither identity, ``_version`` nor ``data_ptr``; this
    catches it. It misses a change that touches none of the 64 elements, so only one of less than a fiftieth of the
    weight in one run. Hashes compare within one process only.

    Args:
        weights: of any dtype, strides and device. On a CPU with a compiler this is C++, about a microsecond per weight
            that is in the cache; otherwise torch operators, which on a GPU wait for the device.
    """
    if all(weight.device.type == "cpu" for weight in weights) and build.load() is None:
        return torch.ops.sparsedm_cpu.checksum(weights) if weights else []
    return [_checksum(weight.detach()) for weight in weights]


@functools.lru_cache(maxsize=256)
def _samples(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions into ``size`` elements, and the odd factors that tell equal elements at different positions apart."""
    generator = torch.Generator().manual_seed(size)
    count = min(size, _SAMPLES)
    positions = torch.arange(count) * max(size // _SAMPLES, 1)
    positions += torch.randint(size // _SAMPLES // 8 + 1, (count,), generator=generator)
    factors = torch.randint(2**62, (count,), generator=generator) * 2 + 1
    return positions.to(device), factors.to(device)


def _checksum(weight: Tensor) -> int:
    if weight.is_complex():
        weight = torch.view_as_real(weight)
    positions, factors = _samples(weight.numel(), weight.device)
    bits = weight.view(_INTEGER_OF_SIZE[weight.element_size()]).take(positions).long()
    return int((bits * factors).sum())  # int64 wraps around, which is what a hash wants
