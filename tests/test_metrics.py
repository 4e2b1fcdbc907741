"""The Fréchet distance against its closed forms."""

import numpy as np
import pytest

from diffusers_edm2.metrics import FeatureMoments, frechet_distance


def with_moments(mean: np.ndarray, cov: np.ndarray) -> np.ndarray:
    """Samples whose mean and covariance are exactly these: 4 D points, whitened, then coloured."""
    x = np.random.default_rng(0).standard_normal((4 * len(mean), len(mean)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x @ np.linalg.cholesky(cov).T + mean


def test_commuting_covariances():
    """Diagonal covariances: |m - n|² + sum (sqrt(a) - sqrt(b))²."""
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 1.0])
    x, y = with_moments(np.zeros(3), np.diag(a)), with_moments(np.array([1.0, 2.0, 0.0]), np.diag(b))
    assert frechet_distance(x, y) == pytest.approx(5 + 1 + 0 + 4, rel=1e-10)


def test_covariances_that_do_not_commute():
    """In two dimensions tr (AB)^½ = sqrt(tr AB + 2 sqrt(det AB))."""
    A, B = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -0.3], [-0.3, 3.0]])
    cross = np.sqrt(np.trace(A @ B) + 2 * np.sqrt(np.linalg.det(A @ B)))
    x, y = with_moments(np.zeros(2), A), with_moments(np.zeros(2), B)
    assert frechet_distance(x, y) == pytest.approx(np.trace(A) + np.trace(B) - 2 * cross, rel=1e-10)


def test_same_features_have_distance_zero_even_when_degenerate():
    x = np.random.default_rng(0).standard_normal((10, 30))  # fewer samples than dimensions
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    one = np.random.default_rng(0).standard_normal((10, 1))
    assert frechet_distance(one, one + 2) == pytest.approx(4, rel=1e-9)


def moments_of(*batches: np.ndarray) -> FeatureMoments:
    moments = FeatureMoments(batches[0].shape[1])
    for batch in batches:
        moments.add(batch)
    return moments


def test_moments_may_be_collected_in_batches_and_in_parts():
    x = np.random.default_rng(0).standard_normal((100, 5)) @ np.diag([1, 2, 3, 4, 5]) + 10
    moments = moments_of(x[:30], x[30:31], x[31:])
    assert moments.count == 100
    np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-13)
    np.testing.assert_allclose(moments.covariance, np.cov(x, rowvar=False), rtol=1e-10, atol=1e-10)
    one, two = moments_of(x[:60]), moments_of(x[60:])
    one.sums += two.sums
    np.testing.assert_allclose(one.sums, moments.sums, rtol=1e-13)
    y = np.random.default_rng(1).standard_normal((50, 5))
    assert frechet_distance(moments, y) == pytest.approx(frechet_distance(x, y), rel=1e-10)


def test_errors():
    with pytest.raises(ValueError, match=r"features have shape \(7,\); they must be \[N, 5\], a row per image"):
        FeatureMoments(5).add(np.zeros(7))
    with pytest.raises(ValueError, match="features hold values that are not finite"):
        FeatureMoments(2).add(np.full((3, 2), np.inf))
    with pytest.raises(ValueError, match=r"features have shape \(1, 2\); they must be \[N, D\] with N >= 2"):
        frechet_distance(moments_of(np.zeros((1, 2))), np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"features have shape \(3,\); they must be \[N, D\] with N >= 2"):
        frechet_distance(np.zeros(3), np.zeros((3, 2)))
    with pytest.raises(ValueError, match="features have 2 and 4 dimensions; both sets"):
        frechet_distance(np.zeros((3, 2)), np.zeros((3, 4)))
    with pytest.raises(ValueError, match="features hold values that are not finite"):
        frechet_distance(np.full((3, 2), np.nan), np.zeros((3, 2)))
