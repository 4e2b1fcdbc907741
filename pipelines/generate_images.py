r"""Draw images from a finished model, a few or 50 000; each is decided by its seed alone.

    python pipelines/generate_images.py runs/digits --class_labels balanced --seeds 0-39 --output_dir digits --grid
    accelerate launch --num_processes 8 pipelines/generate_images.py USER/MODEL --seeds 0-49999 --format npz \
        --mixed_precision fp16 --output_dir images

Several processes divide the work. Stopped at any moment, the same command goes on: it draws what is not there yet.
generation.json in the output folder keeps every setting, and a folder takes images of one setting only.

The image of a seed is the same, byte by byte, whatever other seeds are drawn, in which order, at what --batch_size and
by how many processes, on one kind of device and with one version of each library. For this the network always sees the
same --chunk_size numbers together (0 to 15, 16 to 31, ...): a chunk with one image to draw costs as much as a full one.
"""

import argparse
import contextlib
import inspect
import platform
import re
import signal
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from diffusers import DiffusionPipeline, EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from diffusers.utils.logging import disable_progress_bar
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from diffusers_edm2 import EDM2HeunScheduler, EDM2Pipeline, EDM2UNet2DModel
from diffusers_edm2.checkpoint import CheckpointError, lock_run
from diffusers_edm2.files import atomic_file
from diffusers_edm2.grid import image_grid
from diffusers_edm2.image_folder import CLASS_RULES, ImageFolder, Numbering, fingerprint, parse_seeds, public
from diffusers_edm2.presets import parse_images
from diffusers_edm2.snapshots import SnapshotError, find_networks, run_sigma_data

SCHEDULERS: dict[str, tuple[type, dict[str, Any]]] = {
    "heun": (EDM2HeunScheduler, {}),
    "euler": (EDMEulerScheduler, {}),
    "dpmpp-2m": (EDMDPMSolverMultistepScheduler, {"solver_order": 2}),
    "dpmpp-3m": (EDMDPMSolverMultistepScheduler, {"solver_order": 3}),
}
RAMP = ("sigma_min", "sigma_max", "rho")
CHURN = ("s_churn", "s_tmin", "s_tmax", "s_noise")
SOURCE = ("model", "revision", "variant", "sigma_rel", "nimg", "guide", "guide_sigma_rel", "guide_nimg")
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WRITERS = 4  # threads that compress and write PNG files while the next images are drawn
GRID_IMAGES = 100
# What a user can mend: told without a traceback.
ERRORS = (ValueError, OSError, CheckpointError, SnapshotError)


def main() -> None:
    args = build_parser().parse_args()
    # By itself, PartialState does not look at the flag that `accelerate launch --cpu` sets. The time is for a process
    # that has finished its share and waits for slower ones.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timedelta(days=30))
    if state.device.type == "cpu":
        torch.set_num_threads(args.num_threads)  # rounding depends on it; a launcher would choose by itself
    args.chunk_size = args.chunk_size or (16 if state.device.type == "cpu" else 64)
    for turn in ("main", "others"):  # these find what the main process has downloaded or reconstructed
        problem = ""
        if (turn == "main") == state.is_main_process:
            try:
                pipeline = build_pipeline(args, state.device)
                numbering = build_numbering(args, pipeline.unet.config)
            except ERRORS as error:
                problem = f"error: {error}"
        end_if_any(problem, state)
    code = generate(args, pipeline, ImageFolder(args.output_dir, args.format, numbering), state)
    state.destroy_process_group()
    raise SystemExit(code)


def generate(args: Namespace, pipeline: EDM2Pipeline, folder: ImageFolder, state: PartialState) -> int:
    """Draw what is not there yet, each process its share of the chunks; then the main one completes the folder.

    Returns the exit code.
    """
    wanted = folder.numbers(args.seeds)
    with contextlib.ExitStack() as stack:
        missing, problem = [], ""
        if state.is_main_process:
            try:
                stack.enter_context(lock_run(args.output_dir, warn))
                missing = open_folder(args, pipeline, folder, state.device)
            except ERRORS as error:
                problem = f"error: {error}"
        end_if_any(problem, state)
        todo: list[int] = broadcast_object_list([missing])[0]

        place(pipeline, args, state.device)
        stop = StopSignal()
        progress = Progress(folder, wanted, todo, state)
        share = chunks_of(todo, args.chunk_size)[state.process_index :: state.num_processes]
        problem = draw(args, pipeline, folder, share, stop, progress)
        problems = list(dict.fromkeys(text for text in gather_object([problem]) if text))
        progress.close()
        if state.is_main_process:
            problems += finish(args, folder, wanted, progress, problems)
    return 128 + stop.received if stop.received and problems else int(bool(problems))


def finish(args: Namespace, folder: ImageFolder, wanted: list[int], progress: "Progress", problems: list[str]) -> list:
    """Complete the folder if all images are there, and say how it ended. Returns problems that are new."""
    missing, new = folder.missing(wanted), []
    if missing and not problems:
        new = ["Other processes write to a folder that the main one does not see"]
    elif not problems:
        try:
            folder.complete()
            if args.grid is not None:
                path = args.grid or folder.folder.with_name(f"{folder.folder.name}-grid.png")
                write_grid(path, folder, wanted[:GRID_IMAGES])
        except OSError as error:
            new = [write_problem(error)]
    if problems + new:
        goes_on = "" if any(text.startswith("error:") for text in problems) else " The same command goes on."
        there = f"{len(wanted) - len(missing)} of {len(wanted)} images are complete in {folder.images}."
        print(f"{'; '.join(problems + new)}. {there}{goes_on}", file=sys.stderr)
    else:
        print(f"Finished: {len(wanted)} images in {folder.npz or folder.folder}, {progress.summary()}.")
    return new


def end_if_any(problem: str, state: PartialState) -> None:
    """End all processes if one of them has a problem, and let the main one tell it."""
    if problems := [text for text in gather_object([problem]) if text]:
        state.destroy_process_group()
        raise SystemExit(problems[0] if state.is_main_process else 1)


def draw(args: Namespace, pipeline: EDM2Pipeline, folder: ImageFolder, chunks: list["Chunk"], stop, progress) -> str:
    """Draw the wanted images of each chunk, and write them. Returns "", or why it stopped before the end."""
    per_batch = -(-args.batch_size // args.chunk_size)
    stopped, writing = "", []
    with ThreadPoolExecutor(WRITERS) as writers:
        try:
            for first in range(0, len(chunks), per_batch):
                drawn: list[tuple[int, Image.Image]] = []
                try:
                    for chunk in chunks[first : first + per_batch]:
                        drawn += draw_chunk(args, pipeline, folder.numbering, chunk, stop)
                except Stopped:
                    stopped = f"Stopped by {signal.Signals(stop.received).name}"
                wait_for(writing, progress)
                writing = [writers.submit(folder.save, number, picture) for number, picture in drawn]
                if stopped:
                    break
            wait_for(writing, progress)
        except OSError as error:
            return write_problem(error)
        except torch.OutOfMemoryError:
            return f"error: the GPU has too little memory for --chunk_size {args.chunk_size}; give a smaller one"
        except ValueError as error:
            return f"error: {error}".removesuffix(".")
    return stopped


def draw_chunk(args: Namespace, pipeline: EDM2Pipeline, numbering: Numbering, chunk: "Chunk", stop):
    """The wanted images of one chunk, with their numbers.

    All of the chunk is drawn: rounding depends on the number of images in a batch, and on the place in it.
    """
    places = [numbering.place(chunk.first + i) for i in range(args.chunk_size)]
    drawn_by_pipeline = numbering.rule == "random" or not numbering.num_classes
    arrays = pipeline(
        class_labels=None if drawn_by_pipeline else [label for _, label in places],
        num_inference_steps=args.num_inference_steps,
        generator=[torch.Generator().manual_seed(seed) for seed, _ in places],  # on the CPU: the same for every device
        guidance_scale=args.guidance_scale,
        guidance_interval=args.guidance_interval,
        output_type="np",
        callback_on_step_end=stop.check,
    ).images
    for number in chunk.wanted:
        array = arrays[number - chunk.first]
        if not np.isfinite(array).all():
            raise ValueError(f"image {number} is not finite; try --mixed_precision no, or another model.")
        yield number, pipeline.numpy_to_pil(array)[0]


class Chunk(NamedTuple):
    """Images that the network sees together, from number `first` on, and those of them that are to be kept."""

    first: int
    wanted: list[int]


def chunks_of(numbers: Sequence[int], size: int) -> list[Chunk]:
    chunks: dict[int, list[int]] = {}
    for number in numbers:
        chunks.setdefault(number - number % size, []).append(number)
    return [Chunk(first, wanted) for first, wanted in sorted(chunks.items())]


def wait_for(writing: list[Future], progress: "Progress") -> None:
    """Wait until images are written, or raise what kept them from it."""
    for future in writing:
        future.result()
    progress.add(len(writing))
    writing.clear()


def write_problem(error: OSError) -> str:
    return f"Writing {error.filename or 'a file'} failed: {error.strerror or error}"


def write_grid(path: Path, folder: ImageFolder, numbers: Sequence[int]) -> None:
    """Images side by side under their classes, or under #seed."""
    numbering = folder.numbering
    places = [numbering.place(number) for number in numbers]
    classes = numbering.num_classes if isinstance(numbering.rule, str) else len(numbering.rule)
    columns = classes if numbering.rule not in ("random", "none") and 2 <= classes <= 20 else 10
    with atomic_file(path) as file:
        texts = [str(label) if label >= 0 else f"#{seed}" for seed, label in places]
        image_grid(folder.read(numbers), texts, columns).save(file)


# ----------------------------------------------------------------------------------------------------------------------
# The model


def build_pipeline(args: Namespace, device: torch.device) -> EDM2Pipeline:
    """The model with its guide and the scheduler that the options ask for, still on the CPU."""
    if args.mixed_precision == "fp16" and device.type == "cpu":
        raise ValueError("--mixed_precision fp16 needs a GPU; use bf16 or no on a CPU.")
    disable_progress_bar()  # of the loading: ours is the one to look at
    # All supported Diffusers versions know the name torch_dtype; newer ones prefer dtype, and say so.
    warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
    dtype = {"torch_dtype": DTYPES[args.mixed_precision]}
    guide = check_guide(args)
    if is_run(args.model):
        refuse(args, ("revision", "variant"), f"belongs to a model of the Hub, and {args.model} is a run folder")
        of_run = None
        if guide and is_run(guide):
            of_run = {"run_dir": guide, "sigma_rel": args.guide_sigma_rel, "nimg": args.guide_nimg}
        pipeline = EDM2Pipeline.from_run(args.model, args.sigma_rel, args.nimg, of_run, **dtype)
    else:
        refuse(args, ("sigma_rel", "nimg"), f"chooses a network of a run folder, and {args.model} is none")
        options = {name: value for name in ("revision", "variant") if (value := getattr(args, name))}
        pipeline = load(DiffusionPipeline, args.model, args, **options, **dtype)
    if "guidance_interval" not in inspect.signature(pipeline.__call__).parameters:
        raise ValueError(f"{args.model} is a {type(pipeline).__name__}; this command draws with an EDM2Pipeline.")
    channels = pipeline.unet.config.in_channels if pipeline.vae is None else pipeline.vae.config.out_channels
    if channels not in (1, 3):
        raise ValueError(
            f"{args.model} draws {channels} channels and has no VAE to make a picture of them; load it with "
            "EDM2Pipeline.from_pretrained(..., vae=...), and save it with save_pretrained."
        )
    if guide and not (is_run(guide) and is_run(args.model)):
        pipeline.register_modules(guide_unet=load_guide(guide, args, pipeline.scheduler.config.sigma_data, **dtype))
    pipeline.scheduler = build_scheduler(args, pipeline.scheduler)
    return pipeline


def build_numbering(args: Namespace, config: Any) -> Numbering:
    shape = (config.in_channels, config.sample_size, config.sample_size)
    return Numbering(args.class_labels, config.num_class_embeds or 0, shape)


def check_guide(args: Namespace) -> str | None:
    """Where the guide comes from, if the options name one."""
    names = ("guide", "guide_sigma_rel", "guide_nimg", "guidance_interval")
    given = [name for name in names if getattr(args, name) is not None]
    if given and args.guidance_scale == 1:
        raise ValueError(f"--{given[0]} has no effect with --guidance_scale 1; give another scale, for example 1.5.")
    return (args.guide or args.model) if given and given != ["guidance_interval"] else None


def load_guide(source: str, args: Namespace, sigma_data: float, **options: Any) -> nn.Module:
    """The guiding network: of a run folder, a pipeline, or a network by itself, which does not tell its σ_data."""
    if is_run(source):
        check_sigma_data(source, run_sigma_data(Path(source)), sigma_data)
        (folder,) = find_networks(Path(source), [(args.guide_sigma_rel, args.guide_nimg)])
        return load(EDM2UNet2DModel, str(folder), args, **options)
    refuse(args, ("guide_sigma_rel", "guide_nimg"), f"chooses a network of a run folder, and {source} is none")
    if Path(source).is_dir() and not (Path(source) / "model_index.json").is_file():
        return load(EDM2UNet2DModel, source, args, **options)
    try:
        pipeline = load(DiffusionPipeline, source, args, **options)
    except ValueError as no_pipeline:
        try:
            return load(EDM2UNet2DModel, source, args, **options)
        except ValueError:
            raise no_pipeline from None
    check_sigma_data(source, pipeline.scheduler.config.sigma_data, sigma_data)
    return pipeline.unet


def check_sigma_data(guide: str, found: float, expected: float) -> None:
    if found != expected:
        raise ValueError(f"--guide {guide} has sigma_data={found}, and the model {expected}; a guide shares it.")


def load(cls: Any, source: str, args: Namespace, **options: Any) -> Any:
    """A model or pipeline from a folder or the Hub; whatever goes wrong is a ValueError."""
    if not Path(source).exists() and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source):
        raise ValueError(f"there is no folder {source}, and it is no name of a Hub repository (USER/MODEL) either.")
    try:
        return cls.from_pretrained(source, cache_dir=args.cache_dir, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source} cannot be loaded: {error}") from error


def is_run(source: str) -> bool:
    return (Path(source) / "snapshots").is_dir()


def refuse(args: Namespace, names: Sequence[str], reason: str) -> None:
    for name in names:
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} {reason}.")


def build_scheduler(args: Namespace, scheduler: Any) -> Any:
    """The model's scheduler with the changes that the options ask for."""
    cls, changes = SCHEDULERS[args.scheduler] if args.scheduler else (type(scheduler), {})
    given = {name: getattr(args, name) for name in RAMP + CHURN if getattr(args, name) is not None}
    if not hasattr(cls, "churn"):
        refuse(args, CHURN, f"belongs to the Heun scheduler, and this is {cls.__name__}; give --scheduler heun")
    return cls.from_config(scheduler.config, **changes, **given)


def place(pipeline: EDM2Pipeline, args: Namespace, device: torch.device) -> None:
    """To the device, and such that the same input gives the same bytes."""
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    if pipeline.vae is not None:
        pipeline.vae.enable_slicing()  # one image at a time: pictures take more memory than latents
    for network in (pipeline.unet, pipeline.guide_unet):
        if args.compile and network is not None:
            network.compile(dynamic=False)


# ----------------------------------------------------------------------------------------------------------------------
# What generation.json says


def open_folder(args: Namespace, pipeline: EDM2Pipeline, folder: ImageFolder, device: torch.device) -> list[int]:
    """Write generation.json, or compare with the one that is there. Returns the numbers of the missing images."""
    settings = resolve_settings(args, pipeline, folder.numbering, device)
    for sentence in folder.open(settings, describe_source(args, pipeline), describe_environment(device), args.seeds):
        warn(sentence)
    return folder.missing(folder.numbers(args.seeds))


def resolve_settings(args: Namespace, pipeline, numbering: Numbering, device: torch.device) -> dict[str, Any]:
    """All that decides about the bytes of an image, and the form of the output."""
    names = ("num_inference_steps", "guidance_scale", "guidance_interval", "mixed_precision", "allow_tf32", "compile")
    settings = {name: getattr(args, name) for name in (*names, "chunk_size", "format")}
    settings |= {"class_labels": numbering.rule, "device": device.type}
    if device.type == "cpu":
        settings["num_threads"] = args.num_threads
    settings["scheduler"] = type(pipeline.scheduler).__name__
    settings |= {f"scheduler.{name}": value for name, value in public(pipeline.scheduler.config).items()}
    for name in ("unet", "guide_unet", "vae"):
        used = name != "guide_unet" or args.guidance_scale != 1
        if used and (network := getattr(pipeline, name)) is not None:
            settings[f"{name}_sha256"] = fingerprint(network)
    if pipeline.vae is not None:
        settings |= {name: getattr(pipeline.config, name) for name in ("latents_mean", "latents_std")}
    return settings


def describe_source(args: Namespace, pipeline: EDM2Pipeline) -> dict[str, Any]:
    """Where the model comes from; another place with the same weights is as good."""
    source = {name: value for name in SOURCE if (value := getattr(args, name)) is not None}
    # What comes from the Hub lies in a folder that is named after the commit.
    commit = re.search(r"/snapshots/([0-9a-f]{40})/", str(pipeline.unet.config.get("_name_or_path")))
    return source | ({"commit": commit[1]} if commit else {})


def describe_environment(device: torch.device) -> dict[str, str]:
    packages = ("torch", "diffusers", "accelerate", "diffusers-edm2")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"python": platform.python_version(), **{name: version(name) for name in packages}, "device": name}


# ----------------------------------------------------------------------------------------------------------------------
# Signals and progress


class Stopped(Exception):
    """A signal asked for the end."""


class StopSignal:
    """SIGTERM and SIGINT end the drawing after the present network call; what is drawn is still written.

    One that follows five seconds later ends the process at once. Until then it is the same request: launchers pass on
    what the whole process group has got already.
    """

    def __init__(self):
        self.received, self.time = 0, 0.0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.receive)

    def receive(self, number: int, frame: object) -> None:
        if not self.received:
            self.received, self.time = number, time.monotonic()
        elif time.monotonic() - self.time > 5:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def check(self, *_: object) -> dict[str, Any]:
        """To be called after each network call."""
        if self.received:
            raise Stopped
        return {}


class Progress:
    """A bar on the main process with the images of all: its own as they are written, the others' now and then."""

    def __init__(self, folder: ImageFolder, wanted: Sequence[int], todo: Sequence[int], state: PartialState):
        self.folder, self.wanted, self.todo, self.is_alone = folder, wanted, len(todo), state.num_processes == 1
        self.start = self.looked = time.monotonic()
        count = {"initial": len(wanted) - len(todo), "total": len(wanted)}
        self.bar = tqdm(desc="drawing", unit="img", disable=not state.is_main_process, **count)

    def add(self, count: int) -> None:
        if self.is_alone:
            self.bar.update(count)
        elif not self.bar.disable and time.monotonic() - self.looked > 5:  # a look at 50 000 files takes 0.2 s
            self.look()

    def look(self) -> None:
        self.bar.update(len(self.wanted) - len(self.folder.missing(self.wanted)) - self.bar.n)
        self.looked = time.monotonic()

    def close(self) -> None:
        if not self.bar.disable:
            self.look()
        self.bar.close()

    def summary(self) -> str:
        if not self.todo:
            return "all of them were there"
        return f"{self.todo} of them drawn now, {self.todo / (time.monotonic() - self.start):.1f} img/s"


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------------------
# Options


def seeds(text: str) -> list[int]:
    return explained(parse_seeds, text)


def class_labels(text: str) -> str | list[int]:
    if text in CLASS_RULES:
        return text
    if not re.fullmatch(r"\d+(,\d+)*", text):
        rules = ", ".join(CLASS_RULES)
        raise argparse.ArgumentTypeError(f"{text!r} is no list of classes, such as 0,3,5, and none of {rules}.")
    return [int(part) for part in text.split(",")]


def interval(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low < high:
        raise argparse.ArgumentTypeError(f"{text!r} is no pair of noise levels, such as 0.28,2.9, the lower one first.")
    return low, high


def count(text: str) -> int:
    if not re.fullmatch(r"\d+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1.")
    return int(text)


def images(text: str) -> int:
    return explained(parse_images, text)


def png_file(text: str) -> Path:
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text!r} is no PNG file: its name must end in .png.")
    return Path(text)


def explained(parse: Any, text: str) -> Any:
    """argparse shows the message of this error only."""
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def build_parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help="pipeline folder, Hub id, or run folder of train_edm2.py")
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for name, (text, settings) in options.items():
            group.add_argument(f"--{name}", help=" ".join(text.split()), **settings)
    return parser


def option(text: str, **settings: Any) -> tuple[str, dict[str, Any]]:
    return text, settings


STD = {"type": float, "metavar": "STD"}
FLAG = {"action": "store_true"}

# Name, help (line breaks do not matter), and what argparse is told.
OPTIONS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "which images": {
        "seeds": option(
            "seeds from 0 to 2^32 - 1, for example 0-49999, or 0-9,20,30-39 (default: %(default)s)",
            type=seeds,
            default="0-15",
        ),
        "class_labels": option(
            """balanced: all classes in turn, seed modulo their number; 0,3,5: these in turn, so that seed 4 gets 3;
            all: every class for every seed, from the same noise: --seeds 0-49 gives 50 images of each class, with the
            numbers seed x classes + class; random: drawn from the seed, as the pipeline does by itself; none: no
            class, for networks trained with label dropout (default: random, or none if the network has no classes)""",
            type=class_labels,
            metavar="CLASSES",
        ),
    },
    "output": {
        "output_dir": option(
            """for the images, generation.json, and dataset.json with the classes; what is there already is not drawn
            again""",
            type=Path,
            required=True,
            metavar="DIR",
        ),
        "format": option(
            """png: DIR/001000/001234.png and so on, a thousand to a sub-folder; npz: DIR/images.npz with the images as
            arr_0, uint8 [N,H,W,C], the classes as arr_1, as ADM's evaluator reads them, and the seeds; until all are
            drawn they are kept in DIR/parts (default: %(default)s)""",
            choices=["png", "npz"],
            default="png",
        ),
        "grid": option(
            f"""also draw the first {GRID_IMAGES} images into one, with their classes, or #seed (default name:
            DIR-grid.png beside DIR, because tools for FID would count it in DIR)""",
            type=png_file,
            nargs="?",
            const=False,
            metavar="FILE.png",
        ),
    },
    "model": {
        "sigma_rel": option(
            """EMA length, a fraction of the training, for a run folder; it is reconstructed from the snapshots and kept
            there (EDM2 eq. 123; default: the first tracked)""",
            **STD,
        ),
        "nimg": option(
            "moment of a run folder's training, such as 8Mi (default: the last snapshot)", type=images, metavar="IMAGES"
        ),
        "revision": option("branch, tag or commit of a Hub model", metavar="REV"),
        "variant": option("variant of the weights, for example fp16", metavar="NAME"),
        "cache_dir": option(
            "where models of the Hub are kept; private ones need HF_TOKEN in the environment", metavar="DIR"
        ),
    },
    "sampler": {
        "num_inference_steps": option(
            "N; heun calls the network 2N - 1 times, the others N times (default: %(default)s)",
            type=count,
            default=32,
            metavar="N",
        ),
        "scheduler": option("default: the model's own, usually heun", choices=list(SCHEDULERS)),
        "sigma_min": option("lowest noise level, in units of the samples (default: the model's, usually 0.002)", **STD),
        "sigma_max": option("highest noise level (default: the model's, usually 80)", **STD),
        "rho": option(
            "greater values put more steps at low noise (default: the model's, usually 7)", type=float, metavar="X"
        ),
        "s_churn": option(
            "heun: noise added on the way, over all steps (EDM Algorithm 2; default: the model's, usually 0)",
            type=float,
            metavar="X",
        ),
        "s_tmin": option("heun: churn from this noise level (default: 0)", **STD),
        "s_tmax": option("heun: churn up to this noise level (default: any)", **STD),
        "s_noise": option("heun: factor on the churn's noise (default: 1)", type=float, metavar="X"),
    },
    "guidance": {
        "guidance_scale": option(
            """w in D_guide + w (D - D_guide), arXiv 2406.02507; without a guide the network guides itself, as no class,
            if it was trained with label dropout; 1: no guidance (default: %(default)s)""",
            type=float,
            default=1.0,
            metavar="W",
        ),
        "guidance_interval": option(
            "guide only at noise levels LO < sigma <= HI, arXiv 2404.07724, for example 0.28,2.9 (default: all)",
            type=interval,
            metavar="LO,HI",
        ),
        "guide": option(
            """guiding network: run folder, pipeline, network folder or Hub id (default: that of the pipeline, if it has
            one; MODEL's own run, if one of the next two options is given)""",
            metavar="MODEL",
        ),
        "guide_sigma_rel": option("EMA length of the guide, from a run folder (default: the first tracked)", **STD),
        "guide_nimg": option(
            "moment of the guide's training, from a run folder (default: the last)", type=images, metavar="IMAGES"
        ),
    },
    "speed; all but --batch_size change the rounding, so that some pixels differ by 1/255": {
        "batch_size": option(
            "images that a process draws before it writes them, rounded up to whole chunks (default: one chunk)",
            type=count,
            default=1,
            metavar="N",
        ),
        "chunk_size": option(
            "images per network call: more are faster and take more memory (default: 16 on a CPU, 64 on a GPU)",
            type=count,
            metavar="N",
        ),
        "mixed_precision": option(
            "type of the networks; the sampler's is float32 (default: %(default)s)", choices=list(DTYPES), default="no"
        ),
        "allow_tf32": option("let NVIDIA GPUs multiply float32 numbers with 10 bits of mantissa", **FLAG),
        "compile": option("compile the networks with torch.compile: slower to start, then faster", **FLAG),
        "num_threads": option(
            """CPU threads of a process; several processes use several cores with the same result
            (default: %(default)s)""",
            type=count,
            default=1,
            metavar="N",
        ),
    },
}


if __name__ == "__main__":
    main()
