"""Labelled grids of images."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont


def image_grid(images: Sequence[Image.Image], labels: Sequence[str], columns: int, min_size: int = 64) -> Image.Image:
    """Images of one size in rows of `columns`, each under its label; small ones are enlarged by a whole factor.

    Args:
        images: PIL images, all of the size of the first.
        labels: one text per image; "" for none.
        columns: images per row.
        min_size: the shorter side of each picture, in pixels, at least.

    Raises:
        ValueError: no images, images of several sizes, or not one label per image.
    """
    if not images or len(images) != len(labels):
        raise ValueError(f"{len(images)} images and {len(labels)} labels; a grid needs one label for each image.")
    if len({image.size for image in images}) > 1:
        raise ValueError(f"the images have sizes {sorted({i.size for i in images})}; a grid needs images of one size.")
    factor = max(1, -(-min_size // min(images[0].size)))
    width, height = (side * factor for side in images[0].size)
    font = ImageFont.load_default()
    text_height = 14 if any(labels) else 0
    rows = -(-len(images) // columns)
    gap = 2
    grid = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + text_height + gap) + gap), "white")
    draw = ImageDraw.Draw(grid)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        left = gap + (i % columns) * (width + gap)
        top = gap + (i // columns) * (height + text_height + gap)
        draw.text((left, top), label, fill="black", font=font)
        grid.paste(image.resize((width, height), Image.Resampling.NEAREST), (left, top + text_height))
    return grid
