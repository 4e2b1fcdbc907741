"""The training script, in processes of its own: what a run writes, which options it takes, what it refuses."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusers_edm2 import EDM2Pipeline, EDM2UNet2DModel
from diffusers_edm2.checkpoint import load_checkpoint
from diffusers_edm2.loss import stream_seed
from diffusers_edm2.optim import learning_rate
from training_runs import Run, metrics, outcome, train


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Run:
    return train(tmp_path_factory.mktemp("tiny") / "run", "--report_to", "tensorboard")


def options_of(run: Run) -> dict:
    return json.loads((run.output_dir / "config.json").read_text())["options"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- What a run writes -----------------------------------------------------------------------------------------------


def test_the_run_folder_is_whole(run):
    folder = run.output_dir
    assert names(folder) == sorted(
        [".lock", "checkpoints", "config.json", "logs", "metrics.jsonl", "pipeline", "samples", "snapshots"]
    )
    assert names(folder / "samples") == ["000000160.png", "000000320.png"]
    assert names(folder / "checkpoints") == ["000000240", "000000320"]
    assert names(folder / "snapshots") == [
        f"unet-000000{nimg}-{sigma_rel}" for nimg in (160, 320) for sigma_rel in ("0.050", "0.100")
    ]
    config = json.loads((folder / "config.json").read_text())
    assert {"python", "torch", "diffusers", "accelerate", "diffusers-edm2"} <= config["versions"].keys()
    resolved = {"resolution": 8, "in_channels": 1, "num_classes": 10, "latents": False, "dataset_size": 1297}
    resolved |= {"train_batch_size": 16, "gradient_accumulation_steps": 1, "mixed_precision": "no"}
    assert resolved.items() <= config["options"].items()


def test_the_log_has_a_line_per_interval_with_every_figure(run):
    lines = metrics(run.output_dir)
    assert [line["nimg"] for line in lines] == [64, 128, 192, 256, 320]
    sides = [f"{side}_{resolution}" for side in ("enc", "dec") for resolution in ("8x8", "4x4")]
    always = {"nimg", "loss", "logvar", "learning_rate", "grad_norm", "nonfinite_gradients", "bad_images"}
    always |= {f"weights/{side}" for side in sides} | {f"activations/{side}" for side in sides}
    for line in lines:
        levels = {key for key in line if key.startswith("loss/sigma_")}
        assert line.keys() - levels == always
        assert {"loss/sigma_0.1-0.3", "loss/sigma_0.3-1", "loss/sigma_1-3"} <= levels
        # the mean of all samples is among the means by noise level
        assert min(line[level] for level in levels) < line["loss"] < max(line[level] for level in levels)
        assert line["learning_rate"] == learning_rate(
            line["nimg"] - 16, batch=16, ref_lr=0.01, ref_batches=10, rampup_images=64
        )
        assert line["nonfinite_gradients"] == line["bad_images"] == 0
        # normalised before each step, which is short and mostly goes in other directions
        assert all(line[f"weights/{side}"] == pytest.approx(1, abs=1e-3) for side in sides)
        assert all(0.5 < line[f"activations/{side}"] < 4 for side in sides)
    machine = json.loads((run.output_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert machine["images_per_second"] * machine["interval_seconds"] == pytest.approx(64)
    assert 0.1 < machine["memory_gib"] < 10


def test_a_line_is_the_mean_of_its_own_steps(run, tmp_path):
    steps = metrics(train(tmp_path / "run", "--status_every", "16", "--sample_every", "0").output_dir)
    for line in metrics(run.output_dir):
        of_line = [step for step in steps if line["nimg"] - 64 < step["nimg"] <= line["nimg"]]
        assert len(of_line) == 4
        for key in ("loss", "logvar", "grad_norm"):
            assert line[key] == pytest.approx(sum(step[key] for step in of_line) / 4, rel=1e-12)


def test_console_shows_status_lines_and_a_progress_bar(run):
    status = [line for line in run.stdout.splitlines() if " loss " in line]
    assert len(status) == 5
    assert re.search(r"^ +320  loss \d\.\d{4}  u [+-]\d\.\d{4}  lr 0\.0\d+  grad \S+  \S+ img/s  \S+ GiB$", status[-1])
    assert run.stdout.splitlines()[-1] == (
        f"Finished after 320 images. The pipeline is in {run.output_dir / 'pipeline'}."
    )
    assert re.search(r"training: 100%.* 320/320 \[\d\d:\d\d<00:00, .*img/s\]", run.stderr)


def test_the_tracker_gets_the_same_figures(run):
    events = EventAccumulator(str(run.output_dir / "logs" / "edm2"))
    events.Reload()
    lines = metrics(run.output_dir)
    for key in ("loss", "activations/dec_8x8"):
        assert [event.step for event in events.Scalars(key)] == [line["nimg"] for line in lines]
        assert [event.value for event in events.Scalars(key)] == pytest.approx([line[key] for line in lines], rel=1e-6)


def test_snapshots_are_models_and_equal_the_ema_of_the_checkpoint(run):
    tensors, state = load_checkpoint(run.output_dir / "checkpoints" / "000000320")
    assert state == {"nimg": 320, "bad_images": []}
    for sigma_rel in (0.05, 0.1):
        unet = EDM2UNet2DModel.from_pretrained(run.output_dir / "snapshots" / f"unet-000000320-{sigma_rel:.3f}")
        weights, ema = unet.state_dict(), tensors[f"ema-{sigma_rel}"]
        assert weights.keys() == ema.keys() == tensors["unet"].keys()
        assert all(torch.equal(weights[name], ema[name]) for name in ema)
    assert not torch.equal(tensors["ema-0.05"]["out_conv.weight"], tensors["ema-0.1"]["out_conv.weight"])
    assert not torch.equal(tensors["ema-0.05"]["out_conv.weight"], tensors["unet"]["out_conv.weight"])


def test_the_pipeline_draws_what_the_grid_shows(run):
    pipeline = DiffusionPipeline.from_pretrained(run.output_dir / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    ema = load_checkpoint(run.output_dir / "checkpoints" / "000000320")[0]["ema-0.05"]
    weights = pipeline.unet.state_dict()
    assert all(torch.equal(weights[name], ema[name]) for name in ema)
    generators = [torch.Generator().manual_seed(stream_seed(0, number, use=2)) for number in range(10)]
    images = pipeline(class_labels=range(10), generator=generators, num_inference_steps=2).images
    grid = Image.open(run.output_dir / "samples" / "000000320.png")
    assert grid.size == (10 * 66 + 2, 4 * 80 + 2)  # 8 pixels enlarged to 64, a gap of 2, 14 for the label
    for column, image in enumerate(images):
        assert image.size == (8, 8)
        cell = np.asarray(grid.crop((2 + 66 * column, 16, 66 + 66 * column, 80)))[::8, ::8, 0]
        # a batch of another size may round differently, and so may the last of 256 levels
        assert np.abs(cell.astype(int) - np.asarray(image)).max() <= 1


# ---- Options ---------------------------------------------------------------------------------------------------------


def test_the_command_line_wins_over_the_file_and_the_file_over_the_preset(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("duration: 16Mi\nP_mean: -1.5\nblock_out_channels: [4, 4]\nema_sigma_rel: [0.2]\nseed: 3\n")
    run = train(tmp_path / "run", "--preset", "digits", "--config", str(file), "--duration", "16", "--seed", "5")
    options = options_of(run)
    assert (options["duration"], options["seed"], options["block_out_channels"]) == (16, 5, [8, 8])  # command line
    assert (options["P_mean"], options["ema_sigma_rel"]) == (-1.5, [0.2])  # file
    assert options["dataset_name"] == "digits"  # preset
    assert names(run.output_dir / "snapshots") == ["unet-000000016-0.200"]


def test_dry_run_prints_the_recipe_and_writes_nothing(tmp_path):
    options = ["--preset", "edm2-img512-s", "--dry_run", "--train_batch_size", "64"]
    run = train(tmp_path / "run", *options, recipe=[])
    assert not run.output_dir.exists()
    recipe = dict(line.split(maxsplit=1) for line in run.stdout.partition("\n\n")[0].splitlines())
    assert recipe["block_out_channels"] == "(192, 384, 576, 768)"
    assert recipe["duration"] == "2Gi"
    assert (recipe["total_batch_size"], recipe["gradient_accumulation_steps"]) == ("2048", "32")
    parameters, gmac = re.search(r"([\d.]+) M parameters, ([\d.]+) GMAC per image", run.stdout).groups()
    assert parameters == "280.2"  # published
    assert float(gmac) == pytest.approx(102.2, rel=0.025)  # published; it counts a little more than products
    assert "1048576 optimizer steps of 2048 images" in run.stdout
    parts = re.search(
        r"([\d.]+) GiB per device.*: weights ([\d.]+), gradients ([\d.]+), optimizer ([\d.]+), ema ([\d.]+)", run.stdout
    ).groups()
    total, weights, gradients, optimizer, ema = map(float, parts)
    assert weights == gradients == round(280.2e6 * 4 / 2**30, 2)
    assert optimizer == ema == pytest.approx(2 * weights, abs=0.01)  # two moments, two tracks
    assert total == pytest.approx(6 * weights, abs=0.02)


def test_help_explains_every_option(run, tmp_path):
    text = train(tmp_path / "run", "--help", recipe=[]).stdout
    explained = set(re.findall(r"^  --(\w+)", text, re.M))
    assert len(explained) > 50
    assert explained == options_of(run).keys() - {"dataset_size"} | {"hub_token"}  # which is not written down


# ---- Refusals --------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[Path, bytes] | None:
    if not folder.exists():
        return None
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: path.read_bytes() for path in files}


def refusal(output_dir: Path, *options: str, code: int = 1) -> str:
    """What a run says that does not start, and leaves its folder as it was."""
    before = contents(output_dir)
    with Run(output_dir, *options) as run:
        assert run.wait() == code
    assert contents(output_dir) == before
    assert "Traceback" not in run.stderr
    return run.stderr


@pytest.mark.parametrize(
    "options, code, message",
    [
        ("--preset edm2-img512-q", 2, "error: .*edm2-img512-q.*edm2-img512-s"),
        (
            "--config nowhere.yaml",
            2,
            "error: --config nowhere.yaml does not exist; the examples are in training/configs.",
        ),
        ("--learnin_rate 1", 2, "error: unrecognized arguments: --learnin_rate 1"),
        ("--ema_sigma_rel 0.3", 2, r"error: --ema_sigma_rel 0.3 must be one or more different lengths"),
        ("--train_batch_size 5", 1, "error: --total_batch_size 16 is not a multiple of --train_batch_size 5 x 1 "),
        ("--num_classes 5", 1, "error: --num_classes 5, but the data have 10; give --num_classes 10, or 0 "),
        ("--mixed_precision fp16", 1, "error: --mixed_precision fp16 needs a GPU; use bf16 or no on a CPU."),
        (
            "--train_data_dir nowhere",
            1,
            "error: nowhere does not exist; name a folder of images or a ZIP of them.",
        ),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, options, code, message):
    assert re.search(message, refusal(tmp_path / "run", *options.split(), code=code))
    assert not (tmp_path / "run").exists()


def test_other_options_than_those_of_the_run_are_refused(run):
    message = refusal(run.output_dir, "--dropout", "0.1", "--ema_sigma_rel", "0.05")
    assert (
        f"error: {run.output_dir} is a run with other options:\n"
        "  dropout: was 0.0, now 0.1\n"
        "  ema_sigma_rel: was [0.05, 0.1], now [0.05]\n"
        "Give the same options to resume it. Give another --output_dir to start a new run.\n"
    ) in message


def test_a_checkpoint_that_does_not_exist_is_refused(run):
    message = refusal(run.output_dir, "--resume_from_checkpoint", "7")
    assert (
        f"error: --resume_from_checkpoint 7: there is no such checkpoint; {run.output_dir} has 000000240, "
        "000000320. Give one of these, a path, or latest."
    ) in message


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    message = refusal(tmp_path / "run")
    assert f"error: {tmp_path / 'run'} is not empty and not a run folder: it has no config.json." in message


# ---- Precision and speed ---------------------------------------------------------------------------------------------


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in metrics(run_dir)]


@pytest.mark.slow
def test_bf16_trains_like_float32(run, tmp_path):
    bf16 = train(tmp_path / "run", "--mixed_precision", "bf16")
    assert losses(bf16.output_dir) != losses(run.output_dir)
    # 8 bits of precision, 4e-3 per product, mostly cancel in the mean over a thousand pixels: 1e-4 was seen
    assert losses(bf16.output_dir) == pytest.approx(losses(run.output_dir), rel=2e-3)


@pytest.mark.slow
def test_a_network_trained_with_label_dropout_guides_itself(run, tmp_path):
    train(tmp_path / "run", "--label_dropout", "0.3")
    pipe = EDM2Pipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipe.unet.config.label_dropout == 0.3
    options = {"latents": torch.ones(1, 1, 8, 8), "num_inference_steps": 2, "output_type": "latent"}
    assert not torch.equal(pipe([3], guidance_scale=2.0, **options).images, pipe([3], **options).images)
    # The images are the same and so is their noise; only the classes that the network sees are not.
    assert metrics(tmp_path / "run")[0]["loss"] != metrics(run.output_dir)[0]["loss"]


def test_gradient_checkpointing_changes_nothing(tmp_path):
    recipe = ["--dropout", "0.1", "--sample_every", "0", "--snapshot_every", "0"]
    plain, recomputed = tmp_path / "plain", tmp_path / "recomputed"
    train(plain, *recipe)
    train(recomputed, *recipe, "--gradient_checkpointing")
    assert outcome(recomputed) == outcome(plain)


@pytest.mark.slow
def test_a_compiled_network_trains_the_same(run, tmp_path):
    compiled = train(tmp_path / "run", "--compile", timeout=280)
    assert losses(compiled.output_dir) != losses(run.output_dir)
    # float32 in fused kernels, which round in another order: 3e-7 was seen
    assert losses(compiled.output_dir) == pytest.approx(losses(run.output_dir), rel=1e-5)


# ---- Data ------------------------------------------------------------------------------------------------------------


def save_pictures(folder: Path, count: int, height: int = 8, width: int = 8) -> Path:
    """RGB noise in the class folders a and b."""
    for number in range(count):
        path = folder / "ab"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


def test_pictures_of_any_size_in_class_folders(tmp_path):
    pictures = save_pictures(tmp_path / "pictures", count=20, height=20, width=28)
    odd = refusal(tmp_path / "refused", "--train_data_dir", str(pictures))
    assert "error: the images are 20 x 28 pixels; a training sample is square: give --resolution with" in odd
    run = train(
        tmp_path / "run", "--train_data_dir", str(pictures), "--resolution", "8", "--center_crop", "--duration", "48"
    )
    resolved = {"resolution": 8, "in_channels": 3, "num_classes": 2, "dataset_size": 20, "dataset_name": None}
    assert resolved.items() <= options_of(run).items()
    pipeline = DiffusionPipeline.from_pretrained(run.output_dir / "pipeline")
    assert pipeline(class_labels=[0, 1], num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 3)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_broken_picture_is_named_or_left_out(tmp_path, workers):
    pictures = save_pictures(tmp_path / "pictures", count=32)
    broken = pictures / "b" / "13.png"
    broken.write_bytes(broken.read_bytes()[:80])
    recipe = ["--train_data_dir", str(pictures), "--dataloader_num_workers", workers, "--status_every", "16"]
    with Run(tmp_path / "stopped", *recipe) as stopped:
        assert stopped.wait() == 1
    assert re.search(
        rf"BadImageError: .*{broken} cannot be decoded: .*\. Or leave out all such images with --skip_bad_images\.",
        stopped.stderr,
        re.DOTALL,
    )
    # In this order it is number 16 of the first pass and number 5 of the second.
    for duration in ("48", "64"):
        skipped = train(tmp_path / "skipped", *recipe, "--skip_bad_images", "--duration", duration)
        assert f"1 images could not be used; {skipped.output_dir / 'bad_images.json'} lists them." in skipped.stdout
        assert json.loads((skipped.output_dir / "bad_images.json").read_text()) == [str(broken)]
    assert [line["bad_images"] for line in metrics(skipped.output_dir)] == [0, 1, 1, 1]
    assert "  bad images 1\n" in skipped.stdout


@pytest.mark.parametrize("has_vae", [False, True])
def test_stored_latents(tmp_path, has_vae):
    latents = tmp_path / "latents"
    latents.mkdir()
    labels = [[f"{number}.npy", number % 3] for number in range(20)]
    (latents / "dataset.json").write_text(json.dumps({"labels": labels}))
    for number, (name, _) in enumerate(labels):
        mean, deviation = np.random.default_rng(number).standard_normal((2, 4, 8, 8), np.float32)
        np.save(latents / name, np.concatenate([mean, abs(deviation)]))
    vae = tmp_path / "vae"
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[4, 8],
        norm_num_groups=4,
        latent_channels=4,
    ).save_pretrained(vae)
    decoder = ["--pretrained_vae_model_name_or_path", str(vae)] if has_vae else []
    run = train(tmp_path / "run", "--train_data_dir", str(latents), "--duration", "48", *decoder)
    resolved = {"latents": True, "resolution": 8, "in_channels": 4, "num_classes": 3}
    assert resolved.items() <= options_of(run).items()
    side = 16 if has_vae else 8  # the VAE doubles it
    with Image.open(run.output_dir / "samples" / "000000048.png") as grid:
        assert grid.size == (3 * 66 + 2, 4 * 80 + 2)
    pipeline = DiffusionPipeline.from_pretrained(run.output_dir / "pipeline")
    shape = (2, side, side, 3 if has_vae else 4)
    assert pipeline(class_labels=[0, 2], num_inference_steps=2, output_type="np").images.shape == shape
