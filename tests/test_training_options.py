"""The training script's options: where each value comes from, what is refused and how, what `--help` teaches."""

import re
from argparse import Namespace
from pathlib import Path

import pytest

from diffusers_edm2.presets import PRESETS, Ki, M, Mi, get_preset, parse_images
from diffusers_edm2.training_options import (
    FREE_OPTIONS,
    TABLE,
    build_parser,
    fit_to_data,
    merge_options,
    parse_bool,
    parse_options,
    resolve_batch,
)

TRAINING = Path(__file__).parents[1] / "training"


def write_config(folder: Path, text: str) -> str:
    path = folder / "my.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def from_config(folder: Path, text: str) -> dict:
    return merge_options({"config": write_config(folder, text)})


def refused(argv: list[str], capsys) -> str:
    """The message with which the program ends."""
    with pytest.raises(SystemExit) as end:
        parse_options(argv)
    assert end.value.code == 2
    return capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Where a value comes from


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ((), 35_000),
        (("preset",), 26_000),
        (("preset", "file"), 7),
        (("preset", "command line"), 9),
        (("preset", "file", "command line"), 9),
        (("file",), 7),
        (("file", "command line"), 9),
    ],
)
def test_command_line_over_file_over_preset_over_default(tmp_path, sources, expected):
    argv = ["--train_data_dir", "images"]
    if "preset" in sources:
        argv += ["--preset", "cifar10"]
    if "file" in sources:
        argv += ["--config", write_config(tmp_path, "lr_ref_batches: 7")]
    if "command line" in sources:
        argv += ["--lr_ref_batches", "9"]
    options = parse_options(argv)
    assert options.lr_ref_batches == expected
    assert options.lr_rampup == (10 * M if "preset" in sources else M)  # the rest is as it was


def test_the_file_may_name_the_preset_and_the_command_line_another(tmp_path):
    path = write_config(tmp_path, "preset: cifar10\ntrain_data_dir: images\nP_std: 1.5")
    assert parse_options(["--config", path]).P_mean == -1.2
    options = parse_options(["--config", path, "--preset", "edm2-img64-s"])
    assert (options.P_mean, options.P_std, options.preset) == (-0.8, 1.5, "edm2-img64-s")


def test_a_switch_can_be_turned_off_on_the_command_line(tmp_path):
    path = write_config(tmp_path, "random_flip: true\ncenter_crop: true")
    options = parse_options(["--config", path, "--no-random_flip"])
    assert (options.random_flip, options.center_crop) == (False, True)


def test_values_are_read_as_the_type_that_they_are():
    argv = "--duration 8Mi --lr_rampup 10M --P_mean -1.2 --compile --block_out_channels 32,64 --ema_sigma_rel 0.05,0.10"
    options = parse_options([*argv.split(), "--attention_resolutions", ""])
    assert (options.duration, options.lr_rampup, options.P_mean, options.compile) == (8 * Mi, 10 * M, -1.2, True)
    assert (options.block_out_channels, options.attention_resolutions) == ((32, 64), ())
    assert options.ema_sigma_rel == (0.05, 0.10)


@pytest.mark.parametrize(
    ("argv", "preset", "dataset_name"),
    [
        ("", "digits", "digits"),  # the example that needs nothing
        ("--seed 1", "digits", "digits"),
        ("--dataset_name user/cats", None, "user/cats"),
        ("--train_data_dir cats", None, None),
        ("--preset digits --train_data_dir cats", "digits", None),  # the preset's own images give way
        ("--preset digits --dataset_name user/cats", "digits", "user/cats"),
        ("--preset cifar10 --dry_run", "cifar10", None),  # a recipe can be looked at without images
    ],
)
def test_which_images(argv, preset, dataset_name):
    options = parse_options(argv.split())
    assert (options.preset, options.dataset_name) == (preset, dataset_name)


@pytest.mark.parametrize(
    ("text", "argv", "expected"),
    [
        ("train_data_dir: cats", "--dataset_name user/dogs", ("user/dogs", None)),
        ("dataset_name: user/cats", "--train_data_dir dogs", (None, "dogs")),
        ("dataset_name: user/cats", "--seed 1", ("user/cats", None)),
    ],
)
def test_images_named_on_the_command_line_replace_those_in_the_file(tmp_path, text, argv, expected):
    options = parse_options(["--config", write_config(tmp_path, text), *argv.split()])
    assert (options.dataset_name, options.train_data_dir) == expected


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_resolves(name):
    """From the command line to the network's arguments, on data as the papers' and on 8 processes."""
    recipe = get_preset(name).recipe
    assert recipe.keys() <= TABLE.keys()
    options = parse_options(["--preset", name, "--train_data_dir", "images"])
    assert {key: getattr(options, key) for key in recipe} == {**recipe, "dataset_name": None}
    resolve_batch(options, num_processes=8)
    assert options.total_batch_size == recipe["total_batch_size"] == options.train_batch_size * 8
    stored = (recipe["in_channels"] * (2 if recipe["latents"] else 1), recipe["resolution"], recipe["resolution"])
    fit_to_data(options, stored, recipe["num_classes"], recipe["latents"])
    assert {key: getattr(options, key) for key in recipe} == {**recipe, "dataset_name": None}
    assert None not in (options.resolution, options.in_channels, options.num_classes, options.latents)


@pytest.mark.parametrize("path", sorted((TRAINING / "configs").iterdir()), ids=lambda path: path.stem)
def test_every_example_file_resolves(path):
    options = merge_options({"config": str(path), "dry_run": True})
    assert options["preset"] in PRESETS


def test_every_option_is_used_and_nothing_else_is_asked_for():
    """Of the attributes that the script reads, each is an option; of the options, each is read by somebody."""
    read = set(re.findall(r"\bargs\.(\w+)", (TRAINING / "train_edm2.py").read_text(encoding="utf-8")))
    assert {"seed", "duration"} <= read <= TABLE.keys()
    assert TABLE.keys() - read <= {"config", "latents"}  # for merge_options, fit_to_data


def test_free_options_are_options():
    assert set(TABLE) > FREE_OPTIONS
    # What would change the weights, the data or the noise is not free.
    fixed = {"seed", "total_batch_size", "learning_rate", "P_mean", "ema_sigma_rel", "resolution", "random_flip"}
    assert set(TABLE) > fixed
    assert not FREE_OPTIONS & fixed


# ---------------------------------------------------------------------------------------------------------------------
# Configuration files


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("random_flip: true", True),
        ("random_flip: no", False),  # YAML 1.1: a boolean
        ("random_flip: Off", False),
        ("learning_rate: 1e-4", 1e-4),  # YAML 1.1: a string, for want of a dot
        ("learning_rate: 1", 1.0),
        ("P_mean: -1.2e+0", -1.2),
        ("duration: 256Ki", 256 * Ki),
        ("duration: 4096", 4096),
        ("duration: 200_000", 200_000),
        ("block_out_channels: [32, 64]", (32, 64)),
        ("block_out_channels: 32,64", (32, 64)),
        ("block_out_channels: 32", (32,)),
        ("attention_resolutions: []", ()),
        ("ema_sigma_rel: [0.05, 0.10]", (0.05, 0.10)),
        ('mixed_precision: "no"', "no"),
        ("mixed_precision: bf16", "bf16"),
        ("mixed_precision: null", None),
        ("resolution:", None),
        ("resume_from_checkpoint: 524288", "524288"),
        ('dataset_revision: "0123"', "0123"),
        ("report_to: none", "none"),
    ],
)
def test_a_file_says_what_the_command_line_would(tmp_path, line, expected):
    value = from_config(tmp_path, f"# a comment\n{line}\n")[line.partition(":")[0]]
    assert value == expected and type(value) is type(expected)


def test_null_leaves_to_the_data_what_a_preset_has_set(tmp_path):
    options = from_config(tmp_path, "preset: digits\nresolution: null\nnum_classes: null")
    assert options["resolution"] is None and options["num_classes"] is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train-batch-size: 4", 'my.yaml: there is no option "train-batch-size"; did you mean "train_batch_size"\\?'),
        ("learning_rat: 4", 'there is no option "learning_rat"; did you mean "learning_rate"\\?'),
        ("xyzzy: 4", 'there is no option "xyzzy"; --help lists them all.'),
        ("7: 4", 'there is no option "7"; --help lists them all.'),
        ("learning_rate: fast", r"my.yaml: learning_rate: fast cannot be read \(could not convert string to float"),
        ("seed: 1.5", r"seed: 1.5 cannot be read \(invalid literal for int"),
        ("seed: true", r"seed: True cannot be read \(invalid literal for int"),
        ("duration: 1e6", r'duration: 1e6 cannot be read \("1e6" is not a number of images; .* such as 65536, 64Ki'),
        ("random_flip: 1", r'random_flip: 1 cannot be read \("1" is neither true nor false\)'),
        ("block_out_channels: [32, wide]", r"block_out_channels: \[32, 'wide'\] cannot be read"),
        ("mixed_precision: no", 'False is not one of no, fp16, bf16; put "no" and numbers that are names into quotes'),
        ("mixed_precision: fp8", "mixed_precision: fp8 is not one of no, fp16, bf16"),
        ("- seed: 1", 'my.yaml must hold lines of "option: value"'),
        ("# nothing yet", 'my.yaml must hold lines of "option: value"'),
        ("seed: [1", r"my.yaml is not YAML: while parsing a flow sequence[\s\S]*line 1, column 7"),
        ("preset: digit", 'There is no preset "digit"; did you mean "digits"'),
        ("dropout: 2", "--dropout 2.0 must be at least 0 and less than 1"),
    ],
)
def test_errors_in_a_file(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        from_config(tmp_path, text)


def test_a_file_cannot_name_another(tmp_path):
    """It is an option, so nothing like "did you mean config?"."""
    with pytest.raises(ValueError, match="my.yaml cannot name another configuration file; put all options into one"):
        from_config(tmp_path, "config: other.yaml")


def test_null_where_a_value_is_needed(tmp_path):
    needed = [name for name, option in TABLE.items() if option.default is not None]
    assert {"seed", "ema_sigma_rel", "output_dir", "random_flip"} <= {*needed}
    for name in needed:
        with pytest.raises(ValueError, match=f"my.yaml: {name} needs a value; leave the line out"):
            from_config(tmp_path, f"{name}: null")


def test_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match="absent.yaml does not exist; the examples are in training/configs"):
        merge_options({"config": str(tmp_path / "absent.yaml")})


@pytest.mark.parametrize("text", ["yes", "1", ""])
def test_a_boolean_is_true_or_false(text):
    assert (parse_bool("True"), parse_bool("false")) == (True, False)
    with pytest.raises(ValueError, match=f'"{text}" is neither true nor false'):
        parse_bool(text)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused before any work is done


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--preset cifar10", "--preset cifar10 needs images: name them with --dataset_name or --train_data_dir"),
        ("--center_crop --dhariwal_crop", "--center_crop and --dhariwal_crop exclude each other; give one"),
        ("--ema_sigma_rel 0.3", r"--ema_sigma_rel 0.3 must be one or more different lengths in \(0, 0.2886\]"),
        ("--ema_sigma_rel 0.05,0", "--ema_sigma_rel 0.05,0.0 must be one or more different lengths"),
        ("--ema_sigma_rel ,", "--ema_sigma_rel  must be one or more different lengths"),
        ("--ema_sigma_rel 0.05,0.050", "must be one or more different lengths .* 0.05,0.10 is the papers' choice"),
        ("--block_out_channels ,", "--block_out_channels  must be one or more widths greater than 0"),
        ("--block_out_channels 0,64", "--block_out_channels 0,64 must be one or more widths greater than 0"),
        ("--preset digit", 'There is no preset "digit"; did you mean "digits"'),
        ("--config absent.yaml", "--config absent.yaml does not exist"),
        ("--seed x", "argument --seed: invalid literal for int.* 'x'"),
        ("--duration 1e6", 'argument --duration: "1e6" is not a number of images; write a whole number'),
        ("--mixed_precision fp8", "argument --mixed_precision: invalid choice: 'fp8'"),
        ("--learning 1", "unrecognized arguments: --learning 1"),  # no guessing from the first letters
        *[
            (f"--{name} {value}", f"--{name} {value}.* must be greater than 0")
            for name, value in [
                ("duration", "0"),
                ("status_every", "0"),
                ("num_inference_steps", "0"),
                ("layers_per_block", "0"),
                ("attention_head_dim", "0"),
                ("checkpoints_total_limit", "0"),
                ("total_batch_size", "0"),
                ("train_batch_size", "-1"),
                ("gradient_accumulation_steps", "0"),
                ("sigma_data", "0"),
                ("P_std", "-1"),
            ]
        ],
        *[
            (f"--{name} {value}", f"--{name} {value} must be at least 0 and less than 1")
            for name, value in [
                ("adam_beta1", "1.0"),
                ("adam_beta2", "-0.5"),
                ("dropout", "1.5"),
                ("label_dropout", "nan"),
            ]
        ],
        *[
            (f"--{name} {value}", f"--{name} {value} must not be negative")
            for name, value in [
                ("learning_rate", "-1.0"),
                ("lr_ref_batches", "-2.0"),
                ("adam_epsilon", "-1.0"),
                ("num_classes", "-1"),
                ("dataloader_num_workers", "-1"),
                ("seed", "-1"),
            ]
        ],
    ],
)
def test_refused_with_a_reason(argv, message, capsys):
    assert re.search(f"train_edm2.py: error: .*{message}", refused(argv.split(), capsys))


def test_zero_where_it_switches_off():
    intervals = ["sample_every", "snapshot_every", "checkpoint_every"]
    names = ["lr_ref_batches", "lr_rampup", "num_classes", "dataloader_num_workers", "dropout", *intervals]
    options = parse_options([text for name in names for text in (f"--{name}", "0")])
    assert [getattr(options, name) for name in names] == [0] * len(names)


# ---------------------------------------------------------------------------------------------------------------------
# The batch


def batch(total: int | None, micro: int | None, steps: int | None, processes: int) -> tuple[int, int, int]:
    options = Namespace(total_batch_size=total, train_batch_size=micro, gradient_accumulation_steps=steps)
    resolve_batch(options, processes)
    return options.total_batch_size, options.train_batch_size, options.gradient_accumulation_steps


@pytest.mark.parametrize(
    ("given", "processes", "expected"),
    [
        ((None, None, None), 1, (16, 16, 1)),
        ((None, None, None), 4, (64, 16, 1)),
        ((None, 8, None), 4, (32, 8, 1)),
        ((None, None, 3), 2, (96, 16, 3)),
        ((None, 8, 3), 2, (48, 8, 3)),
        ((2048, None, None), 32, (2048, 64, 1)),
        ((2048, None, 4), 32, (2048, 16, 4)),
        ((2048, 32, None), 8, (2048, 32, 8)),
        ((2048, 64, None), 32, (2048, 64, 1)),
        ((48, 8, 3), 2, (48, 8, 3)),
    ],
)
def test_total_is_micro_times_steps_times_processes(given, processes, expected):
    assert batch(*given, processes) == expected
    total, micro, steps = expected
    assert total == micro * steps * processes


@pytest.mark.parametrize(
    ("given", "processes", "message", "ways"),
    [
        ((100, 16, None), 2, "100 is not a multiple of --train_batch_size 16 x 2 processes", (96, 128)),
        ((10, 16, None), 2, "10 is not a multiple of --train_batch_size 16 x 2 processes", (32,)),
        ((100, None, None), 3, "100 is not a multiple of 3 processes x 1 accumulation steps", (99, 102)),
        ((100, None, 8), 1, "100 is not a multiple of 1 processes x 8 accumulation steps", (96, 104)),
        ((1, None, None), 2, "1 is not a multiple of 2 processes x 1 accumulation steps", (2,)),
    ],
)
def test_a_batch_that_does_not_divide(given, processes, message, ways):
    """The error names the nearest totals, and each of them works."""
    with pytest.raises(ValueError, match=f"--total_batch_size {message}; use {' or '.join(map(str, ways))}\\.$"):
        batch(*given, processes)
    for total in ways:
        assert batch(total, *given[1:], processes)[0] == total


def test_accumulation_that_contradicts_the_rest():
    with pytest.raises(
        ValueError,
        match="--gradient_accumulation_steps 3 contradicts --total_batch_size 64: --train_batch_size 16 x 2 processes "
        "makes it 2; leave it out, or use --total_batch_size 96.",
    ):
        batch(64, 16, 3, processes=2)
    assert batch(64, 16, None, processes=2) == (64, 16, 2)
    assert batch(96, 16, 3, processes=2) == (96, 16, 3)


# ---------------------------------------------------------------------------------------------------------------------
# The data


UNKNOWN = {"resolution": None, "in_channels": None, "num_classes": None, "latents": None}


def fitted(shape=(3, 32, 32), classes=10, is_latent=False, **given) -> Namespace:
    options = Namespace(**UNKNOWN | {"label_dropout": 0.0} | given)
    fit_to_data(options, shape, classes, is_latent)
    return options


def test_the_data_fill_in_what_is_not_given():
    assert vars(fitted()).items() >= {"resolution": 32, "in_channels": 3, "num_classes": 10, "latents": False}.items()
    # 8 stored channels are mean and deviation of 4
    latents = fitted((8, 64, 64), 1000, is_latent=True)
    assert vars(latents).items() >= {"resolution": 64, "in_channels": 4, "num_classes": 1000, "latents": True}.items()
    assert fitted(classes=0).num_classes == 0


@pytest.mark.parametrize("num_classes", [0, 10, 11])
def test_classes_may_be_ignored_and_may_be_more_than_the_data_show(num_classes):
    assert fitted(resolution=32, in_channels=3, num_classes=num_classes, latents=False).num_classes == num_classes


@pytest.mark.parametrize(
    ("shape", "num_classes", "is_latent", "given", "message"),
    [
        ((3, 32, 48), 0, False, {}, "the images are 32 x 48 pixels; .* give --resolution with --center_crop"),
        ((3, 32, 32), 0, False, {"latents": True}, "holds pictures, but --latents asks for the other; give another"),
        ((8, 64, 64), 0, True, {"latents": False}, "holds stored latents, but --no-latents asks for the other"),
        ((1, 28, 28), 0, False, {"in_channels": 3}, "--in_channels 3, but the data have 1 channels; leave the option"),
        ((8, 64, 64), 0, True, {"in_channels": 8}, "--in_channels 8, but the data have 4 channels"),
        ((3, 32, 32), 0, False, {"num_classes": 10}, "--num_classes 10, but the data have no labels; .* 0 to train"),
        ((3, 32, 32), 0, False, {"label_dropout": 0.1}, "--label_dropout 0.1 needs classes to leave out"),
        ((3, 32, 32), 100, False, {"num_classes": 10}, "10, but the data have 100; give --num_classes 100, or 0 to"),
    ],
)
def test_a_network_that_does_not_fit_the_data(shape, num_classes, is_latent, given, message):
    with pytest.raises(ValueError, match=message):
        fitted(shape, num_classes, is_latent, **given)


# ---------------------------------------------------------------------------------------------------------------------
# --help


@pytest.fixture
def help_text(monkeypatch) -> str:
    monkeypatch.setenv("COLUMNS", "1000")  # one line per paragraph
    return build_parser().format_help()


@pytest.mark.parametrize("name", TABLE)
def test_help_explains_each_option(name, help_text):
    """Name, unit and meaning on one line; the default is text that the option itself reads as its default."""
    option = TABLE[name]
    if option.parse is parse_bool:
        assert re.search(rf"--{name}, --no-{name}\s+{re.escape(option.help)}", help_text)
        return
    unit = "{" + ",".join(option.choices) + "}" if option.choices else option.metavar
    assert unit
    explained = rf"--{name} {re.escape(unit)}\s+{re.escape(option.help)}"
    entry = re.search(rf"{explained}(?: \(default: (.*)\))?\n", help_text)
    assert entry
    assert (entry[1] is not None) == (option.default is not None)
    if option.default is not None:
        assert option.parse(entry[1]) == option.default
    else:  # a value that is found or derived says how; a name that is not given needs no words
        assert "default: " in option.help or unit in ("NAME", "FILE", "REV", "DIR", "PATH")


def test_help_says_units_and_precedence(help_text):
    in_images = [name for name, option in TABLE.items() if option.parse is parse_images]
    assert len(in_images) >= 6
    assert all(TABLE[name].metavar == "IMAGES" for name in in_images)
    assert "suffixes Ki, Mi, Gi (powers of 1024) and k, M (of 1000)" in help_text
    assert "the command line wins over it, it wins over the preset" in help_text
    assert "accelerate launch training/train_edm2.py" in help_text


def test_the_example_in_help_works(help_text):
    example = help_text.partition("Example: accelerate launch training/train_edm2.py ")[2].split()
    options = parse_options(example)
    assert options.preset in PRESETS and options.train_data_dir
