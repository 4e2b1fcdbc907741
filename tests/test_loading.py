"""One folder loads everywhere: in fresh processes, from a folder and from a Hub id, with and without the package."""

import hashlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import EDMEulerScheduler

from diffusers_edm2 import EDM2HeunScheduler, EDM2Pipeline
from model_hub import model_hub
from test_pipeline_edm2 import tiny_vae
from test_unet_edm2 import active_unet

pytestmark = pytest.mark.slow  # five processes


def draw(pipe) -> str:
    """Two images, as the hash of their bytes."""
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "guidance_scale": 1.5 if pipe.guide_unet else 1.0, "output_type": "np"}
    images = pipe([1, 2], generator=[torch.Generator().manual_seed(i) for i in range(2)], **options).images
    return hashlib.sha256(images.tobytes()).hexdigest()


# The start of each script: what a process reports, and how it draws.
COMMON = """
import hashlib, json, os, sys
import torch
report = {}

def names(pipe):
    return {name: None if part is None else f"{type(part).__module__}.{type(part).__name__}"
            for name, part in {"pipeline": pipe, **pipe.components}.items()}


def message(function):
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"

""" + inspect.getsource(draw)

# As where the package is not installed, and cannot be found beside the interpreter's own modules either.
NOT_INSTALLED = """
import sys
class NoSuchPackage:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "diffusers_edm2":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NoSuchPackage())
"""

REMOTE = """
from diffusers import DiffusionPipeline
for key, source in json.loads(sys.argv[1]).items():
    load = lambda source=source, **kwargs: DiffusionPipeline.from_pretrained(source, trust_remote_code=True, **kwargs)
    refused = message(lambda: DiffusionPipeline.from_pretrained(source))
    pipe = load()
    again = os.path.join(sys.argv[2], key)
    pipe.save_pretrained(again)
    report[key] = {"refused": refused, "names": names(pipe), "image": draw(pipe), "again": draw(load(again)),
                   "without guide": load(guide_unet=None).guide_unet is None,
                   "given guide": type(pipe).from_pipe(pipe, guide_unet=pipe.unet).guide_unet is pipe.unet}
report["package"] = message(lambda: __import__("diffusers_edm2"))
print(json.dumps(report))
"""

INSTALLED = """
import diffusers_edm2
from diffusers import AutoModel, DiffusionPipeline
for key, source in json.loads(sys.argv[1]).items():
    pipe = DiffusionPipeline.from_pretrained(source)
    own = diffusers_edm2.EDM2Pipeline.from_pretrained(source)
    unet = diffusers_edm2.EDM2UNet2DModel.from_pretrained(source, subfolder="unet")
    auto = AutoModel.from_pretrained(source, subfolder="unet")
    same = all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in
               zip(*(model.state_dict().values() for model in (pipe.unet, unet, auto)), strict=True))
    again = os.path.join(sys.argv[2], key)
    pipe.save_pretrained(again)
    half = DiffusionPipeline.from_pretrained(source, torch_dtype=torch.bfloat16)
    report[key] = {"names": names(pipe), "own": names(own), "image": draw(pipe), "own image": draw(own), "same": same,
                   "auto": type(auto).__module__, "half": str(half.unet.dtype),
                   "again": draw(DiffusionPipeline.from_pretrained(again)),
                   "without guide": DiffusionPipeline.from_pretrained(source, guide_unet=None).guide_unet is None,
                   "given guide": DiffusionPipeline.from_pretrained(source, guide_unet=unet).guide_unet is unet}
report["remote"] = [module for module in sys.modules if module.startswith("diffusers_modules")]
print(json.dumps(report))
"""


def run(script: str, sources: dict[str, str], save_to: Path, **environment: str) -> dict:
    """The report of a fresh process that loads from `sources`."""
    command = [sys.executable, "-c", script, json.dumps(sources), str(save_to)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def pipelines() -> dict[str, EDM2Pipeline]:
    guide = active_unet(seed=4, num_class_embeds=None, in_channels=4)
    return {
        "plain": EDM2Pipeline(active_unet(), EDM2HeunScheduler()),
        "full": EDM2Pipeline(active_unet(in_channels=4), EDM2HeunScheduler(), guide, tiny_vae()),
        "euler": EDM2Pipeline(active_unet(), EDMEulerScheduler()),
    }


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, dict]:
    """What each process says: without the package, with it, and with it from the cache, without a connection."""
    base = tmp_path_factory.mktemp("loading")
    folders, images = {}, {}
    for key, pipe in pipelines().items():
        pipe.save_pretrained(base / key)
        folders[key], images[key] = str(base / key), draw(pipe)
    with model_hub() as hub:
        for key in ("plain", "full"):
            hub.add(f"somebody/{key}", contents(base / key))
        by_id = {"full by id": "somebody/full"}
        home, home_with_package = (hub.environment(base / name) for name in ("home", "home with package"))
        remote = run(NOT_INSTALLED + COMMON + REMOTE, folders | by_id, base / "remote", **home)
        saved_there = {f"{key}, saved there": str(base / "remote" / key) for key in ("full", "euler", "full by id")}
        by_id["plain by id"] = "somebody/plain"
        no_code = {"DIFFUSERS_DISABLE_REMOTE_CODE": "1"}
        sources = {"full": folders["full"]} | by_id | saved_there
        installed = run(COMMON + INSTALLED, sources, base / "installed", **home_with_package, **no_code)
        assert not hub.unknown
    offline = {"HF_HUB_OFFLINE": "1", **no_code}
    cached = run(COMMON + INSTALLED, by_id, base / "cached", **home_with_package, **offline)
    return {"remote": remote, "installed": installed, "cached": cached, "images": images, "base": base}


def loaded(report: dict) -> dict[str, dict]:
    return {key: value for key, value in report.items() if isinstance(value, dict)}


def test_every_copy_draws_the_same_images_to_the_bit(reports):
    """From folders and by id, with and without the package, after saving and loading again in either."""
    for process in ("remote", "installed", "cached"):
        assert loaded(reports[process])
        for key, report in loaded(reports[process]).items():
            expected = reports["images"][key.partition(",")[0].partition(" ")[0]]
            drawn = {report[name] for name in ("image", "again", "own image") if name in report}
            assert drawn == {expected}, (process, key)
    assert len(set(reports["images"].values())) == 3


@pytest.mark.parametrize("process", ["installed", "cached"])
def test_installed_classes_are_used_and_no_code_of_the_folder(reports, process):
    for key, report in loaded(reports[process]).items():
        kind = key.partition(",")[0].partition(" ")[0]
        heun = "diffusers_edm2.scheduling_edm2_heun.EDM2HeunScheduler"
        assert (
            report["names"]
            == report["own"]
            == {
                "pipeline": "diffusers_edm2.pipeline_edm2.EDM2Pipeline",
                "unet": "diffusers_edm2.unet_edm2.EDM2UNet2DModel",
                "guide_unet": "diffusers_edm2.unet_edm2.EDM2UNet2DModel" if kind == "full" else None,
                "scheduler": "diffusers.schedulers.scheduling_edm_euler.EDMEulerScheduler" if kind == "euler" else heun,
                "vae": "diffusers.models.autoencoders.autoencoder_kl.AutoencoderKL" if kind == "full" else None,
            }
        )
        assert report["same"] and report["auto"] == "diffusers_edm2.unet_edm2"
        assert report["half"] == "torch.bfloat16"
    assert reports[process]["remote"] == []


def test_the_folder_carries_its_code(reports):
    assert reports["remote"]["package"] == "ModuleNotFoundError: No module named 'diffusers_edm2'"
    for report in loaded(reports["remote"]).values():
        modules = {str(name).rpartition(".")[0] for name in report["names"].values()}
        assert "diffusers_modules.local.unet_edm2" in modules
        assert not any(name.startswith("diffusers_edm2") for name in modules)


def test_code_of_a_folder_runs_only_if_asked_for(reports):
    for key, report in loaded(reports["remote"]).items():
        where = "The repository for somebody/full" if key == "full by id" else "The directory "
        assert report["refused"].startswith(f"ValueError: {where}")
        assert "contains custom code in pipeline_edm2.py" in report["refused"]
        assert report["refused"].endswith("Pass `trust_remote_code=True` to allow loading remote code modules.")


def test_a_folder_loaded_and_saved_again_is_the_same(reports):
    """To the last byte, in both worlds, so that it loads wherever the first one did."""
    base = reports["base"]
    for process, keys in {"remote": ("full", "euler", "full by id"), "installed": ("full", "full by id")}.items():
        for key in keys:
            assert contents(base / process / key) == contents(base / key.partition(" ")[0])


def contents(folder: Path) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}
    assert "unet/unet_edm2.py" in found
    return found


def test_components_can_be_replaced_everywhere(reports):
    for process in ("remote", "installed", "cached"):
        for key, report in loaded(reports[process]).items():
            assert report["without guide"] and report["given guide"], (process, key)


def test_a_pipeline_from_another_shares_its_parts():
    """Diffusers carries networks over only where their class is the annotated one, which ours cannot be."""
    pipe = pipelines()["full"]
    other = EDM2Pipeline.from_pipe(pipe, scheduler=EDMEulerScheduler())
    assert all(getattr(other, name) is getattr(pipe, name) for name in ("unet", "guide_unet", "vae"))
    assert type(other.scheduler) is EDMEulerScheduler and other.config.latents_mean == pipe.config.latents_mean
    assert EDM2Pipeline.from_pipe(pipe, guide_unet=None).guide_unet is None


def test_a_compiled_network_is_saved_as_what_it_is(tmp_path):
    pipe = pipelines()["plain"]
    pipe.save_pretrained(tmp_path / "plain")
    pipe.unet = torch.compile(pipe.unet, backend="eager")  # the default's modules warn in some versions of PyTorch
    pipe.save_pretrained(tmp_path / "compiled")
    assert contents(tmp_path / "compiled") == contents(tmp_path / "plain")


def test_a_saved_folder_does_not_say_where_its_parts_came_from(tmp_path):
    """Also if that folder is gone by then, when a path looks like a name."""
    pipe = EDM2Pipeline(active_unet(in_channels=4), EDM2HeunScheduler(), vae=tiny_vae())
    pipe.save_pretrained(tmp_path / "first")
    loaded = EDM2Pipeline.from_pretrained(tmp_path / "first")
    assert loaded.unet.config._name_or_path == str(tmp_path / "first" / "unet")
    (tmp_path / "first").rename(tmp_path / "moved")
    loaded.save_pretrained(tmp_path / "second")
    assert contents(tmp_path / "second") == contents(tmp_path / "moved")
    configs = [text for name, text in contents(tmp_path / "second").items() if name.endswith(".json")]
    assert len(configs) == 4 and b"_name_or_path" not in b"".join(configs)


def test_a_class_of_the_users_own_keeps_its_name(tmp_path):
    """Its file is not known to stand alone, so it does not go along; our network still does."""

    class MyPipeline(EDM2Pipeline):
        pass

    MyPipeline(active_unet(), EDM2HeunScheduler()).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == "MyPipeline" and index["unet"] == ["unet_edm2", "EDM2UNet2DModel"]
    assert type(MyPipeline.from_pretrained(tmp_path)) is MyPipeline
    assert not (tmp_path / "test_loading.py").exists()
