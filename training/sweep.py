"""Search the EMA length and the guidance of a finished run: `python training/sweep.py --help`.

Every combination of --sigma_rel, --guide_sigma_rel and --guidance_scale draws the same images from the same noise; the
Fréchet distance of their features to those of real images judges it. The features come from a function of your own.
"""

import argparse
import csv
import importlib
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from torch import Tensor
from tqdm.auto import tqdm

from diffusers_edm2 import EDM2Pipeline, EDM2UNet2DModel
from diffusers_edm2.checkpoint import CheckpointError, lock_run
from diffusers_edm2.dataset import TrainingImages, open_source
from diffusers_edm2.ema import parse_sigma_rel
from diffusers_edm2.files import atomic_file, atomic_folder, clean_leftovers, write_atomic
from diffusers_edm2.metrics import FeatureMoments, frechet_distance
from diffusers_edm2.presets import parse_images
from diffusers_edm2.snapshots import SnapshotError, find_networks, newest_network, run_options, run_sigma_data

COLUMNS = ("sigma_rel", "guide_sigma_rel", "guidance_scale", "frechet_distance", "seconds", "best")
# They choose the points of the search, not how a point is measured: a sweep may go on with others.
FREE = {"run_dir", "output_dir", "sigma_rel", "guide_sigma_rel", "guidance_scale", "batch_size", "save_best"}


GUIDE = ("guide_run", "guide_nimg", "guidance_interval")


class Point(NamedTuple):
    """One combination; `guide_sigma_rel` is None without guidance, and for a network that guides itself."""

    sigma_rel: float
    guide_sigma_rel: float | None
    guidance_scale: float


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sweep.py",
        description="Search the EMA length and the guidance of a finished run. Networks that are not among its "
        "snapshots are reconstructed, once. The table grows row by row; started again, the search goes on.",
        epilog="Example: python training/sweep.py runs/digits --sigma_rel 0.05,0.10,...,0.20 --guidance_scale 1,1.5,2 "
        "--guide_nimg 32Ki --metric examples.digit_features:features --num_images 500",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("run_dir", type=Path, help="run folder of training/train_edm2.py")
    add(
        "--output_dir", type=Path, metavar="DIR", help="sweep.csv, sweep.png and best.json go here (default: RUN/sweep)"
    )
    add("--metric", required=True, metavar="MODULE:FUNCTION", help="features to judge by: a function in a module that "
        "can be imported from the current folder; it gets images, a uint8 tensor [B,C,H,W] on the device that draws "
        "them, and returns features [B,D]")  # fmt: skip
    add("--num_images", type=int, default=10000, metavar="N", help="images drawn at each point, classes in equal "
        "shares; the distance depends on N (default: %(default)s)")  # fmt: skip
    add("--save_best", type=Path, metavar="DIR", help="save the best point as a pipeline folder")

    group = parser.add_argument_group("points of the search")
    group.add_argument("--sigma_rel", type=_list(parse_sigma_rel), default="0.05,0.10,...,0.20", metavar="STD,...",
        help='EMA lengths, fractions of the training; "..." goes on in even steps (default: %(default)s)')  # fmt: skip
    group.add_argument("--guidance_scale", type=_list(parse_weights), default="1", metavar="W,...",
        help="guidance weights; 1 is no guidance (default: %(default)s)")  # fmt: skip
    group.add_argument("--guide_sigma_rel", type=_list(parse_sigma_rel), metavar="STD,...",
        help="EMA lengths of the guide (default: the first that its run tracked)")  # fmt: skip
    group.add_argument("--nimg", type=_list(parse_images), metavar="IMAGES",
        help="moment of the run, with suffixes Ki, Mi (default: the last snapshot)")  # fmt: skip
    group.add_argument("--guide_run", type=Path, metavar="DIR", help="run folder of the guide (default: the same run)")
    group.add_argument("--guide_nimg", type=_list(parse_images), metavar="IMAGES",
        help="moment of the guide's run (default: its last snapshot); without any --guide option, a network trained "
        "with --label_dropout is guided by itself without classes")  # fmt: skip
    group.add_argument("--guidance_interval", type=_list(parse_interval), metavar="LO,HI",
        help="guide only at noise levels in (LO, HI] (default: at all)")  # fmt: skip

    group = parser.add_argument_group("sampling")
    group.add_argument("--num_inference_steps", type=int, default=32, metavar="N", help="default: %(default)s")
    group.add_argument("--seed", type=int, default=0, help="of the first image, which the others count on from")
    group.add_argument("--batch_size", type=int, default=64, metavar="N", help="images at once, per device "
        "(default: %(default)s)")  # fmt: skip
    group.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default="no",
        help="type of the networks (default: float32)")  # fmt: skip

    group = parser.add_argument_group("real images (default: those that the run was trained on, not mirrored)")
    group.add_argument("--dataset_name", metavar="NAME", help="as in training/train_edm2.py")
    group.add_argument("--train_data_dir", metavar="PATH", help="as in training/train_edm2.py")
    group.add_argument("--dataset_split", metavar="NAME", help="as in training/train_edm2.py")
    group.add_argument("--num_real_images", type=int, metavar="N", help="how many of them (default: all)")
    return parser


def _list(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """argparse shows the message of this error only."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


def parse_weights(text: str) -> tuple[float, ...]:
    weights = tuple(float(part) for part in text.split(","))
    if len(set(weights)) < len(weights) or not all(map(math.isfinite, weights)):
        raise ValueError(f'"{text}" must be different finite numbers, such as 1,1.5,2')
    return weights


def parse_interval(text: str) -> tuple[float, float]:
    low, _, high = text.partition(",")
    interval = float(low), float(high)
    if not 0 <= interval[0] < interval[1]:
        raise ValueError(f'"{text}" must be two noise levels, 0 <= LO < HI, such as 0.28,2.9')
    return interval


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    try:
        sweep(args)
    except (ValueError, OSError, SnapshotError, CheckpointError, ImportError) as error:
        raise SystemExit(f"sweep.py: error: {error}") from error


def sweep(args: argparse.Namespace) -> None:
    # The others wait while the main process reconstructs, and for the slowest at each point.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=30))])
    if args.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("--mixed_precision fp16 needs a GPU; use bf16 or no on a CPU.")
    is_main, output_dir = accelerator.is_main_process, args.output_dir or args.run_dir / "sweep"
    if args.save_best and args.save_best.exists():
        raise ValueError(f"--save_best {args.save_best} exists already; give another folder.")
    features_of = load_metric(args.metric)
    guide_run, points = plan(args)
    # Fixed now, by one process: a run that goes on gets newer snapshots meanwhile.
    args.nimg, args.guide_nimg, points = broadcast_object_list([args.nimg, args.guide_nimg, points])
    settings = measured_settings(args, guide_run)
    with lock_run(output_dir) if is_main else nullcontext():
        table = Table(output_dir, settings, points, is_main)
        accelerator.wait_for_everyone()  # all have read the table before its first row is added
        todo = [point for point in points if point not in table.rows]

        # ---- Networks, each made once, by one process -------------------------------------------------------------
        with accelerator.main_process_first():
            paths = find_networks(args.run_dir, [(p.sigma_rel, args.nimg) for p in todo]) if todo else []
            asked = [(p.guide_sigma_rel, args.guide_nimg) for p in todo]
            guide_paths = find_networks(guide_run, asked) if guide_run and todo else [None] * len(todo)

        # ---- Real images, then every point --------------------------------------------------------------------------
        if todo:
            pipe = EDM2Pipeline.from_run(args.run_dir, nimg=args.nimg)
            pipe.set_progress_bar_config(disable=True)
            real = real_moments(args, pipe, features_of, accelerator, output_dir)
            bar = tqdm(total=len(todo) * args.num_images, unit="img", disable=not is_main, mininterval=1)
            for point, path, guide_path in zip(todo, paths, guide_paths, strict=True):
                started = time.perf_counter()
                load_networks(pipe, path, guide_path if point.guidance_scale != 1 else None, args, accelerator.device)
                bar.set_description(describe(point))
                drawn = drawn_moments(args, pipe, point, features_of, accelerator, bar.update)
                distance = frechet_distance(drawn, real) if np.isfinite(drawn.sums).all() else math.inf
                if is_main:
                    table.add(point, distance, time.perf_counter() - started)
                    bar.write(f"{describe(point)}: Fréchet distance {distance:.5g}")
            bar.close()
        if is_main:
            finish(args, output_dir, table)
    accelerator.wait_for_everyone()
    accelerator.end_training()


# ----------------------------------------------------------------------------------------------------------------------
# What is to be done


def load_metric(entry: str) -> Callable[[Tensor], Any]:
    module, _, name = entry.partition(":")
    sys.path.insert(0, os.getcwd())
    if not module or not name:
        raise ValueError(f'--metric {entry} must be "module:function", such as examples.digit_features:features.')
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--metric {entry} cannot be imported from {os.getcwd()}: {error}.") from error


def plan(args: argparse.Namespace) -> tuple[Path | None, list[Point]]:
    """The run of the guide, None for none, and the points; all that can be wrong with them is found here.

    Raises:
        ValueError: options that contradict each other, or that the runs cannot meet.
    """
    for name in ("num_images", "num_inference_steps", "batch_size", "num_real_images"):
        if (value := getattr(args, name)) is not None and value < (2 if "images" in name else 1):
            raise ValueError(f"--{name} {value} is too few; give {2 if 'images' in name else 1} or more.")
    args.nimg = args.nimg or newest_network(args.run_dir)[1]
    has_guide = any(value is not None for value in (args.guide_run, args.guide_sigma_rel, args.guide_nimg))
    weights = [w for w in args.guidance_scale if w != 1]
    if has_guide and not weights:
        raise ValueError("--guidance_scale 1 does not use the guide; add weights, such as --guidance_scale 1,1.5,2.")
    if weights and not has_guide and not run_options(args.run_dir).get("label_dropout"):
        raise ValueError(
            f"--guidance_scale {','.join(map(str, args.guidance_scale))} needs a guide: --guide_nimg for an early "
            "moment of the same run, or --guide_run; or a run trained with --label_dropout."
        )
    guide_run = (args.guide_run or args.run_dir) if has_guide else None
    lengths: Sequence[float | None] = (None,)  # guided by itself
    if guide_run:
        first, newest = newest_network(guide_run)
        lengths, args.guide_nimg = args.guide_sigma_rel or (first,), args.guide_nimg or newest
        scales = [run_sigma_data(folder) for folder in (guide_run, args.run_dir)]
        if scales[0] != scales[1]:
            raise ValueError(f"--guide_run {guide_run} has sigma_data={scales[0]}, {args.run_dir} {scales[1]}.")
    points = [
        Point(sigma_rel, guide if w != 1 else None, w)
        for w in args.guidance_scale
        for guide in (lengths if w != 1 else (None,))
        for sigma_rel in args.sigma_rel
    ]
    return guide_run, points


def measured_settings(args: argparse.Namespace, guide_run: Path | None) -> dict[str, Any]:
    """What makes the figures of one table comparable."""
    settings = {name: value for name, value in vars(args).items() if name not in FREE}
    settings["guide_run"] = str(guide_run) if guide_run not in (None, args.run_dir) else None
    return json.loads(json.dumps(settings, default=str))


# ----------------------------------------------------------------------------------------------------------------------
# One point


def load_networks(pipe: EDM2Pipeline, path: Path, guide_path: Path | None, args, device: torch.device) -> None:
    """Give the pipeline these networks; one that it has already is not loaded again."""
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.mixed_precision]
    for name, wanted in (("unet", path), ("guide_unet", guide_path)):
        present = getattr(pipe, name)
        if wanted is None:
            pipe.register_modules(**{name: None})
        elif present is None or getattr(present, "swept_path", None) != wanted:
            unet = EDM2UNet2DModel.from_pretrained(wanted, torch_dtype=dtype)
            unet.swept_path = wanted
            pipe.register_modules(**{name: unet})
    pipe.to(device)


def drawn_moments(
    args: argparse.Namespace,
    pipe: EDM2Pipeline,
    point: Point,
    features_of: Callable[[Tensor], Any],
    accelerator: Accelerator,
    progress: Callable[[int], Any],
) -> FeatureMoments:
    """Features of --num_images images, of which every process draws its share: image k has seed --seed + k."""
    moments = None
    mine = range(accelerator.process_index, args.num_images, accelerator.num_processes)
    num_classes = pipe.unet.config.num_class_embeds
    for first in range(0, len(mine), args.batch_size):
        numbers = mine[first : first + args.batch_size]
        images = pipe(
            class_labels=[number % num_classes for number in numbers] if num_classes else None,
            num_inference_steps=args.num_inference_steps,
            generator=[torch.Generator().manual_seed(args.seed + number) for number in numbers],
            guidance_scale=point.guidance_scale,
            guidance_interval=args.guidance_interval,
            output_type="pt",
        ).images
        is_finite = bool(images.isfinite().all())
        moments = add_features(moments, features_of, (images.nan_to_num() * 255).round().to(torch.uint8))
        if not is_finite:  # too strong a guidance, or too coarse a type: the worst there is, and the search goes on
            moments.sums[0] = math.nan
        progress(len(numbers) * accelerator.num_processes)
    return reduced(moments, accelerator)


def real_moments(args, pipe, features_of, accelerator: Accelerator, output_dir: Path) -> FeatureMoments:
    """Features of the real images; computed once, and kept for a search that goes on."""
    file = output_dir / "real_images.npz"
    images = open_real_images(args, pipe)
    names = ("metric", "dataset_name", "train_data_dir", "dataset_split", "num_real_images")
    key = json.dumps([images.source.title, len(images), *images.image_shape, *(getattr(args, name) for name in names)])
    if file.exists():
        with np.load(file) as kept:
            if str(kept["key"]) == key:
                moments = FeatureMoments(int(kept["dimension"]))
                moments.sums = kept["sums"]
                return moments
    count = min(len(images), args.num_real_images or len(images))
    mine = range(accelerator.process_index, count, accelerator.num_processes)
    moments = None
    for first in tqdm(range(0, len(mine), args.batch_size), "real images", disable=not accelerator.is_main_process):
        batch = torch.stack([images[number]["image"] for number in mine[first : first + args.batch_size]])
        moments = add_features(moments, features_of, batch.to(accelerator.device))
    moments = reduced(moments, accelerator)
    if accelerator.is_main_process:
        with atomic_file(file) as temporary:
            np.savez(temporary, dimension=moments.dimension, sums=moments.sums, key=key)
    return moments


def open_real_images(args: argparse.Namespace, pipe: EDM2Pipeline) -> TrainingImages:
    """The run's own images, or those that the options name, in the size that the pipeline draws."""
    options = run_options(args.run_dir)
    own = not (args.dataset_name or args.train_data_dir)
    if own and options.get("latents"):
        raise ValueError(
            f"{args.run_dir} was trained on stored latents; name the pictures to compare with: --dataset_name or "
            "--train_data_dir."
        )
    if own and not (options.get("dataset_name") or options.get("train_data_dir")):
        raise ValueError(
            f"{args.run_dir} does not say what it was trained on; give --dataset_name or --train_data_dir."
        )
    chosen = options if own else vars(args)
    source = open_source(
        chosen.get("dataset_name"),
        chosen.get("train_data_dir"),
        config=options.get("dataset_config_name") if own else None,
        split=args.dataset_split or (options.get("dataset_split") if own else None),
        image_column=options.get("image_column") if own else None,
        label_column=options.get("label_column") if own else None,
        cache_dir=options.get("cache_dir"),
        revision=options.get("dataset_revision") if own else None,
    )
    factor = 1 if pipe.vae is None else 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    size = pipe.unet.config.sample_size * factor
    crop = "dhariwal" if options.get("dhariwal_crop") else "center"
    return TrainingImages(source, 0, size, crop)


def add_features(
    moments: FeatureMoments | None, features_of: Callable[[Tensor], Any], images: Tensor
) -> FeatureMoments:
    with torch.inference_mode():
        features = features_of(images)
    features = features.detach().double().cpu().numpy() if isinstance(features, Tensor) else np.asarray(features)
    if features.ndim != 2 or len(features) != len(images):
        raise ValueError(
            f"--metric returned features of shape {features.shape} for {len(images)} images; it must be "
            f"[{len(images)}, D]."
        )
    moments = moments or FeatureMoments(features.shape[1])
    moments.add(features)
    return moments


def reduced(moments: FeatureMoments | None, accelerator: Accelerator) -> FeatureMoments:
    """The sum over the processes; one that had no image to look at has None."""
    if accelerator.num_processes > 1:
        dimension = torch.tensor([moments.dimension if moments else 0], device=accelerator.device)
        moments = moments or FeatureMoments(int(accelerator.gather(dimension).max()))
        sums = torch.from_numpy(moments.sums).to(accelerator.device)
        moments.sums = accelerator.reduce(sums, "sum").cpu().numpy()
    assert moments is not None  # --num_images is at least 2
    return moments


# ----------------------------------------------------------------------------------------------------------------------
# What a sweep writes


class Table:
    """`sweep.csv`, on the disk after every row, and `sweep.json`, the settings that all rows share."""

    def __init__(self, folder: Path, settings: dict[str, Any], planned: Sequence[Point], is_main: bool):
        self.path = folder / "sweep.csv"
        if is_main:
            clean_leftovers(folder)
        self.rows: dict[Point, tuple[float, float]] = {}
        if self.path.exists():
            with open(self.path, newline="", encoding="utf-8") as lines:
                for row in csv.DictReader(lines):
                    guide = float(row["guide_sigma_rel"]) if row["guide_sigma_rel"] else None
                    point = Point(float(row["sigma_rel"]), guide, float(row["guidance_scale"]))
                    self.rows[point] = float(row["frechet_distance"]), float(row["seconds"])
        file = folder / "sweep.json"
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() and self.rows else {}
        # Rows without guidance are the same with any guide.
        is_guided = [any(point.guidance_scale != 1 for point in points) for points in (self.rows, planned)]
        names = [name for name in settings if all(is_guided) or name not in GUIDE]
        different = [name for name in names if before and before.get(name) != settings[name]]
        if different:
            lines = "\n  ".join(f"{n}: was {before.get(n)}, now {settings[n]}" for n in different)
            raise ValueError(f"{folder} is a sweep with other settings:\n  {lines}\nGive another --output_dir.")
        if is_main:
            kept = {name: before[name] for name in GUIDE} if is_guided[0] else {}
            write_atomic(file, json.dumps(settings | kept, indent=2) + "\n")

    @property
    def best(self) -> Point:
        return min(self.rows, key=lambda point: self.rows[point][0])

    def add(self, point: Point, distance: float, seconds: float) -> None:
        self.rows[point] = distance, seconds
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(COLUMNS)
        for p, (d, s) in self.rows.items():
            guide = "" if p.guide_sigma_rel is None else p.guide_sigma_rel
            writer.writerow([p.sigma_rel, guide, p.guidance_scale, d, f"{s:.1f}", "*" if p == self.best else ""])
        write_atomic(self.path, text.getvalue())


def finish(args: argparse.Namespace, output_dir: Path, table: Table) -> None:
    """The plot, the best point, and what to do with it."""
    with atomic_file(output_dir / "sweep.png") as file:
        plot(table, args.metric, file)
    best, guide = table.best, None
    distance, _ = table.rows[best]
    settings = json.loads(
        (output_dir / "sweep.json").read_text(encoding="utf-8")
    )  # of all rows, not of this call alone
    if best.guide_sigma_rel is not None:
        guide_run = settings["guide_run"] or str(args.run_dir)
        guide = {"run_dir": guide_run, "sigma_rel": best.guide_sigma_rel, "nimg": settings["guide_nimg"]}
    network = {"sigma_rel": best.sigma_rel, "nimg": args.nimg, "guide": guide}
    interval = settings["guidance_interval"] if best.guidance_scale != 1 else None
    call = {"guidance_scale": best.guidance_scale, "guidance_interval": interval}
    record = {"run_dir": str(args.run_dir), **network, **call, "frechet_distance": distance, "metric": args.metric}
    write_atomic(output_dir / "best.json", json.dumps(record, indent=2) + "\n")
    print(f"\n{len(table.rows)} points in {table.path}, their plot in {output_dir / 'sweep.png'}")
    print(f"The best: {describe(best)}, Fréchet distance {distance:.5g}")
    lengths = {point.sigma_rel for point in table.rows}
    if len(lengths) > 1 and best.sigma_rel in (min(lengths), max(lengths)):
        print("It is at the end of the range of --sigma_rel: a wider range may hold a better one.")
    if args.save_best:
        pipe = EDM2Pipeline.from_run(args.run_dir, **network)
        with atomic_folder(args.save_best) as folder:
            pipe.save_pretrained(folder)
        print(f"Saved as {args.save_best}; sample it with {', '.join(f'{k}={v}' for k, v in call.items() if v)}.")
    else:
        options = "".join(f", {name}={value!r}" for name, value in network.items() if value is not None)
        print(f'pipe = EDM2Pipeline.from_run("{args.run_dir}"{options})')


def describe(point: Point) -> str:
    text = f"sigma_rel {point.sigma_rel:g}, guidance {point.guidance_scale:g}"
    return text if point.guide_sigma_rel is None else f"{text}, guide's sigma_rel {point.guide_sigma_rel:g}"


def plot(table: Table, metric: str, file: Path) -> None:
    """The distance over sigma_rel: a line per weight, a panel per EMA length of the guide, a star at the best."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    guides = sorted({p.guide_sigma_rel for p in table.rows if p.guidance_scale != 1}, key=lambda g: g or 0) or [None]
    figure, axes = pyplot.subplots(
        1, len(guides), figsize=(1.5 + 4.5 * len(guides), 4), sharey=True, squeeze=False, layout="constrained"
    )
    best = table.best
    for axis, guide in zip(axes[0], guides, strict=True):
        for w in sorted({p.guidance_scale for p in table.rows}):
            line = sorted(
                (p.sigma_rel, d)
                for p, (d, _) in table.rows.items()
                if p.guidance_scale == w and (w == 1 or p.guide_sigma_rel == guide)
            )
            axis.plot(
                *zip(*line, strict=True), marker="o", markersize=4, label=f"w = {w:g}" if w != 1 else "no guidance"
            )
            if best in [Point(s, guide if w != 1 else None, w) for s, _ in line]:
                axis.plot(best.sigma_rel, table.rows[best][0], "k*", markersize=14, zorder=3)
        axis.set_xlabel(r"$\sigma_{rel}$")
        axis.set_title("" if guide is None else rf"guide's $\sigma_{{rel}}$ = {guide:g}")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(f"Fréchet distance ({metric})", fontsize=8)
    axes[0][-1].legend()
    figure.savefig(file, dpi=150, format="png")
    pyplot.close(figure)


if __name__ == "__main__":
    main()
