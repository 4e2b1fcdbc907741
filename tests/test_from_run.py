"""EDM2Pipeline.from_run on a tiny run of digits."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffusers_edm2 import EDM2Pipeline, EDM2UNet2DModel
from diffusers_edm2.ema import snapshot_name
from training_runs import train


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("run") / "run", "--snapshot_every", "80").output_dir


def same_weights(unet: torch.nn.Module, folder: Path) -> bool:
    expected = EDM2UNet2DModel.from_pretrained(folder).state_dict()
    return all(torch.equal(tensor, expected[name]) for name, tensor in unet.state_dict().items())


def test_by_default_it_is_the_pipeline_of_the_run(run_dir):
    pipe = EDM2Pipeline.from_run(str(run_dir))
    assert same_weights(pipe.unet, run_dir / "pipeline" / "unet") and pipe.guide_unet is None
    assert pipe.scheduler.config == EDM2Pipeline.from_pretrained(run_dir / "pipeline").scheduler.config


def test_autoguidance_from_one_run(run_dir):
    guide = {"sigma_rel": 0.12, "nimg": 160}
    pipe = EDM2Pipeline.from_run(run_dir, sigma_rel=0.08, guide=guide, torch_dtype=torch.float32)
    assert same_weights(pipe.unet, run_dir / "posthoc" / snapshot_name(320, 0.08))
    assert same_weights(pipe.guide_unet, run_dir / "posthoc" / snapshot_name(160, 0.12))
    made = [path.stat().st_mtime_ns for path in sorted((run_dir / "posthoc").glob("unet-*"))]
    again = EDM2Pipeline.from_run(run_dir, sigma_rel=0.08, guide=guide)
    assert [path.stat().st_mtime_ns for path in sorted((run_dir / "posthoc").glob("unet-*"))] == made
    draw = lambda p, w: p([3], 2, latents=torch.ones(1, 1, 8, 8), guidance_scale=w, output_type="latent").images  # noqa: E731
    assert torch.equal(draw(pipe, 2.0), draw(again, 2.0))
    assert not torch.equal(draw(pipe, 2.0), draw(pipe, 1.0))


def test_the_guide_may_be_of_another_run(run_dir, tmp_path):
    other = train(tmp_path / "other", "--block_out_channels", "8,16", "--seed", "5").output_dir
    pipe = EDM2Pipeline.from_run(run_dir, guide={"run_dir": other, "nimg": 160})
    assert same_weights(pipe.unet, run_dir / "snapshots" / snapshot_name(320, 0.05))
    assert same_weights(pipe.guide_unet, other / "snapshots" / snapshot_name(160, 0.05))


def test_a_training_that_is_writing_its_snapshots_counts_up_to_the_last_whole_time(run_dir, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy, ignore=shutil.ignore_patterns("posthoc"))
    late = copy / "snapshots" / snapshot_name(320, 0.10)
    late.rename(tmp_path / "late")
    assert same_weights(EDM2Pipeline.from_run(copy).unet, copy / "snapshots" / snapshot_name(240, 0.05))
    assert same_weights(EDM2Pipeline.from_run(copy, 0.05, 320).unet, copy / "snapshots" / snapshot_name(320, 0.05))
    with pytest.raises(ValueError, match="nimg=320: there is no snapshot of this time"):
        EDM2Pipeline.from_run(copy, 0.08, 320)
    (tmp_path / "late").rename(late)
    expected = EDM2Pipeline.from_run(run_dir, 0.08).unet.state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in EDM2Pipeline.from_run(copy, 0.08).unet.state_dict().items())


def test_snapshots_that_are_written_anew_are_reconstructed_from_anew(run_dir, tmp_path):
    copy, other = tmp_path / "run", train(tmp_path / "other", "--snapshot_every", "80", "--dropout", "0.2").output_dir
    shutil.copytree(run_dir, copy)
    before = EDM2Pipeline.from_run(copy, 0.08).unet.state_dict()
    shutil.rmtree(copy / "snapshots")
    shutil.copytree(other / "snapshots", copy / "snapshots", copy_function=shutil.copy)
    for path in (copy / "snapshots").iterdir():
        os.utime(path)  # copytree gives folders the times of the original
        config = json.loads((path / "config.json").read_text()) | {"dropout": 0.0}
        (path / "config.json").write_text(json.dumps(config))
    after = EDM2Pipeline.from_run(copy, 0.08).unet.state_dict()
    assert not torch.equal(before["out_conv.weight"], after["out_conv.weight"])


def test_a_type_for_each_component(run_dir):
    pipe = EDM2Pipeline.from_run(run_dir, guide={"nimg": 160}, torch_dtype={"unet": torch.bfloat16, "default": None})
    assert (pipe.unet.dtype, pipe.guide_unet.dtype) == (torch.bfloat16, torch.float32)


def test_what_cannot_work_is_refused(run_dir, tmp_path):
    with pytest.raises(ValueError, match="nowhere has no snapshots"):
        EDM2Pipeline.from_run("nowhere")
    with pytest.raises(ValueError, match="nimg=100: there is no snapshot of this time"):
        EDM2Pipeline.from_run(run_dir, nimg=100)
    with pytest.raises(ValueError, match=r"guide has the unknown keys \['sigma'\]; it takes run_dir, sigma_rel and"):
        EDM2Pipeline.from_run(run_dir, guide={"sigma": 0.1})
    other = train(tmp_path / "other", "--sigma_data", "0.4", "--duration", "160").output_dir
    with pytest.raises(ValueError, match=r"other was trained with sigma_data=0.4, .*run with 0.5; a guide shares it"):
        EDM2Pipeline.from_run(run_dir, guide={"run_dir": other})


def test_the_published_file_alone_asks_for_the_package(run_dir):
    source = Path(sys.modules[EDM2Pipeline.__module__].__file__)
    script = (
        "import importlib.util, sys\n"
        "sys.modules['diffusers_edm2'] = None\n"  # cannot be imported
        f"spec = importlib.util.spec_from_file_location('pipeline_edm2', {str(source)!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        f"module.EDM2Pipeline.from_run({str(run_dir)!r})\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "RuntimeError: from_run needs the package: pip install diffusers-edm2" in result.stderr
