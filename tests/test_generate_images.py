"""Drawing images with pipelines/generate_images.py, in processes of its own: the same bytes however it is done."""

import importlib.util
import json
import os
import re
import resource
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from PIL import Image
from torch.nn.modules.module import register_module_forward_hook

from diffusers_edm2 import EDM2HeunScheduler, EDM2Pipeline, EDM2UNet2DModel
from diffusers_edm2.image_folder import image_path
from model_hub import model_hub
from test_unet_edm2 import active_unet
from training_runs import _FORKSERVER as FORKSERVER
from training_runs import train

SCRIPT = Path(__file__).parents[1] / "pipelines" / "generate_images.py"


class Job:
    """The script in one or several processes that share the work; they end at the latest with the block."""

    def __init__(self, out: Path, model: Path, options: str = "", processes: int = 1, file_size_limit: int = 0):
        self.log = out.with_name(f"{out.name}-{len(list(out.parent.glob('*.log')))}.log")
        arguments = [str(model), "--output_dir", str(out), "--num_inference_steps", "2", *shlex.split(options)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environments = [{"ACCELERATE_USE_CPU": "true"} for _ in range(processes)]
        for rank, environment in enumerate(environments if processes > 1 else []):
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self.processes = [
            FORKSERVER.Process(target=_run, args=(arguments, environment, self.log, file_size_limit))
            for environment in environments
        ]
        for process in self.processes:
            process.start()

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        self.send(signal.SIGKILL)
        self.wait()

    def send(self, number: int) -> None:
        for process in self.processes:
            if process.exitcode is None and process.pid:
                os.kill(process.pid, number)

    def wait(self) -> list[int | None]:
        for process in self.processes:
            process.join(120)
        return [process.exitcode for process in self.processes]

    def wait_for(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < end and any(p.exitcode is None for p in self.processes), self.text
            time.sleep(0.0005)

    @property
    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def _run(arguments: list[str], environment: dict[str, str], log: Path, file_size_limit: int) -> None:
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if file_size_limit:  # in place of a full disk; Python ignores the signal of this limit: writing fails with EFBIG
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size_limit, file_size_limit))
    torch.set_num_threads(3)  # as on a machine of three cores
    calls: list[None] = []
    register_module_forward_hook(lambda module, *_: calls.append(None) if isinstance(module, EDM2UNet2DModel) else None)
    sys.argv = [str(SCRIPT), *arguments]
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        print(f"{torch.get_num_threads()} threads, {len(calls)} calls", flush=True)


def calls(text: str) -> list[int]:
    """How often each process called the network, the busiest first."""
    return sorted(map(int, re.findall(r"threads, (\d+) calls", text)), reverse=True)


def script_with(monkeypatch, *arguments: str) -> Any:
    """The script as a module, with a command line that it has not read yet."""
    spec = importlib.util.spec_from_file_location("generate_images", SCRIPT)
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(sys, "argv", ["generate_images.py", *arguments])
    return script


def draw(out: Path, model: Path, options: str = "", processes: int = 1) -> str:
    """A job that ends well. Returns what it said."""
    with Job(out, model, options, processes) as job:
        assert job.wait() == [0] * processes, job.text
        return job.text


def fail(out: Path, model: Path, options: str = "", **kwargs: int) -> str:
    with Job(out, model, options, **kwargs) as job:
        assert job.wait() == [1] * len(job.processes), job.text
        return job.text


def pictures(out: Path) -> dict[int, bytes]:
    """The files with images, which must all be in their places."""
    files = {int(path.stem): path for path in out.rglob("*.png")}
    assert all(path == image_path(out, number) for number, path in files.items())
    return {number: path.read_bytes() for number, path in sorted(files.items())}


def png(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def pixels(out: Path) -> np.ndarray:
    return np.stack([png(image_path(out, number)) for number in pictures(out)])


def settings(out: Path) -> dict:
    return json.loads((out / "generation.json").read_text())["settings"]


def tiny_unet(**options) -> EDM2UNet2DModel:
    return active_unet(**({"sample_size": 8, "attention_resolutions": (4,), "label_dropout": 0.1} | options))


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "pipeline"
    EDM2Pipeline(tiny_unet(), EDM2HeunScheduler()).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def forty(model, tmp_path_factory) -> dict[int, bytes]:
    """The images of seeds 0 to 39, by one process without interruption."""
    out = tmp_path_factory.mktemp("forty") / "out"
    draw(out, model, "--seeds 0-39")
    return pictures(out)


def directly(model: Path, seeds: range, scheduler=None, labels=None, **options) -> np.ndarray:
    """What the pipeline itself draws, in one batch and one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pipe = EDM2Pipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler or pipe.scheduler
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    images = pipe(class_labels=labels, generator=generators, **({"num_inference_steps": 2} | options)).images
    torch.set_num_threads(threads)
    return np.stack([np.asarray(image) for image in images])


# ---- What a job leaves -----------------------------------------------------------------------------------------------


def test_images_are_those_of_the_pipeline(model, tmp_path):
    """Seed, class and noise as in `pipe(generator=...)`; to the byte where a batch there is a chunk here."""
    out = tmp_path / "out"
    text = draw(out, model, "--seeds 996-1003 --chunk_size 4 --grid")
    assert f"Finished: 8 images in {out}, 8 of them drawn now, " in text
    assert re.search(r"drawing: 100%.* 8/8 \[.*img/s\]", text)
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    images = [f"{folder}/{number:06d}.png" for folder, numbers in
              {"000000": range(996, 1000), "001000": range(1000, 1004)}.items() for number in numbers]  # fmt: skip
    assert names == [".lock", *images, "dataset.json", "generation.json"]
    expected = [directly(model, range(996, 1000)), directly(model, range(1000, 1004))]
    assert np.array_equal(pixels(out), np.concatenate(expected))
    labels = json.loads((out / "dataset.json").read_text())["labels"]
    assert [name for name, _ in labels] == images
    assert np.array_equal(directly(model, range(996, 1000), labels=[label for _, label in labels[:4]]), expected[0])
    content = json.loads((out / "generation.json").read_text())
    assert content["seeds"] == "996-1003" and content["source"] == {"model": str(model)}
    assert {"torch", "diffusers", "device"} <= content["environments"][0].keys()
    shown = {"num_inference_steps": 2, "scheduler": "EDM2HeunScheduler", "scheduler.sigma_max": 80.0}
    shown |= {"class_labels": "random", "chunk_size": 4, "device": "cpu", "num_threads": 1, "guidance_scale": 1.0}
    assert shown.items() <= content["settings"].items()
    grid = png(tmp_path / "out-grid.png")
    assert (grid[16:80:8, 2:66:8] == pixels(out)[0]).all()  # enlarged 8 times, under a line of text


def test_every_class_from_the_same_noise(model, tmp_path):
    draw(tmp_path / "out", model, f"--seeds 1,3 --class_labels all --chunk_size 10 --grid {tmp_path / 'grid.png'}")
    assert list(pictures(tmp_path / "out")) == [*range(10, 20), *range(30, 40)]
    noise = torch.stack([torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(3))] * 10)
    expected = directly(model, range(10), latents=noise, labels=list(range(10)))
    assert np.array_equal(pixels(tmp_path / "out")[10:], expected)
    assert png(tmp_path / "grid.png").shape == (2 * 80 + 2, 10 * 66 + 2, 3)  # a row for each seed


@pytest.mark.parametrize("options", ["--class_labels 3,5,9", "--class_labels all --seeds 0-2"])
def test_npz_equals_png(model, tmp_path, options):
    draw(tmp_path / "png", model, f"--seeds 0-19 {options}")
    text = draw(tmp_path / "npz", model, f"--seeds 0-19 {options} --format npz --grid")
    count = 30 if "all" in options else 20
    assert f"Finished: {count} images in {tmp_path / 'npz/images.npz'}, {count} of them" in text
    with np.load(tmp_path / "npz/images.npz") as archive:
        assert np.array_equal(archive["arr_0"], pixels(tmp_path / "png"))
        labels = json.loads((tmp_path / "png/dataset.json").read_text())["labels"]
        assert archive["arr_1"].tolist() == [label for _, label in labels]
    names = sorted(path.name for path in (tmp_path / "npz").iterdir())
    assert names == [".lock", "generation.json", "images.npz"] and (tmp_path / "npz-grid.png").exists()


def test_latents_go_through_the_vae(tmp_path):
    torch.manual_seed(3)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, **blocks)
    unet = tiny_unet(in_channels=4, num_class_embeds=None, label_dropout=0)
    EDM2Pipeline(unet, EDM2HeunScheduler(), vae=vae).save_pretrained(tmp_path / "model")
    draw(tmp_path / "out", tmp_path / "model", "--seeds 0-3 --chunk_size 4")
    expected = directly(tmp_path / "model", range(4))  # decoded in one batch
    assert pixels(tmp_path / "out").shape == expected.shape == (4, 16, 16, 3)
    assert np.abs(pixels(tmp_path / "out").astype(int) - expected).max() <= 1
    assert {"vae_sha256", "latents_mean", "latents_std"} <= settings(tmp_path / "out").keys()
    EDM2Pipeline(unet, EDM2HeunScheduler()).save_pretrained(tmp_path / "raw")
    assert "raw draws 4 channels and has no VAE to make a picture of them; load it" in fail(
        tmp_path / "no", tmp_path / "raw"
    )


# ---- The same bytes --------------------------------------------------------------------------------------------------


def test_the_network_sees_whole_chunks_whichever_images_are_kept(model, tmp_path, monkeypatch):
    """Rounding depends on shapes, positions and threads; too rarely to be seen in the bytes of a few images."""
    script = script_with(monkeypatch, str(model), "--output_dir", str(tmp_path), "--chunk_size", "8", "--s_churn", "9")
    args = script.build_parser().parse_args()
    pipeline = script.build_pipeline(args, torch.device("cpu"))
    pipeline.set_progress_bar_config(disable=True)
    numbering = script.build_numbering(args, pipeline.unet.config)
    inputs: list[list[torch.Tensor]] = []
    pipeline.unet.register_forward_pre_hook(lambda unet, given: inputs[-1].extend(tensor.clone() for tensor in given))
    kept = []
    for chunk in script.chunks_of(range(3, 17), 8) + script.chunks_of([13, 9], 8):
        inputs.append([])
        kept += [number for number, _ in script.draw_chunk(args, pipeline, numbering, chunk, script.StopSignal())]
    assert kept == [*range(3, 17), 13, 9]
    first, second, third, again = inputs  # of numbers 0 to 7, 8 to 15, 16 to 23; and once more 8 to 15
    assert len(first) == len(second) == len(third) == 3 * (2 * args.num_inference_steps - 1)
    assert all(tensors[0].shape == (8, 3, 8, 8) for tensors in inputs)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(second, again, strict=True))
    assert not torch.equal(first[0], second[0])


def test_the_machine_does_not_decide_about_threads(model, tmp_path):
    assert "\n1 threads" in draw(tmp_path / "one", model, "--seeds 0")
    assert "\n2 threads" in draw(tmp_path / "two", model, "--seeds 0 --num_threads 2")
    assert settings(tmp_path / "two")["num_threads"] == 2


@pytest.mark.parametrize("options", ["--batch_size 1", "--batch_size 24", "--batch_size 64 --seeds 39,5-20,0-38"])
def test_batches_and_order_do_not_matter(model, forty, tmp_path, options):
    draw(tmp_path / "out", model, f"--seeds 0-39 {options}")
    assert pictures(tmp_path / "out") == forty


def test_other_seeds_do_not_matter(model, forty, tmp_path):
    draw(tmp_path / "out", model, "--seeds 37,3")
    assert pictures(tmp_path / "out") == {seed: forty[seed] for seed in (3, 37)}
    assert calls(draw(tmp_path / "out", model, "--seeds 0-20")) == [2 * 3]
    assert calls(draw(tmp_path / "out", model, "--seeds 3-9,37")) == [0]
    assert pictures(tmp_path / "out") == {seed: forty[seed] for seed in (*range(21), 37)}
    assert json.loads((tmp_path / "out/generation.json").read_text())["seeds"] == "0-20,37"


@pytest.mark.parametrize(
    "processes, seeds, expected", [(2, "0-39", [6, 3]), (3, "0-39", [3, 3, 3]), (3, "17-20", [3, 0, 0])]
)
def test_processes_divide_the_work(model, forty, tmp_path, processes, seeds, expected):
    """Chunks of 16 images, 3 network calls each."""
    first, last = map(int, seeds.split("-"))
    text = draw(tmp_path / "png", model, f"--seeds {seeds}", processes)
    assert calls(text) == expected
    assert text.count("Finished: ") == 1 and f"{last - first + 1}/{last - first + 1} [" in text
    assert pictures(tmp_path / "png") == {seed: forty[seed] for seed in range(first, last + 1)}
    if processes == 2:
        draw(tmp_path / "npz", model, f"--seeds {seeds} --format npz", processes)
        assert np.array_equal(np.load(tmp_path / "npz/images.npz")["arr_0"], pixels(tmp_path / "png"))


@pytest.mark.slow
def test_accelerate_launches_two(model, forty, tmp_path):
    """Other thread settings included: the launcher gives its processes one thread each."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += shlex.split("--main_process_port 0 --num_machines 1 --mixed_precision no --dynamo_backend no")
    command += [str(SCRIPT), str(model), "--seeds", "0-39", "--num_inference_steps", "2"]
    command += ["--output_dir", str(tmp_path / "out")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Finished: 40 images") == 1
    assert pictures(tmp_path / "out") == forty


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--compile", "--mixed_precision bf16", "--num_threads 2"])
def test_ways_to_compute_are_settings(model, forty, tmp_path, option):
    """Each computes something close to float32 in one thread, says so, and repeats itself to the byte."""
    draw(tmp_path / "a", model, f"--seeds 0-39 {option}")
    draw(tmp_path / "b", model, f"--seeds 0-39 {option}", processes=2)
    assert pictures(tmp_path / "a") == pictures(tmp_path / "b")
    for seed, data in forty.items():
        (tmp_path / "plain" / image_path(Path(), seed)).parent.mkdir(parents=True, exist_ok=True)
        image_path(tmp_path / "plain", seed).write_bytes(data)
    difference = np.abs(pixels(tmp_path / "a").astype(int) - pixels(tmp_path / "plain"))
    assert difference.mean() < (3 if "bf16" in option else 0.01)
    assert difference.any() == ("bf16" in option) or "bf16" not in option
    name, _, value = option.removeprefix("--").partition(" ")
    assert str(settings(tmp_path / "a")[name]) == (value or "True")


# ---- Interruptions ---------------------------------------------------------------------------------------------------


def written(out: Path, count: int) -> Callable[[], bool]:
    return lambda: len(list(out.rglob("[0-9]*.png"))) >= count


@pytest.mark.parametrize("image_format", ["png", "npz"])
def test_killed_it_goes_on(model, forty, tmp_path, image_format):
    out, options = tmp_path / "out", f"--seeds 0-39 --chunk_size 16 --format {image_format}"
    images = out / "parts" if image_format == "npz" else out
    for count in (1, 17):
        with Job(out, model, options) as job:
            job.wait_for(written(out, count))
            job.send(signal.SIGKILL)
            assert job.wait() == [-signal.SIGKILL]
    (image_path(images, 5).parent / ".tmp-4194305-000005.png").write_bytes(
        b"half a picture"
    )  # of an impossible process
    before = {path: path.stat().st_mtime_ns for path in images.rglob("[0-9]*.png")}
    assert 17 <= len(before) < 40
    text = draw(out, model, options)
    assert f"{40 - len(before)} of them drawn now" in text and "removed the unfinished" in text
    assert f" {len(before)}/40 [" in text  # the bar begins with what is there
    assert list(out.rglob(".tmp-*")) == []
    if image_format == "png":
        assert pictures(out) == forty
        assert {path: path.stat().st_mtime_ns for path in before} == before  # not written again
    else:
        draw(tmp_path / "png", model, "--seeds 0-39")
        assert np.array_equal(np.load(out / "images.npz")["arr_0"], pixels(tmp_path / "png"))
    assert "Finished: 40 images" in (text := draw(out, model, options)) and "all of them were there" in text


@pytest.mark.parametrize("number, processes", [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_signal_ends_it_cleanly(model, forty, tmp_path, number, processes):
    out = tmp_path / "out"
    with Job(out, model, "--seeds 0-4999", processes) as job:
        job.wait_for(written(out, 40))
        job.send(number)
        assert job.wait() == [128 + number] * processes
        count = len(pictures(out))
        stopped = (
            f"Stopped by {signal.Signals(number).name}. {count} of 5000 images are complete in {out}. The same command"
        )
        assert stopped in job.text and "Traceback" not in job.text
    assert list(out.rglob(".tmp-*")) == []
    draw(out, model, "--seeds 0-39")
    assert forty.items() <= pictures(out).items()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk(tmp_path, processes):
    model, out, steps = tmp_path / "model", tmp_path / "out", "--num_inference_steps 8"
    unet = tiny_unet(sample_size=32, attention_resolutions=())
    torch.nn.init.zeros_(unet.out_gain)  # it draws noise
    EDM2Pipeline(unet, EDM2HeunScheduler()).save_pretrained(model)
    # Room for generation.json, and not for 3 KB that cannot be compressed.
    with Job(out, model, f"--seeds 0-17 {steps}", processes, file_size_limit=2500) as job:
        assert job.wait() == [1] * processes
        assert re.search(rf"Writing {out}/000000/0000[01]\d.png failed: File too large", job.text)
        assert f". 0 of 18 images are complete in {out}. The same command goes on." in job.text
        assert "Traceback" not in job.text
    assert list(out.rglob("*.png")) == list(out.rglob(".tmp-*")) == []
    assert "18 of them drawn now" in draw(out, model, f"--seeds 0-17 {steps}", processes)


def test_one_job_at_a_time(model, tmp_path):
    with Job(tmp_path / "out", model, "--seeds 0-4999") as job:
        job.wait_for(written(tmp_path / "out", 1))
        message = rf"error: {tmp_path / 'out'} is in use by process {job.processes[0].pid} on "
        assert re.search(message, fail(tmp_path / "out", model, "--seeds 0-9"))


# ---- Settings --------------------------------------------------------------------------------------------------------


def test_a_folder_keeps_to_its_settings(model, tmp_path):
    out, moved = tmp_path / "out", tmp_path / "moved"
    draw(out, model, "--seeds 0-3")
    text = fail(out, model, "--seeds 0-3 --num_inference_steps 3 --s_churn 4 --class_labels balanced")
    assert f"error: {out} holds images of other settings:" in text
    for difference in ('class_labels: was "random", now "balanced"', "num_inference_steps: was 2, now 3",
                       "scheduler.s_churn: was 0.0, now 4.0"):  # fmt: skip
        assert f"\n  {difference}\n" in text
    EDM2Pipeline(tiny_unet(), EDM2HeunScheduler()).save_pretrained(moved)  # the same weights in another place
    draw(out, moved, "--seeds 0-5")
    EDM2Pipeline(tiny_unet(seed=1), EDM2HeunScheduler()).save_pretrained(tmp_path / "other")
    assert re.search(r"settings:\n  unet_sha256: was \S+, now \S+\nGive the same", fail(out, tmp_path / "other"))


@pytest.mark.parametrize(
    "options, scheduler",
    [
        ("--scheduler heun --s_churn 8 --s_tmin 0.1 --s_tmax 50 --s_noise 1.01", EDM2HeunScheduler(
            s_churn=8, s_tmin=0.1, s_tmax=50, s_noise=1.01)),
        ("--scheduler euler --sigma_min 0.01 --sigma_max 60 --rho 5", EDMEulerScheduler(0.01, 60, rho=5)),
        ("--scheduler dpmpp-2m", EDMDPMSolverMultistepScheduler(solver_order=2)),
        ("--scheduler dpmpp-3m", EDMDPMSolverMultistepScheduler(solver_order=3)),
    ],
)  # fmt: skip
def test_schedulers(model, forty, tmp_path, options, scheduler):
    draw(tmp_path / "out", model, f"--seeds 0-15 --num_inference_steps 5 {options}")
    expected = directly(model, range(16), scheduler, num_inference_steps=5)
    assert np.array_equal(pixels(tmp_path / "out"), expected)
    assert settings(tmp_path / "out")["scheduler"] == type(scheduler).__name__


# ---- Guidance, and models of a run or the Hub ------------------------------------------------------------------------


def test_guidance(model, tmp_path):
    guide = tiny_unet(seed=2, block_out_channels=(8, 8))
    guide.save_pretrained(tmp_path / "network")
    EDM2Pipeline(guide, EDM2HeunScheduler()).save_pretrained(tmp_path / "pipeline")
    plain = directly(model, range(4))
    for name, options, expected in [
        ("network", f"--guide {tmp_path / 'network'}", {"guide": guide}),
        ("pipeline", f"--guide {tmp_path / 'pipeline'} --guidance_interval 0.1,20", {"guidance_interval": (0.1, 20)}),
        ("itself", "", {}),
    ]:
        out = tmp_path / f"out-{name}"
        draw(out, model, f"--seeds 0-3 --chunk_size 4 --num_inference_steps 4 --guidance_scale 1.7 {options}")
        pipe = EDM2Pipeline.from_pretrained(model, guide_unet=None if name == "itself" else guide)
        pipe.save_pretrained(tmp_path / name / "guided")
        expected = {"guidance_scale": 1.7, "num_inference_steps": 4} | expected
        expected.pop("guide", None)
        assert np.array_equal(pixels(out), directly(tmp_path / name / "guided", range(4), **expected))
        assert not np.array_equal(pixels(out), plain)
        assert ("guide_unet_sha256" in settings(out)) == (name != "itself")


def test_a_run_and_an_early_moment_of_it(tmp_path):
    run = train(tmp_path / "run").output_dir
    options = "--seeds 0-9 --chunk_size 10 --class_labels balanced"
    draw(tmp_path / "plain", run, options)
    expected = EDM2Pipeline.from_run(run)
    expected.save_pretrained(tmp_path / "pipeline")
    assert np.array_equal(
        pixels(tmp_path / "plain"), directly(tmp_path / "pipeline", range(10), labels=list(range(10)))
    )
    guided = f"{options} --sigma_rel 0.07 --guidance_scale 2 --guide_nimg 160 --guide_sigma_rel 0.1"
    draw(tmp_path / "guided", run, guided, processes=2)
    expected = EDM2Pipeline.from_run(run, 0.07, guide={"nimg": 160, "sigma_rel": 0.1})
    expected.save_pretrained(tmp_path / "guided-pipeline")
    images = directly(tmp_path / "guided-pipeline", range(10), labels=list(range(10)), guidance_scale=2)
    assert np.array_equal(pixels(tmp_path / "guided"), images)
    # The same guide for a model that is no run.
    text = f"{options} --guidance_scale 2 --guide {run} --guide_nimg 160 --guide_sigma_rel 0.1"
    draw(tmp_path / "mixed", tmp_path / "guided-pipeline", text)
    assert pictures(tmp_path / "mixed") == pictures(tmp_path / "guided")
    assert settings(tmp_path / "mixed") == settings(tmp_path / "guided")
    # As a converted run: snapshots and a pipeline, but no options of a training.
    (run / "config.json").unlink()
    draw(tmp_path / "converted", run, guided)
    assert pictures(tmp_path / "converted") == pictures(tmp_path / "guided")


def test_a_guide_shares_sigma_data(model, tmp_path):
    EDM2Pipeline(tiny_unet(), EDM2HeunScheduler(sigma_data=0.25)).save_pretrained(tmp_path / "run" / "pipeline")
    tiny_unet().save_pretrained(tmp_path / "run" / "snapshots" / "unet-000000320-0.050")
    for guide in (tmp_path / "run" / "pipeline", tmp_path / "run"):
        text = fail(tmp_path / "out", model, f"--guidance_scale 2 --guide {guide}")
        assert f"error: --guide {guide} has sigma_data=0.25, and the model 0.5; a guide shares it." in text


@pytest.mark.slow
def test_a_model_of_the_hub(model, forty, tmp_path):
    with model_hub() as hub:
        hub.add("somebody/ours", {str(p.relative_to(model)): p.read_bytes() for p in model.rglob("*") if p.is_file()})
        command = [sys.executable, str(SCRIPT), "somebody/ours", "--seeds", "0-15", "--num_inference_steps", "2"]
        command += ["--output_dir", str(tmp_path / "out"), "--revision", "main", "--cache_dir", str(tmp_path / "cache")]
        environment = os.environ | hub.environment(tmp_path / "home") | {"ACCELERATE_USE_CPU": "true"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert result.returncode == 0, result.stderr
        commit = hub.sha("somebody/ours", "main")
    assert pictures(tmp_path / "out") == {seed: forty[seed] for seed in range(16)}
    source = json.loads((tmp_path / "out/generation.json").read_text())["source"]
    assert source == {"model": "somebody/ours", "revision": "main", "commit": commit}


# ---- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ("--seeds 5-1", "'5-1' is no seed and no range of seeds from 0 to 4294967295, such as 0-9,20,30-39."),
        (
            "--class_labels some",
            "'some' is no list of classes, such as 0,3,5, and none of all, balanced, random, none.",
        ),
        ("--guidance_interval 3,1", "'3,1' is no pair of noise levels, such as 0.28,2.9, the lower one first."),
        ("--batch_size 0", "'0' is no whole number from 1."),
        ("--nimg 8m", '"8m" is not a number of images'),
        ("--grid grid", "'grid' is no PNG file: its name must end in .png."),
        ("--scheduler ddim", "invalid choice: 'ddim'"),
    ],
)
def test_options_that_cannot_be_read(monkeypatch, capsys, options, message):
    script = script_with(monkeypatch, "model", "--output_dir", "out", *shlex.split(options))
    with pytest.raises(SystemExit, match="2"):
        script.build_parser().parse_args()
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        ("--mixed_precision fp16", "--mixed_precision fp16 needs a GPU; use bf16 or no on a CPU."),
        ("--sigma_rel 0.1", r"--sigma_rel chooses a network of a run folder, and \S+ is none."),
        ("--guidance_scale 2 --guide_nimg 5", r"--guide_nimg chooses a network of a run folder, and \S+ is none."),
        ("--guide elsewhere", "--guide has no effect with --guidance_scale 1; give another scale, for example 1.5."),
        ("--guidance_scale 2 --guide ./lost", "there is no folder ./lost, and it is no name of a Hub repository"),
        (
            "--scheduler euler --s_churn 4",
            "--s_churn belongs to the Heun scheduler, and this is EDMEulerScheduler; give",
        ),
        ("--sigma_min 90", "sigma_min=90.0 and sigma_max=80.0 must satisfy 0 < sigma_min < sigma_max."),
        ("--class_labels 0,10", r"the classes of this network are 0 to 9, and not \[0, 10\]."),
    ],
)
def test_options_that_do_not_fit(model, tmp_path, options, message):
    text = fail(tmp_path / "out", model, options)
    assert re.search(f"^error: {message}", text, re.M), text
    assert "Traceback" not in text
    assert not (tmp_path / "out/generation.json").exists()


def test_one_of_several_processes_tells_what_is_wrong(model, tmp_path):
    text = fail(tmp_path / "out", model, "--class_labels 0,10", processes=2)
    assert text.count("error: ") == 1 and "Traceback" not in text and "warn" not in text
    assert "error: " in fail(tmp_path / "out", tmp_path / "lost", processes=2)


def test_models_that_do_not_fit(model, tmp_path):
    lost = fail(tmp_path / "out", tmp_path / "lost")
    assert f"error: there is no folder {tmp_path / 'lost'}, and it is no name of a Hub repository (USER/MODEL)" in lost
    assert "cannot be loaded" in fail(tmp_path / "out", model / "unet")
    broken = tiny_unet()
    broken.out_gain.data.fill_(float("nan"))
    EDM2Pipeline(broken, EDM2HeunScheduler()).save_pretrained(tmp_path / "broken")
    text = fail(tmp_path / "out", tmp_path / "broken")
    assert "goes on" not in text and "error: image 0 is not finite; try --mixed_precision no, or another model." in text
    draw(tmp_path / "out", model, "--seeds 0")  # nothing was drawn, so the folder is free
