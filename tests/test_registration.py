"""What `import diffusers_edm2` does to Diffusers, before and after in one fresh process."""

import json
import subprocess
import sys

import pytest

from diffusers_edm2 import EDM2HeunScheduler, EDM2Pipeline, EDM2UNet2DModel

SCRIPT = """
import copy, json, sys
import diffusers
from diffusers.pipelines import pipeline_loading_utils as tables

folder = sys.argv[1]
report = {}

def load():
    try:
        return diffusers.DiffusionPipeline.from_pretrained(folder)
    except Exception as error:
        report["error"] = f"{type(error).__name__}: {error}"

def state():
    return set(dir(diffusers)), copy.deepcopy(tables.LOADABLE_CLASSES), dict(tables.ALL_IMPORTABLE_CLASSES)

load()
report["unloaded"] = "diffusers_edm2" not in sys.modules
names, loadable, importable = state()
import diffusers_edm2
names_after, loadable_after, importable_after = state()

report["names"] = sorted(names_after - names)
report["gone"] = sorted(names - names_after)
report["same"] = [getattr(diffusers, name) is getattr(diffusers_edm2, name) for name in report["names"]]
report["libraries"] = sorted(loadable)
report["loadable"] = {key: value for key, value in loadable_after.items() if loadable.get(key) != value}
report["loadable_gone"] = sorted(loadable.keys() - loadable_after.keys())
report["importable"] = {key: value for key, value in importable_after.items() if importable.get(key) != value}
report["importable_gone"] = sorted(importable.keys() - importable_after.keys())

def name(thing):
    return f"{type(thing).__module__}.{type(thing).__name__}"

pipe = load()
report["pipeline"] = [name(pipe), name(pipe.unet), name(pipe.scheduler)]
report["remote"] = [module for module in sys.modules if module.startswith("diffusers_modules")]
report["auto"] = name(diffusers.AutoModel.from_pretrained(folder, subfolder="unet"))
swapped = diffusers.EDMEulerScheduler.from_config(pipe.scheduler.config)
report["compatible"] = [cls.__name__ for cls in pipe.scheduler.compatibles]
report["back"] = name(diffusers_edm2.EDM2HeunScheduler.from_config(swapped.config))
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline as we save it."""
    path = tmp_path_factory.mktemp("pipeline")
    unet = EDM2UNet2DModel(
        sample_size=4,
        in_channels=1,
        block_out_channels=(8,),
        layers_per_block=1,
        attention_resolutions=(),
        attention_head_dim=8,
    )
    EDM2Pipeline(unet, EDM2HeunScheduler()).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def report(folder) -> dict:
    command = [sys.executable, "-W", "error", "-c", SCRIPT, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_the_folder_holds_stable_names(folder):
    """The package, not the module inside it: files may move."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == "EDM2Pipeline"
    assert index["unet"] == ["diffusers_edm2", "EDM2UNet2DModel"]
    assert index["scheduler"] == ["diffusers_edm2", "EDM2HeunScheduler"]


def test_without_the_import_diffusers_does_not_know_the_folder(report):
    assert report["unloaded"]
    assert report["error"] == "AttributeError: module diffusers has no attribute EDM2Pipeline"


def test_the_import_adds_three_names_to_diffusers(report):
    assert report["names"] == ["EDM2HeunScheduler", "EDM2Pipeline", "EDM2UNet2DModel"]
    assert report["same"] == [True, True, True]
    assert report["gone"] == []


def test_the_import_changes_nothing_else(report):
    methods = {name: ["save_pretrained", "from_pretrained"] for name in ("ModelMixin", "SchedulerMixin")}
    assert {"diffusers", "transformers"} <= set(report["libraries"])  # it looked at the real table
    assert report["loadable"] == {"diffusers_edm2": methods}
    assert report["importable"] == {}  # it knows the base classes already
    assert report["loadable_gone"] == report["importable_gone"] == []


def test_diffusion_pipeline_loads_the_folder_with_the_installed_classes(report):
    assert report["pipeline"] == [
        "diffusers_edm2.pipeline_edm2.EDM2Pipeline",
        "diffusers_edm2.unet_edm2.EDM2UNet2DModel",
        "diffusers_edm2.scheduling_edm2_heun.EDM2HeunScheduler",
    ]
    assert report["remote"] == []


def test_auto_model_loads_the_network_alone(report):
    assert report["auto"] == "diffusers_edm2.unet_edm2.EDM2UNet2DModel"


def test_schedulers_can_be_swapped_there_and_back(report):
    assert {"EDM2HeunScheduler", "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"} == set(report["compatible"])
    assert report["back"] == "diffusers_edm2.scheduling_edm2_heun.EDM2HeunScheduler"
