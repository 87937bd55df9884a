"""Judging one model: distances of its samples over seeds, denoising loss, MACs and bytes."""

import time
from dataclasses import asdict, dataclass, replace
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from sparsedm_compile.macs import count_macs
from sparsedm_compile.quality.distances import ReferenceSet
from sparsedm_compile.quality.draw import draw
from sparsedm_compile.quality.features import weights_sha256
from sparsedm_compile.quality.validation import validation_loss

# Its times are spread over a batch: fixed, so that the loss does not depend on how samples are drawn.
_VALIDATION_BATCH = 500


@dataclass(frozen=True)
class Score:
    """What was measured of one model.

    Attributes:
        name: of the row.
        pattern: of its sparse layers; several, joined by commas, where layers differ.
        macs: of linear and convolution layers, zeros skipped; ``attention_macs`` comes on top.
        weight_bytes: of all parameters, packed.
        validation_loss: see :func:`validation_loss`.
        frechet, kernel: one a seed; see :class:`Distances`.
        samples, solver, steps, seeds: how the samples were drawn.
        weights_sha256, features_sha256: of the model and of the feature extractor.
        seconds: what judging took.
    """

    name: str
    pattern: str
    macs: int
    attention_macs: int
    weight_bytes: int
    validation_loss: float
    frechet: tuple[float, ...]
    kernel: tuple[float, ...]
    samples: int
    solver: str
    steps: int
    seeds: tuple[int, ...]
    weights_sha256: str
    features_sha256: str
    seconds: float

    @property
    def frechet_mean(self) -> float:
        """Over seeds."""
        return mean(self.frechet)

    @property
    def frechet_spread(self) -> float:
        """Sample standard deviation over seeds; 0 for one seed."""
        return stdev(self.frechet) if len(self.frechet) > 1 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON."""
        return asdict(self)

    def merged(self, later: "Score") -> "Score":
        """This score with the seeds of a later one, of the same model judged in the same way, added."""
        added = {name: getattr(self, name) + getattr(later, name) for name in ("frechet", "kernel", "seeds", "seconds")}
        return replace(self, **added)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Score":
        """The inverse of :meth:`to_dict`, also after a way through JSON."""
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def judge(
    name: str,
    model: nn.Module,
    reference: ReferenceSet,
    test_images: Tensor,
    *,
    seeds: tuple[int, ...],
    samples: int,
    solver: str = "dpm-solver++",
    steps: int = 20,
    batch: int = 500,
    pattern: str = "",
    progress: bool = True,
) -> tuple[Score, Tensor]:
    """Measure a model, compiled: what is judged is what the sparse kernels compute.

    Args:
        name: of the row.
        model: a noise predictor without condition, dense or sparse, in eval mode.
        reference: the test images' features.
        test_images: ``(N, C, H, W)`` in [-1, 1].
        seeds, samples, solver, steps, batch: see :func:`draw`.
        pattern: what the row is labelled with.

    Returns:
        The score, and the first samples of the first seed, for a picture.
    """
    start = time.perf_counter()
    compiled = torch.compile(model, backend="sparsedm")
    batch = min(batch, samples, len(test_images))
    shape = tuple(test_images.shape[1:])
    distances, shown = [], None
    for seed in seeds:
        drawn = draw(compiled, samples, shape, seed=seed, solver=solver, steps=steps, batch=batch, progress=progress)
        distances.append(reference.distances(drawn))
        shown = drawn[:64] if shown is None else shown
    macs = count_macs(model, test_images[:1], torch.zeros(1))
    score = Score(
        name=name,
        pattern=pattern,
        macs=macs.sparse,
        attention_macs=macs.attention,
        weight_bytes=macs.packed_bytes,
        validation_loss=validation_loss(compiled, test_images, batch=min(_VALIDATION_BATCH, len(test_images))),
        frechet=tuple(d.frechet for d in distances),
        kernel=tuple(d.kernel for d in distances),
        samples=samples,
        solver=solver,
        steps=steps,
        seeds=tuple(seeds),
        weights_sha256=weights_sha256(model),
        features_sha256=reference.extractor.sha256,
        seconds=time.perf_counter() - start,
    )
    return score, shown
