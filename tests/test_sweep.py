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
from diffusers_edm2.checkpoint import lock_run
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


def test_guided_by_itself_and_guided_by_another_are_told_apart(sweep, tmp_path):
    run, out = train(tmp_path / "run", "--label_dropout", "0.2").output_dir, tmp_path / "out"
    options = [str(run), *OPTIONS, "--sigma_rel", "0.05", "--output_dir", str(out), "--guidance_scale"]
    sweep([*options, "1"])
    sweep([*options, "3"])
    assert distances(out).keys() == {("0.05", "", "1.0"), ("0.05", "", "3.0")}
    assert len(set(distances(out).values())) == 2
    with pytest.raises(SystemExit, match="other settings:\n  guide_nimg: was None, now 160"):
        sweep([*options, "3", "--guide_nimg", "160"])


def test_the_best_point_keeps_its_guide(run_dir, sweep, tmp_path):
    """Also after a second call that asks for no guidance."""
    arguments = [str(run_dir), *OPTIONS, "--output_dir", str(tmp_path / "out")]
    guided = [*arguments, "--sigma_rel", "0.05", "--guidance_scale", "1.01", "--guide_nimg", "160"]
    sweep([*guided, "--guide_sigma_rel", "0.12"])
    sweep([*arguments, "--sigma_rel", "0.2", "--save_best", str(tmp_path / "saved")])
    rows, best = rows_of(tmp_path / "out"), json.loads((tmp_path / "out" / "best.json").read_text())
    (row,) = [row for row in rows if row["best"]]
    assert len(rows) == 2 and best["guidance_scale"] == float(row["guidance_scale"])
    assert row["guide_sigma_rel"] == "0.12"  # the longer average is worse, so early in a training
    assert best["guide"] == {"run_dir": str(run_dir), "sigma_rel": 0.12, "nimg": 160}
    assert EDM2Pipeline.from_pretrained(tmp_path / "saved").guide_unet is not None


def test_a_run_that_goes_on_does_not_change_the_moment(sweep, tmp_path):
    run = train(tmp_path / "run", "--duration", "160").output_dir
    (tmp_path / "my_metric.py").write_text(METRIC)
    arguments = [str(run), *OPTIONS, "--output_dir", str(tmp_path / "out"), "--sigma_rel"]
    sweep([*arguments, "0.05"])
    assert json.loads((tmp_path / "out" / "best.json").read_text())["nimg"] == 160
    train(run, "--duration", "320")
    with pytest.raises(SystemExit, match="other settings:\n  nimg: was 160, now 320"):
        sweep([*arguments, "0.05,0.1"])
    sweep([*arguments, "0.05,0.1", "--nimg", "160"])
    assert len(rows_of(tmp_path / "out")) == 2


def test_a_first_attempt_that_failed_leaves_no_settings(run_dir, sweep, tmp_path):
    arguments = [str(run_dir), *OPTIONS, "--sigma_rel", "0.05", "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit, match="returned features of shape"):
        sweep([*arguments, "--metric", "my_metric:scalar"])
    sweep([*arguments, "--num_real_images", "20"])
    few = distances(tmp_path)
    (tmp_path / "sweep.csv").unlink()
    sweep(arguments)  # nor are the features of other real images taken
    assert distances(tmp_path) != few
    with lock_run(tmp_path / "locked"):
        command = [sys.executable, str(SCRIPT), *arguments[:-1], str(tmp_path / "locked")]
        result = subprocess.run(command, cwd=run_dir.parent, env=os.environ | ON_CPU, capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "sweep.py: error: " in result.stderr and "is in use by process" in result.stderr


def test_images_that_are_not_finite_are_the_worst(run_dir, sweep, tmp_path):
    options = ["--sigma_rel", "0.05", "--guidance_scale", "1,1e38", "--guide_nimg", "160"]
    sweep([str(run_dir), *OPTIONS, *options, "--output_dir", str(tmp_path)])
    found = distances(tmp_path)
    assert found[("0.05", "0.05", "1e+38")] == float("inf") > found[("0.05", "", "1.0")]


def test_features_of_digits():
    spec = importlib.util.spec_from_file_location("digit_features", SCRIPT.parents[1] / "examples/digit_features.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    digits = DigitsSource("test")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    features = module.features(torch.from_numpy(digits.images).permute(0, 3, 1, 2).to(device))
    assert features.shape == (500, 32) and features.min() == 0
    classifier = module.trained_classifier()
    classes = (features @ classifier.coefs_[1] + classifier.intercepts_[1]).argmax(1)
    assert (classes == np.asarray(digits.labels)).mean() > 0.95


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
