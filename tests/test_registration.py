"""What `import diffusers_edm2` does to Diffusers and to folders of others, before and after in one fresh process."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest

import diffusers_edm2
from diffusers_edm2 import EDM2HeunScheduler, EDM2Pipeline, EDM2UNet2DModel

SCRIPT = """
import copy, json, sys
import diffusers
from diffusers.pipelines import pipeline_loading_utils as tables

folder, *others = sys.argv[1:]
report = {}

def load(folder=folder):
    try:
        return diffusers.DiffusionPipeline.from_pretrained(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def name(thing):
    return f"{type(thing).__module__}.{type(thing).__name__}"

def state():
    return set(dir(diffusers)), copy.deepcopy(tables.LOADABLE_CLASSES), dict(tables.ALL_IMPORTABLE_CLASSES)

def members():  # of the classes and modules that loading goes through
    found = {}
    for cls in (diffusers.DiffusionPipeline, diffusers.AutoModel, diffusers.ModelMixin, diffusers.ConfigMixin):
        found |= {f"{cls.__name__}.{key}": value for key, value in vars(cls).items()}
    for module in (tables, diffusers.pipelines, diffusers.pipelines.pipeline_utils, diffusers.utils):
        found |= {f"{module.__name__}.{key}": value for key, value in vars(module).items()}
    return found

def of_others():  # a pipeline or the message, and the index
    loaded = [load(other) for other in others]
    indices = [diffusers.DiffusionPipeline.load_config(other) for other in others]
    return [result if isinstance(result, str) else [name(result), name(result.unet)] for result in loaded], indices

report["error"] = load()
report["others"] = [of_others()]
report["unloaded"] = "diffusers_edm2" not in sys.modules
(names, loadable, importable), before = state(), members()
import diffusers_edm2
(names_after, loadable_after, importable_after), after = state(), members()
report["members"] = [key for key in after if key not in before or after[key] is not before[key]]
report["members_gone"] = sorted(before.keys() - after.keys())
report["others"].append(of_others())

report["names"] = sorted(names_after - names)
report["gone"] = sorted(names - names_after)
report["same"] = [getattr(diffusers, name) is getattr(diffusers_edm2, name) for name in report["names"]]
report["libraries"] = sorted(loadable)
report["loadable"] = {key: value for key, value in loadable_after.items() if loadable.get(key) != value}
report["loadable_gone"] = sorted(loadable.keys() - loadable_after.keys())
report["importable"] = {key: value for key, value in importable_after.items() if importable.get(key) != value}
report["importable_gone"] = sorted(importable.keys() - importable_after.keys())

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
def others(tmp_path_factory, folder) -> list[Path]:
    """Folders of others: one of Diffusers itself, and one that carries code of its own beside a network like ours."""
    diffusers_own, own_code = (tmp_path_factory.mktemp(name) for name in ("diffusers own", "own code"))
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = diffusers.UNet2DModel(sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, **blocks)
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(diffusers_own)
    shutil.copytree(folder, own_code, dirs_exist_ok=True)
    (own_code / "pipeline_edm2.py").rename(own_code / "my_pipeline.py")
    (own_code / "unet" / "unet_edm2.py").rename(own_code / "unet" / "my_unet.py")
    index = json.loads((own_code / "model_index.json").read_text(encoding="utf-8"))
    index |= {"_class_name": ["my_pipeline", "EDM2Pipeline"], "unet": ["my_unet", "EDM2UNet2DModel"]}
    index["scheduler"] = ["scheduling_edm2_heun", "MyScheduler"]  # only half of our name
    (own_code / "model_index.json").write_text(json.dumps(index))
    return [diffusers_own, own_code]


@pytest.fixture(scope="module")
def report(folder, others) -> dict:
    command = [sys.executable, "-W", "error", "-c", SCRIPT, *map(str, (folder, *others))]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_the_folder_names_our_classes_by_the_files_it_carries(folder):
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == ["pipeline_edm2", "EDM2Pipeline"]
    assert index["unet"] == ["unet_edm2", "EDM2UNet2DModel"]
    assert index["scheduler"] == ["scheduling_edm2_heun", "EDM2HeunScheduler"]
    source = Path(diffusers_edm2.__file__).parent
    for name in ("pipeline_edm2.py", "unet/unet_edm2.py", "scheduler/scheduling_edm2_heun.py"):
        assert (folder / name).read_bytes() == (source / Path(name).name).read_bytes()


def test_without_the_import_diffusers_asks_for_trust(report):
    assert report["unloaded"]
    assert "contains custom code in pipeline_edm2.py which must be executed" in report["error"]
    assert report["error"].endswith("Pass `trust_remote_code=True` to allow loading remote code modules.")


def test_folders_of_others_load_or_are_refused_as_before(report):
    before, after = report["others"]
    assert before == after
    (own, refused), (_, index) = after
    assert own == ["diffusers.pipelines.ddpm.pipeline_ddpm.DDPMPipeline", "diffusers.models.unets.unet_2d.UNet2DModel"]
    assert "contains custom code in my_pipeline.py" in refused and "trust_remote_code=True" in refused
    assert index["unet"] == ["my_unet", "EDM2UNet2DModel"]
    assert index["scheduler"] == ["scheduling_edm2_heun", "MyScheduler"]


def test_the_import_replaces_one_method_of_two_classes(report):
    """How an index is read; of all that loading goes through, nothing else."""
    assert report["members"] == ["DiffusionPipeline._dict_from_json_file", "AutoModel._dict_from_json_file"]
    assert report["members_gone"] == []


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
