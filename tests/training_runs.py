"""Running training scripts in processes of their own, and comparing what they leave."""

import json
import multiprocessing
import os
import resource
import runpy
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[1] / "training" / "train_edm2.py"

# The digits, 20 steps of a network that takes milliseconds. The rate is up after 4 of them and decays after 10.
TINY = shlex.split(
    "--block_out_channels 8,8 --layers_per_block 1 --attention_resolutions 4 --attention_head_dim 8 "
    "--lr_rampup 64 --lr_ref_batches 10 --total_batch_size 16 --duration 320 --status_every 64 --sample_every 160 "
    "--snapshot_every 160 --checkpoint_every 80 --num_inference_steps 2 --dataloader_num_workers 0 --report_to none"
)

# The promises to the bit are for the CPU; Accelerate reads this.
ON_CPU = {"ACCELERATE_USE_CPU": "true"}

# What a log line says about the machine and not about the training.
TIMING = {"images_per_second", "interval_seconds", "memory_gib", "gpu_memory_gib"}

# Importing takes seconds: each process is forked from one that has done that, and nothing else, so far.
_FORKSERVER = multiprocessing.get_context("forkserver")
_FORKSERVER.set_forkserver_preload(
    ["accelerate", "diffusers_edm2", "sklearn.datasets", "torch.utils.data", "tqdm.auto"]
)


class Run:
    """A process that runs the script as `__main__`; it leads a process group, as a command of a shell does.

    As a context manager it ends at the latest with the block.

    Args:
        output_dir: the run folder; the output goes to files beside it, that workers of a killed process may hold open.
        options: of the command line, after those in `recipe`: the last one of a name counts.
        file_size_limit: bytes that no file can exceed, in place of a full disk.
        command: run this instead of forking, with the script and its options behind it.
        script: which one; `output_option` is its word for where the output goes.
    """

    def __init__(
        self,
        output_dir: Path,
        *options: str,
        recipe: list[str] = TINY,
        file_size_limit: int | None = None,
        command: list[str] | None = None,
        script: Path = SCRIPT,
        output_option: str = "--output_dir",
    ):
        self.output_dir = output_dir
        arguments = [*recipe, output_option, str(output_dir), *options]
        number = len(list(output_dir.parent.glob(f"{output_dir.name}-*.out")))
        self.out, self.err = (output_dir.with_name(f"{output_dir.name}-{number}.{end}") for end in ("out", "err"))
        if command is None:
            self.process = _FORKSERVER.Process(
                target=_run, args=(script, arguments, self.out, self.err, file_size_limit)
            )
            self.process.start()
        else:
            with open(self.out, "wb") as out, open(self.err, "wb") as err:
                line = [*command, str(script), *arguments]
                environment = os.environ | ON_CPU
                self.process = subprocess.Popen(line, stdout=out, stderr=err, env=environment, start_new_session=True)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_running:
            self.send(signal.SIGKILL, to_group=True)
            self.wait()

    def wait(self, timeout: float = 120) -> int:
        """The exit code; minus the number of the signal that ended the process."""
        if isinstance(self.process, ForkServerProcess):
            self.process.join(timeout)
            code = self.process.exitcode
        else:
            code = self.process.wait(timeout)
        assert code is not None, f"still running after {timeout} s\n{self.stderr}"
        return code

    def wait_for(self, condition: Callable[[], Any], timeout: float = 120) -> None:
        """Return as soon as `condition()` is true."""
        end = time.monotonic() + timeout
        while not condition():
            assert self.is_running or condition(), f"ended before the moment waited for\n{self.stderr}"
            assert time.monotonic() < end, f"nothing happened for {timeout} s\n{self.stderr}"
            time.sleep(0.0005)

    @property
    def is_running(self) -> bool:
        forked = isinstance(self.process, ForkServerProcess)
        return (self.process.exitcode if forked else self.process.poll()) is None

    def send(self, number: int, to_group: bool = False) -> None:
        assert self.process.pid is not None
        (os.killpg if to_group else os.kill)(self.process.pid, number)

    @property
    def stdout(self) -> str:
        return self.out.read_text() if self.out.exists() else ""

    @property
    def stderr(self) -> str:
        return self.err.read_text() if self.err.exists() else ""


def _run(script: Path, arguments: list[str], out: Path, err: Path, file_size_limit: int | None) -> None:
    os.setsid()
    os.environ.update(ON_CPU)
    multiprocessing.set_start_method(None, force=True)  # the data workers' is not ours, but Python's default
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    if file_size_limit is not None:  # Python ignores the signal of this limit: writing fails with EFBIG
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size_limit, file_size_limit))
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def train(output_dir: Path, *options: str, timeout: float = 120, **kwargs: Any) -> Run:
    """A run that has ended well."""
    with Run(output_dir, *options, **kwargs) as run:
        assert run.wait(timeout) == 0, run.stderr
    return run


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, less what the machine makes of them."""

    def refuse(constant: str):
        raise ValueError(f"{constant} is not JSON")

    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=refuse) for line in lines]
    return [{key: value for key, value in record.items() if key not in TIMING} for record in records]


def outcome(run_dir: Path) -> dict[str, Any]:
    """All that training decides: log lines, and the bytes of grids, snapshots, pipeline and newest checkpoint."""
    newest = max((run_dir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    folders = [run_dir / "samples", run_dir / "snapshots", run_dir / "pipeline", newest]
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(run_dir)): file.read_bytes() for file in files} | {"metrics": metrics(run_dir)}
