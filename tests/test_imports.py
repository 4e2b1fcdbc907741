"""Who may import whom. The rooms of the package, and the rule of each, read off the syntax trees of the files."""

import ast
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "diffusers_edm2"
MODULES = {file.stem: file for file in sorted((ROOT / "src" / PACKAGE).glob("*.py"))}
COMMAND_FOLDERS = ("training", "pipelines", "examples")
COMMANDS = {file.stem: file for folder in COMMAND_FOLDERS for file in sorted((ROOT / folder).glob("*.py"))}

# Each is published as one file and runs where the package is not installed.
HUB = {"unet_edm2", "scheduling_edm2_heun", "pipeline_edm2"}
# Maths and data, with the one library (beside torch and numpy) that the subject needs.
PURE: dict[str, set[str]] = {
    "dataset": {"PIL", "datasets", "sklearn"},
    "ema": set(),
    "files": set(),
    "grid": {"PIL"},
    "latents": {"diffusers"},  # for the VAE
    "loss": set(),
    "metrics": set(),
    "monitoring": set(),
    "optim": set(),
    "pickle_reader": set(),
    "presets": set(),
    "published": set(),
}
# Files and names outside of the process.
INPUT_OUTPUT = {"checkpoint", "convert", "dataset_writer", "hub", "image_folder", "registration", "snapshots"}
# What a command says on its command line.
OPTIONS = {"training_options"}
# Installed without an extra.
CORE = {"torch", "diffusers", "safetensors", "huggingface_hub", "numpy", "PIL"}


def imported_modules(source: str) -> set[str]:
    """Full names of all modules that a file imports, at any depth; those of relative imports begin with a dot."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = "." * node.level + (node.module or "")
            # `from diffusers_edm2 import loss` imports a module, `from diffusers_edm2 import EDM2Loss` the front door.
            modules = {alias.name for alias in node.names} & MODULES.keys() if parent == PACKAGE else set()
            names |= {f"{PACKAGE}.{name}" for name in modules}
            if len(modules) < len(node.names):
                names.add(parent)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            is_known = isinstance(node.args[0], ast.Constant)
            names.add(ast.literal_eval(node.args[0]) if is_known else "?")  # "?" is in no list of what is allowed
    return names


def imports_of(file: Path) -> tuple[set[str], set[str]]:
    """The modules of our package that a file imports, and the top-level names of everything else."""
    names = imported_modules(file.read_text(encoding="utf-8"))
    own = {name for name in names if name.partition(".")[0] == PACKAGE}
    return own, {name.partition(".")[0] for name in names - own}


def in_package(names: set[str]) -> set[str]:
    return {f"{PACKAGE}.{name}" for name in names}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("import torch.nn as nn", {"torch.nn"}),
        ("from torch.nn import functional", {"torch.nn"}),
        ("def f():\n    import accelerate", {"accelerate"}),
        ("if TYPE_CHECKING:\n    from PIL import Image", {"PIL"}),
        ("from . import loss", {"."}),
        ("from .loss import EDM2Loss", {".loss"}),
        ("from diffusers_edm2 import loss, EDM2Pipeline", {"diffusers_edm2.loss", "diffusers_edm2"}),
        ("from diffusers_edm2 import checkpoint", {"diffusers_edm2.checkpoint"}),
        ("importlib.import_module('diffusers_edm2.ema')", {"diffusers_edm2.ema"}),
        ("importlib.import_module(name)", {"?"}),
        ("# import this", set()),
    ],
)
def test_every_kind_of_import_is_seen(line, found):
    assert imported_modules(line) == found


def test_every_file_has_a_room():
    """A new file is entered in one of the tables above, and stays within its rule."""
    rooms = [HUB, PURE.keys(), INPUT_OUTPUT, OPTIONS, {"__init__"}]
    assert sum(map(len, rooms)) == len(set().union(*rooms))
    assert set().union(*rooms) == MODULES.keys()


@pytest.mark.parametrize("name", sorted(HUB))
def test_hub_files_stand_alone(name):
    own, others = imports_of(MODULES[name])
    assert {"torch", "diffusers"} <= others  # it read a real file
    assert not own
    assert others <= sys.stdlib_module_names | {"numpy", "PIL", "torch", "diffusers"}  # no relative import: no ""


@pytest.mark.parametrize("name", sorted(PURE))
def test_pure_modules_know_only_their_subject(name):
    own, others = imports_of(MODULES[name])
    assert others  # it read a real file
    assert not own
    assert others <= (sys.stdlib_module_names - {"argparse"}) | {"torch", "numpy"} | PURE[name]


@pytest.mark.parametrize("name", sorted(INPUT_OUTPUT))
def test_input_and_output_import_hub_files_and_pure_modules(name):
    own, others = imports_of(MODULES[name])
    assert others
    assert own <= in_package(HUB | PURE.keys())
    assert not others & {"", "argparse", "accelerate"}
    assert ("huggingface_hub" in others) == (name == "hub")


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_options_know_the_recipes_and_nothing_else(name):
    own, others = imports_of(MODULES[name])
    assert "argparse" in others
    assert own == {f"{PACKAGE}.presets"}
    assert others <= sys.stdlib_module_names | {"yaml"}


def test_import_of_the_package_needs_no_extra():
    """`import diffusers_edm2` reaches, over all of its imports, only what is installed without an extra."""
    reached, waiting = set(), {PACKAGE}
    while waiting:
        name = waiting.pop()
        own, others = imports_of(MODULES[name.partition(".")[2] or "__init__"])
        assert others <= sys.stdlib_module_names | {
            "torch",
            "diffusers",
            "safetensors",
            "huggingface_hub",
            "numpy",
            "PIL",
        }
        reached.add(name)
        waiting |= own - reached
    assert in_package(HUB) < reached


def test_commands_do_not_import_each_other():
    assert "train_edm2" in COMMANDS
    for name, file in COMMANDS.items():
        own, others = imports_of(file)
        assert own, name  # it read a real command
        assert not others & {"", *COMMANDS, *COMMAND_FOLDERS, "tests"}, name


def test_commands_hide_no_library():
    """A command's folder comes first on `sys.path`: `import datasets` would find a `training/datasets.py`."""
    libraries = sys.stdlib_module_names | packages_distributions().keys()
    assert {"datasets", "json"} <= libraries
    assert not COMMANDS.keys() & libraries
