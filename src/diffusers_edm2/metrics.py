"""How far apart two sets of images are, judged by features of them."""

import numpy as np


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of two sets of features, each taken as a Gaussian (Heusel et al., arXiv 1706.08500, eq. 6).

        |mean_a - mean_b|² + tr(cov_a + cov_b - 2 (cov_a cov_b)^½)

    Computed in float64. It depends on the number of samples: compare only figures of equal numbers.

    Args:
        a, b: features [N, D] and [M, D]; N and M at least 2.

    Raises:
        ValueError: other shapes, or values that are not finite.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features have shapes {a.shape} and {b.shape}; they must be [N, D] and [M, D], N and M >= 2.")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("features hold values that are not finite; look for broken images.")
    cov_a, cov_b = np.cov(a, rowvar=False).reshape(a.shape[1], -1), np.cov(b, rowvar=False).reshape(b.shape[1], -1)
    # cov_a cov_b and S cov_b S with S = cov_a^½ have the same eigenvalues, and the second is symmetric.
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0)).sum()
    distance = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    return float(max(distance, 0.0))
