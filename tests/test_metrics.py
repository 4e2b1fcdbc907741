"""The Fréchet distance against its closed forms."""

import numpy as np
import pytest

from diffusers_edm2.metrics import frechet_distance


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


def test_errors():
    with pytest.raises(ValueError, match=r"features have shapes \(3, 2\) and \(3, 4\)"):
        frechet_distance(np.zeros((3, 2)), np.zeros((3, 4)))
    with pytest.raises(ValueError, match="features hold values that are not finite"):
        frechet_distance(np.full((3, 2), np.nan), np.zeros((3, 2)))
