"""Grids of images: sizes, places, labels."""

import numpy as np
import pytest
from PIL import Image

from diffusers_edm2.grid import image_grid


def checks(mode: str = "L", size: tuple[int, int] = (8, 8), seed: int = 0) -> Image.Image:
    """Random pixels."""
    channels = () if mode == "L" else (3,)
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize(
    ("size", "count", "columns", "labelled", "expected"),
    [
        ((8, 8), 10, 10, False, (10 * 66 + 2, 66 + 2)),  # 8 pixels are shown as 64
        ((8, 8), 10, 10, True, (10 * 66 + 2, 66 + 14 + 2)),
        ((8, 8), 11, 5, True, (5 * 66 + 2, 3 * (66 + 14) + 2)),  # the third row holds one
        ((28, 28), 4, 2, False, (2 * 86 + 2, 2 * 86 + 2)),  # 3 x 28 = 84 is the first multiple that is 64 or more
        ((64, 64), 1, 1, False, (68, 68)),
        ((100, 80), 2, 2, False, (2 * 102 + 2, 82 + 2)),  # large ones stay as they are
        ((32, 16), 1, 1, False, (4 * 32 + 4, 4 * 16 + 4)),  # the shorter side decides
        ((8, 8), 2, 5, False, (5 * 66 + 2, 66 + 2)),  # room for 5 columns, though 3 stay empty
    ],
)
def test_size(size, count, columns, labelled, expected):
    images = [checks(size=size, seed=i) for i in range(count)]
    grid = image_grid(images, ["7" if labelled else ""] * count, columns)
    assert (grid.size, grid.mode) == (expected, "RGB")


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_every_image_lies_in_its_place(mode):
    """Row by row, each pixel enlarged to a square of equal ones, white in between."""
    images = [checks(mode, seed=i) for i in range(6)]
    grid = pixels(image_grid(images, [""] * 6, columns=3)).copy()
    for i, image in enumerate(images):
        top, left = 2 + 66 * (i // 3), 2 + 66 * (i % 3)
        shown = grid[top : top + 64, left : left + 64]
        assert np.array_equal(shown, pixels(image).repeat(8, axis=0).repeat(8, axis=1))
        shown[:] = 255
    assert (grid == 255).all()


def test_labels_are_drawn_above_their_image_and_nowhere_else():
    images = [checks(seed=i) for i in range(2)]
    plain, labelled = (pixels(image_grid(images, labels, columns=2)) for labels in (["", "3"], ["8", "3"]))
    changed = (plain != labelled).any(axis=2)
    rows, columns = np.nonzero(changed)
    assert len(rows) > 10  # the strokes of an 8
    assert rows.max() < 2 + 14 and columns.max() < 2 + 64  # in the strip above the first image
    assert not np.array_equal(labelled, pixels(image_grid(images, ["5", "3"], columns=2)))


def test_min_size():
    assert image_grid([checks()], [""], columns=1, min_size=1).size == (12, 12)
    assert image_grid([checks()], [""], columns=1, min_size=9).size == (20, 20)


def test_images_are_left_as_they_were():
    image = checks()
    before = image.tobytes()
    image_grid([image], ["0"], columns=1)
    assert (image.tobytes(), image.mode, image.size) == (before, "L", (8, 8))


@pytest.mark.parametrize(
    ("count", "labels", "message"),
    [
        (0, [], "0 images and 0 labels; a grid needs one label for each image"),
        (2, ["0"], "2 images and 1 labels; a grid needs one label for each image"),
        (1, ["0", "1"], "1 images and 2 labels"),
    ],
)
def test_one_label_per_image(count, labels, message):
    with pytest.raises(ValueError, match=message):
        image_grid([checks()] * count, labels, columns=2)


def test_images_of_several_sizes_are_refused():
    images = [Image.new("L", (8, 8)), Image.new("L", (8, 4))]
    with pytest.raises(
        ValueError, match=r"the images have sizes \[\(8, 4\), \(8, 8\)\]; a grid needs images of one size"
    ):
        image_grid(images, ["", ""], columns=2)
