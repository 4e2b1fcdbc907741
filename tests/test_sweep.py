"""training/sweep.py on a tiny run of digits: the table, its continuation, and what is refused."""

import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_edm2 import EDM2Pipeline
from diffusers_edm2.dataset import DigitsSource
from diffusers_edm2.metrics import frechet_distance
from training_runs import ON_CPU, train

SCRIPT = Path(__file__).parents[1] / "training" / "sweep.py"
METRIC = """
def features(images):  # mean and contrast of the two halves
    assert images.shape[1:] == (1, 8, 8) and str(images.dtype) == "torch.uint8"
    halves = images.double().reshape(len(images), 2, 32) / 255
    return __import__("torch").cat([halves.mean(2), halves.std(2)], dim=1)

def scalar(images):
    return images.double().mean()
"""
POINTS = ["--sigma_rel", "0.05,0.12", "--guidance_scale", "1,2", "--guide_nimg", "160", "--guide_sigma_rel", "0.10"]
OPTIONS = ["--metric", "my_metric:features", "--num_images", "12", "--num_inference_steps", "2", "--batch_size", "5"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "my_metric.py").write_text(METRIC)
    return train(folder / "run", "--snapshot_every", "80").output_dir


@pytest.fixture
def sweep(run_dir, monkeypatch):
    """The script's `main` in this process; the module of the metric lies in the current folder."""
    monkeypatch.chdir(run_dir.parent)
    monkeypatch.syspath_prepend(run_dir.parent)
    for name, value in ON_CPU.items():
        monkeypatch.setenv(name, value)
    spec = importlib.util.spec_from_file_location("sweep", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "sweep.csv", newline="") as lines:
        return list(csv.DictReader(lines))


def distances(folder: Path) -> dict[tuple[str, ...], float]:
    rows = rows_of(folder)
    return {(r["sigma_rel"], r["guide_sigma_rel"], r["guidance_scale"]): float(r["frechet_distance"]) for r in rows}


def test_a_table_a_plot_and_the_best_as_a_pipeline(run_dir, sweep, tmp_path, capfd):
    out, saved = tmp_path / "out", tmp_path / "saved"
    sweep([str(run_dir), *POINTS, *OPTIONS, "--output_dir", str(out), "--save_best", str(saved)])
    found = distances(out)
    guided = {("0.05", "0.1", "2.0"), ("0.12", "0.1", "2.0")}
    assert found.keys() == {("0.05", "", "1.0"), ("0.12", "", "1.0")} | guided
    assert len(set(found.values())) == 4
    assert [r["best"] for r in rows_of(out)].count("*") == 1
    best = next(r for r in rows_of(out) if r["best"])
    assert float(best["frechet_distance"]) == min(found.values())
    assert json.loads((out / "best.json").read_text())["sigma_rel"] == float(best["sigma_rel"])
    with Image.open(out / "sweep.png") as picture:
        assert picture.size[0] > 500 and len(set(picture.convert("L").tobytes())) > 50
    printed = capfd.readouterr().out
    assert f"The best: sigma_rel {best['sigma_rel']}" in printed and "at the end of the range" in printed

    pipe = EDM2Pipeline.from_pretrained(saved)
    assert (pipe.guide_unet is not None) == bool(best["guide_sigma_rel"])

    # One point, computed here by hand: the images are those of the seeds, their distance that of the features.
    pipe = EDM2Pipeline.from_run(run_dir, sigma_rel=0.12, guide={"nimg": 160, "sigma_rel": 0.10})
    generators = [torch.Generator().manual_seed(k) for k in range(12)]
    labels = [k % 10 for k in range(12)]
    images = pipe(labels, 2, generator=generators, guidance_scale=2.0, output_type="pil").images
    drawn = torch.from_numpy(np.stack([np.asarray(image)[None] for image in images]))
    real = torch.from_numpy(DigitsSource("train").images).permute(0, 3, 1, 2)
    namespace: dict = {}
    exec(METRIC, namespace)
    expected = frechet_distance(namespace["features"](drawn).numpy(), namespace["features"](real).numpy())
    assert found[("0.12", "0.1", "2.0")] == pytest.approx(expected, rel=1e-9)


def test_a_search_goes_on_and_may_be_widened(run_dir, sweep, tmp_path, capfd):
    arguments = [str(run_dir), *OPTIONS, "--output_dir", str(tmp_path)]
    sweep([*arguments, "--sigma_rel", "0.05"])
    (before,) = rows_of(tmp_path)
    made = {path: path.stat().st_mtime_ns for path in (run_dir / "posthoc").glob("unet-*")}
    sweep([*arguments, "--sigma_rel", "0.05,0.12,0.15"])
    assert rows_of(tmp_path)[0]["seconds"] == before["seconds"]  # not drawn again
    assert len(rows_of(tmp_path)) == 3
    for path, time_made in made.items():  # nor was a network made again
        assert path.stat().st_mtime_ns == time_made
    capfd.readouterr()
    sweep([*arguments, "--sigma_rel", "0.05,0.12,0.15"])
    assert "3 points in" in capfd.readouterr().out


@pytest.mark.slow
def test_a_killed_search_ends_with_the_same_table(run_dir, sweep, tmp_path):
    arguments = [str(run_dir), *POINTS, *OPTIONS, "--output_dir"]
    sweep([*arguments, str(tmp_path / "whole")])
    table = tmp_path / "killed" / "sweep.csv"
    command = [sys.executable, str(SCRIPT), *arguments, str(tmp_path / "killed")]
    with subprocess.Popen(command, cwd=run_dir.parent, env=os.environ | ON_CPU, stderr=subprocess.PIPE) as process:
        while not table.exists() and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL and len(rows_of(tmp_path / "killed")) < 4, errors
    sweep([*arguments, str(tmp_path / "killed")])
    assert distances(tmp_path / "killed") == distances(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_find_the_same(run_dir, sweep, tmp_path):
    sweep([str(run_dir), *POINTS, *OPTIONS, "--output_dir", str(tmp_path / "one")])
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [*launch, str(SCRIPT), str(run_dir), *POINTS, *OPTIONS, "--output_dir", str(tmp_path / "two")]
    environment = os.environ | ON_CPU | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=run_dir.parent, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    one, two = distances(tmp_path / "one"), distances(tmp_path / "two")
    assert one.keys() == two.keys()
    for point, distance in one.items():
        # The batches differ, so a pixel may be rounded the other way: 1/255 of one in 768.
        assert two[point] == pytest.approx(distance, rel=1e-3)


def test_a_network_with_label_dropout_guides_itself(sweep, run_dir, tmp_path):
    run = train(tmp_path / "run", "--label_dropout", "0.2").output_dir
    options = ["--sigma_rel", "0.05", "--guidance_scale", "1,3", "--output_dir", str(tmp_path / "out")]
    sweep([str(run), *OPTIONS, *options])
    assert len(set(distances(tmp_path / "out").values())) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--guidance_scale", "1,2"], "--guidance_scale 1.0,2.0 needs a guide: --guide_nimg for an early moment"),
        (["--guide_nimg", "160"], "--guidance_scale 1 does not use the guide; add weights"),
        (["--metric", "my_metric"], '--metric my_metric must be "module:function"'),
        (["--metric", "no_such:features"], "--metric no_such:features cannot be imported from .* No module named"),
        (["--metric", "my_metric:scalar"], r"--metric returned features of shape \(\) for 5 images; .* \[5, D\]"),
        (["--num_images", "1"], "--num_images 1 is too few; give 2 or more"),
        (["--nimg", "100"], "nimg=100: there is no snapshot of this time"),
        (["--guide_run", "nowhere", "--guidance_scale", "2"], "nowhere has no snapshots"),
        (["--save_best", "."], r"--save_best . exists already; give another folder"),
    ],
)
def test_what_cannot_work_is_refused(run_dir, sweep, tmp_path, options, message):
    with pytest.raises(SystemExit, match=f"sweep.py: error: {message}"):
        sweep([str(run_dir), *OPTIONS, "--sigma_rel", "0.12", "--output_dir", str(tmp_path / "out"), *options])
    assert not (tmp_path / "out" / "sweep.csv").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sigma_rel", "0.3"], "sigma_rel=0.3 is not in"),
        (["--guidance_scale", "1,1"], '"1,1" must be different finite numbers, such as 1,1.5,2'),
        (["--guidance_interval", "2.9,0.28"], '"2.9,0.28" must be two noise levels, 0 <= LO < HI'),
    ],
)
def test_values_that_cannot_be_read_are_refused(run_dir, sweep, capsys, options, message):
    with pytest.raises(SystemExit, match="2"):
        sweep([str(run_dir), *OPTIONS, *options])
    assert message in capsys.readouterr().err


def test_another_setting_needs_another_folder(run_dir, sweep, tmp_path):
    arguments = [str(run_dir), *OPTIONS, "--sigma_rel", "0.05", "--output_dir", str(tmp_path)]
    sweep(arguments)
    with pytest.raises(SystemExit, match=r"a sweep with other settings:\n  seed: was 0, now 7\nGive another"):
        sweep([*arguments, "--seed", "7"])
