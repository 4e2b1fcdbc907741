"""Draw 500 digits with a trained pipeline, and let a classifier that knows real digits judge them.

    python examples/judge_digits.py runs/digits

The classifier (k nearest neighbours) and the Fréchet distance compare the drawn digits with real ones, beside what real
digits that neither has seen reach.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from sklearn.neighbors import KNeighborsClassifier

import diffusers_edm2  # noqa: F401  makes the pipeline known to Diffusers
from diffusers_edm2.dataset import DigitsSource
from diffusers_edm2.grid import image_grid
from diffusers_edm2.metrics import frechet_distance


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="run folder of training/train_edm2.py --preset digits")
    parser.add_argument("--per_class", type=int, default=50, help="digits drawn of each class (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn digits (default: %(default)s)")
    parser.add_argument("--minimum", type=float, default=0.95, help="fail below this accuracy (default: %(default)s)")
    args = parser.parse_args()
    if not (args.run_dir / "pipeline").is_dir():
        parser.error(f"{args.run_dir / 'pipeline'} does not exist; train first: see training/train_edm2.py --help")

    train, held_out = DigitsSource("train"), DigitsSource("test")
    pixels = lambda images: images.reshape(len(images), -1).astype(np.float64) / 255  # noqa: E731
    classifier = KNeighborsClassifier(n_neighbors=5).fit(pixels(train.images), train.labels)

    pipeline = DiffusionPipeline.from_pretrained(args.run_dir / "pipeline")
    labels = np.repeat(np.arange(10), args.per_class)
    generator = [torch.Generator().manual_seed(args.seed + i) for i in range(len(labels))]
    drawn = pipeline(class_labels=labels.tolist(), generator=generator, num_inference_steps=18)
    images = drawn.images

    accuracy = classifier.score(pixels(np.stack([np.asarray(image) for image in images])), labels)
    real_accuracy = classifier.score(pixels(held_out.images), held_out.labels)
    distance = frechet_distance(pixels(np.stack([np.asarray(image) for image in images])), pixels(train.images))
    real_distance = frechet_distance(pixels(held_out.images), pixels(train.images))
    grid_file = args.run_dir / "digits.png"
    columns = [images[c * args.per_class + row] for row in range(min(args.per_class, 8)) for c in range(10)]
    image_grid(columns, [str(i % 10) for i in range(len(columns))], columns=10).save(grid_file)

    print(f"{'':32}{'drawn':>10}{'real, held out':>18}")
    print(f"{'recognised as their label':32}{accuracy:>10.1%}{real_accuracy:>18.1%}")
    print(f"{'Fréchet distance of the pixels':32}{distance:>10.3f}{real_distance:>18.3f}")
    print(f"{len(images)} digits drawn, {len(held_out)} held out; the grid is in {grid_file}")
    if accuracy < args.minimum:
        print(f"fewer than {args.minimum:.0%} were recognised: train longer", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
