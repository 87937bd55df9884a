"""How far one set of images is from another: the Fréchet distance of Gaussians fitted to their pixels."""

import torch
from torch import Tensor


def pixel_frechet_distance(images: Tensor, others: Tensor) -> float:
    """``|mean difference|^2 + trace(C1 + C2 - 2 (C1 C2)^(1/2))`` of the pixels, computed in float64.

    The formula of the FID, but on raw pixels in place of a network's features, which at 8 x 8 pixels say enough. It is
    not an FID and cannot be compared with one. It falls as the sets grow: compare only distances between sets of equal
    sizes.

    Args:
        images, others: ``(N, ...)`` and ``(M, ...)`` of the same shape an image, at least 2 images each.

    Raises:
        ValueError: images of different shapes, fewer than 2, or pixels that are not finite.

    Source: Dowson and Landau, "The Fréchet distance between multivariate normal distributions", 1982.
    """
    if images.shape[1:] != others.shape[1:] or min(len(images), len(others)) < 2:
        raise ValueError(
            f"need two sets of at least 2 images of one shape, got {tuple(images.shape)} and {tuple(others.shape)}"
        )
    x, y = images.flatten(1).double(), others.flatten(1).double()
    if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
        raise ValueError("images with pixels that are not finite have no distance")
    cov_x, cov_y = torch.atleast_2d(torch.cov(x.T)), torch.atleast_2d(torch.cov(y.T))
    # The trace of (C1 C2)^(1/2) through the symmetric C1^(1/2) C2 C1^(1/2), which has the same eigenvalues: pixels that
    # never change make the covariances singular, and a general matrix root fails there.
    values, vectors = torch.linalg.eigh(cov_x)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ cov_y @ root).clamp(min=0).sqrt().sum()
    distance = (x.mean(0) - y.mean(0)).square().sum() + cov_x.trace() + cov_y.trace() - 2 * shared
    return distance.clamp(min=0).item()
