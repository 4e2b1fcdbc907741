"""Features of digits, for `training/sweep.py --metric examples.digit_features:features`.

They are what a small classifier makes of an image before its last layer. It learns on the 1297 real training digits in
about a second, and recognises about 97 % of the others.
"""

import functools

import numpy as np
from sklearn.neural_network import MLPClassifier
from torch import Tensor

from diffusers_edm2.dataset import DigitsSource


def features(images: Tensor) -> np.ndarray:
    """The hidden layer's 32 activations for each image, [B, 32].

    Args:
        images (`Tensor` [B,1,8,8], uint8).
    """
    classifier = trained_classifier()
    return np.maximum(_pixels(images.cpu().numpy()) @ classifier.coefs_[0] + classifier.intercepts_[0], 0)


@functools.cache
def trained_classifier() -> MLPClassifier:
    digits = DigitsSource("train")
    return MLPClassifier((32,), random_state=0, max_iter=1000, alpha=1e-2).fit(_pixels(digits.images), digits.labels)


def _pixels(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1) / 255


if __name__ == "__main__":
    held_out = DigitsSource("test")
    accuracy = trained_classifier().score(_pixels(held_out.images), held_out.labels)
    print(f"{accuracy:.1%} of the digits that it has not seen are recognised")
