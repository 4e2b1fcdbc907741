"""How far apart two sets of images are, judged by features of them."""

import numpy as np


class FeatureMoments:
    """Mean and covariance of features that come in batches: sums in float64, so the memory is that of D² numbers.

    Sums of several parts, such as those of several processes, may be added: `sums` is one array [1 + D + D²] with the
    count, the sum of the features and the sum of their outer products.

    Args:
        dimension: D, the length of a feature vector.
    """

    def __init__(self, dimension: int):
        self.dimension = dimension
        self.sums = np.zeros(1 + dimension + dimension**2)

    def add(self, features: np.ndarray) -> None:
        """Take in features [N, D].

        Raises:
            ValueError: another shape, or values that are not finite.
        """
        x = np.asarray(features, np.float64)
        if x.ndim != 2 or x.shape[1] != self.dimension:
            raise ValueError(f"features have shape {x.shape}; they must be [N, {self.dimension}], a row per image.")
        if not np.isfinite(x).all():
            raise ValueError("features hold values that are not finite; look for broken images.")
        self.sums += np.concatenate([[len(x)], x.sum(0), (x.T @ x).flatten()])

    @property
    def count(self) -> int:
        """The number of images."""
        return round(self.sums[0])

    @property
    def mean(self) -> np.ndarray:
        """Mean [D]."""
        return self.sums[1 : 1 + self.dimension] / self.count

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased covariance [D, D]."""
        products = self.sums[1 + self.dimension :].reshape(self.dimension, self.dimension)
        return (products - self.count * np.outer(self.mean, self.mean)) / (self.count - 1)


def frechet_distance(a: np.ndarray | FeatureMoments, b: np.ndarray | FeatureMoments) -> float:
    """Fréchet distance of two sets of features, each taken as a Gaussian (Heusel et al., arXiv 1706.08500, eq. 6).

        |mean_a - mean_b|² + tr(cov_a + cov_b - 2 (cov_a cov_b)^½)

    Computed in float64. It depends on the number of samples: compare only figures of equal numbers.

    Args:
        a, b: features [N, D] and [M, D], or their moments; N and M at least 2.

    Raises:
        ValueError: other shapes, or values that are not finite.
    """
    (mean_a, cov_a), (mean_b, cov_b) = _moments(a), _moments(b)
    if len(mean_a) != len(mean_b):
        raise ValueError(f"features have {len(mean_a)} and {len(mean_b)} dimensions; both sets need the same ones.")
    # cov_a cov_b and S cov_b S with S = cov_a^½ have the same eigenvalues, and the second is symmetric.
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0)).sum()
    distance = np.square(mean_a - mean_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    return float(max(distance, 0.0))


def _moments(features: np.ndarray | FeatureMoments) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and covariance [D, D]."""
    if isinstance(features, FeatureMoments):
        shape = features.count, features.dimension
    else:
        features = np.asarray(features, np.float64)
        shape = features.shape
    if len(shape) != 2 or shape[0] < 2:
        raise ValueError(f"features have shape {shape}; they must be [N, D] with N >= 2, a row per image.")
    if isinstance(features, FeatureMoments):
        return features.mean, features.covariance
    if not np.isfinite(features).all():
        raise ValueError("features hold values that are not finite; look for broken images.")
    return features.mean(0), np.cov(features, rowvar=False).reshape(shape[1], -1)
