"""What this machine can do at most, as measured: the rate of a dense product, and of a copy."""

import torch

from sparsedm_compile.timing import paired_times

# Squares that fit the caches of one core and of a socket; the best of them counts.
_SIZES = (384, 768, 1536)
_COPY = 64 << 20  # floats: 256 MB, beyond any cache


def measure_peak(seconds: float = 2.0) -> dict[str, float]:
    """``{"gflops", "gbytes"}`` at torch's present number of threads, the fastest round of each.

    The rate is that of float32 matrix products, which reach 90 to 95% of what the FMA units can do: a share of it is a
    little more than the share of the theoretical peak. A copy's bytes are counted read and written.
    """
    products = {}
    for size in _SIZES:
        a, b, out = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
        products[size] = lambda a=a, b=b, out=out: torch.mm(a, b, out=out)
    source, target = torch.zeros(_COPY), torch.zeros(_COPY)
    times = paired_times({**products, "copy": lambda: target.copy_(source)}, seconds=seconds)
    return {
        "gflops": max(2 * size**3 / min(times[size]) for size in _SIZES) / 1e9,
        "gbytes": 2 * source.nbytes / min(times["copy"]) / 1e9,
    }
