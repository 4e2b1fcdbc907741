"""training/reconstruct_ema.py on a real run: what it writes, keeps, says and refuses; killed, and on a full disk."""

import json
import multiprocessing
import re
import resource
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from diffusers_edm2 import EDM2UNet2DModel
from diffusers_edm2.ema import snapshot_name
from diffusers_edm2.snapshots import WEIGHTS, find_networks, list_snapshots
from training_runs import train

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "training" / "reconstruct_ema.py"
END = 320  # images of the run, 16 per step; a snapshot after each step


@pytest.fixture(scope="session")  # slow tests run after those of other files
def run(tmp_path_factory):
    """A run of three tracks, one of them then set apart in `direct`."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    train(run_dir, "--ema_sigma_rel", "0.05,0.10,0.0725", "--snapshot_every", "16")
    (run_dir / "direct").mkdir()
    for snapshot in list_snapshots(run_dir):
        if snapshot.sigma_rel == 0.0725:
            snapshot.path.rename(run_dir / "direct" / snapshot.path.name)
    return run_dir


@pytest.fixture
def command(monkeypatch, capsys):
    """The script in this process; returns its output, or its error."""

    def call(*words: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, words)])
        capsys.readouterr()
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return capsys.readouterr().out

    return call


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def test_third_track_of_a_run(run, tmp_path, command):
    """It is rebuilt from the other two, and better from more snapshots."""
    direct = weights_of(run / "direct" / snapshot_name(END, 0.0725))
    network = EDM2UNet2DModel.from_pretrained(run / "snapshots" / snapshot_name(END, 0.05))
    names = [name for name, p in network.named_parameters() if p.requires_grad]

    def distance(folder: Path) -> float:
        weights = weights_of(folder)
        difference = sum((weights[n] - direct[n]).square().sum().item() for n in names)
        return (difference / sum(direct[n].square().sum().item() for n in names)) ** 0.5

    snapshots = list_snapshots(run)
    assert len(snapshots) == 40
    errors = []
    for step in (80, 32, 16):
        chosen = [s.path for s in snapshots if s.nimg % step == 0]
        command(*chosen, "--sigma_rel", "0.0725", "--output_dir", tmp_path / str(step))
        errors.append(distance(tmp_path / str(step) / snapshot_name(END, 0.0725)))
    nearest = min(distance(s.path) for s in snapshots)
    print(f"4, 10, 20 times of two tracks: {errors}; the nearest snapshot: {nearest}")
    assert nearest > 2 * errors[0]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


def test_outputs_are_made_listed_and_kept(run, tmp_path, command):
    out = tmp_path / "out"
    text = command(run, "--sigma_rel", "0.03,0.04,...,0.06", "--nimg", "160", "--output_dir", out)
    made = [snapshot_name(160, s) for s in (0.03, 0.04, 0.05, 0.06)]
    assert sorted(path.name for path in out.iterdir()) == made
    lines = {Path(line.split()[2]).name: line for line in text.splitlines() if "unet-" in line}
    assert list(lines) == made
    assert lines[made[2]].split()[:2] == ["0.05", "0.000%"]
    assert float(lines[made[0]].split()[1].rstrip("%")) > 1
    EDM2UNet2DModel.from_pretrained(out / made[0])

    (out / made[1] / WEIGHTS).write_bytes(b"mine")
    shutil.rmtree(out / made[0])
    text = command(run, "--sigma_rel", "0.03,0.04,...,0.06", "--nimg", "160", "--output_dir", out)
    assert [line.endswith("(was there, kept)") for line in text.splitlines() if "unet-" in line] == [False] + 3 * [True]
    assert "--overwrite makes them anew" in text
    assert (out / made[1] / WEIGHTS).read_bytes() == b"mine" and (out / made[0]).is_dir()
    assert "kept" not in command(run, "--sigma_rel", "0.04", "--nimg", "160", "--output_dir", out, "--overwrite")
    EDM2UNet2DModel.from_pretrained(out / made[1])


def test_default_folder_type_and_warning(run, command, caplog):
    command(run, "--sigma_rel", "0.08,0.20", "--dtype", "bfloat16")
    names = [f"{snapshot_name(END, s)}-bfloat16" for s in (0.08, 0.20)]
    assert sorted(path.name for path in (run / "posthoc").iterdir()) == names
    assert weights_of(run / "posthoc" / names[0])["emb_noise.weight"].dtype == torch.bfloat16
    (warning,) = [record.message for record in caplog.records if "nearest profile" in record.message]
    assert warning.startswith(f"{names[1]}: the nearest profile that these snapshots can build is 1.")


def test_pipelines(run, tmp_path, command):
    command(run, "--sigma_rel", "0.07,0.08", "--output_dir", tmp_path, "--pipeline")
    command(run, "--sigma_rel", "0.08", "--output_dir", tmp_path)
    folder = tmp_path / "pipeline-000000320-0.080"
    network = tmp_path / snapshot_name(END, 0.08)
    assert (folder / "unet" / WEIGHTS).read_bytes() == (network / WEIGHTS).read_bytes()
    files = [file.relative_to(folder) for file in folder.rglob("*") if file.is_file()]
    assert sorted(files) == sorted(
        f.relative_to(run / "pipeline") for f in (run / "pipeline").rglob("*") if f.is_file()
    )
    assert all(
        (folder / file).read_bytes() == (run / "pipeline" / file).read_bytes() for file in files if file.name != WEIGHTS
    )
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(class_labels=[1], num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 8, 8, 1) and np.ptp(images) > 0


def test_pipeline_without_a_pipeline_to_imitate(run, tmp_path, command, caplog):
    shutil.copytree(run / "snapshots", tmp_path / "run/snapshots")
    config = json.loads((run / "config.json").read_text())
    config["options"]["sigma_data"] = 0.25
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    command(tmp_path / "run/snapshots", "--sigma_rel", "0.07", "--output_dir", tmp_path / "out", "--pipeline")
    assert "the pipelines get the Heun scheduler, sigma_data=0.25, no VAE" in caplog.text
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out/pipeline-000000320-0.070")
    assert pipeline.scheduler.config.sigma_data == 0.25 and pipeline.unet.config.num_class_embeds == 10


def test_plot(run, tmp_path, command):
    """Lines of several colours on white."""
    options = ["--sigma_rel", "0.03,0.05,...,0.15", "--output_dir", tmp_path / "out"]
    assert f"The plot of the profiles is in {tmp_path / 'profiles'}" in command(
        run, *options, "--plot", tmp_path / "profiles"
    )
    with Image.open(tmp_path / "profiles") as image:
        assert image.format == "PNG" and image.width > 600
        pixels = np.asarray(image.convert("HSV")).reshape(-1, 3)
    assert len(np.unique(pixels[pixels[:, 1] > 100, 0] // 16)) >= 4  # hues


def test_plot_needs_matplotlib(run, monkeypatch, command, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    with pytest.raises(SystemExit):
        command(run, "--sigma_rel", "0.07", "--plot", "p.png")
    assert '--plot needs matplotlib: pip install "matplotlib' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{tmp}", "--sigma_rel", "0.07"], "error: {tmp} has no snapshots; give a run folder"),
        (["{run}", "--sigma_rel", "0.07,0.3"], "--sigma_rel: sigma_rel=0.3 is not in (0, 0.2886]"),
        (["{run}", "--sigma_rel", "0.07,..."], '"0.07,..." is not a list of lengths'),
        (["{run}", "--sigma_rel", "0.07", "--nimg", "1Mi"], "nimg=1048576: there is no snapshot of this time"),
        (["{run}", "--sigma_rel", "0.07", "--nimg", "1x"], '--nimg: "1x" is not a number of images'),
        (["{run}", "{run}", "--sigma_rel", "0.07"], "several snapshot folders need an --output_dir"),
        (["{run}", "--sigma_rel", "0.07", "--output_dir", "{tmp}/file"], "error: [Errno 17] File exists: '{tmp}/file'"),
        (["{tmp}/bad", "--sigma_rel", "0.07"], "error: {tmp}/bad/unet-000000320-0.050/config.json cannot be read: No "),
    ],
)
def test_errors_are_one_line(run, tmp_path, command, capsys, words, message):
    (tmp_path / "file").touch()
    for sigma_rel in (0.05, 0.1):
        (tmp_path / "bad" / snapshot_name(320, sigma_rel)).mkdir(parents=True)
    with pytest.raises(SystemExit) as caught:
        command(*(word.format(run=run, tmp=tmp_path) for word in words))
    shown = str(caught.value) if isinstance(caught.value.code, str) else capsys.readouterr().err
    assert message.format(run=run, tmp=tmp_path) in shown


# ---- In processes of its own -----------------------------------------------------------------------


def make_large_snapshots(folder: Path) -> None:
    """28 snapshots of 35 MB, which are one file: enough to be in the middle of."""
    unet = EDM2UNet2DModel(sample_size=16, in_channels=3, block_out_channels=(64, 128, 128), attention_resolutions=())
    unet.save_pretrained(folder / snapshot_name(1000, 0.05))
    for nimg in range(1000, 15000, 1000):
        for sigma_rel in (0.05, 0.10):
            path = folder / snapshot_name(nimg, sigma_rel)
            path.mkdir(exist_ok=True)
            for file in (folder / snapshot_name(1000, 0.05)).iterdir():
                if not (path / file.name).exists():
                    (path / file.name).hardlink_to(file)


@pytest.mark.slow
def test_killed_reconstruction_leaves_no_half_folder(tmp_path):
    make_large_snapshots(tmp_path / "run/snapshots")
    words = [sys.executable, str(SCRIPT), str(tmp_path / "run"), "--sigma_rel", "0.06,0.07"]
    out = tmp_path / "run/posthoc"
    with open(tmp_path / "log", "w") as log, subprocess.Popen(words, stderr=log) as process:
        while not any(file.stat().st_size > 2**20 for file in out.glob(f".tmp-*/{WEIGHTS}")):
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.001)
        process.kill()
        process.wait()
    left = sorted(path.name for path in out.iterdir())
    assert len(left) == 2 and all(name.startswith(".tmp-") for name in left)
    again = subprocess.run(words, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("removed the unfinished") == 2
    assert sorted(path.name for path in out.iterdir()) == [snapshot_name(14000, s) for s in (0.06, 0.07)]
    source = EDM2UNet2DModel.from_pretrained(tmp_path / "run/snapshots" / snapshot_name(1000, 0.05))
    result = EDM2UNet2DModel.from_pretrained(out / snapshot_name(14000, 0.06))
    torch.testing.assert_close(result.state_dict(), source.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_full_disk(run, tmp_path):
    """A limit on the size of files in place of a full disk: an error without traceback, and nothing is left."""
    largest = max(file.stat().st_size for file in (run / "snapshots").rglob("*.safetensors"))
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2,) * 2)  # noqa: E731
    words = [sys.executable, str(SCRIPT), str(run), "--sigma_rel", "0.06,0.07", "--output_dir", str(tmp_path / "out")]
    result = subprocess.run(words, capture_output=True, text=True, preexec_fn=limit)
    assert result.returncode == 1
    assert re.search(r"^error: .*File too large", result.stderr, flags=re.MULTILINE)
    assert "Traceback" not in result.stderr
    assert list((tmp_path / "out").iterdir()) == []


def ask(run_dir: Path, queue) -> None:
    queue.put(find_networks(run_dir, [(0.06, None), (0.07, None)]))


def test_processes_that_ask_at_once_share_one_reconstruction(run, tmp_path):
    shutil.copytree(run / "snapshots", tmp_path / "run/snapshots")
    context = multiprocessing.get_context("forkserver")
    queue = context.Queue()
    processes = [context.Process(target=ask, args=(tmp_path / "run", queue)) for _ in range(4)]
    for process in processes:
        process.start()
    answers = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    expected = [tmp_path / "run/posthoc" / snapshot_name(END, s) for s in (0.06, 0.07)]
    assert answers == 4 * [expected]
    assert sorted(path.name for path in (tmp_path / "run/posthoc").iterdir()) == [".lock", *(p.name for p in expected)]


@pytest.mark.slow
def test_memory_is_that_of_a_few_tensors(tmp_path):
    """Of a network of 119 MiB and 8 snapshots; the constant is for tables and for what the allocator keeps."""
    words = ["--block_out_channels", "64,128,192,256", "--snapshots", "8", "--outputs", "3", "--folder", str(tmp_path)]
    benchmark = [sys.executable, str(ROOT / "examples" / "benchmark_reconstruction.py"), *words]
    result = subprocess.run(benchmark, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (model,) = re.findall(r"of (\d+) MiB each", result.stdout)
    outputs, rise, _, allowed, _, _ = result.stdout.splitlines()[-1].split()
    assert outputs == "3" and int(model) > 100 and 20 < float(allowed) < 25
    assert float(rise) < float(allowed) + 20
