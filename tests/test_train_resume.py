"""A run cannot be harmed: whatever ends the training process, the same command reaches the same bits.

Every interrupted run is compared with `whole`, one that was never interrupted, started as a user starts it.
"""

import contextlib
import random
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusers_edm2.checkpoint import list_checkpoints, load_checkpoint, verify_checkpoint
from training_runs import Run, metrics, outcome, train

# All that is random is on: dropout, flips, and two workers that read ahead. The intervals do not divide each other, so
# that checkpoints fall between two log lines.
RECIPE = shlex.split(
    "--dropout 0.1 --random_flip --dataloader_num_workers 2 "
    "--duration 640 --status_every 48 --sample_every 112 --snapshot_every 144 --checkpoint_every 80"
)


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run = train(run_dir, *RECIPE, command=[sys.executable])
    assert "Finished after 640 images." in run.stdout
    return run_dir


def assert_same(run_dir: Path, other: Path) -> None:
    """Bitwise the same training, and no rubbish left."""
    ours, theirs = outcome(run_dir), outcome(other)
    assert ours["metrics"] == theirs["metrics"]
    assert sorted(ours) == sorted(theirs)
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert list(run_dir.rglob(".tmp-*")) == []


def lines(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def something_new(run_dir: Path, pattern: str) -> Callable[[], set[Path]]:
    before = set(run_dir.glob(pattern))
    return lambda: set(run_dir.glob(pattern)) - before


def has_lines(run_dir: Path, count: int) -> Callable[[], bool]:
    return lambda: lines(run_dir) >= count


# ---- kill -9 ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_while_it_writes(whole, tmp_path):
    run_dir, recipe = tmp_path / "run", [*RECIPE, "--report_to", "tensorboard"]
    with Run(run_dir, *recipe) as run:
        run.wait_for(has_lines(run_dir, 1))
    for pattern in ("checkpoints/*", "samples/*", "snapshots/*", "*pipeline", "checkpoints/*"):
        with Run(run_dir, *recipe) as run:
            run.wait_for(something_new(run_dir, pattern))  # what is being written aside, or else the result
            run.send(signal.SIGKILL)
            assert run.wait() == -signal.SIGKILL
    last = train(run_dir, *recipe)
    assert f"Resuming from {run_dir / 'checkpoints'}" in last.stdout
    assert_same(run_dir, whole)
    events = EventAccumulator(str(run_dir / "logs" / "edm2"))  # a file per start, one course without repetition
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [line["nimg"] for line in metrics(run_dir)]


@pytest.mark.slow
def test_killed_at_random_moments_until_it_finishes(whole, tmp_path):
    run_dir, choose, codes = tmp_path / "run", random.Random(0), []
    while 0 not in codes:
        wanted = lines(run_dir) + choose.choice([0, 1, 2])
        with Run(run_dir, *RECIPE) as run:
            while run.is_running and lines(run_dir) < wanted:
                time.sleep(0.001)
            time.sleep(choose.uniform(0, 0.1))
            with contextlib.suppress(ProcessLookupError):
                run.send(signal.SIGKILL)
            codes.append(run.wait())
    assert codes.count(-signal.SIGKILL) == len(codes) - 1 >= 3
    assert_same(run_dir, whole)


# ---- SIGTERM and SIGINT ----------------------------------------------------------------------------------------------


def to_main(run: Run, number: int) -> None:
    run.send(number)


def to_group(run: Run, number: int) -> None:
    """As a terminal does at Ctrl-C."""
    run.send(number, to_group=True)


def to_all(run: Run, number: int) -> None:
    """As service managers and clusters do: to every single process, the data workers first."""
    workers = psutil.Process(run.process.pid).children()
    assert len(workers) == 2
    for worker in workers:
        worker.send_signal(number)
    run.send(number)


def to_group_and_again(run: Run, number: int) -> None:
    """As launchers do, which pass on what the group has got already."""
    run.send(number, to_group=True)
    time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        run.send(number)


@pytest.mark.slow
def test_a_signal_saves_and_the_same_command_goes_on(whole, tmp_path):
    run_dir, seen = tmp_path / "run", []
    for number, send in (
        (signal.SIGTERM, to_main),
        (signal.SIGINT, to_group),
        (signal.SIGTERM, to_all),
        (signal.SIGTERM, to_group_and_again),
    ):
        with Run(run_dir, *RECIPE) as run:
            run.wait_for(has_lines(run_dir, lines(run_dir) + 1))
            send(run, number)
            assert run.wait() == 0, run.stderr
        saved = list_checkpoints(run_dir)[-1]
        assert verify_checkpoint(saved)
        seen.append(int(saved.name))
        assert f"Stopped after {seen[-1]} of 640 images; all is saved. The same command goes on." in run.stdout
        assert "Traceback" not in run.stderr
    assert seen == sorted(set(seen)) and seen[-1] < 640
    last = train(run_dir, *RECIPE)
    assert f"Resuming from {saved}, after {seen[-1]} of 640 images." in last.stdout
    assert_same(run_dir, whole)


@pytest.mark.slow
def test_a_second_signal_after_five_seconds_ends_a_step_that_hangs(tmp_path):
    # the first step comes to grids that take an hour
    with Run(tmp_path / "run", "--status_every", "16", "--sample_every", "16", "--num_inference_steps", "99999") as run:
        run.wait_for(has_lines(tmp_path / "run", 1))
        run.send(signal.SIGTERM)
        time.sleep(5.1)
        assert run.is_running
        run.send(signal.SIGTERM)
        assert run.wait() == -signal.SIGTERM


# ---- Damage, a full disk, a second process ---------------------------------------------------------------------------


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(whole, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    before, damaged = list_checkpoints(run_dir)
    weights = damaged / "unet.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    run = train(run_dir, *RECIPE)
    assert f"warning: {weights} is damaged: its checksum is wrong. Using {before} instead.\n" in run.stderr
    assert f"Resuming from {before}, after {int(before.name)} of 640 images." in run.stdout
    assert_same(run_dir, whole)


@pytest.mark.slow
def test_a_full_disk_loses_nothing(whole, tmp_path):
    run_dir = tmp_path / "run"
    with Run(run_dir, *RECIPE) as run:
        run.wait_for(something_new(run_dir, "checkpoints/000000160"))
    kept = list_checkpoints(run_dir)[-1]

    with Run(run_dir, *RECIPE, file_size_limit=100_000) as full:  # enough for the weights, not for the optimizer
        assert full.wait() == 1
    failed = run_dir / "checkpoints" / f"{int(kept.name) + 80:09d}"
    assert re.search(
        f"error: Writing {failed} failed: .*File too large.*; the last complete checkpoint is {kept}. "
        "Free some space or mend the cause, and start the run again.",
        full.stderr,
    )
    assert list_checkpoints(run_dir)[-1] == kept and verify_checkpoint(kept)
    train(run_dir, *RECIPE)
    assert_same(run_dir, whole)


def test_a_run_is_trained_by_one_command_at_a_time(tmp_path):
    run_dir = tmp_path / "run"
    with Run(run_dir, "--duration", "1Mi") as first:
        first.wait_for(has_lines(run_dir, 1))
        with Run(run_dir, "--duration", "1Mi") as second:
            assert second.wait() == 1
        assert f"error: {run_dir} is in use by process {first.process.pid} on " in second.stderr
        first.send(signal.SIGINT)
        assert first.wait() == 0


# ---- The end, and beyond ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_finished_run_changes_only_when_it_is_made_longer(whole, tmp_path):
    run_dir = tmp_path / "run"
    train(run_dir, *RECIPE, "--duration", "240")
    finished = outcome(run_dir)
    again = train(run_dir, *RECIPE, "--duration", "240")
    assert "Finished after 240 images." in again.stdout
    assert outcome(run_dir) == finished

    train(run_dir, *RECIPE)
    ours, uninterrupted = outcome(run_dir), outcome(whole)
    weights = [name for name in uninterrupted if name.endswith(".safetensors") and "meter" not in name]
    assert len(weights) > 10
    assert [name for name in weights if ours[name] != uninterrupted[name]] == []
    assert [line["nimg"] for line in ours["metrics"]] == [*range(48, 640, 48), 640]


@pytest.mark.slow
def test_resume_from_a_chosen_checkpoint(whole, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    run = train(run_dir, *RECIPE, "--resume_from_checkpoint", "560")
    assert f"Resuming from {run_dir / 'checkpoints' / '000000560'}, after 560 of 640 images." in run.stdout
    assert_same(run_dir, whole)


# ---- Several processes -----------------------------------------------------------------------------------------------

# Accelerate calls its launcher of several processes this, also where they exchange gradients on the CPU.
TWO_PROCESSES = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
TWO_PROCESSES += shlex.split("--main_process_port 0 --num_machines 1 --mixed_precision no --dynamo_backend no")
# Micro-batches of 8, two per step: two processes do them at once, one process one after the other.
SHARED = shlex.split("--train_batch_size 8 --duration 640 --status_every 48 --sample_every 0 --snapshot_every 0")


def assert_close(run_dir: Path, other: Path, weights: float, losses: float, but_for: tuple[str, ...] = ()) -> None:
    """The newest checkpoints within `weights` of each tensor's largest element, the log within `losses` of each number.

    Numbers whose names begin with one of `but_for` are not compared.
    """
    ours, theirs = (load_checkpoint(list_checkpoints(path)[-1])[0] for path in (run_dir, other))
    assert ours.keys() == theirs.keys() == {"unet", "optimizer", "meter", "ema-0.05", "ema-0.1"}
    for group in ours.keys() - {"meter"}:
        for name, tensor in ours[group].items():
            expected = theirs[group][name]
            scale = expected.abs().max().item()
            torch.testing.assert_close(tensor, expected, rtol=0, atol=weights * scale, msg=f"{group} {name}")
    lines = [
        [{key: value for key, value in line.items() if not key.startswith(but_for)} for line in metrics(path)]
        for path in (run_dir, other)
    ]
    assert lines[0] == [pytest.approx(line, rel=losses, abs=0) for line in lines[1]]


@pytest.mark.slow
def test_the_size_of_the_micro_batches_changes_rounding_only(tmp_path):
    """Every image is used once, with noise of its own, however a batch is divided."""
    runs = [tmp_path / size for size in ("16", "8", "2")]
    for run_dir in runs:
        train(run_dir, *SHARED, "--train_batch_size", run_dir.name)
    # float32 sums in another order, 6e-8, through 40 steps of Adam: 1e-5 and 5e-7 at most were seen. One image that is
    # lost or repeated changes the loss by 1e-2. Activations are logged for one micro-batch.
    for run_dir in runs[1:]:
        assert_close(run_dir, runs[0], weights=1e-4, losses=1e-5, but_for=("activations/",))


@pytest.mark.slow
@pytest.mark.parametrize("dropout", ["0", "0.1"])
def test_two_processes_equal_one_that_accumulates(tmp_path, dropout):
    one, two = tmp_path / "one", tmp_path / "two"
    train(one, *SHARED, "--dropout", dropout)
    run = train(two, *SHARED, "--dropout", dropout, command=TWO_PROCESSES)
    # Exactly: each of the two gradients is halved, and the order of two summands does not matter. The losses in the log
    # are sums of many in float64.
    assert_close(two, one, weights=0, losses=1e-12)
    # one of the two speaks
    assert len(re.findall("^ .* loss .* img/s .*$", run.stdout, re.M)) == len(metrics(two)) == 14
    assert run.stdout.count("Finished after 640 images.") == 1
    assert run.stderr.count("training:   0%") == 1


@pytest.mark.slow
def test_two_processes_stop_at_a_signal_and_go_on(tmp_path):
    whole, run_dir, narrower = tmp_path / "whole", tmp_path / "run", tmp_path / "narrower"
    recipe = [*SHARED, "--dropout", "0.1", "--dataloader_num_workers", "1"]
    train(whole, *recipe)
    with Run(run_dir, *recipe, command=TWO_PROCESSES) as run:
        run.wait_for(has_lines(run_dir, 1))
        run.send(signal.SIGTERM, to_group=True)
        run.wait()  # the launcher's own exit code is not 0
    nimg = int(list_checkpoints(run_dir)[-1].name)
    assert 0 < nimg < 640
    assert f"Stopped after {nimg} of 640 images; all is saved. The same command goes on." in run.stdout

    shutil.copytree(run_dir, narrower)
    for path, command in ((run_dir, TWO_PROCESSES), (narrower, None)):  # one process can take over from two
        last = train(path, *recipe, command=command)
        assert f"Resuming from {path / 'checkpoints' / f'{nimg:09d}'}, after {nimg} of 640 images." in last.stdout
        assert_close(path, whole, weights=0, losses=1e-12)
