"""What the README shows works: Python blocks run, commands have options that exist, links lead somewhere."""

import importlib.util
import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from diffusers_edm2 import EDM2HeunScheduler, EDM2Pipeline
from diffusers_edm2.ema import snapshot_name
from diffusers_edm2.training_options import build_parser
from test_unet_edm2 import active_unet

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def python_blocks(section: str) -> list[str]:
    text = README.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def run(code: str, folder: Path) -> None:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert result.returncode == 0, result.stderr


def test_sampling_blocks_run(tmp_path):
    unet = active_unet(sample_size=8, in_channels=1, attention_resolutions=(4,))
    EDM2Pipeline(unet, EDM2HeunScheduler()).save_pretrained(tmp_path / "runs/digits/pipeline")
    for nimg, sigma_rel in itertools.product((16384, 131072), (0.10, 0.15)):
        unet.save_pretrained(tmp_path / "runs/digits/snapshots" / snapshot_name(nimg, sigma_rel))
    blocks = python_blocks("Sample")
    assert len(blocks) == 3
    checks = "\nassert len(images) == 2 and images[0].size == (8, 8) and pipe.guide_unet is guide\n"
    run("\n".join(blocks) + checks, tmp_path)


def test_ema_block_runs(tmp_path):
    (block,) = python_blocks("EMA in your own loop")
    assert len(block.splitlines()) <= 10
    before = (
        "import torch\nmodel, steps, batch_size = torch.nn.Linear(2, 2), 32, 4\n"
        "def train_step(model):\n    model.weight.data += 1\n"
    )
    run(before + block + "\nassert ema.nimg == 128", tmp_path)


def commands() -> list[list[str]]:
    """The words of each command that runs one of our scripts, from the script's name on."""
    found = re.findall(
        r"^    (?:accelerate launch|python) ((?:training|pipelines)/\S+\.py(?:.*\\\n)*.*)$", README, flags=re.MULTILINE
    )
    return [shlex.split(command.replace("\\\n", " "), comments=True) for command in found]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_have_options_that_exist(words):
    spec = importlib.util.spec_from_file_location("command", ROOT / words[0])
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    parser = build_parser() if words[0] == "training/train_edm2.py" else script.build_parser()
    assert vars(parser.parse_args(words[1:]))


def test_every_command_is_shown():
    scripts = {
        str(path.relative_to(ROOT)) for folder in ("training", "pipelines") for path in (ROOT / folder).glob("*.py")
    }
    assert len(scripts) >= 4
    assert {words[0] for words in commands()} == scripts


@pytest.mark.parametrize("target", ["demo", "test"])
def test_make_targets_exist(target):
    assert f"\n    make {target} " in README
    result = subprocess.run(["make", "--dry-run", "--always-make", target], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0 and "constraints.txt" in result.stdout, result.stderr


def test_map_and_links_lead_to_files():
    files = re.findall(r"`(\w+\.py)`", README.split("## Map of the code")[1].split("\n## ")[0])
    assert len(files) >= 12
    missing = [name for name in files if not (ROOT / "src/diffusers_edm2" / name).is_file()]
    assert not missing
    listed = {path.name for path in (ROOT / "src/diffusers_edm2").glob("*.py")} - {"__init__.py"}
    assert listed <= set(files)
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    assert links and all((ROOT / link).exists() for link in links)
