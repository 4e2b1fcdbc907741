"""A data set from the Hub, by its id: the real loading code against a local server."""

import io
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from local_hub import dataset_hub

SCRIPT = Path(__file__).parent.parent / "training" / "train_edm2.py"
OPEN = """
from diffusers_edm2.dataset import open_source
source = open_source("somebody/pictures")
image, label = source[3]
print(len(source), source.class_names, label, image[0, 0, 0], source.shape, source.name(3))
"""


def parquet() -> bytes:
    """Six grey pictures of 8x8 pixels and growing brightness, in three classes."""
    pictures = [Image.fromarray(np.full((8, 8, 3), 10 * i, np.uint8)) for i in range(6)]
    rows = datasets.Dataset.from_dict({"img": pictures, "label": [0, 1, 2, 0, 1, 2]})
    rows = rows.cast_column("label", datasets.ClassLabel(names=["ant", "bee", "cat"]))
    buffer = io.BytesIO()
    rows.to_parquet(buffer)
    return buffer.getvalue()


def run(environment: dict[str, str], *command: str) -> str:
    result = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_hub_id_is_downloaded_once(tmp_path):
    files = {"data/train-00000-of-00001.parquet": parquet(), "README.md": b"---\nlicense: cc0-1.0\n---\n"}
    with dataset_hub("somebody/pictures", files) as (endpoint, requests):
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        expected = "6 ['ant', 'bee', 'cat'] 0 30 (3, 8, 8) somebody/pictures (train) row 3\n"
        assert run(environment, "-c", OPEN) == expected
        downloads = [request for request in requests if request.startswith("GET") and ".parquet" in request]
        assert len(downloads) == 1

        network = ["--block_out_channels", "8,8", "--attention_resolutions", "4", "--attention_head_dim", "8"]
        recipe = run(environment, str(SCRIPT), "--dataset_name", "somebody/pictures", "--dry_run", *network)
        options = dict(line.split(None, 1) for line in recipe.splitlines() if len(line.split(None, 1)) == 2)
        assert (options["resolution"], options["in_channels"], options["num_classes"]) == ("8", "3", "3")
        assert downloads == [request for request in requests if request.startswith("GET") and ".parquet" in request]
    assert run({**environment, "HF_HUB_OFFLINE": "1"}, "-c", OPEN) == expected
