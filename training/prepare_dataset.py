"""Make images ready for training: `python training/prepare_dataset.py --help`.

Every image is cropped and resized once, and, with a VAE, encoded once. The output is a pure function of the images and
the options, whatever the number of processes, and however often they were interrupted.
"""

import argparse
import contextlib
import errno
import io
import json
import shutil
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from diffusers_edm2.checkpoint import CheckpointError, lock_run
from diffusers_edm2.dataset import BadImageError, ImageSource, center_crop, dhariwal_crop, open_source, wide_crop
from diffusers_edm2.dataset_writer import DatasetWriter, DatasetWriterError
from diffusers_edm2.files import write_atomic
from diffusers_edm2.latents import channel_moments, channel_statistics, encode_moments, load_vae
from diffusers_edm2.training_options import TABLE

# The names of train_edm2.py, and its words.
SOURCE_OPTIONS = ("dataset_name", "train_data_dir", "dataset_config_name", "dataset_split", "dataset_revision")
SOURCE_OPTIONS += ("image_column", "label_column", "cache_dir")

# What may differ when an interrupted command is started again: batches change latents by float rounding at most.
FREE_OPTIONS = {"output", "batch_size", "dataloader_num_workers", "cache_dir", "skip_bad_images"}

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse_size(text: str) -> tuple[int, int]:
    """Width and height: "64" -> (64, 64), "256x144" -> (256, 144)."""
    width, _, height = text.partition("x")
    size = int(width), int(height or width)
    if min(size) < 1:
        raise ValueError(text)
    return size


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prepare_dataset.py",
        description="Crop and resize images, and encode them with a VAE if one is named, into a data set that "
        "train_edm2.py reads: a ZIP (PNG or NPY files with dataset.json, EDM2's own format) or a folder of parquet "
        "files. Interrupted, the same command goes on; the output appears only when it is whole. With `accelerate "
        "launch`, several processes and GPUs share the work.",
        epilog="Example: accelerate launch training/prepare_dataset.py --train_data_dir imagenet/train "
        "--resolution 512 --dhariwal_crop --pretrained_vae_model_name_or_path stabilityai/sd-vae-ft-mse "
        "--output imagenet-latents.zip",
        allow_abbrev=False,
    )
    group = parser.add_argument_group("images (by default the bundled digits)")
    for name in SOURCE_OPTIONS:
        group.add_argument(f"--{name}", metavar=TABLE[name].metavar, help=TABLE[name].help.replace("train on", "take"))
    group.add_argument("--max_images", type=int, metavar="N", help="take only N images, spread evenly over the source")
    group.add_argument(
        "--skip_bad_images",
        action="store_true",
        help="leave out images that cannot be used, count and list them, instead of stopping",
    )

    group = parser.add_argument_group("size")
    group.add_argument(
        "--resolution",
        type=parse_size,
        metavar="PIXELS",
        help="width and height of the pictures, before a VAE; WIDTHxHEIGHT with --wide_crop (default: as they are)",
    )
    crops = group.add_mutually_exclusive_group()
    crops.add_argument("--center_crop", action="store_true", help=TABLE["center_crop"].help)
    crops.add_argument("--dhariwal_crop", action="store_true", help=TABLE["dhariwal_crop"].help)
    crops.add_argument(
        "--wide_crop",
        action="store_true",
        help="cut out the centred part of the shape WIDTHxHEIGHT, resize it, and centre it on a black square of WIDTH",
    )

    group = parser.add_argument_group("latents")
    group.add_argument(
        "--pretrained_vae_model_name_or_path",
        metavar="NAME",
        help="AutoencoderKL, Hub id or folder, or a pipeline with one: store the means and standard deviations of its "
        "posteriors in place of pictures",
    )
    group.add_argument(
        "--batch_size", type=int, default=16, metavar="N", help="images per pass and device (default: %(default)s)"
    )
    group.add_argument(
        "--mixed_precision",
        choices=tuple(DTYPES),
        default="no",
        help="type of the VAE's activations, on a GPU; the papers' are float32 (default: %(default)s)",
    )
    group.add_argument("--allow_tf32", action="store_true", help=TABLE["allow_tf32"].help)

    group = parser.add_argument_group("output")
    group.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="PATH",
        help="NAME.zip, or a folder for parquet files; must not exist. While it is made, its parts are in PATH.part; "
        "making a ZIP of them takes its size once more",
    )
    group.add_argument(
        "--shard_size",
        type=int,
        default=1024,
        metavar="N",
        help="images per parquet file; and what each process may lose when it is killed (default: %(default)s)",
    )
    group.add_argument(
        "--dataloader_num_workers",
        type=int,
        default=2,
        metavar="N",
        help="processes that read and crop images, per device; 0: none of their own (default: %(default)s)",
    )
    return parser


def parse_options(argv: Sequence[str] | None = None) -> Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    for name in ("batch_size", "shard_size", "max_images"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} must be greater than 0.")
    if args.dataloader_num_workers < 0:
        parser.error(f"--dataloader_num_workers {args.dataloader_num_workers} must not be negative.")
    args.crop = next((name for name in ("center", "dhariwal", "wide") if getattr(args, f"{name}_crop")), "none")
    width, height = args.resolution or (None, None)
    if args.crop != "none" and width is None:
        parser.error(f"--{args.crop}_crop does not say to which size; add --resolution.")
    if args.crop != "wide" and width != height:
        parser.error(f"--resolution {width}x{height} is for --wide_crop; other pictures are square: give one number.")
    if args.crop == "wide" and width < height:
        parser.error(f"--resolution {width}x{height} with --wide_crop must not be higher than it is wide.")
    if args.mixed_precision != "no" and args.pretrained_vae_model_name_or_path is None:
        parser.error("--mixed_precision is for the VAE; name one with --pretrained_vae_model_name_or_path.")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_options(argv)
    # By itself, PartialState does not look at the flag that `accelerate launch --cpu` sets.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    try:
        prepare(args, state)
    except CheckpointError as error:  # another process holds the lock
        raise SystemExit(f"error: {str(error).replace('--output_dir', '--output')}") from error
    except (ValueError, DatasetWriterError) as error:
        raise SystemExit(f"error: {error}") from error
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        way_out = f"\nFree some space and run the same command again; {args.output}.part keeps what is done."
        raise SystemExit(f"error: {error}{way_out if is_full else ''}") from error
    except torch.OutOfMemoryError as error:
        raise SystemExit(f"error: {error}\nGive the same command less than --batch_size {args.batch_size}.") from error
    except KeyboardInterrupt:
        raise SystemExit("Interrupted. The same command goes on.") from None
    finally:
        state.destroy_process_group()


def prepare(args: Namespace, state: PartialState) -> None:
    job = set_up(args, state.device)
    writer = job.writer
    if not state.is_main_process:
        encode_shards(job, state, broadcast_object_list([None])[0])
        return
    if not writer.check_output():
        broadcast_object_list([[]])
        writer.remove_part()
        print(f"{args.output} is complete.")
        return
    with lock_run(writer.part, lambda text: print(f"warning: {text}", file=sys.stderr)):
        check_space(writer)
        writer.begin(plan(args, job))
        missing = writer.missing()
        if len(missing) < len(writer.shards):
            print(f"Going on: {len(writer.shards) - len(missing)} of {len(writer.shards)} shards are in {writer.part}.")
        broadcast_object_list([missing])
        encode_shards(job, state, missing)
        finish(args, job)


class Job(NamedTuple):
    """What is to be done with which images."""

    source: ImageSource
    chosen: np.ndarray  # indices of the source
    shape: tuple[int, int, int]  # (C, H, W) of the pictures
    crop: Callable[[np.ndarray], np.ndarray] | None
    smallest: tuple[int, int]  # (height, width) below which a picture is enlarged
    vae: Any
    args: Namespace
    writer: DatasetWriter


def set_up(args: Namespace, device: torch.device) -> Job:
    """Everything that can be wrong before the first image, found out."""
    source = open_source(
        args.dataset_name,
        args.train_data_dir,
        config=args.dataset_config_name,
        split=args.dataset_split,
        image_column=args.image_column,
        label_column=args.label_column,
        cache_dir=args.cache_dir,
        revision=args.dataset_revision,
    )
    if source.is_latent:
        raise ValueError(f"{source.title} holds stored latents, which are ready; name the images they were made of.")
    channels, height, width = source.shape
    crop, smallest = None, (0, 0)
    if args.resolution:
        width, height = args.resolution
    if args.crop == "wide":
        crop, smallest, height = partial(wide_crop, width=width, height=height), (height, width), width
    elif args.crop != "none":
        crop = partial({"center": center_crop, "dhariwal": dhariwal_crop}[args.crop], resolution=width)
        smallest = (height, width)
    if height != width:
        raise ValueError(
            f"the images are {height} x {width} pixels (height x width), and training samples are square; give "
            "--resolution with --center_crop, --dhariwal_crop or --wide_crop."
        )

    vae, latents_shape = None, None
    if args.pretrained_vae_model_name_or_path:
        if args.mixed_precision != "no" and device.type == "cpu":
            raise ValueError(f"--mixed_precision {args.mixed_precision} needs a GPU; leave it out on a CPU.")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
        torch.backends.cudnn.deterministic = True
        vae = load_vae(args.pretrained_vae_model_name_or_path).to(device)
        channels, latents_shape = fit_to_vae(vae.config, channels, width)

    number = min(args.max_images or len(source), len(source))
    chosen = np.arange(number) * len(source) // number
    has_labels = source.num_classes > 0
    writer = DatasetWriter(args.output, number, args.shard_size, latents_shape, source.class_names, has_labels)
    job = Job(source, chosen, (channels, height, width), crop, smallest, vae, args, writer)
    for place in () if args.skip_bad_images else np.linspace(0, number - 1, min(number, 16)).astype(int):
        Pictures(job).read(int(place))  # a wrong size shows now
    return job


def fit_to_vae(config: Any, channels: int, side: int) -> tuple[int, tuple[int, int, int]]:
    """Channels of the pictures for the VAE, and [2C, h, w] of what is stored."""
    if channels > config.in_channels:
        raise ValueError(
            f"the images have {channels} channels and the VAE takes {config.in_channels}; name another VAE."
        )
    factor = 2 ** (len(config.block_out_channels) - 1)
    if side % factor:
        low = side // factor * factor
        ways = f"{low} or {low + factor}" if low else f"{factor}"
        raise ValueError(
            f"the VAE divides each side by {factor}, which does not divide {side}; use --resolution {ways} with a crop."
        )
    return config.in_channels, (2 * config.latent_channels, side // factor, side // factor)


def plan(args: Namespace, job: Job) -> dict[str, Any]:
    """What decides the output, to hold another start of the command against."""
    options = {name: value for name, value in vars(args).items() if name not in {*FREE_OPTIONS, "crop"}}
    labels = sha256(job.source.labels.tobytes()).hexdigest()[:16]
    return options | {"images in the source": len(job.source), "checksum of its labels": labels}


def check_space(writer: DatasetWriter) -> None:
    """Refuse to begin what the disk cannot hold. How large pictures become is not known before."""
    if writer.latents_shape is None:
        return
    size = 4 * int(np.prod(writer.latents_shape))
    needed = size * sum(len(writer.shards[number]) for number in writer.missing())
    needed += size * sum(map(len, writer.shards)) if writer.is_zip else 0  # its parts, and then the whole beside them
    place = next(folder for folder in writer.part.absolute().parents if folder.exists())
    if (free := shutil.disk_usage(place).free) < needed:
        raise ValueError(
            f"making {writer.output} needs {needed / 2**30:.2f} GiB, but only {free / 2**30:.2f} GiB are free; free "
            "some space, give an --output on another disk"
            + (", or a folder, which needs half." if writer.is_zip else ".")
        )


# ----------------------------------------------------------------------------------------------------------------------
# The images


class Pictures(Dataset):
    """Item i: picture i of the output, as uint8 [C, H, W] for a VAE, or as the content of a PNG file.

    What is wrong with a picture comes as "error": only the main loop knows what follows from it.
    """

    def __init__(self, job: Job):
        self.source, self.chosen, self.shape = job.source, job.chosen, job.shape
        self.crop, self.smallest, self.as_png = job.crop, job.smallest, job.vae is None

    def read(self, number: int) -> tuple[np.ndarray, bool]:
        """Picture `number`, uint8 [C, H, W], and whether it was enlarged."""
        index = int(self.chosen[number])
        picture = self.source.read(index)
        fitted = self.source.fit(picture, index, self.shape, self.crop)
        return fitted, any(side < least for side, least in zip(picture.shape, self.smallest, strict=False))

    def __getitem__(self, number: int) -> dict[str, Any]:
        try:
            picture, enlarged = self.read(number)
        except BadImageError as error:
            return {"error": str(error), "name": self.source.name(int(self.chosen[number]))}
        label = int(self.source.labels[self.chosen[number]])
        data = png(picture) if self.as_png else picture.copy()
        return {"number": number, "label": label, "enlarged": enlarged, "data": data}


def png(picture: np.ndarray) -> bytes:
    """The content of a PNG file: lossless. uint8 [C, H, W]."""
    pixels, buffer = picture.transpose(1, 2, 0), io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()


def encode_shards(job: Job, state: PartialState, missing: Sequence[int]) -> None:
    """This process's share of the shards; the main process waits for the others', to show how far all are."""
    writer, batch_size = job.writer, job.args.batch_size
    mine = missing[state.process_index :: state.num_processes]
    batches = [
        list(writer.shards[number][first : first + batch_size])
        for number in mine
        for first in range(0, len(writer.shards[number]), batch_size)
    ]
    options = {"num_workers": job.args.dataloader_num_workers, "worker_init_fn": ignore_interrupt}
    loaded = iter(DataLoader(Pictures(job), batch_sampler=batches, collate_fn=list, **options))
    total = sum(map(len, writer.shards))
    bar = {"desc": "preparing", "unit": "img", "unit_scale": True, "disable": not state.is_main_process}
    with tqdm(total=total, initial=writer.images_written(), **bar) as progress:
        for number in mine:
            with writer.shard(number) as shard:
                record = {"bad_images": [], "enlarged": 0, "moments": np.zeros(())}
                for first in range(0, len(writer.shards[number]), batch_size):
                    add_batch(job, shard, record, next(loaded), state.device)
                    if state.is_main_process:
                        done = min(first + batch_size, len(writer.shards[number]))
                        progress.update(writer.images_written() + done - progress.n)
                shard.record = {**record, "moments": record["moments"].tolist()}
        while state.is_main_process and writer.missing():
            time.sleep(0.2)
            progress.update(writer.images_written() - progress.n)
        progress.update(writer.images_written() - progress.n)  # the others may have ended first


def add_batch(job: Job, shard: Any, record: dict[str, Any], items: list[dict[str, Any]], device: torch.device) -> None:
    """Encode pictures as `Pictures` gives them, add them to the shard, and note in its record what came of it."""
    errors = [item for item in items if "error" in item]
    if errors and not job.args.skip_bad_images:
        raise BadImageError(f"{errors[0]['error']} Or leave out all such images with --skip_bad_images.")
    record["bad_images"] += [item["name"] for item in errors]
    good = [item for item in items if "error" not in item]
    for item, data in zip(good, encode(job, good, device), strict=True):
        shard.add(item["number"], data, item["label"])
        record["enlarged"] += item["enlarged"]
        if job.vae is not None:
            record["moments"] = record["moments"] + channel_moments(data)


def encode(job: Job, items: list[dict[str, Any]], device: torch.device) -> Iterable[Any]:
    """What is stored of each picture: its PNG, or float32 [2C, h, w]."""
    if job.vae is None or not items:
        return [item["data"] for item in items]
    pictures = torch.from_numpy(np.stack([item["data"] for item in items])).to(device)
    dtype = DTYPES[job.args.mixed_precision]
    with torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext():
        moments = encode_moments(job.vae, pictures).cpu().numpy()
    for item, latents in zip(items, moments, strict=True):
        if not np.isfinite(latents).all():
            raise ValueError(
                f"the VAE's latents of {job.source.name(int(job.chosen[item['number']]))} are not finite; use "
                "--mixed_precision no or bf16, or another VAE."
            )
    return moments


def ignore_interrupt(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# ----------------------------------------------------------------------------------------------------------------------
# The end


def finish(args: Namespace, job: Job) -> None:
    """The output of the shards, and what the user should know about it."""
    records = job.writer.records()
    images = sum(len(record["labels"]) for record in records)
    bad_images = [name for record in records for name in record["bad_images"]]
    if images == 0:
        raise ValueError(
            f"none of the {len(bad_images)} images can be used, though --skip_bad_images leaves out those that cannot. "
            f"Run without it to see what is wrong with the first. Remove {job.writer.part}."
        )
    info: dict[str, Any] = {"prepared": origin(args)}
    if job.vae is not None:
        moments = sum(np.array(record["moments"]) for record in records) / images
        info["latents_mean"], info["latents_std"] = channel_statistics(moments)
    if bad_images:
        listing = args.output.with_name(f"{args.output.name}.bad_images.json")
        write_atomic(listing, json.dumps(bad_images, indent=2) + "\n")
        print(f"{len(bad_images)} images could not be used; {listing} lists them.")
    if enlarged := sum(record["enlarged"] for record in records):
        print(f"{enlarged} of {images} images were smaller than --resolution and have been enlarged.")
    with tqdm(total=images, desc="merging", unit="img", unit_scale=True, disable=not job.writer.is_zip) as progress:
        job.writer.finish(info, progress.update)
    option = "--train_data_dir" if job.writer.is_zip else "--dataset_name"
    vae = (
        f" --pretrained_vae_model_name_or_path {args.pretrained_vae_model_name_or_path}" if job.vae is not None else ""
    )
    print(f"{images} images are in {args.output}. Train on them with: train_edm2.py {option} {args.output}{vae}")


def origin(args: Namespace) -> dict[str, Any]:
    """What the images were made of, without the folders of this machine."""
    names = [args.dataset_name or args.train_data_dir or "digits", args.pretrained_vae_model_name_or_path]
    source, vae = (name and (Path(name).expanduser().resolve().name if Path(name).exists() else name) for name in names)
    return {"source": source, "crop": args.crop, "resolution": args.resolution, "vae": vae}


if __name__ == "__main__":
    main()
