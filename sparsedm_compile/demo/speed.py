"""One forward pass of a real U-ViT, dense through Inductor against sparse through this package, side by side."""

import copy
import statistics
from dataclasses import dataclass
from typing import Any

import torch

from sparsedm_compile.models import create_uvit, example_inputs
from sparsedm_compile.sparsify import sparsify
from sparsedm_compile.timing import median_ratio, paired_times

_DENSE = {"Inductor": False, "Inductor with freezing": True}


@dataclass(frozen=True)
class ForwardTimes:
    """Times of one forward pass.

    Attributes:
        model, batch, pattern, policy: what ran; the weights are random, which changes no time.
        threads: of the CPU.
        dense_seconds: name -> median, of each dense competitor.
        dense: the name of the faster one.
        sparse_seconds: median.
        ratio: how many times faster sparse is than ``dense``: median over the rounds.
        ratio_spread: interquartile range of that ratio.
        rounds: how many rounds; each ran all candidates once.
        relative_error: of the sparse output, against the same masked weights run densely; maximum over maximum.
    """

    model: str
    batch: int
    pattern: str
    policy: str
    threads: int
    dense_seconds: dict[str, float]
    dense: str
    sparse_seconds: float
    ratio: float
    ratio_spread: float
    rounds: int
    relative_error: float

    def __str__(self) -> str:
        dense = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in self.dense_seconds.items())
        return (
            f"{self.model}, batch {self.batch}, {self.threads} threads: {dense}; {self.pattern} "
            f"{self.sparse_seconds * 1e3:.1f} ms = {self.ratio:.2f}x (spread {self.ratio_spread:.2f}) over {self.dense}"
        )


def time_forward(
    preset: str = "uvit-s/2",
    pattern: str = "2:4",
    *,
    policy: str = "sparsedm",
    batch: int = 4,
    seconds: float = 15.0,
    **overrides: Any,
) -> ForwardTimes:
    """Compile a U-ViT densely and sparsely and time one forward pass of each, in turn.

    Args:
        preset, overrides: see :func:`create_uvit`.
        pattern, policy: see :func:`sparsify`.
        batch: of the inputs.
        seconds: of timing; compiling is on top of it.

    Raises:
        ValueError: an unknown preset, pattern or policy.
    """
    torch.manual_seed(0)
    dense = create_uvit(preset, **overrides).eval()
    sparse = copy.deepcopy(dense)
    sparsify(sparse, pattern, policy=policy)
    inputs = example_inputs(dense, batch)
    compiled = {}
    for name, freezing in _DENSE.items():
        compiled[name] = torch.compile(copy.deepcopy(dense), options={"freezing": freezing})
        # Freezing must be on while Dynamo traces as well, which torch.compile's options alone do not bring about.
        with torch.no_grad(), torch._inductor.config.patch(freezing=freezing):
            compiled[name](*inputs)
    compiled["sparse"] = torch.compile(sparse, backend="sparsedm")

    def run(name: str):
        return lambda: compiled[name](*inputs)

    with torch.no_grad():
        expected, output = sparse(*inputs), compiled["sparse"](*inputs)
        times = paired_times({name: run(name) for name in compiled}, seconds=seconds)
    medians = {name: statistics.median(rounds) for name, rounds in times.items()}
    best = min(_DENSE, key=medians.__getitem__)
    ratio, spread = median_ratio(times[best], times["sparse"])
    return ForwardTimes(
        model=preset,
        batch=batch,
        pattern=pattern,
        policy=policy,
        threads=torch.get_num_threads(),
        dense_seconds={name: medians[name] for name in _DENSE},
        dense=best,
        sparse_seconds=medians["sparse"],
        ratio=ratio,
        ratio_spread=spread,
        rounds=len(times["sparse"]),
        relative_error=((output - expected).abs().max() / expected.abs().max()).item(),
    )
