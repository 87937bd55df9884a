"""Distances between sets of images: Fréchet and kernel distance of their features, by torchmetrics, in float64."""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsedm_compile.quality.features import Features


@dataclass(frozen=True)
class Distances:
    """How far a set of images is from the reference set.

    Attributes:
        frechet: Fréchet distance of Gaussians fitted to the features (Heusel et al., arXiv 1706.08500).
        kernel: unbiased squared maximum mean discrepancy under a cubic kernel (Bińkowski et al., arXiv 1801.01401),
            mean over random subsets; it can be slightly negative.
    """

    frechet: float
    kernel: float


class _Given(nn.Module):
    """Features computed once serve both metrics, which see them as "images"."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


class ReferenceSet:
    """The features of real images, to measure generated ones against.

    Both distances depend on how many images are compared: compare only figures of equal counts. With fewer images than
    features (128 of the classifier) covariances are singular, and the Fréchet distance hangs on rounding: by 0.8%, seen
    with 40 images.

    Args:
        features: the extractor.
        images: ``(N, C, H, W)`` in [-1, 1]; the test images, which no model was trained on.

    Raises:
        ImportError: torchmetrics is missing (the extra ``quality``).
        ValueError: fewer than 2 images.
    """

    def __init__(self, features: Features, images: Tensor) -> None:
        try:
            import torchmetrics.image  # noqa: F401
        except ImportError as error:
            raise ImportError("quality figures need torchmetrics: pip install 'sparsedm-compile[quality]'") from error
        if len(images) < 2:
            raise ValueError(f"a reference set needs at least 2 images, got {len(images)}")
        self.extractor = features
        self._shape = images.shape[1:]
        self._real = features(images)

    def distances(self, images: Tensor) -> Distances:
        """Measure images ``(M, C, H, W)`` in [-1, 1] against the reference.

        Raises:
            ValueError: fewer than 2 images, another shape, or values that are not finite.
        """
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance

        if len(images) < 2 or images.shape[1:] != self._shape:
            raise ValueError(
                f"need at least 2 images of shape {tuple(self._shape)}, got a set of shape {tuple(images.shape)}"
            )
        if not images.isfinite().all():
            raise ValueError("images that are not finite have no distance")
        generated = self.extractor(images)
        given = _Given(generated.shape[1])
        subset = min(1000, len(generated), len(self._real))
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore", UserWarning)  # that the kernel distance keeps all features in memory
            torch.manual_seed(0)  # of the subsets
            metrics = FrechetInceptionDistance(given), KernelInceptionDistance(given, subsets=50, subset_size=subset)
            for metric in metrics:
                metric.set_dtype(torch.float64)
                metric.update(self._real, real=True)
                metric.update(generated, real=False)
            frechet, kernel = metrics[0].compute(), metrics[1].compute()[0]
        return Distances(frechet.item(), kernel.item())
