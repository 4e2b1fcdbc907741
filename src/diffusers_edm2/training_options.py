"""The options of the training script: where each comes from, what it means, and how they become one recipe.

The command line wins over `--config`, `--config` over `--preset`, and the preset over the defaults in the table below.
"""

import argparse
import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffusers_edm2.presets import Ki, M, Mi, format_images, get_preset, parse_images

# Options that may differ between the start of a run and its continuation: they say where and how fast it is computed,
# how long it goes on and what is kept, not what is computed. Batch size per device and accumulation change the numbers
# by float rounding only.
FREE_OPTIONS = frozenset(
    (
        "preset",
        "config",
        "output_dir",
        "resume_from_checkpoint",
        "checkpoints_total_limit",
        "checkpoint_every",
        "duration",
        "report_to",
        "train_batch_size",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "dataloader_num_workers",
        "cache_dir",
        "dry_run",
        "push_to_hub",
        "hub_model_id",
        "hub_private_repo",
        "hub_token",
        "hub_strategy",
    )
)

SOURCES = ("dataset_name", "train_data_dir")  # two ways to name the images


def parse_int_list(text: str) -> tuple[int, ...]:
    """Whole numbers: "64,128" -> (64, 128)."""
    return tuple(int(part) for part in text.split(",") if part.strip())


def parse_float_list(text: str) -> tuple[float, ...]:
    """Numbers: "0.05,0.10" -> (0.05, 0.1)."""
    return tuple(float(part) for part in text.split(",") if part.strip())


def parse_bool(text: str) -> bool:
    """For configuration files; on the command line it is --option and --no-option."""
    if text.lower() not in ("true", "false"):
        raise ValueError(f'"{text}" is neither true nor false')
    return text.lower() == "true"


class Option(NamedTuple):
    """One line of the table: `parse` reads the text of the command line, and of a configuration file."""

    name: str
    parse: Callable[[str], Any]
    default: Any
    help: str
    metavar: str | None = None
    choices: Sequence[str] | None = None


Group = tuple[str, tuple[Option, ...]]

OPTIONS: tuple[Group, ...] = (
    (
        "recipe",
        (
            Option("preset", str, None, "a published recipe, which the other options change: edm2-img512-{xxs,xs,s,m,l,xl,xxl}, edm2-img64-{xs,s,m,l,xl}, cifar10 or digits; without data and preset: digits", "NAME"),
            Option("config", str, None, "YAML file of these options; the command line wins over it, it wins over the preset", "FILE"),
            Option("dry_run", parse_bool, False, "print the resolved recipe, parameters, GMAC per image and memory, then stop; nothing is written"),
        ),
    ),
    (
        "data",
        (
            Option("dataset_name", str, None, "Hub id, or a local folder of parquet, Arrow or image files; or digits", "NAME"),
            Option("train_data_dir", str, None, "images in class folders, or an EDM2 data set: a ZIP or folder of PNG or NPY files, with dataset.json", "PATH"),
            Option("dataset_config_name", str, None, "configuration of a Hub data set that has several", "NAME"),
            Option("dataset_split", str, None, "split to train on (default: train, or the only one)", "NAME"),
            Option("dataset_revision", str, None, "revision of a Hub data set", "REV"),
            Option("image_column", str, None, "column with the images (default: found by its type)", "NAME"),
            Option("label_column", str, None, "column with the classes (default: found by its type or name)", "NAME"),
            Option("cache_dir", str, None, "where data sets from the Hub are kept", "DIR"),
            Option("resolution", int, None, "height and width to train on, in pixels of the image or of the stored latent (default: that of the data)", "PIXELS"),
            Option("center_crop", parse_bool, False, "cut out the centred square and resize it to --resolution"),
            Option("dhariwal_crop", parse_bool, False, "crop as for the papers' ImageNet: halve, bicubic, centre (arXiv 2105.05233)"),
            Option("random_flip", parse_bool, False, "mirror half of the images, left to right"),
            Option("skip_bad_images", parse_bool, False, "leave out images that cannot be used, count and list them, instead of stopping"),
            Option("latents", parse_bool, None, "whether the data set holds stored VAE latents (default: as found)"),
            Option("pretrained_vae_model_name_or_path", str, None, "AutoencoderKL, Hub id or folder (or a pipeline with one), that decodes latents for sample grids and the saved pipeline", "NAME"),
            Option("latents_mean", parse_float_list, None, "mean of each raw channel of stored latents, to bring them to mean 0 (default: as noted in the data set, or that of sd-vae-ft-mse on ImageNet)", "X,..."),
            Option("latents_std", parse_float_list, None, "standard deviation of each raw channel, to bring it to --sigma_data (default: as for --latents_mean)", "X,..."),
            Option("dataloader_num_workers", int, 2, "processes that read images, per device; 0 reads in the training process", "N"),
        ),
    ),
    (
        "network (EDM2 configuration G)",
        (
            Option("num_classes", int, None, "classes of the network; 0 trains without classes (default: those of the data)", "N"),
            Option("in_channels", int, None, "channels of the network: 1 or 3 for images, 4 for latents (default: those of the data)", "N"),
            Option("block_out_channels", parse_int_list, (64, 128, 192, 256), "width of each resolution level, the highest resolution first", "N,..."),
            Option("layers_per_block", int, 3, "residual blocks per level of the encoder", "N"),
            Option("attention_resolutions", parse_int_list, (16, 8), "resolutions with self-attention, in pixels", "N,..."),
            Option("attention_head_dim", int, 64, "channels per attention head", "N"),
            Option("dropout", float, 0.0, "dropout probability of the residual branches, in [0, 1)", "P"),
            Option("gradient_checkpointing", parse_bool, False, "recompute activations in the backward pass: less memory, about a third more time"),
        ),
    ),
    (
        "objective",
        (
            Option("P_mean", float, -0.4, "mean of ln(sigma) in training (EDM2 Table 6)", "X"),
            Option("P_std", float, 1.0, "standard deviation of ln(sigma) in training (EDM2 Table 6)", "X"),
            Option("label_dropout", float, 0.0, "share of images shown without their class, in [0, 1); 0.1 is usual for classifier-free guidance with the trained network alone", "P"),
            Option("sigma_data", float, 0.5, "standard deviation of the training data (EDM Table 1)", "X"),
        ),
    ),
    (
        "optimization",
        (
            Option("duration", parse_images, 8 * Mi, "training images in all, in place of a number of steps or epochs; suffixes Ki, Mi, Gi (powers of 1024) and k, M (of 1000)", "IMAGES"),
            Option("total_batch_size", int, None, "images per optimizer step, over all devices; accumulation is derived from it (default: --train_batch_size x accumulation x devices)", "N"),
            Option("train_batch_size", int, None, "images per device and forward pass (default: all of --total_batch_size at once, or 16; give it when memory runs out)", "N"),
            Option("gradient_accumulation_steps", int, None, "forward passes per optimizer step (default: derived, or 1)", "N"),
            Option("learning_rate", float, 0.01, "reference learning rate alpha_ref (EDM2 eq. 67)", "X"),
            Option("lr_ref_batches", float, 35000.0, "steps after which the rate decays as 1/sqrt(steps), t_ref (EDM2 eq. 67); 0: no decay", "STEPS"),
            Option("lr_rampup", parse_images, 1 * M, "images over which the rate rises from 0; 0: no ramp", "IMAGES"),
            Option("adam_beta1", float, 0.9, "Adam's decay of the first moment", "X"),
            Option("adam_beta2", float, 0.99, "Adam's decay of the second moment", "X"),
            Option("adam_epsilon", float, 1e-8, "Adam's epsilon", "X"),
            Option("ema_sigma_rel", parse_float_list, (0.05, 0.10), "EMA lengths to track, as fractions of the run (EDM2 eq. 123), each in (0, 0.2886]; the first one is sampled and saved as pipeline; two allow any other length after the training", "STD,..."),
            Option("seed", int, 0, "of initial weights, data order, flips, noise and dropout: the same seed gives the same run", "N"),
        ),
    ),
    (
        "speed",
        (
            Option("mixed_precision", str, None, "type of the network's activations; no loss scaling is used (default: that of the preset, or as accelerate is configured)", None, ("no", "fp16", "bf16")),
            Option("allow_tf32", parse_bool, False, "let NVIDIA GPUs round float32 products to TF32; off, as in the paper"),
            Option("compile", parse_bool, False, "torch.compile the network: minutes at the start, faster afterwards"),
        ),
    ),
    (
        "output",
        (
            Option("output_dir", str, "edm2-run", "the run folder: config, metrics, samples, snapshots, checkpoints, pipeline", "DIR"),
            Option("status_every", parse_images, 64 * Ki, "images between two status lines (console, metrics.jsonl, tracker)", "IMAGES"),
            Option("sample_every", parse_images, 1 * Mi, "images between two sample grids; 0: only at the end", "IMAGES"),
            Option("snapshot_every", parse_images, 1 * Mi, "images between two snapshots of each EMA; 0: only at the end", "IMAGES"),
            Option("checkpoint_every", parse_images, 1 * Mi, "images between two checkpoints to resume from; 0: only at the end", "IMAGES"),
            Option("checkpoints_total_limit", int, 2, "how many checkpoints are kept", "N"),
            Option("resume_from_checkpoint", str, "latest", "latest (if there is one), the number of images of a checkpoint of this run, or a path; to start anew, give another --output_dir", "WHICH"),
            Option("report_to", str, "tensorboard", "tracker: tensorboard, wandb, another that accelerate knows, or none", "NAME"),
            Option("num_inference_steps", int, 32, "sampling steps for the grids", "N"),
        ),
    ),
    (
        "Hugging Face Hub",
        (
            Option("push_to_hub", parse_bool, False, "push the pipeline with its model card to the Hub, in the background; a failing network never stops the training"),
            Option("hub_model_id", str, None, "repository: name, or namespace/name (default: the name of --output_dir, in your namespace)", "ID"),
            Option("hub_private_repo", parse_bool, False, "make a new repository private"),
            Option("hub_token", str, None, "token that may write; better set HF_TOKEN or log in with hf auth login: command lines are seen by others (default: from there)", "TOKEN"),
            Option("hub_strategy", str, "end", "push once the training is done, or every snapshot", None, ("end", "snapshots")),
        ),
    ),
)  # fmt: skip

TABLE: dict[str, Option] = {option.name: option for _, group in OPTIONS for option in group}


def build_parser() -> argparse.ArgumentParser:
    """The command line; options that are not given are absent from its result, so that the preset can speak."""
    parser = argparse.ArgumentParser(
        prog="train_edm2.py",
        description="Train an EDM2 diffusion model. The run folder holds everything that resuming, sampling and "
        "choosing the EMA afterwards need; started again, the run goes on where it stopped.",
        epilog="Example: accelerate launch training/train_edm2.py --preset edm2-img64-s --train_data_dir imagenet.zip "
        "--output_dir runs/img64-s --train_batch_size 64",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for title, options in OPTIONS:
        group = parser.add_argument_group(title)
        for o in options:
            show = format_images if o.parse is parse_images else _show
            default = "" if o.default is None or o.parse is parse_bool else f" (default: {show(o.default)})"
            help_text = f"{o.help}{default}".replace("%", "%%")
            if o.parse is parse_bool:
                group.add_argument(f"--{o.name}", action=argparse.BooleanOptionalAction, help=help_text)
            else:
                group.add_argument(
                    f"--{o.name}", type=_argument(o.parse), metavar=o.metavar, choices=o.choices, help=help_text
                )
    return parser


def _argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """argparse shows the message of this error only."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


def _show(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """All options, merged from command line, configuration file, preset and defaults.

    What depends on the data or the number of devices stays None until `fit_to_data` and `resolve_batch`.
    Errors end the program with a message and status 2, as argparse does.
    """
    parser = build_parser()
    given = vars(parser.parse_args(argv))
    try:
        return argparse.Namespace(**merge_options(given))
    except ValueError as error:
        parser.error(str(error))


def merge_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` (the command line) over its `config` file, over the preset, over the defaults.

    Who names the images, by whichever of the two options, replaces the images named below.

    Raises:
        ValueError: a configuration file or preset that does not exist, or options that contradict each other.
    """
    file = read_config(given["config"]) if given.get("config") else {}
    if any(given.get(name) for name in SOURCES):
        file = {name: value for name, value in file.items() if name not in SOURCES}
    asked = {**file, **given}
    if not any(asked.get(name) for name in ("preset", *SOURCES)):
        asked["preset"] = "digits"
    preset = dict(get_preset(asked["preset"]).recipe) if asked.get("preset") else {}
    if asked.get("train_data_dir"):
        preset["dataset_name"] = None
    options = {**{name: o.default for name, o in TABLE.items()}, **preset, **asked}
    check_options(options)
    return options


def read_config(path: str) -> dict[str, Any]:
    """The options in a YAML file, read as the command line would read them.

    Raises:
        ValueError: the file is missing, not a table of options, or has an unknown name or a value that cannot be read.
    """
    import yaml

    if not Path(path).is_file():
        raise ValueError(f"--config {path} does not exist; the examples are in training/configs.")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f'--config {path} must hold lines of "option: value".')
    options = {}
    for name, value in content.items():
        if name == "config":
            raise ValueError(f"--config {path} cannot name another configuration file; put all options into one.")
        if name not in TABLE:
            close = difflib.get_close_matches(str(name), TABLE, n=1)
            hint = f'; did you mean "{close[0]}"?' if close else "; --help lists them all."
            raise ValueError(f'--config {path}: there is no option "{name}"{hint}')
        option = TABLE[name]
        if value is None and option.default is not None:
            raise ValueError(f"--config {path}: {name} needs a value; leave the line out for the usual one.")
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        try:
            options[name] = None if value is None else option.parse(text)
        except ValueError as error:
            raise ValueError(f"--config {path}: {name}: {value} cannot be read ({error}).") from error
        if option.choices and options[name] not in (None, *option.choices):
            raise ValueError(
                f"--config {path}: {name}: {value} is not one of {', '.join(option.choices)}; "
                'put "no" and numbers that are names into quotes.'
            )
    return options


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse what cannot work, before any work is done.

    Raises:
        ValueError: names the option, its value and the rule.
    """
    if options["dataset_name"] is None and options["train_data_dir"] is None and not options["dry_run"]:
        raise ValueError(
            f"--preset {options['preset']} needs images: name them with --dataset_name or --train_data_dir."
        )
    mean, std = options["latents_mean"], options["latents_std"]
    if (mean is None) != (std is None) or (std and min(std) <= 0):
        raise ValueError(
            f"--latents_mean {_show(mean)} and --latents_std {_show(std)} must be given together, with deviations "
            "greater than 0."
        )
    if options["center_crop"] and options["dhariwal_crop"]:
        raise ValueError("--center_crop and --dhariwal_crop exclude each other; give one.")
    positive = ("duration", "status_every", "sigma_data", "P_std", "num_inference_steps")
    network = ("resolution", "in_channels", "layers_per_block", "attention_head_dim")
    batch = ("total_batch_size", "train_batch_size", "gradient_accumulation_steps", "checkpoints_total_limit")
    for name in (*positive, *network, *batch):
        if options[name] is not None and options[name] <= 0:
            raise ValueError(f"--{name} {options[name]} must be greater than 0.")
    for name in ("adam_beta1", "adam_beta2", "dropout", "label_dropout"):
        if not 0 <= options[name] < 1:
            raise ValueError(f"--{name} {options[name]} must be at least 0 and less than 1.")
    if min(options["block_out_channels"], default=0) <= 0:
        raise ValueError(
            f"--block_out_channels {_show(options['block_out_channels'])} must be one or more widths greater than 0."
        )
    rates = ("learning_rate", "lr_ref_batches", "lr_rampup", "adam_epsilon")
    for name in (*rates, "num_classes", "dataloader_num_workers", "seed"):
        if options[name] is not None and options[name] < 0:
            raise ValueError(f"--{name} {options[name]} must not be negative.")
    lengths = options["ema_sigma_rel"]
    if not lengths or len(set(lengths)) < len(lengths) or not all(0 < s < 12**-0.5 for s in lengths):
        raise ValueError(
            f"--ema_sigma_rel {_show(lengths)} must be one or more different lengths in (0, 0.2886], fractions of the "
            "training; 0.05,0.10 is the papers' choice."
        )


def resolve_batch(options: argparse.Namespace, num_processes: int) -> None:
    """Fill in the sizes of a step that were not given.

        total_batch_size = train_batch_size x gradient_accumulation_steps x num_processes

    Raises:
        ValueError: they contradict each other, or the total cannot be divided.
    """
    total, micro, steps = options.total_batch_size, options.train_batch_size, options.gradient_accumulation_steps
    if total is None:
        micro, steps = micro or 16, steps or 1
        total = micro * steps * num_processes
    elif micro is None:
        parts = num_processes * (steps or 1)
        if total % parts:
            low = total // parts * parts
            ways = f"{low} or {low + parts}" if low else f"{parts}"
            raise ValueError(
                f"--total_batch_size {total} is not a multiple of {num_processes} processes x {steps or 1} "
                f"accumulation steps; use {ways}."
            )
        micro, steps = total // parts, steps or 1
    else:
        together = micro * num_processes
        if total % together:
            low = total // together * together
            ways = f"{low} or {low + together}" if low else f"{together}"
            raise ValueError(
                f"--total_batch_size {total} is not a multiple of --train_batch_size {micro} x {num_processes} "
                f"processes; use {ways}."
            )
        if steps is not None and steps != total // together:
            raise ValueError(
                f"--gradient_accumulation_steps {steps} contradicts --total_batch_size {total}: --train_batch_size "
                f"{micro} x {num_processes} processes makes it {total // together}; leave it out, or use "
                f"--total_batch_size {together * steps}."
            )
        steps = total // together
    options.total_batch_size, options.train_batch_size, options.gradient_accumulation_steps = total, micro, steps


def fit_to_data(options: argparse.Namespace, shape: tuple[int, int, int], num_classes: int, is_latent: bool) -> None:
    """Fill in `resolution`, `in_channels`, `num_classes` and `latents` from the data, or hold them against it.

    Args:
        shape: (channels, height, width) of a training sample as it is stored; latents store mean and deviation.
        num_classes: classes of the data, 0 for none.
        is_latent: whether the data are stored latents.

    Raises:
        ValueError: the network does not fit the data.
    """
    channels, height, width = shape
    channels = channels // 2 if is_latent else channels
    if height != width:
        raise ValueError(
            f"the images are {height} x {width} pixels; a training sample is square: give --resolution with "
            "--center_crop or --dhariwal_crop."
        )
    options.resolution = height
    if options.latents is not None and options.latents != is_latent:
        raise ValueError(
            f"the data set holds {'stored latents' if is_latent else 'pictures'}, but --"
            f"{'latents' if options.latents else 'no-latents'} asks for the other; give another data set, or "
            "another --preset."
        )
    options.latents = is_latent
    if options.in_channels not in (None, channels):
        raise ValueError(
            f"--in_channels {options.in_channels}, but the data have {channels} channels; leave the option out, "
            "or convert the data."
        )
    options.in_channels = channels
    if options.num_classes is None:
        options.num_classes = num_classes
    elif options.num_classes and not num_classes:
        raise ValueError(
            f"--num_classes {options.num_classes}, but the data have no labels; give --num_classes 0 to train "
            "without classes, or a data set with labels."
        )
    elif 0 < options.num_classes < num_classes:
        raise ValueError(
            f"--num_classes {options.num_classes}, but the data have {num_classes}; give --num_classes {num_classes}, "
            "or 0 to train without classes."
        )
    if options.label_dropout and not options.num_classes:
        raise ValueError(
            f"--label_dropout {options.label_dropout} needs classes to leave out, but the network has none; "
            "leave the option out, or train with classes."
        )
