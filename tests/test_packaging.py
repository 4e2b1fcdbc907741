"""The wheel holds what it should and works where only its requirements are installed; the pins are honest."""

import itertools
import json
import os
import re
import subprocess
import sys
import venv
import zipfile
from collections import defaultdict
from importlib.metadata import Distribution, PathDistribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "diffusers_edm2"
EXTRAS = {"train", "metrics", "dev"}

USE_THE_WHEEL = """
import importlib.util, json, sys
from importlib.metadata import version
import torch
import diffusers_edm2
from diffusers import DiffusionPipeline

torch.manual_seed(0)
network = {"block_out_channels": (8, 16), "attention_resolutions": (4,), "attention_head_dim": 8}
unet = diffusers_edm2.EDM2UNet2DModel(sample_size=8, in_channels=1, num_class_embeds=2, **network)
diffusers_edm2.EDM2Pipeline(unet, diffusers_edm2.EDM2HeunScheduler()).save_pretrained("pipeline")
images = DiffusionPipeline.from_pretrained("pipeline")(class_labels=[0, 1], num_inference_steps=2).images
print(json.dumps({
    "file": diffusers_edm2.__file__,
    "version": diffusers_edm2.__version__,
    "metadata version": version("diffusers-edm2"),
    "images": [(image.mode, image.size) for image in images],
    "extras": [name for name in ("datasets", "sklearn", "tensorboard", "pytest") if importlib.util.find_spec(name)],
}))
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that knows nothing of this process's Python path."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (file,) = folder.iterdir()
    return file


@pytest.fixture(scope="module")
def metadata(wheel) -> PathDistribution:
    (info,) = [path for path in zipfile.Path(wheel).iterdir() if path.name.endswith(".dist-info")]
    return PathDistribution(info)


def requirements(dist: Distribution, extras: set[str]) -> list[Requirement]:
    """What `dist[extras]` needs on this platform."""
    parsed = [Requirement(text) for text in dist.requires or []]
    return [r for r in parsed if not r.marker or any(r.marker.evaluate({"extra": e}) for e in extras or {""})]


def installed_requirements(dist: Distribution) -> list[Distribution]:
    """Everything that `dist` needs, and what that needs, as installed here."""
    found: dict[tuple[str, frozenset[str]], Distribution] = {}
    waiting = requirements(dist, set())
    while waiting:
        requirement = waiting.pop()
        key = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if key not in found:
            found[key] = distribution(requirement.name)
            assert requirement.specifier.contains(found[key].version, prereleases=True), requirement
            waiting += requirements(found[key], requirement.extras)
    return list(found.values())


# --- The wheel -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(wheel, metadata):
    package = {f"diffusers_edm2/{file.name}" for file in PACKAGE.iterdir() if file.is_file()}
    assert "diffusers_edm2/unet_edm2.py" in package
    info = f"diffusers_edm2-{metadata.version}.dist-info"
    assert set(zipfile.ZipFile(wheel).namelist()) == package | {
        f"{info}/METADATA",
        f"{info}/RECORD",
        f"{info}/WHEEL",
        f"{info}/licenses/LICENSE",
    }


@pytest.mark.slow
def test_wheel_says_what_it_is(metadata):
    assert metadata.metadata["License-Expression"] == "Apache-2.0"
    assert metadata.metadata.get_all("License-File") == ["LICENSE"]
    assert metadata.metadata["Requires-Python"] == ">=3.10"
    assert set(metadata.metadata.get_all("Provides-Extra")) == EXTRAS
    core = {requirement.name for requirement in requirements(metadata, set())}
    assert core == {"torch", "diffusers", "safetensors", "huggingface-hub", "numpy", "pillow", "accelerate"}


@pytest.mark.slow
def test_wheel_works_where_only_its_requirements_are_installed(wheel, metadata, tmp_path):
    """A new environment gets the core requirements (as links, they are large), none of the extras, and the wheel."""
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    for dist in installed_requirements(metadata):
        for name in {file.parts[0] for file in dist.files or []} - {"..", "__pycache__"}:
            link = site_packages / name
            if not link.exists():
                link.symlink_to(dist.locate_file(name))
    pip_install = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-index")
    run(*pip_install, "--target", site_packages, wheel, cwd=tmp_path)

    output = run(environment / "bin" / "python", "-W", "error", "-c", USE_THE_WHEEL, cwd=tmp_path)
    assert json.loads(output.splitlines()[-1]) == {
        "file": str(site_packages / "diffusers_edm2" / "__init__.py"),
        "version": metadata.version,
        "metadata version": metadata.version,
        "images": [["L", [8, 8]]] * 2,
        "extras": [],
    }


# --- The pins --------------------------------------------------------------------------------------------------------


def pinned_versions(python: str) -> dict[str, Version]:
    """The versions in constraints.txt for a version of Python."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pins = [Requirement(line) for line in text.splitlines() if line and not line.startswith("#")]
    chosen = [pin for pin in pins if not pin.marker or pin.marker.evaluate({"python_version": python})]
    versions = {canonicalize_name(pin.name): Version(str(pin.specifier).removeprefix("==")) for pin in chosen}
    assert len(versions) == len(chosen)  # one pin for each
    return versions


def declared_requirements() -> dict[str, list[Requirement]]:
    """The requirements in pyproject.toml by extra ("" for the core), without those on our own extras."""
    # Python 3.10 has no tomllib: the lists of quoted requirements are read line by line.
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = defaultdict(list)
    for name, block in re.findall(r"^(dependencies|\w+) = \[\n(.*?)^\]", text, flags=re.MULTILINE | re.DOTALL):
        if name == "dependencies" or name in EXTRAS:
            parsed = [Requirement(item) for item in re.findall(r'^\s*"(.+?)"', block, flags=re.MULTILINE)]
            found["" if name == "dependencies" else name] = [r for r in parsed if r.name != "diffusers-edm2"]
    return found


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.14"])
def test_pins_satisfy_the_requirements(python):
    declared, pins = declared_requirements(), pinned_versions(python)
    assert declared.keys() == EXTRAS | {""}
    for requirement in itertools.chain.from_iterable(declared.values()):
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_lower_bounds_are_what_python_3_10_is_tested_with():
    declared, pins = declared_requirements(), pinned_versions("3.10")
    assert len(declared[""]) == 7
    for requirement in declared[""] + declared["train"] + declared["metrics"]:
        (bound,) = requirement.specifier
        assert bound.operator == ">=" and Version(bound.version) == pins[canonicalize_name(requirement.name)], (
            requirement
        )
