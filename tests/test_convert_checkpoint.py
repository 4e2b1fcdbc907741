"""The command: published settings from local files and from a server, folders of snapshots, and wrong requests."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline

from diffusers_edm2 import EDM2UNet2DModel
from diffusers_edm2.hub import read_metrics
from diffusers_edm2.published import PUBLISHED
from diffusers_edm2.snapshots import list_snapshots
from official_pickles import dumps, save_training_state, tiny_content, training_state
from test_convert import Server, snapshot_folder

SCRIPT = Path(__file__).parents[1] / "pipelines/convert_checkpoint.py"
COMMAND = runpy.run_path(str(SCRIPT), run_name="convert_checkpoint")
SETTING = PUBLISHED["edm2-img512-s-autog-fid"]


def convert(*arguments: str | Path) -> None:
    COMMAND["main"]([str(argument) for argument in arguments])


@pytest.fixture
def pickles(tmp_path) -> Path:
    """The files of a published setting, with tiny networks in them."""
    folder = tmp_path / "pickles"
    folder.mkdir()
    (folder / SETTING.net).write_bytes(dumps(tiny_content(seed=0)))
    (folder / SETTING.guide).write_bytes(dumps(tiny_content(seed=1)))
    return folder


def test_published_setting_from_local_files(pickles, tmp_path, capsys):
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).save_pretrained(tmp_path / "vae")
    output = tmp_path / "out"
    convert(
        "--preset", "edm2-img512-s-autog-fid", "--local_dir", pickles, "--output_dir", output, "--vae", tmp_path / "vae"
    )
    pipe = DiffusionPipeline.from_pretrained(output)
    assert pipe.vae is not None and pipe.guide_unet is not None
    for unet, seed in ((pipe.unet, 0), (pipe.guide_unet, 1)):
        expected = tiny_content(seed)["ema"].unet.out_conv.weight
        assert unet.out_conv.weight.float().equal(expected.float())
    assert len(pipe(class_labels=[1], num_inference_steps=2, guidance_scale=2.1).images) == 1
    card = (output / "README.md").read_text()
    assert "license: cc-by-nc-sa-4.0" in card and "FID 1.34" in card
    assert "guidance_scale 2.1" in card and "guidance_scale=2.1)" in card
    (score,) = read_metrics(output / "metrics.json")
    assert (score["metric"], score["value"], score["dataset"]) == ("FID", 1.34, "ImageNet 512x512")
    assert SETTING.net in card and SETTING.guide in card and "2147483648 training images" in card
    assert str(tmp_path) not in card
    said = capsys.readouterr().out
    assert "EMA length 0.125" in said and f"Wrote {output}." in said and "latents:" not in said


def test_one_file_without_a_vae(pickles, tmp_path, capsys):
    convert(pickles / SETTING.net, "--output_dir", tmp_path / "out", "--license", "mit")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert pipe.vae is None and pipe.guide_unet is None and len(pipe.config.latents_mean) == 4
    assert "convert again with --vae stabilityai/sd-vae-ft-mse" in capsys.readouterr().out
    assert "license: mit" in (tmp_path / "out/README.md").read_text()


def test_file_from_a_server(tmp_path):
    with Server(dumps(tiny_content()), breaks=[10_000]) as server:
        convert(server.url, "--output_dir", tmp_path / "out", "--cache_dir", tmp_path / "cache", "--model_only")
        assert server.url in (tmp_path / "out/README.md").read_text()
    unet = EDM2UNet2DModel.from_pretrained(tmp_path / "out")
    assert unet.out_conv.weight.float().equal(tiny_content()["ema"].unet.out_conv.weight.float())


def test_secrets_of_an_address_are_sent_and_not_shown(tmp_path, capsys):
    """The signature is longer than the name of a file may be."""
    query, cache = f"?token=hunter2{'x' * 300}", ("--cache_dir", tmp_path / "cache")
    with Server(dumps(tiny_content())) as server:
        url = server.url + query
        convert(url, "--guide", url, "--output_dir", tmp_path / "out", *cache)
        assert server.targets and all(target.endswith(query) for target in server.targets)
    card = (tmp_path / "out/README.md").read_text()
    assert server.url in card
    with pytest.raises(SystemExit) as caught:
        convert(url + "2", "--output_dir", tmp_path / "out2", *cache)
    said = capsys.readouterr()
    assert server.url in str(caught.value) and said.err
    assert "hunter2" not in card + str(caught.value) + said.out + said.err
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written and not any(b"hunter2" in path.read_bytes() for path in written)


def test_training_state(tmp_path, capsys):
    save_training_state(training_state(), tmp_path / "state.pt")
    convert(tmp_path / "state.pt", "--sigma_rel", "0.1", "--output_dir", tmp_path / "out")
    said = capsys.readouterr().out
    assert "EMA lengths 0.05, 0.1, 0 (0: none), took 0.1" in said and "official defaults" in said
    expected = training_state()["ema"]["emas"][1]["unet.out_conv.weight"]
    assert torch.equal(DiffusionPipeline.from_pretrained(tmp_path / "out").unet.out_conv.weight, expected)


def test_folder_of_snapshots(tmp_path, capsys):
    raw = snapshot_folder(tmp_path / "raw")
    for expected in ("Wrote 4 snapshots", "Wrote 0 snapshots to .*; 4 were there before"):
        convert(raw, "--output_dir", tmp_path / "run", "--license", "mit")
        assert len(list_snapshots(tmp_path / "run")) == 4
        assert re.search(expected, capsys.readouterr().out)
    assert "license: mit" in (tmp_path / "run/pipeline/README.md").read_text()
    newest = DiffusionPipeline.from_pretrained(tmp_path / "run/pipeline").unet.out_conv.weight.float()
    assert newest.equal(tiny_content(seed=2)["ema"].unet.out_conv.weight.float())  # the latest of length 0.05


@pytest.mark.slow
def test_snapshots_can_be_reconstructed(tmp_path):
    """As they are, by the command that reconstructs our own."""
    convert(snapshot_folder(tmp_path / "raw"), "--output_dir", tmp_path / "run")
    script = SCRIPT.parents[1] / "training/reconstruct_ema.py"
    result = subprocess.run(
        [
            sys.executable,
            script,
            tmp_path / "run",
            "--sigma_rel",
            "0.07",
            "--pipeline",
            "--output_dir",
            tmp_path / "posthoc",
        ],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    (folder,) = (tmp_path / "posthoc").iterdir()
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert len(pipe.config.latents_mean) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either a checkpoint or a --preset"),
        (["a.pkl", "--preset", "edm2-img512-s-fid"], "give either a checkpoint or a --preset"),
        (["--preset", "edm2-img512-s"], "not one of the published settings; --help lists them"),
        (["a.pkl", "--local_dir", "x"], "--local_dir goes with --preset"),
        (["--preset", "edm2-img512-s-guid-fid", "--guide", "x"], "--preset has its own guide"),
        (["a.pkl", "--guidance_scale", "2"], "--guidance_scale 2.0 without a guide"),
        (["--preset", "edm2-img512-s-guid-fid", "--model_only"], "--model_only writes one network"),
        (["a.pkl", "--license", "free: yes\n"], "is not an identifier such as mit"),
    ],
)
def test_wrong_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        convert(*arguments, "--output_dir", "out")
    assert caught.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.pkl"], "a.pkl cannot be read: No such file"),
        (["--preset", "edm2-img512-s-fid", "--local_dir", "."], "edm2-img512-s-2147483-0.130.pkl cannot be read"),
        (["http://x/", "--cache_dir", "cache"], "is not the http"),
        (["bad.pkl"], "bad.pkl cannot be converted: it names 'os.system'"),
        (["good.pkl", "--vae", "nothing/here/at/all"], "--vae nothing/here/at/all cannot be loaded"),
        (["good.pkl", "--guide", "bad.pkl"], "bad.pkl cannot be converted: it names 'os.system'"),
        ([".", "--guide", "good.pkl"], ". is a folder of snapshots; --guide"),
        (["."], "has no files named like network-snapshot"),
    ],
)
def test_what_goes_wrong_is_said_and_leaves_nothing(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bad.pkl").write_bytes(b"\x80\x04cos\nsystem\nX\x05\x00\x00\x00touch\x85R.")
    Path("good.pkl").write_bytes(dumps(tiny_content()))
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        convert(*arguments, "--output_dir", "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.pkl", "good.pkl"]


def test_nothing_is_overwritten(pickles, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match="out exists already"):
        convert(pickles / SETTING.net, "--output_dir", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_help_lists_the_presets(capsys):
    with pytest.raises(SystemExit) as caught:
        convert("--help")
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert all(name in said for name in PUBLISHED) and "(default: cc-by-nc-sa-4.0)" in said


@pytest.mark.slow
def test_error_of_the_process_has_no_traceback(tmp_path):
    command = [sys.executable, SCRIPT, "none.pkl", "--output_dir", tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert "error: none.pkl cannot be read" in result.stderr and "Traceback" not in result.stderr
