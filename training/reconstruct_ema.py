"""Choose the EMA length after training: networks of any sigma_rel from the snapshots of a run (EDM2 Section 3.2).

python training/reconstruct_ema.py runs/digits --sigma_rel 0.03,0.05,...,0.20
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from diffusers_edm2.ema import parse_sigma_rel, posthoc_coefficients, posthoc_profiles, snapshot_name
from diffusers_edm2.files import atomic_file, clean_leftovers
from diffusers_edm2.presets import format_images, parse_images
from diffusers_edm2.snapshots import (
    Snapshot,
    SnapshotError,
    check_targets,
    list_snapshots,
    pipeline_template,
    reconstruct,
)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def main() -> None:
    args = parse_arguments()
    try:
        snapshots = list_snapshots(args.source[0] if len(args.source) == 1 else args.source)
        nimg = snapshots[-1].nimg if args.nimg is None else args.nimg
        targets = [(sigma_rel, nimg) for sigma_rel in args.sigma_rel]
        check_targets(snapshots, targets)
        outputs = {output_folder(args, *target): target for target in targets}
        for sentence in clean_leftovers(args.output_dir):
            print(sentence, file=sys.stderr)
        if args.plot:
            plot_profiles(snapshots, targets, args.plot)
            print(f"The plot of the profiles is in {args.plot}.")
        kept = set() if args.overwrite else {folder for folder in outputs if folder.exists()}
        missing = {folder: target for folder, target in outputs.items() if folder not in kept}
        if missing:
            with pipeline_template(args.source[0]) if args.pipeline else nullcontext() as template:
                progress = partial(tqdm, desc=f"{len(snapshots)} snapshots", unit="tensor")
                dtype, folders, goals = DTYPES[args.dtype], list(missing), list(missing.values())
                reconstruct(snapshots, goals, folders, dtype, args.overwrite, progress, template)
    except (ValueError, SnapshotError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    _, errors = posthoc_coefficients([(s.sigma_rel, s.nimg) for s in snapshots], targets)
    print(f"{'sigma_rel':>9}  {'profile error':>13}  folder")
    for (folder, (sigma_rel, _)), distance in zip(outputs.items(), errors, strict=True):
        print(f"{sigma_rel:9.6g}  {distance:13.3%}  {folder}{' (was there, kept)' if folder in kept else ''}")
    if kept:
        print("Folders that were there have been kept; --overwrite makes them anew.")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="""\
The profile error is the distance between the wanted average's weighting of the
training time and the nearest one that the snapshots can build, relative to the
wanted one; above 1 % there is a warning. More snapshots (--snapshot_every of
training/train_edm2.py) and lengths between the tracked ones make it smaller.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="a run folder of training/train_edm2.py, a folder with snapshots, or several snapshot folders",
    )
    parser.add_argument(
        "--sigma_rel",
        type=argument(parse_sigma_rel),
        required=True,
        metavar="STD,...",
        help="EMA lengths as fractions of the training, in (0, 0.2886]; 0.03,0.05,...,0.20 goes from 0.03 to 0.19 in "
        "steps of 0.02, and then to 0.20",
    )
    parser.add_argument(
        "--nimg",
        type=argument(parse_images),
        metavar="N",
        help="after how many training images, such as 65536, 64Ki or 8Mi: there must be a snapshot of this time "
        "(default: the newest)",
    )
    parser.add_argument("--output_dir", type=Path, metavar="DIR", help="where the folders go (default: RUN/posthoc)")
    parser.add_argument(
        "--pipeline", action="store_true", help="write whole pipelines: RUN/pipeline with another network"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="type of the weights (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="make folders anew that exist (default: keep them)")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE.png",
        help="draw the wanted and the built profiles over the training time (needs matplotlib)",
    )
    return parser


def parse_arguments() -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args()
    if args.output_dir is None:
        if len(args.source) > 1:
            parser.error("several snapshot folders need an --output_dir")
        args.output_dir = args.source[0] / "posthoc"
    if args.plot:
        try:
            import matplotlib  # noqa: F401  now, before the work
        except ImportError:
            parser.error('--plot needs matplotlib: pip install "matplotlib>=3.9"')
    return args


def argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """For argparse, which shows the message of this error only."""

    def parse_argument(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse_argument


def output_folder(args: argparse.Namespace, sigma_rel: float, nimg: int) -> Path:
    """unet-<nimg>-<sigma_rel>, or pipeline-...; the type follows if it is not the usual one."""
    name = snapshot_name(nimg, sigma_rel)
    if args.pipeline:
        name = name.replace("unet", "pipeline", 1)
    return args.output_dir / (name if args.dtype == "float32" else f"{name}-{args.dtype}")


def plot_profiles(snapshots: list[Snapshot], targets: list[tuple[float, int]], path: Path) -> None:
    """Wanted profiles as broad lines, built ones as thin lines on them, over the training time."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    end = targets[0][1]
    times, wanted, built = posthoc_profiles([(s.sigma_rel, s.nimg) for s in snapshots], targets)
    axes = (figure := Figure(figsize=(9, 5), layout="constrained")).subplots()
    for i, (sigma_rel, _) in enumerate(targets):
        colour = colormaps["viridis"](i / len(targets))
        axes.plot(times, wanted[i] * end, color=colour, linewidth=4, alpha=0.4, label=f"{sigma_rel:g}")
        axes.plot(times, built[i] * end, color=colour, linewidth=1)
    for nimg in sorted({s.nimg for s in snapshots if s.nimg <= end}):
        axes.axvline(nimg, ymax=0.02, color="black", linewidth=1)
    axes.set_xlim(0, end)
    axes.set_xlabel(f"images seen, up to {format_images(end)}; the short black lines are the snapshots")
    axes.set_ylabel("weight in the average (1: as in the mean)")
    axes.legend(title="sigma_rel: broad the wanted,\nthin the built profile", ncols=2 if len(targets) > 8 else 1)
    with atomic_file(path) as file:
        figure.savefig(file, dpi=120, format="png")


if __name__ == "__main__":
    main()
