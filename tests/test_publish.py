"""Publishing from the command line and from a training, in processes of their own, against a local server."""

import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from diffusers_edm2 import EDM2HeunScheduler, EDM2Pipeline
from model_hub import TOKEN, model_hub
from test_loading import NOT_INSTALLED
from test_unet_edm2 import active_unet
from training_runs import Run, metrics

SCRIPT = Path(__file__).parents[1] / "pipelines" / "publish.py"
PERSON = "---\nlicense: mit\n---\n# My digits\n\nDrawn by me.\n"


@pytest.fixture
def hub():
    with model_hub() as hub:
        yield hub


@pytest.fixture
def environment(hub, tmp_path, monkeypatch) -> dict[str, str]:
    """For processes, and in this one for those that it starts."""
    variables = hub.environment(tmp_path / "home")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return os.environ | variables


@pytest.fixture
def folder(tmp_path) -> Path:
    EDM2Pipeline(active_unet(), EDM2HeunScheduler()).save_pretrained(tmp_path / "pipe")
    return tmp_path / "pipe"


# --- pipelines/publish.py --------------------------------------------------------------------------------------------


@pytest.fixture
def here(hub, environment, monkeypatch) -> None:
    """Point this process, too, at the local server: it reads the address when it imports the Hub's library."""
    template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.endpoint)


@pytest.fixture
def publish(here, monkeypatch, capsys):
    """The script, in this process; its output, or the message that it ends with."""

    def run(*arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as end:
            return str(end.code)
        return capsys.readouterr().out

    return run


def test_dry_run_sends_nothing_and_shows_all(publish, folder, hub):
    shown = publish(folder, "somebody/digits", "--dry_run", "--license", "apache-2.0")
    assert hub.requests == []
    listed = dict(re.findall(r"^ *([\d.]+ \w+)  (\S+)$", shown.split("\n---\n")[0], flags=re.MULTILINE))
    own = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(listed.values()) == own and len(own) == 8
    size = (folder / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert f"{size / 1024:.1f} KiB  unet/diffusion_pytorch_model.safetensors" in shown
    assert "to somebody/digits; nothing was sent" in shown and "license: apache-2.0" in shown


@pytest.mark.slow
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_publish_and_read_the_card(publish, folder, hub, environment, tmp_path, variant):
    """Both ways of loading that the card shows work as they stand there, also for a variant alone."""
    (tmp_path / "metrics.json").write_text('{"metric": "FID", "value": 2.5, "dataset": "digits"}')
    (tmp_path / "grid.png").write_bytes(b"picture")
    options = ["--private", "--license", "mit", "--metrics", tmp_path / "metrics.json"]
    if variant:
        EDM2Pipeline.from_pretrained(folder).save_pretrained(folder, variant=variant)
        options += ["--variant", variant]
    out = publish(folder, "digits", *options, "--sample_grid", tmp_path / "grid.png", "--commit_message", "mine")
    assert out.startswith(f"{hub.endpoint}/somebody/digits/commit/") and hub.private["somebody/digits"]
    assert hub.commits[0]["message"] == "mine" and hub.commits[0]["token"] == TOKEN
    on_hub = hub.files["somebody/digits"]["main"]
    assert on_hub["samples.png"] == b"picture"
    card = on_hub["README.md"].decode()
    assert ModelCard(card).data.eval_results[0].metric_value == 2.5

    installed, remote = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    report = "\nprint(images[0].size, type(pipe).__module__)\n"
    script = f"{NOT_INSTALLED}{remote}{report}del sys.meta_path[0]\n{installed}{report}"
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    modules = ["diffusers_modules.local.pipeline_edm2", "diffusers_edm2.pipeline_edm2"]
    assert result.stdout.splitlines() == [f"(16, 16) {module}" for module in modules]
    assert not hub.unknown


def test_a_pull_request_needs_no_permission_and_keeps_the_card(publish, folder, hub):
    hub.add("other/digits", {"README.md": PERSON.encode()})
    assert "cannot write to other/digits" in publish(folder, "other/digits")
    assert publish(folder, "other/digits", "--create_pr").endswith(f"{hub.endpoint}/other/digits/discussions/1\n")
    proposed = hub.files["other/digits"]["refs/pr/1"]
    assert "unet/unet_edm2.py" in proposed and "# My digits\n\nDrawn by me.\n" in proposed["README.md"].decode()
    assert hub.files["other/digits"]["main"] == {"README.md": PERSON.encode()}


def test_errors_are_one_line_and_nothing_is_changed(publish, folder, hub, tmp_path):
    message = publish(folder, "digits", "--token", "hf_wrong")
    assert message.startswith("error: the Hub refuses the token (401)")
    assert publish(folder, "other/none", "--create_pr").startswith("error: other/none does not exist")
    assert publish(tmp_path, "digits").startswith(f"error: {tmp_path} is neither a pipeline folder")
    assert publish(folder, "digits", "--sample_grid", "no.png").startswith("error: --sample_grid no.png does not exist")
    (folder / "unet" / "optimizer.bin").write_bytes(b"")
    assert "unet/optimizer.bin is a pickle" in publish(folder, "digits")
    assert hub.files == {}
    hub.trouble = lambda method, path: 503
    (folder / "unet" / "optimizer.bin").unlink()
    assert publish(folder, "digits").startswith("error: ") and not hub.commits


def test_push_to_hub_writes_the_same(here, hub, folder):
    """Diffusers' own method: the code files go along, and a card that says something unless the Hub has one."""
    hub.add("somebody/second", {"README.md": PERSON.encode()})
    pipe = EDM2Pipeline.from_pretrained(folder)
    pipe.push_to_hub("first", private=True)
    pipe.push_to_hub("somebody/second")
    pipe.save_pretrained(folder.parent / "third", push_to_hub=True)
    own = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    for name in ("first", "second", "third"):
        on_hub = hub.files[f"somebody/{name}"]["main"]
        assert on_hub.keys() == own
        for part in own - {"README.md"}:
            assert on_hub[part] == (folder / part).read_bytes(), (name, part)
    first = hub.files["somebody/first"]["main"]["README.md"].decode()
    assert 'from_pretrained("somebody/first", trust_remote_code=True)' in first and "More Information" not in first
    second = hub.files["somebody/second"]["main"]["README.md"].decode()
    assert second.endswith("# My digits\n\nDrawn by me.\n") and ModelCard(second).data.license == "mit"
    assert hub.private == {"somebody/first": True, "somebody/second": False, "somebody/third": False}
    assert not hub.unknown


# --- training/train_edm2.py --push_to_hub ----------------------------------------------------------------------------

PYTHON = [sys.executable]  # not forked: the Hub's address is read when its library is imported


def secrets_in(run: Run) -> list[str]:
    """The places where a run, or what it printed, names the token."""
    files = [path for path in run.output_dir.rglob("*") if path.is_file()] + [run.out, run.err]
    assert len(files) > 10
    return [str(path) for path in files if TOKEN.encode() in path.read_bytes()]


@pytest.mark.slow
def test_a_training_pushes_its_snapshots_through_troubles(tmp_path, hub, environment):
    """From one of two processes; the token, given on the command line, is written nowhere."""
    answers = iter([500])
    hub.trouble = lambda method, path: next(answers, None) if "/commit/" in path else None
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    options = ("--push_to_hub", "--hub_strategy", "snapshots", "--hub_private_repo", "--hub_token", TOKEN)
    with Run(tmp_path / "digits", *options, "--report_to", "tensorboard", command=launch) as run:
        assert run.wait(200) == 0, run.stderr
    assert hub.private == {"somebody/digits": True} and hub.requests.count("GET /api/whoami-v2") == 1
    pushed = [int(commit["message"].split()[2]) for commit in hub.commits]
    assert pushed in ([320], [160, 320])  # one that waited may have given way to a newer one
    on_hub, local = hub.files["somebody/digits"]["main"], run.output_dir / "pipeline"
    for path in local.rglob("*.*"):
        if path.name != "README.md":
            assert on_hub[path.relative_to(local).as_posix()] == path.read_bytes()
    assert on_hub["samples.png"] == (run.output_dir / "samples" / "000000320.png").read_bytes()
    assert "| learning_rate | 0.01 |" in on_hub["README.md"].decode()
    assert not list(run.output_dir.glob(".tmp-*")) and "not on the Hub" not in run.stderr
    assert secrets_in(run) == []
    recorded = json.loads((run.output_dir / "config.json").read_text())
    assert recorded["options"]["push_to_hub"] and "hub_token" not in recorded["options"]
    assert recorded["dataset_is_local"] is False and "## Training data\n\ndigits\n" in on_hub["README.md"].decode()


@pytest.mark.slow
@pytest.mark.parametrize("end", ["error", "signal"])
def test_a_training_that_ends_early_accounts_for_its_upload(tmp_path, hub, environment, end):
    """After an error it says what is missing; a signal leaves an upload that is under way a few seconds."""
    options = ("--push_to_hub", "--hub_strategy", "snapshots", "--duration", "10Mi", "--sample_every", "0")
    started, ended = threading.Event(), threading.Event()

    def slow(method: str, path: str) -> None:
        if "/commit/" in path:
            started.set()
            ended.wait(60)

    hub.trouble = slow
    with Run(tmp_path / "digits", *options, "--snapshot_every", "1600", command=PYTHON) as run:
        assert started.wait(120), run.stderr
        if end == "signal":
            run.send(signal.SIGTERM)
            run.wait_for(lambda: "all is saved" in run.stdout)
            time.sleep(1)
        else:
            (run.output_dir / "snapshots").rename(run.output_dir / "away")
            (run.output_dir / "snapshots").write_bytes(b"no folder")
            run.wait_for(lambda: "not on the Hub yet" in run.stderr)
        ended.set()
        assert run.wait() == (0 if end == "signal" else 1), run.stderr
    if end == "signal":
        assert hub.commits[0]["message"] == "EDM2Pipeline after 1600 images"
        assert "Pushed the pipeline after 1600 images: " in run.stdout
    else:
        command = f"python pipelines/publish.py {run.output_dir} somebody/digits"
        assert f"is not on the Hub yet. Push it with: {command}\n" in run.stderr


@pytest.mark.slow
def test_a_training_without_a_network_ends_well(tmp_path, hub, environment, publish, monkeypatch):
    """It says what is still to be pushed and how; a signal ends the waiting for the Hub, and that command does it."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    with Run(tmp_path / "my digits", "--push_to_hub", "--hub_model_id", "somebody/mine", command=PYTHON) as run:
        run.wait_for(lambda: "Waiting for the Hub" in run.stdout)
        run.send(signal.SIGTERM)
        assert run.wait() == 0, run.stderr
    assert metrics(run.output_dir)[-1]["nimg"] == 320
    assert "warning: --push_to_hub: ConnectError" in run.stderr and "The training goes on" in run.stderr
    (command,) = re.findall("Push it with: python (pipelines/publish.py .*)$", run.stderr, flags=re.MULTILINE)
    assert command == f"pipelines/publish.py '{run.output_dir}' somebody/mine"
    assert publish(*shlex.split(command)[1:]).startswith(f"{hub.endpoint}/somebody/mine/commit/")
    assert hub.files["somebody/mine"]["main"].keys() > {"model_index.json", "samples.png"}


@pytest.mark.slow
def test_a_wrong_token_ends_before_the_training(tmp_path, hub, environment):
    with Run(tmp_path / "digits", "--push_to_hub", "--hub_token", "hf_wrong", command=PYTHON) as run:
        assert run.wait() == 1
    assert run.stderr.splitlines()[-1].startswith("error: --push_to_hub: the Hub refuses the token (401); set another")
    assert "Traceback" not in run.stderr and not (run.output_dir / "metrics.jsonl").exists()
