import numpy as np
import pytest
import scipy.linalg
import torch

from sparsedm_compile.quality.distances import ReferenceSet
from sparsedm_compile.quality.features import Features


def flat(images):
    return images.flatten(1)


FLAT = Features("flat", "0" * 64, flat)


def images(seed, count, shift=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(12, 12, generator=torch.Generator().manual_seed(99))
    values = torch.randn(count, 12, generator=generator) @ mixing
    return (scale * values + shift).reshape(count, 3, 2, 2)


def frechet_by_scipy(x, y):
    x, y = (a.flatten(1).double().numpy() for a in (x, y))
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(cov_x @ cov_y).real
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x + cov_y - 2 * root))


def kernel_by_definition(x, y):
    x, y = (a.flatten(1).double() for a in (x, y))

    def k(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    n, m = len(x), len(y)
    within_x = (k(x, x).sum() - k(x, x).trace()) / (n * (n - 1))
    within_y = (k(y, y).sum() - k(y, y).trace()) / (m * (m - 1))
    return (within_x + within_y - 2 * k(x, y).mean()).item()


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.5, 1.0), (0.0, 0.3)])
def test_both_distances_against_their_definitions(shift, scale):
    real, generated = images(0, 300), images(1, 300, shift, scale)
    measured = ReferenceSet(FLAT, real).distances(generated)
    assert measured.frechet == pytest.approx(frechet_by_scipy(real, generated), rel=1e-9)
    # All images are in each of the subsets, so their mean is the distance of the whole sets.
    assert measured.kernel == pytest.approx(kernel_by_definition(real, generated), rel=1e-9)


def test_float64_keeps_a_small_distance_beside_large_features():
    # In float32 the rounding of features of 1e4 is larger than this distance.
    real, generated = images(0, 400, shift=1e4), images(0, 400, shift=1e4 + 1e-2)
    features = Features("flat", "0" * 64, lambda x: x.flatten(1).double())
    measured = ReferenceSet(features, real.double()).distances(generated.double())
    assert measured.frechet == pytest.approx(frechet_by_scipy(real, generated.double()), abs=1e-4)


def test_the_global_random_state_is_left_alone():
    reference = ReferenceSet(FLAT, images(0, 50))
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    reference.distances(images(1, 50))
    assert torch.equal(torch.rand(1), expected)


def test_bad_sets_are_refused():
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        ReferenceSet(FLAT, images(0, 1))
    reference = ReferenceSet(FLAT, images(0, 10))
    with pytest.raises(ValueError, match=r"images of shape \(3, 2, 2\), got a set of shape \(10, 3, 4, 1\)"):
        reference.distances(images(0, 10).reshape(10, 3, 4, 1))
    with pytest.raises(ValueError, match="not finite"):
        reference.distances(images(0, 10, shift=float("nan")))
