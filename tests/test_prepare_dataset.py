"""Data made ready by training/prepare_dataset.py: what it writes, survives and refuses, and training on it."""

import io
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image

from diffusers_edm2.dataset import FileSource, ImageSource, TrainingImages, center_crop, open_source, wide_crop
from diffusers_edm2.latents import encode_moments, whiten
from diffusers_edm2.loss import noise_generators
from diffusers_edm2.training_options import parse_options
from local_hub import dataset_hub
from test_dataset import encode, pixels, write
from training_runs import SCRIPT, Run, train

PREPARE = SCRIPT.with_name("prepare_dataset.py")
TWO_PROCESSES = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
OPTIONS = ["--dataloader_num_workers", "0"]


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def prepare(output: Path, *options: str) -> Path:
    """Run the command in this process."""
    runpy.run_path(str(PREPARE))["main"]([*OPTIONS, "--output", str(output), *map(str, options)])
    return output


def start(output: Path, *options: str, **kwargs) -> Run:
    """Run the command in a process of its own."""
    return Run(output, *map(str, options), recipe=OPTIONS, script=PREPARE, output_option="--output", **kwargs)


def content(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else path.rglob("*")
    return {str(file.relative_to(path)): file.read_bytes() for file in files if file.is_file()}


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        assert all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())
        return {name: archive.read(name) for name in archive.namelist()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """36 noise pictures of several sizes in three classes; two of them are grayscale."""
    files = {}
    for n in range(36):
        image = pixels(n, 17 + n % 5, 26 - n % 3, channels=1 if n in (7, 20) else 3)
        files[f"{('ant', 'bee', 'cat')[n // 12]}/{n:02d}.png"] = encode(image)
    return write(tmp_path_factory.mktemp("data") / "photos", files)


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    """A real AutoencoderKL of random weights, that halves each side and has two latent channels."""
    torch.manual_seed(0)
    levels = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    path = tmp_path_factory.mktemp("vae") / "vae"
    AutoencoderKL(**levels, block_out_channels=[8, 8], norm_num_groups=4, latent_channels=2).save_pretrained(path)
    return path


def images_of(source: ImageSource) -> list[np.ndarray]:
    return [source[index][0] for index in range(len(source))]


# ---- Pictures --------------------------------------------------------------------------------------------------------


def test_a_zip_is_edm2s_own_format(tmp_path, photos, capsys):
    path = prepare(tmp_path / "photos.zip", "--train_data_dir", photos, "--resolution", "16", "--center_crop")
    files = members(path)
    assert list(files) == [f"00000/img{n:08d}.png" for n in range(36)] + ["dataset.json"]
    listing = json.loads(files["dataset.json"])
    assert listing["labels"] == [[f"00000/img{n:08d}.png", n // 12] for n in range(36)]
    assert listing["class_names"] == ["ant", "bee", "cat"]
    assert listing["prepared"] == {"source": "photos", "crop": "center", "resolution": [16, 16], "vae": None}
    for n in (0, 7, 35):  # grayscale in a data set in colour has three equal channels
        with Image.open(io.BytesIO(files[f"00000/img{n:08d}.png"])) as image:
            expected = np.broadcast_to(center_crop(FileSource(photos)[n][0], 16), (16, 16, 3))
            assert (image.mode, image.format) == ("RGB", "PNG")
            assert np.array_equal(np.asarray(image), expected)
    assert names(tmp_path) == ["photos.zip"]
    said = capsys.readouterr()
    assert f"36 images are in {path}. Train on them with: train_edm2.py --train_data_dir {path}" in said.out
    assert re.search(r"preparing: 100%.* 36.0/36.0 \[00:\d\d<00:00, .*img/s\]", said.err)


@pytest.mark.parametrize("crop", ["center", "dhariwal", "wide"])
def test_parquet_and_zip_hold_the_same_pictures_and_labels(tmp_path, photos, crop):
    size = "16x9" if crop == "wide" else "16"
    options = ["--train_data_dir", photos, "--resolution", size, f"--{crop}_crop", "--shard_size", "10"]
    zipped = open_source(train_data_dir=str(prepare(tmp_path / "photos.zip", *options)))
    folder = prepare(tmp_path / "photos", *options)
    assert names(folder / "data") == [f"train-{n:05d}-of-00004.parquet" for n in range(4)]
    rows = open_source(str(folder), cache_dir=str(tmp_path / "cache"))
    for source in (zipped, rows):
        assert (source.shape, source.class_names) == ((3, 16, 16), ["ant", "bee", "cat"])
        assert source.labels.tolist() == [n // 12 for n in range(36)]
        assert not source.is_latent
    assert all(map(np.array_equal, images_of(zipped), images_of(rows)))
    assert rows.name(12).endswith("row 12 (img00000012.png)")
    if crop == "wide":
        assert np.array_equal(zipped[3][0], wide_crop(FileSource(photos)[3][0], 16, 9))
    # both are trained on as if cropped on the way
    else:
        direct = TrainingImages(FileSource(photos), seed=1, resolution=16, crop=crop)
        assert torch.equal(direct[5]["image"], TrainingImages(zipped, seed=1)[5]["image"])


def test_images_without_a_crop_stay_as_they_are_and_need_no_labels(tmp_path, capsys):
    data = write(tmp_path / "data", {f"{n}.png": encode(pixels(n, channels=1)) for n in range(5)})
    path = prepare(tmp_path / "out.zip", "--train_data_dir", data)
    assert json.loads(members(path)["dataset.json"])["labels"] is None
    source = FileSource(path)
    assert (source.shape, source.num_classes) == ((1, 8, 8), 0)
    assert all(np.array_equal(image, pixels(n, channels=1)) for n, image in enumerate(images_of(source)))
    assert "enlarged" not in capsys.readouterr().out


def test_max_images_are_spread_over_the_source(tmp_path, photos):
    options = ["--train_data_dir", photos, "--resolution", "16", "--center_crop", "--max_images", "6"]
    source = FileSource(prepare(tmp_path / "out.zip", *options))
    assert source.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert np.array_equal(source[1][0], center_crop(FileSource(photos)[6][0], 16))


def test_small_images_are_enlarged_and_counted(tmp_path, photos, capsys):
    prepare(tmp_path / "out.zip", "--train_data_dir", photos, "--resolution", "18", "--center_crop")
    assert "8 of 36 images were smaller than --resolution and have been enlarged.\n" in capsys.readouterr().out


# ---- Latents ---------------------------------------------------------------------------------------------------------


def photo_options(photos: Path) -> list:
    return ["--train_data_dir", photos, "--resolution", "16", "--center_crop", "--shard_size", "5"]


def latents_options(photos: Path, vae: Path) -> list:
    return [*photo_options(photos), "--pretrained_vae_model_name_or_path", vae, "--batch_size", "3"]


def prepare_latents(folder: Path, photos: Path, vae: Path) -> Path:
    return prepare(folder / "latents.zip", *latents_options(photos, vae))


def test_latents_are_means_and_deviations_of_the_posterior(tmp_path, photos, vae):
    source = FileSource(prepare_latents(tmp_path, photos, vae))
    rows = open_source(str(prepare(tmp_path / "latents", *latents_options(photos, vae))), cache_dir=str(tmp_path))
    pictures = [np.broadcast_to(center_crop(image, 16), (16, 16, 3)) for image in images_of(FileSource(photos))]
    network = AutoencoderKL.from_pretrained(vae)
    expected = encode_moments(network, torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2))
    for prepared in (source, rows):
        assert (prepared.is_latent, prepared.shape, prepared.num_classes) == (True, (4, 8, 8), 3)
        assert prepared.class_names == ["ant", "bee", "cat"]
        # another size of the batch changes the order of sums in a convolution
        np.testing.assert_allclose(np.stack(images_of(prepared)), expected, rtol=1e-4, atol=1e-5)
        assert (prepared.latents_mean, prepared.latents_std) == (source.latents_mean, source.latents_std)
    # whitened by the statistics that it records, the data set has mean 0 and deviation sigma_data
    generators = noise_generators(0, range(36), torch.device("cpu"))
    means, deviations = torch.from_numpy(np.stack(images_of(source))).chunk(2, dim=1)
    noise = torch.stack([torch.randn(2, 8, 8, generator=generator) for generator in generators])
    white = whiten(means + deviations * noise, source.latents_mean, source.latents_std, sigma_data=0.5)
    assert white.mean(dim=(0, 2, 3)).abs().max() < 0.04  # 36 x 64 draws: 4 standard errors of 0.5
    assert (white.std(dim=(0, 2, 3)) - 0.5).abs().max() < 0.03


@pytest.mark.slow
def test_two_processes_write_the_same_bytes_as_one(tmp_path, photos, vae):
    one = prepare(tmp_path / "one" / "out", *latents_options(photos, vae))
    (tmp_path / "two").mkdir()
    with start(tmp_path / "two" / "out", *latents_options(photos, vae), command=TWO_PROCESSES) as run:
        assert run.wait() == 0, run.stderr
    assert content(tmp_path / "two" / "out") == content(one)
    assert re.search(r"preparing: 100%.* 36.0/36.0 ", run.stderr)
    assert run.stdout.count("36 images are in") == 1
    assert not (tmp_path / "two" / "out.part").exists()


@pytest.mark.slow
def test_training_on_latents_end_to_end(tmp_path, photos, vae):
    """Prepared by two processes, trained on, loaded as a pipeline, and drawn from."""
    data = tmp_path / "latents.zip"
    with start(data, *latents_options(photos, vae), command=TWO_PROCESSES) as run:
        assert run.wait() == 0, run.stderr
    assert data.read_bytes() == prepare(tmp_path / "one.zip", *latents_options(photos, vae)).read_bytes()
    source = FileSource(data)
    options = ["--train_data_dir", str(data), "--duration", "96", "--sigma_data", "0.4"]
    run = train(tmp_path / "run", *options, "--pretrained_vae_model_name_or_path", str(vae))
    options = json.loads((run.output_dir / "config.json").read_text())["options"]
    assert {"latents": True, "resolution": 8, "in_channels": 2, "num_classes": 3}.items() <= options.items()
    assert options["latents_mean"] == list(source.latents_mean)

    pipeline = DiffusionPipeline.from_pretrained(run.output_dir / "pipeline")
    assert pipeline.config.latents_mean == list(source.latents_mean)
    assert pipeline.config.latents_std == list(source.latents_std)
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"class_labels": [0, 2], "num_inference_steps": 2}
    images = pipeline(**arguments, generator=torch.Generator().manual_seed(0)).images
    assert [image.size for image in images] == [(16, 16)] * 2
    # the decoder gets what the encoder made: the whitening of the training, undone
    drawn = pipeline(**arguments, generator=torch.Generator().manual_seed(0), output_type="latent").images
    raw = (
        drawn / 0.4 * torch.tensor(source.latents_std)[:, None, None] + torch.tensor(source.latents_mean)[:, None, None]
    )
    decoded = pipeline.vae.decode(raw).sample.clamp(0, 1).permute(0, 2, 3, 1).detach().numpy()
    assert np.abs(np.stack([np.asarray(image) for image in images]) - 255 * decoded).max() < 0.51  # rounding to 8 bits


def test_each_visit_of_an_image_draws_its_latents_anew(tmp_path, photos, vae):
    source = FileSource(prepare_latents(tmp_path, photos, vae))
    images = TrainingImages(source, seed=3)
    to_samples = runpy.run_path(str(SCRIPT))["to_samples"]
    args = Namespace(latents_mean=source.latents_mean, latents_std=source.latents_std, sigma_data=0.4)

    def visit(number: int) -> torch.Tensor:
        generators = noise_generators(3, [number], torch.device("cpu"))
        return to_samples(images[number]["image"][None], generators, args)

    first = 5
    second = next(n for n in range(36, 72) if torch.equal(images[n]["image"], images[first]["image"]))
    assert torch.equal(visit(first), visit(first))
    assert not torch.equal(visit(first), visit(second))
    means, deviations = images[first]["image"][None].chunk(2, dim=1)
    noise = torch.randn(2, 8, 8, generator=noise_generators(3, [second], torch.device("cpu"))[0])
    expected = whiten(means + deviations * noise, source.latents_mean, source.latents_std, sigma_data=0.4)
    torch.testing.assert_close(visit(second), expected)


def test_statistics_and_vae_must_fit_the_latents(tmp_path, photos, vae):
    """What the data set does not say, the options do; what does not fit is refused before the training."""
    npy = {name: data for name, data in members(prepare_latents(tmp_path, photos, vae)).items() if "npy" in name}
    plain = write(tmp_path / "plain", npy)
    open_images = runpy.run_path(str(SCRIPT))["open_images"]
    with pytest.raises(
        ValueError, match="4 means and 4 standard deviations for latents of 2 channels; .*--latents_mean"
    ):
        open_images(parse_options(["--train_data_dir", str(plain)]))
    given = ["--latents_mean", "1,-2", "--latents_std", "3,4"]
    args = parse_options(["--train_data_dir", str(plain), *given])
    open_images(args)
    assert (args.latents_mean, args.latents_std) == ((1, -2), (3, 4))
    args = parse_options(["--train_data_dir", str(tmp_path / "latents.zip"), *given])
    open_images(args)
    assert (args.latents_mean, args.latents_std) == ((1, -2), (3, 4))  # the command line wins over the data set
    with pytest.raises(ValueError, match="--latents_mean and --latents_std are for stored latents; the data set holds"):
        open_images(parse_options(given))

    AutoencoderKL(block_out_channels=[8], norm_num_groups=4, latent_channels=4).save_pretrained(tmp_path / "other")
    options = ["--train_data_dir", str(plain), *given, "--pretrained_vae_model_name_or_path", str(tmp_path / "other")]
    with Run(tmp_path / "run", *options) as run:
        assert run.wait() == 1
    assert "the network has 2 channels and the VAE 4" in run.stderr
    assert names(tmp_path / "run") == [".lock"]


@pytest.mark.slow
def test_latents_on_the_hub_keep_their_statistics(tmp_path, photos, vae):
    path = prepare(tmp_path / "latents", *latents_options(photos, vae))
    known = json.loads(re.search(r"description: (.*)", (path / "README.md").read_text())[1])
    code = (
        "from diffusers_edm2.dataset import open_source\n"
        "source = open_source('somebody/latents')\n"
        "print(len(source), source.shape, source.class_names, source.latents_mean, source.latents_std)"
    )
    with dataset_hub("somebody/latents", content(path)) as (endpoint, _):
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    statistics = [tuple(json.loads(known)[name]) for name in ("latents_mean", "latents_std")]
    assert result.stdout == "36 (4, 8, 8) ['ant', 'bee', 'cat'] {} {}\n".format(*statistics)


# ---- Interrupted -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".zip", ""], ids=["zip", "parquet"])
@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_goes_on(tmp_path, photos, vae, suffix):
    """One command, killed again and again, at the moments where least or most is there."""
    options = [*latents_options(photos, vae), "--shard_size", "2"]
    expected = content(prepare(tmp_path / "whole" / f"out{suffix}", *options))
    output = tmp_path / f"out{suffix}"
    part = tmp_path / f"out{suffix}.part"
    shards = part / ("shards" if suffix else "result/data")

    def records() -> int:
        return len(list((part / "records").glob("[0-9]*.json")))

    moments = [
        lambda: (part / "plan.json").exists(),
        lambda: any(shards.glob(".tmp-*")),  # a shard is half written
        lambda: records() >= 5,
        lambda: len(list(shards.glob("[!.]*"))) > records(),  # written, and not yet recorded
        lambda: records() == 18,  # all are there
        lambda: any(part.glob("*result.zip")) if suffix else (part / "result" / "README.md").exists(),
        lambda: not shards.exists(),  # put together, and maybe named
    ]
    kills = 0
    for moment in moments:
        if output.exists() and not part.exists():
            break  # the kill before came too late
        before = records()
        with start(output, *options) as run:
            run.wait_for(run.err.exists)  # it leads a process group
            while run.is_running and not moment():
                assert not output.exists() or content(output) == expected
            if run.is_running:
                run.send(signal.SIGKILL, to_group=True)
            kills += run.wait() == -signal.SIGKILL
        assert records() >= before or output.exists()
    assert kills >= 4  # the last moments are short
    if not output.exists() or part.exists():
        with start(output, *options) as run:
            assert run.wait() == 0, run.stderr
    assert content(output) == expected
    assert not part.exists()


def test_a_second_command_for_the_same_output_is_refused(tmp_path, photos):
    output = tmp_path / "out.zip"
    with start(output, *photo_options(photos)) as run:
        run.wait_for((tmp_path / "out.zip.part" / "plan.json").exists)
        run.send(signal.SIGSTOP)
        with pytest.raises(SystemExit, match=r"out\.zip\.part is in use by process \d+ on .*give another --output\."):
            prepare(output, *photo_options(photos))


def test_a_clean_up_that_was_cut_short_is_finished(tmp_path, photos, capsys):
    part = tmp_path / "out.zip.part"
    output = prepare(tmp_path / "out.zip", *photo_options(photos))
    expected = output.read_bytes()
    for number in range(8):
        write(part, {f"records/{number:05d}.json": b"{}"})
    prepare(output, *photo_options(photos))
    assert capsys.readouterr().out.endswith(f"{output} is complete.\n")
    assert names(tmp_path) == ["out.zip"]
    assert output.read_bytes() == expected


def begin(output: Path, *options: str) -> Path:
    """Leave what a command made before a bad image stopped it."""
    with pytest.raises(SystemExit, match="cannot be decoded"):
        prepare(output, *options)
    return output.with_name(f"{output.name}.part")


@pytest.fixture
def with_a_bad_one(tmp_path) -> Path:
    """20 pictures; the bad one is not among the 16 that are looked at before the work begins."""
    files = {f"{n:02d}.png": encode(pixels(n)) for n in range(20)} | {"14.png": b"not a picture"}
    return write(tmp_path / "bad", files)


def test_other_options_than_those_begun_with_are_refused(tmp_path, with_a_bad_one):
    options = ["--train_data_dir", with_a_bad_one, "--shard_size", "4"]
    part = begin(tmp_path / "out.zip", *options, "--max_images", "20")
    assert len(list((part / "records").iterdir())) == 3
    with pytest.raises(
        SystemExit, match=r"(?s)was begun with other options:\n  center_crop: was False, now True\n  res"
    ):
        prepare(tmp_path / "out.zip", *options, "--max_images", "20", "--center_crop", "--resolution", "8")
    write(with_a_bad_one, {"20.png": encode(pixels(20))})
    with pytest.raises(
        SystemExit, match="images in the source: was 20, now 21\nGive the same options to go on, another"
    ):
        prepare(tmp_path / "out.zip", *options, "--max_images", "20")


def test_bad_images_stop_or_are_left_out_and_listed(tmp_path, with_a_bad_one, capsys):
    options = ["--train_data_dir", with_a_bad_one, "--shard_size", "4"]
    output = tmp_path / "out.zip"
    part = begin(output, *options)
    with pytest.raises(SystemExit, match=r"bad/14\.png cannot be decoded: .*leave out all .* with --skip_bad_images"):
        prepare(output, *options)
    prepare(output, *options, "--skip_bad_images")
    said = capsys.readouterr().out
    assert f"Going on: 3 of 5 shards are in {part}." in said
    listing = tmp_path / "out.zip.bad_images.json"
    assert f"1 images could not be used; {listing} lists them." in said
    assert json.loads(listing.read_text()) == [f"{with_a_bad_one}/14.png"]
    source = FileSource(output)
    assert len(source) == 19
    assert [source.name(n)[-12:] for n in (13, 14)] == ["00000013.png", "00000015.png"]
    assert np.array_equal(source[14][0], pixels(15))


def test_a_full_disk_is_explained_and_nothing_is_lost(tmp_path, photos):
    expected = prepare(tmp_path / "whole.zip", *photo_options(photos)).read_bytes()
    output = tmp_path / "out.zip"
    with start(output, *photo_options(photos), file_size_limit=9000) as run:  # room for each shard, not for the whole
        assert run.wait() == 1
    assert run.stderr.splitlines()[-2].startswith("error: [Errno 27] File too large")
    assert run.stderr.splitlines()[-1] == (
        f"Free some space and run the same command again; {output}.part keeps what is done."
    )
    assert "Traceback" not in run.stderr
    assert not output.exists()
    prepare(output, *photo_options(photos))
    assert output.read_bytes() == expected


# ---- Refused ---------------------------------------------------------------------------------------------------------


def test_what_exists_is_never_touched(tmp_path, photos):
    for name in ("out.zip", "out"):
        write(tmp_path / "out", {"precious.txt": b"mine"})
        (tmp_path / "out.zip").write_bytes(b"mine")
        with pytest.raises(SystemExit, match=rf"error: .*{name} exists already; remove it, or give another --output"):
            prepare(tmp_path / name, *photo_options(photos))
    assert names(tmp_path) == ["out", "out.zip"]
    assert content(tmp_path / "out") == {"precious.txt": b"mine"}


def test_help_explains_and_its_example_is_valid():
    build_parser = runpy.run_path(str(PREPARE))["build_parser"]
    text = " ".join(build_parser().format_help().split())
    args = build_parser().parse_args(text.split("training/prepare_dataset.py ")[1].split())
    assert (args.resolution, args.output) == ((512, 512), Path("imagenet-latents.zip"))
    assert "images per pass and device (default: 16)" in text
    assert all(action.help for action in build_parser()._actions)


@pytest.mark.parametrize(
    "options, error",
    [
        (["--center_crop"], "--center_crop does not say to which size; add --resolution"),
        (["--resolution", "16x9"], "--resolution 16x9 is for --wide_crop; other pictures are square: give one number"),
        (["--resolution", "9x16", "--wide_crop"], "--resolution 9x16 with --wide_crop must not be higher than it is"),
        (["--resolution", "0"], "argument --resolution: invalid parse_size value: '0'"),
        (["--center_crop", "--wide_crop"], "argument --wide_crop: not allowed with argument --center_crop"),
        (["--shard_size", "0"], "--shard_size 0 must be greater than 0"),
        (["--dataloader_num_workers", "-1"], "--dataloader_num_workers -1 must not be negative"),
        (["--mixed_precision", "bf16"], "--mixed_precision is for the VAE; name one with"),
    ],
)
def test_options_that_do_not_fit_together(tmp_path, capsys, options, error):
    with pytest.raises(SystemExit, match="2"):
        prepare(tmp_path / "out.zip", *options)
    assert error in capsys.readouterr().err
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "options, error",
    [
        ([], r"the images are 17 x 26 pixels \(height x width\), and training samples are square; give --resolution"),
        (["--resolution", "16"], r"ant/00\.png is 17 x 26 pixels; without a crop all images must be 16 x 16"),
        (
            ["--resolution", "15", "--center_crop", "VAE"],
            "divides each side by 2, which does not divide 15; use .* 14 or",
        ),
        (["--resolution", "16", "--center_crop", "VAE", "--mixed_precision", "bf16"], "bf16 needs a GPU; leave it out"),
        (["--dataset_name", "digits"], "--dataset_name digits and --train_data_dir .* both name the images"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_image(tmp_path, photos, vae, options, error):
    words = ["--train_data_dir", photos]
    for option in options:
        words += ["--pretrained_vae_model_name_or_path", vae] if option == "VAE" else [option]
    with pytest.raises(SystemExit, match=f"(?s)error: .*{error}"):
        prepare(tmp_path / "out.zip", *words)
    assert names(tmp_path) == []


def test_sources_that_cannot_be_prepared(tmp_path, photos, vae):
    latents = prepare_latents(tmp_path, photos, vae)
    with pytest.raises(SystemExit, match=r"latents\.zip holds stored latents, which are ready; name the images they"):
        prepare(tmp_path / "out.zip", "--train_data_dir", latents)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"error: .*empty holds no images"):
        prepare(tmp_path / "out.zip", "--train_data_dir", tmp_path / "empty")
    wide = write(tmp_path / "wide", {"0.png": encode(pixels(0, 8, 10))})
    with pytest.raises(
        SystemExit, match="the images are 8 x 10 pixels .* square; give --resolution with --center_crop"
    ):
        prepare(tmp_path / "out.zip", "--train_data_dir", wide)
    bad = write(tmp_path / "bad", {"0.png": b"no picture"})
    with pytest.raises(SystemExit, match="None of the images tried in .*bad can be used"):
        prepare(tmp_path / "out.zip", "--train_data_dir", bad, "--skip_bad_images")
    assert names(tmp_path) == ["bad", "empty", "latents.zip", "wide"]
