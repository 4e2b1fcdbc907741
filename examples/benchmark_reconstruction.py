"""Measure the memory that post-hoc EMA needs: a network of 1 GB, 32 snapshots, several numbers of outputs.

    python examples/benchmark_reconstruction.py

Each reconstruction runs in a process of its own, which says how far its resident memory rose, beside what it may rise:
the largest tensor in float32 times (outputs + 2). The snapshots are hard links to one file, as the figure does not
depend on what the weights are; each is read on its own. Needs Linux, and free disk for the snapshot and the outputs.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from diffusers_edm2 import EDM2UNet2DModel
from diffusers_edm2.ema import snapshot_name
from diffusers_edm2.snapshots import list_snapshots, reconstruct

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="work in a temporary folder in here (default: the system's)")
    parser.add_argument("--snapshots", type=int, default=32, help="of two tracks (default: %(default)s)")
    parser.add_argument("--outputs", default="1,4,8", help="how many at once (default: %(default)s)")
    parser.add_argument(
        "--block_out_channels", default="192,384,576,768", help="of the network (default: %(default)s: 1 GB of weights)"
    )
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the outputs")
    parser.add_argument("--measure", nargs=2, metavar=("SNAPSHOTS", "OUTPUTS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    if args.measure:
        return measure(Path(args.measure[0]), int(args.measure[1]), dtype)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        largest = make_snapshots(Path(folder), args.snapshots, [int(c) for c in args.block_out_channels.split(",")])
        print(f"{'outputs':>7} {'rise of memory':>15} {'largest x (outputs + 2)':>24} {'seconds':>8}")
        for outputs in args.outputs.split(","):
            command = [sys.executable, __file__, "--dtype", args.dtype, "--measure", folder, outputs]
            rise, seconds = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
            allowed = largest * (int(outputs) + 2) / MIB
            print(f"{outputs:>7} {float(rise):11.1f} MiB {allowed:20.1f} MiB {float(seconds):8.1f}", flush=True)


def make_snapshots(folder: Path, count: int, block_out_channels: list[int]) -> int:
    """Write `count` snapshots, and return the bytes of the largest tensor."""
    unet = EDM2UNet2DModel(sample_size=64, in_channels=4, block_out_channels=block_out_channels, num_class_embeds=1000)
    for i in range(count):
        path = folder / snapshot_name((i // 2 + 1) * 2**20, (0.05, 0.10)[i % 2])
        if i == 0:
            unet.save_pretrained(path)
            first = path
        else:
            path.mkdir()
            for file in first.iterdir():
                (path / file.name).hardlink_to(file)
    sizes = [4 * p.numel() for p in unet.parameters()]
    total, largest = sum(sizes) / MIB, max(sizes) / MIB
    print(f"{count} snapshots (hard links to one) of {total:.0f} MiB each; the largest tensor has {largest:.1f} MiB")
    return max(sizes)


def measure(folder: Path, outputs: int, dtype: torch.dtype) -> None:
    """Print by how many MiB the peak exceeds the memory before, and the seconds."""
    snapshots = list_snapshots(folder)
    nimg = snapshots[-1].nimg
    targets = [(0.055 + 0.04 * i / outputs, nimg) for i in range(outputs)]
    with tempfile.TemporaryDirectory(dir=folder) as results:
        torch.zeros(2).add_(torch.ones(2), alpha=2)  # what a first operation loads is not counted
        before, start = resident("VmRSS"), time.perf_counter()
        reconstruct(snapshots, targets, [Path(results, str(i)) for i in range(outputs)], dtype)
        print((resident("VmHWM") - before) / MIB, time.perf_counter() - start)


def resident(kind: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most so far (unlike `ru_maxrss` not the parent's too)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:"))


if __name__ == "__main__":
    main()
