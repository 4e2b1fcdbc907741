"""A run cannot be harmed: real files, real full disks, and a real writer that is killed at every step it takes.

`serve` is that writer: it forks once per line of its standard input, so that a kill costs milliseconds.
"""

import errno
import fcntl
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusers_edm2 import checkpoint
from diffusers_edm2.checkpoint import (
    CheckpointError,
    MetricsFile,
    check_config,
    check_free_space,
    explain_save_errors,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_optimizer_tensors,
    lock_run,
    optimizer_tensors,
    save_checkpoint,
    truncate_metrics,
    verify_checkpoint,
    write_config,
)
from diffusers_edm2.files import atomic_file, atomic_folder, clean_leftovers, write_atomic

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def content(nimg: int, seed: int = 0, size: int = 1000) -> dict:
    """Tensors and state that tell which save wrote them."""
    generator = torch.Generator().manual_seed(nimg + seed)
    unet, exp_avg, ema = torch.randn(3, size, generator=generator)
    return {
        "tensors": {"unet": {"conv.weight": unet}, "optimizer": {"conv.weight.exp_avg": exp_avg}, "ema": {"w": ema}},
        "state": {"seed": seed, "rates": [0.1, 1e-300]},
    }


def assert_holds(path: Path, seed: int = 0, size: int = 1000) -> None:
    """The checkpoint is, to the bit, what `content` gives for its number of images."""
    tensors, state = load_checkpoint(path)
    expected = content(int(path.name), seed, size)
    assert state == {**expected["state"], "nimg": int(path.name)}
    assert tensors.keys() == expected["tensors"].keys()
    for group, named in expected["tensors"].items():
        assert tensors[group].keys() == named.keys()
        assert all(torch.equal(tensors[group][name], tensor) for name, tensor in named.items())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- The writer process --------------------------------------------------------------------------


def save_third(run: Path) -> None:
    save_checkpoint(run, 300, total_limit=2, **content(300))


def replace_second(run: Path) -> None:
    save_checkpoint(run, 200, **content(200, seed=1))


def clean(run: Path) -> None:
    clean_leftovers(run)


def save_on(run: Path) -> None:
    first = int(list_checkpoints(run)[-1].name) + 1
    for nimg in range(first, first + 1000):
        save_checkpoint(run, nimg, total_limit=2, **content(nimg, size=100_000))


def save_on_full_disk(run: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # Python ignores SIGXFSZ: write fails with EFBIG
    save_third(run)


def configure_on_full_disk(run: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    write_config(run, {"options": {"text": "x" * 3000}})


def hold_lock(run: Path) -> None:
    with lock_run(run):
        (run / "held").touch()
        time.sleep(60)


def signal_before_operation(number: int, index: int) -> None:
    """Have this process get a signal right before its `index`-th file operation: Python tells them to audit hooks."""
    operations = itertools.count()

    def hook(event: str, _: tuple) -> None:
        if (event == "open" or event.startswith(("os.", "shutil."))) and next(operations) == index:
            os.kill(os.getpid(), number)

    sys.addaudithook(hook)


def serve() -> None:
    torch.set_num_threads(1)  # no thread pool that a fork would lose
    jobs = (save_third, replace_second, clean, save_on, save_on_full_disk, configure_on_full_disk, hold_lock)
    for line in sys.stdin:
        name, run, number, index = json.loads(line)
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                if number:
                    signal_before_operation(number, index)
                {job.__name__: job for job in jobs}[name](Path(run))
                os._exit(0)
            except (CheckpointError, KeyboardInterrupt) as error:
                os.write(writer, f"{type(error).__name__}: {error}".encode())
            finally:
                os._exit(1)
        print(pid, flush=True)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.close(writer)
        with open(reader) as file:
            print(json.dumps([status, file.read()]), flush=True)


class Writer:
    def __init__(self) -> None:
        # Without the package's __init__, hence without diffusers: it starts and forks in half the time.
        package = Path(checkpoint.__file__).parent
        script = (
            "import sys, types\n"
            "package = sys.modules['diffusers_edm2'] = types.ModuleType('diffusers_edm2')\n"
            f"package.__path__ = [{str(package)!r}]\n"
            "import test_checkpoint\n"
            "test_checkpoint.serve()"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=Path(__file__).parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def start(self, job, run: Path, number: int = 0, index: int = 0) -> int:
        """Start a job, which gets signal `number` before file operation `index`. Returns its process."""
        self.process.stdin.write(json.dumps([job.__name__, str(run), number, index]) + "\n")
        return self.read()

    def end(self) -> list:
        """Wait for the job. Returns its exit status and its error."""
        return self.read()

    def read(self):
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module", autouse=True)
def writer():
    """Started with the first test, used by the last ones: it imports torch meanwhile."""
    writer = Writer()
    yield writer
    writer.process.kill()
    writer.process.wait()
    writer.process.stdin.close()
    writer.process.stdout.close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two checkpoints."""
    for nimg in (100, 200):
        save_checkpoint(tmp_path / "run", nimg, **content(nimg))
    return tmp_path / "run"


# ---- Atomic files and folders --------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_what_was_there(tmp_path, error):
    write_atomic(tmp_path / "a" / "b" / "file.png", "before")
    with pytest.raises(error), atomic_file(tmp_path / "a" / "b" / "file.png") as temporary:
        assert temporary.suffix == ".png"  # from which image libraries tell the format
        temporary.write_text("half")
        raise error
    for replace in (False, True):
        with atomic_folder(tmp_path / "folder", replace=replace) as temporary:
            (temporary / "file").write_text("before")
    with pytest.raises(error), atomic_folder(tmp_path / "folder", replace=True) as temporary:
        (temporary / "file").write_text("half")
        raise error
    assert (tmp_path / "a" / "b" / "file.png").read_text() == (tmp_path / "folder" / "file").read_text() == "before"
    assert names(tmp_path) == ["a", "folder"] and names(tmp_path / "a" / "b") == ["file.png"]


def test_the_disk_has_it_before_it_has_its_name(tmp_path, monkeypatch):
    """Only this order survives a power cut: each file and folder, then the name, then the folder that holds it."""
    log = []
    fsync = os.fsync

    def logged_fsync(descriptor: int) -> None:
        log.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def logged(rename):
        def move(source: Path, target: Path) -> None:
            log.append(f"-> {target.name}")
            rename(source, target)

        return move

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "rename", logged(os.rename))
    monkeypatch.setattr(os, "replace", logged(os.replace))
    with atomic_folder(tmp_path / "parent" / "new") as folder:
        (folder / "sub").mkdir()
        for name in ("a", "sub/b"):
            (folder / name).touch()
    temporary = f".tmp-{os.getpid()}-"
    assert log[0] == tmp_path.name  # which holds the name "parent"
    assert sorted(log[1:4]) == ["a", "b", "sub"] and log.index("b") < log.index("sub")
    assert log[4:] == [temporary + "new", "-> new", "parent"]
    log.clear()
    write_atomic(tmp_path / "file", b"")
    assert log == [temporary + "file", "-> file", tmp_path.name]
    log.clear()
    MetricsFile(tmp_path / "metrics.jsonl").append({"nimg": 1})
    assert log == [tmp_path.name, "metrics.jsonl"]


def test_files_are_as_readable_as_the_umask_says(run):
    umask = os.umask(0)
    os.umask(umask)
    modes = {path.stat().st_mode & 0o777 for path in (run / "checkpoints" / "000000200").iterdir()}
    assert modes == {0o666 & ~umask}


def test_a_link_is_replaced_and_its_target_kept(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with atomic_folder(tmp_path / "link", replace=True) as folder:
        (folder / "file").touch()
    assert names(tmp_path) == ["link", "target"]
    assert names(tmp_path / "link") == ["file"] and names(tmp_path / "target") == []


# ---- Checkpoints ---------------------------------------------------------------------------------


def test_every_kind_of_tensor_survives_bit_by_bit(tmp_path):
    """Strides and sharing may go; NaN payloads, -0, subnormals and integers that float32 cannot hold may not."""
    bits = torch.randint(-(2**31), 2**31, (4, 6, 2, 2), dtype=torch.int32)
    base = torch.arange(12.0).reshape(3, 4)
    saved = {
        "any bits": bits.view(torch.float32),
        "bfloat16": bits.view(torch.bfloat16),
        "float16": bits.view(torch.float16),
        "float64": torch.tensor([-0.0, 5e-324, torch.inf], dtype=torch.float64),
        "int64": torch.tensor(2**62 + 1),
        "uint8": torch.get_rng_state(),
        "bool": torch.tensor([True, False]),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "transposed": base.T,
        "whole": base,
        "same again": base,
        "part": base[1:, 2],
        "expanded": torch.tensor([1.5]).expand(3, 3),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "scalar": torch.tensor(-0.0),
        "empty": torch.empty(0, 3),
    }
    path = save_checkpoint(tmp_path, 7, tensors={"all": saved, "none": {}}, state={})
    tensors, state = load_checkpoint(path, torch.device("cpu"))
    assert state == {"nimg": 7} and tensors["none"] == {} and tensors["all"].keys() == saved.keys()
    for name, tensor in saved.items():
        loaded = tensors["all"][name]
        assert (loaded.dtype, loaded.shape) == (tensor.dtype, tensor.shape), name
        assert (
            loaded.numpy(force=True).tobytes() == tensor.detach().contiguous().numpy(force=True).tobytes()
            if (tensor.dtype != torch.bfloat16)
            else torch.equal(loaded.view(torch.int16), tensor.contiguous().view(torch.int16))
        ), name


def test_checkpoint_limit(tmp_path):
    for nimg in (100, 200, 300):
        save_checkpoint(tmp_path, nimg, total_limit=None, **content(nimg))
    assert names(tmp_path / "checkpoints") == ["000000100", "000000200", "000000300"]
    save_checkpoint(tmp_path, 400, total_limit=2, **content(400))
    assert names(tmp_path / "checkpoints") == ["000000300", "000000400"]
    save_checkpoint(tmp_path, 350, total_limit=1, **content(350))  # resumed from an earlier one on purpose
    assert names(tmp_path / "checkpoints") == ["000000350"]
    for nimg in (999_999_999, 2**31):  # the paper's runs need a tenth digit
        save_checkpoint(tmp_path, nimg, total_limit=2, **content(0))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["999999999", "2147483648"]
    with pytest.raises(ValueError, match="--checkpoints_total_limit 0 would keep no checkpoint; give 1 or more"):
        save_checkpoint(tmp_path, 500, total_limit=0, **content(500))


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "flip": (lambda file: flip(file, file.stat().st_size // 2), "is damaged: its checksum is wrong"),
    "truncate": (lambda file: os.truncate(file, file.stat().st_size - 1), r"is damaged: it has \d+ bytes, \d+ were"),
    "delete": (lambda file: file.unlink(), "cannot be read: No such file or directory"),
}


@pytest.mark.parametrize("file", ["unet.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_previous_checkpoint_used(run, file, kind):
    damage, reason = DAMAGE[kind]
    damaged = run / "checkpoints" / "000000200"
    damage(damaged / file)
    message = f"000000200/{file} {reason}"
    for read in (verify_checkpoint, load_checkpoint):
        with pytest.raises(CheckpointError, match=message):
            read(damaged)
    warnings = []
    found = find_checkpoint(run, warn=warnings.append)
    assert_holds(found)
    assert found.name == "000000100"
    assert len(warnings) == 1 and re.search(f"{message}.* Using .*000000100 instead", warnings[0])
    damage(found / file)
    with pytest.raises(
        CheckpointError, match=rf"No checkpoint of .* can be used: (?=.*000000100/{file})(?=.*{message})"
    ):
        find_checkpoint(run, warn=pytest.fail)
    replace_second(run)  # a run that fell back reaches the damaged one again
    assert_holds(damaged, seed=1)


def test_a_changed_manifest_is_noticed_whichever_byte_it_is(run):
    manifest = run / "checkpoints" / "000000200" / "manifest.json"
    original = manifest.read_bytes()
    messages = set()
    for position in range(len(original)):
        flip(manifest, position)
        with pytest.raises(CheckpointError, match=r"manifest\.json ") as caught:
            verify_checkpoint(manifest.parent)
        messages.add(re.sub(r"\(.*\)", "", str(caught.value).split("manifest.json ")[1]))
        manifest.write_bytes(original)
    assert any("not JSON" in message for message in messages) and "is damaged: its checksum is wrong." in messages
    for text, message in {
        '{"format": 2}': "has format version 2, this program reads 1; use the version of diffusers_edm2 that wrote it",
        "[]": "is damaged: it is not a JSON object",
        '{"format": 1': "is damaged: it is not JSON",
    }.items():
        manifest.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            verify_checkpoint(manifest.parent)


def test_which_checkpoint(run, tmp_path):
    (run / "checkpoints" / "notes").mkdir()
    first, second = list_checkpoints(run)
    assert find_checkpoint(run, warn=pytest.fail) == second
    for which in ("100", "000000100", str(first)):
        assert find_checkpoint(run, which) == first
    for which in ("300", str(run / "checkpoints" / "300")):
        with pytest.raises(
            CheckpointError,
            match=f"--resume_from_checkpoint {which}: there is no such checkpoint; .* has 000000100, 000000200. Give",
        ):
            find_checkpoint(run, which)
    assert find_checkpoint(tmp_path / "new") is None
    with pytest.raises(CheckpointError, match="has none"):
        find_checkpoint(tmp_path / "new", "300")


# ---- Optimizer -----------------------------------------------------------------------------------


class Net(torch.nn.Module):
    """A channels_last filter, a scalar gain, a frozen parameter, and one that gets its first gradient late."""

    def __init__(self, device: str) -> None:
        super().__init__()
        weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0)).to(device)
        self.weight = torch.nn.Parameter(weight.to(memory_format=torch.channels_last))
        self.gain = torch.nn.Parameter(torch.tensor(0.5, device=device))
        self.late = torch.nn.Parameter(torch.ones(6, 1, 1, 1, device=device))
        self.frozen = torch.nn.Parameter(torch.ones(2, device=device), requires_grad=False)

    def train_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        x = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(step)).to(self.gain.device)
        y = self.weight * x * self.gain
        optimizer.zero_grad()
        ((y * self.late if step >= 4 else y) - 1).square().mean().backward()
        optimizer.step()


OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.9, 0.99), foreach=False),
    "adam foreach": lambda p: torch.optim.Adam(p, lr=0.1, foreach=True),
    "adam fused": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "adam capturable": lambda p: torch.optim.Adam(p, lr=0.1, capturable=p[0]["params"][0].is_cuda),  # not on the CPU
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),  # moments of rows and columns
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),  # two scalars
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("steps_before", [0, 3])
def test_optimizer_continues_bitwise(tmp_path, kind, device, steps_before):
    def new() -> tuple[Net, torch.optim.Optimizer]:
        net = Net(device)
        return net, OPTIMIZERS[kind]([{"params": [net.late, net.frozen]}, {"params": [net.gain, net.weight]}])

    net, optimizer = new()
    for step in range(steps_before):
        net.train_step(optimizer, step)
    state = optimizer_tensors(optimizer, net.named_parameters())
    assert state.keys() >= {"frozen", "late"}
    path = save_checkpoint(tmp_path, 1, tensors={"unet": net.state_dict(), "optimizer": state}, state={})

    tensors, _ = load_checkpoint(path)
    resumed, resumed_optimizer = new()
    resumed.load_state_dict(tensors["unet"])
    load_optimizer_tensors(resumed_optimizer, resumed.named_parameters(), tensors["optimizer"])
    for step in range(steps_before, 6):
        net.train_step(optimizer, step)
        resumed.train_step(resumed_optimizer, step)
    for name, parameter in net.named_parameters():
        assert torch.equal(dict(resumed.named_parameters())[name], parameter), name
    after = optimizer_tensors(optimizer, net.named_parameters())
    after_resumed = optimizer_tensors(resumed_optimizer, resumed.named_parameters())
    assert after.keys() == after_resumed.keys()
    assert after.keys() >= ({"weight.momentum_buffer"} if kind == "sgd" else {"late.step", "weight.step", "frozen"})
    for name, tensor in after.items():
        assert torch.equal(after_resumed[name], tensor), name
        assert after_resumed[name].device == tensor.device and after_resumed[name].dtype == tensor.dtype, name
    for name, tensor in load_file(path / "optimizer.safetensors").items():
        assert torch.equal(tensor, tensors["optimizer"][name]), "the loaded tensors are copied, not adopted"


def test_optimizer_state_that_is_a_number():
    """SparseAdam counts steps in Python integers."""
    table = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = torch.optim.SparseAdam(table.parameters())
    table(torch.tensor([1, 1, 4])).sum().backward()
    optimizer.step()
    tensors = optimizer_tensors(optimizer, table.named_parameters())
    assert tensors.keys() == {"weight.step:number", "weight.exp_avg", "weight.exp_avg_sq"}
    resumed = torch.optim.SparseAdam(table.parameters())
    load_optimizer_tensors(resumed, table.named_parameters(), tensors)
    assert resumed.state[table.weight]["step"] == 1 and type(resumed.state[table.weight]["step"]) is int
    with pytest.raises(TypeError, match="LBFGS keeps a list as old_dirs of weight; only tensors and numbers can be"):
        linear = torch.nn.Linear(2, 1, bias=False)
        lbfgs = torch.optim.LBFGS(linear.parameters(), max_iter=2)

        def closure() -> torch.Tensor:
            lbfgs.zero_grad()
            loss = (linear(torch.ones(1, 2)) - 1).square().sum()
            loss.backward()
            return loss

        lbfgs.step(closure)
        optimizer_tensors(lbfgs, linear.named_parameters())


def test_optimizer_state_of_another_network():
    def adam(*sizes: int) -> tuple[torch.nn.Module, torch.optim.Adam]:
        net = torch.nn.Sequential(*(torch.nn.Linear(size, 3, bias=False) for size in sizes))
        return net, torch.optim.Adam(net.parameters())

    net, optimizer = adam(4, 5)
    net[1](net[0](torch.ones(4)).new_ones(5)).sum().backward()
    net[0](torch.ones(4)).sum().backward()
    optimizer.step()
    tensors = optimizer_tensors(optimizer, net.named_parameters())
    for sizes, message in {
        (4, 5, 6): "does not fit the network: missing: 2.weight. Resume with the network it was saved with",
        (4,): "unexpected: 1.weight.step, 1.weight.exp_avg, 1.weight.exp_avg_sq",
        (2, 5): r"of another shape: 0.weight.exp_avg \(3, 4\) for \(3, 2\), 0.weight.exp_avg_sq \(3, 4\)",
    }.items():
        other, other_optimizer = adam(*sizes)
        with pytest.raises(ValueError, match=message):
            load_optimizer_tensors(other_optimizer, other.named_parameters(), tensors)
        assert not other_optimizer.state
    with pytest.raises(ValueError, match=r"holds parameters of shapes \[\(3, 5\)\] that are not among the named ones"):
        optimizer_tensors(optimizer, [("0.weight", net[0].weight)])


# ---- Configuration and metrics -------------------------------------------------------------------


def test_config_of_another_recipe_is_refused(tmp_path):
    config = {"options": {"lr": 0.1, "ema": (0.05, 0.1), "report_to": "tensorboard", "old": None}, "versions": {}}
    run = tmp_path / "run"
    assert check_config(run, config, set()) is False
    (run / ".tmp-123-config.json").mkdir(parents=True)  # what a killed first start may leave
    with lock_run(run):
        assert check_config(run, config, set()) is False
    write_config(run, config)
    assert json.loads((run / "config.json").read_text())["options"]["ema"] == [0.05, 0.1]
    assert check_config(run, config, set()) is True
    changed = {
        "options": {"lr": 0.2, "ema": [0.05, 0.1], "report_to": "wandb", "new": "x"},
        "versions": {"torch": "3"},
    }
    message = (
        f"{run} is a run with other options:\n"
        '  lr: was 0.1, now 0.2\n  new: was (not set), now "x"\n  old: was null, now (not set)\n'
        "Give the same options to resume it. Give another --output_dir to start a new run."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_config(run, changed, {"report_to"})
    assert check_config(run, changed, {"report_to", "lr", "new", "old"}) is True


def test_config_that_is_broken_or_absent(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is not empty and not a run folder: it has no config.json. Give another"):
        check_config(tmp_path, {"options": {}}, set())
    for text, message in {"{": "is not JSON", "[]": "is not a JSON object", "{}": 'it has no "options"'}.items():
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=f"config.json is broken: .*{message}.* Restore it from a copy. Give ano"):
            check_config(tmp_path, {"options": {}}, set())


def test_metrics_are_strict_json_and_continue_where_the_checkpoint_is(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    assert truncate_metrics(path, 0) == 0
    metrics = MetricsFile(path)
    for nimg in (100, 200, 300):
        metrics.append({"nimg": nimg, "loss": float("nan"), "by_sigma": [float("inf"), {"u": (-float("inf"), 0.1)}]})

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert lines[1] == {"nimg": 200, "loss": None, "by_sigma": [None, {"u": [None, 0.1]}]}
    whole = path.read_bytes()
    assert truncate_metrics(path, 300) == 0
    for half in (b'{"nimg": 30', b'{"nimg": 300}'):  # killed, or the disk was full; only a line feed ends a line
        path.write_bytes(whole + half)
        assert truncate_metrics(path, 300) == 1
        assert path.read_bytes() == whole
    path.write_bytes(b"\0\0\n[1]\n" + whole)  # a machine that lost power
    assert truncate_metrics(path, 200) == 3
    metrics.append({"nimg": 300, **{key: lines[2][key] for key in ("loss", "by_sigma")}})
    assert path.read_bytes() == whole
    with pytest.raises(ValueError, match=r"""needs "nimg", the images seen; it has \['loss'\]"""):
        metrics.append({"loss": 1})


# ---- Killed --------------------------------------------------------------------------------------


def stopped_everywhere(writer: Writer, job, number: int, start: Path, scratch: Path):
    """Yield a copy of the run folder `start` for each file operation of `job`, which got signal `number` before it."""
    for index in itertools.count():
        run = scratch / str(index)
        shutil.copytree(start, run, symlinks=True)
        writer.start(job, run, number, index)
        status, error = writer.end()
        if status == 0:
            return
        assert (status, error) == ((1, "KeyboardInterrupt: ") if number == signal.SIGINT else (-number, ""))
        yield run
        shutil.rmtree(run)


def test_save_killed_before_each_of_its_operations(writer, run, tmp_path):
    """The old checkpoints go after the new one exists, and none is ever half there."""
    seen = []
    for killed in stopped_everywhere(writer, save_third, signal.SIGKILL, run, tmp_path):
        for _ in range(2):
            for path in list_checkpoints(killed):
                assert_holds(path)
            listed = [int(path.name) for path in list_checkpoints(killed)]
            assert len(listed) >= 2 and find_checkpoint(killed, warn=pytest.fail).name == f"{listed[-1]:09d}"
            clean_leftovers(killed)  # and the same after it
        assert names(killed) == ["checkpoints"]
        assert names(killed / "checkpoints") == [f"{nimg:09d}" for nimg in listed]
        seen.append(listed)
    assert [key for key, _ in itertools.groupby(seen)] == [[100, 200], [100, 200, 300], [200, 300]]
    assert len(seen) > 20


def test_replacement_killed_before_each_of_its_operations(writer, run, tmp_path):
    """The old whole one or the new whole one, after each kill; between the two renames after a clean-up."""
    before_cleaning, after = [], []
    for killed in stopped_everywhere(writer, replace_second, signal.SIGKILL, run, tmp_path):
        before_cleaning.append(len(list_checkpoints(killed)))
        assert find_checkpoint(killed, warn=pytest.fail) is not None
        for former in (killed / "checkpoints").glob(".tmp-old-*"):
            verify_checkpoint(former)  # whole as long as it has that name
        done = clean_leftovers(killed)
        assert any(text.startswith("restored") for text in done) == (before_cleaning[-1] == 1)
        assert names(killed / "checkpoints") == ["000000100", "000000200"]
        _, state = load_checkpoint(killed / "checkpoints" / "000000200")
        assert_holds(killed / "checkpoints" / "000000200", seed=state["seed"])
        after.append(state["seed"])
    assert before_cleaning.count(1) == 1  # the kill between the renames
    assert [key for key, _ in itertools.groupby(after)] == [0, 1]


def test_replacement_interrupted_before_each_of_its_operations(writer, run, tmp_path):
    """Ctrl-C needs no clean-up to leave the old whole one, without a trace, or the new whole one."""
    seen = []
    for interrupted in stopped_everywhere(writer, replace_second, signal.SIGINT, run, tmp_path):
        _, state = load_checkpoint(interrupted / "checkpoints" / "000000200")
        assert_holds(interrupted / "checkpoints" / "000000200", seed=state["seed"])
        if state["seed"] == 0:
            assert names(interrupted / "checkpoints") == ["000000100", "000000200"]
        seen.append(state["seed"])
    assert [key for key, _ in itertools.groupby(seen)] == [0, 1]


def interrupted_swap(run: Path) -> Path:
    """The folder that a kill between the two renames leaves."""
    path = run / "checkpoints" / "000000200"
    os.rename(path, path.with_name(".tmp-old-000000200"))
    shutil.copytree(run / "checkpoints" / "000000100", path.with_name(f".tmp-{dead_process()}-000000200"))
    return path


def dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_clean_up_killed_before_each_of_its_operations(writer, run, tmp_path):
    interrupted_swap(run)
    count = 0
    for killed in stopped_everywhere(writer, clean, signal.SIGKILL, run, tmp_path):
        clean_leftovers(killed)
        assert names(killed / "checkpoints") == ["000000100", "000000200"]
        assert_holds(killed / "checkpoints" / "000000200")
        count += 1
    assert count > 3


def test_next_save_recovers_an_interrupted_one(run):
    path = interrupted_swap(run)
    (path.parent / f".tmp-{os.getpid()}-000000200").mkdir()  # a process of the same number, in another container
    message = "000000200 exists already; remove it or choose another name"
    with pytest.raises(FileExistsError, match=message), atomic_folder(path):
        pass
    assert_holds(path)
    replace_second(run)
    assert_holds(path, seed=1)


def test_writer_killed_at_random_moments(writer, run):
    """What resume finds after each kill is whole, and there is ever more of it."""
    interrupted = 0
    newest = 200
    save_checkpoint(run, newest, **content(newest, size=100_000))
    for _ in range(20):
        pid = writer.start(save_on, run)
        time.sleep(random.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
        assert writer.end() == [-signal.SIGKILL, ""]
        interrupted += len(clean_leftovers(run)) > 0
        found = find_checkpoint(run, warn=pytest.fail)
        assert int(found.name) >= newest
        newest = int(found.name)
        assert_holds(found, size=100_000)
    assert interrupted > 0
    assert newest > 200


def test_living_processes_keep_their_files(tmp_path):
    living = tmp_path / f".tmp-{os.getppid()}-x"
    other = tmp_path / "mine" / ".tmp-notes"
    namesake = tmp_path / f".tmp-{os.getpid()}-x"  # of a former process with the number that is now ours
    for path in (living, other, namesake):
        path.mkdir(parents=True)
    assert sorted(clean_leftovers(tmp_path)) == [
        f"left {living}: process {os.getppid()} is running",
        f"removed the unfinished {namesake}",
    ]
    assert not namesake.exists()
    assert living.exists() and other.exists()
    assert clean_leftovers(tmp_path / "absent") == []


def test_second_writer_is_refused_until_the_first_is_killed(writer, tmp_path):
    pid = writer.start(hold_lock, tmp_path)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    message = f"is in use by process {pid} on .*; wait for it or end it, or give another --output_dir"
    with pytest.raises(CheckpointError, match=message), lock_run(tmp_path):
        pass
    os.kill(pid, signal.SIGKILL)
    assert writer.end() == [-signal.SIGKILL, ""]
    with lock_run(tmp_path, warn=pytest.fail):
        assert re.fullmatch(f"process {os.getpid()} on .+", (tmp_path / ".lock").read_text())


def test_file_system_without_locks_is_a_warning(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with pytest.warns(UserWarning, match=r"cannot be locked \(No locks available\)"), lock_run(tmp_path):
        pass


# ---- Full disk -----------------------------------------------------------------------------------


def test_full_disk_loses_nothing(writer, run):
    writer.start(save_on_full_disk, run)
    status, message = writer.end()
    assert status == 1
    assert re.match(
        r"CheckpointError: Writing \S+/000000300 failed: .*File too large.*; "
        r"the last complete checkpoint is \S+/000000200\. Free some space or mend the cause, and start the run again",
        message,
    )
    writer.start(configure_on_full_disk, run / "new")
    status, message = writer.end()
    assert status == 1
    assert re.match(
        r"CheckpointError: Writing \S+config.json failed: File too large; there is no complete checkpoint yet", message
    )
    assert names(run) == ["checkpoints", "new"] and names(run / "new") == []
    assert names(run / "checkpoints") == ["000000100", "000000200"]
    assert_holds(run / "checkpoints" / "000000200")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, the device that is always full")
def test_metrics_on_a_full_disk(run):
    (run / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=r"metrics.jsonl failed: No space left on device; the last .*000000200"):
        MetricsFile(run / "metrics.jsonl").append({"nimg": 1})


def test_other_save_errors_pass_through(run):
    with pytest.raises(KeyError), explain_save_errors(run, run / "x"):
        raise KeyError
    with pytest.raises(CheckpointError, match="x failed: File exists") as caught, explain_save_errors(run, run / "x"):
        os.mkdir(run)
    assert isinstance(caught.value.__cause__, FileExistsError)


def test_free_space(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    check_free_space(tmp_path / "not" / "yet", free // 2, "A checkpoint")
    with pytest.raises(
        CheckpointError,
        match=r"A checkpoint in .*yet needs \d+\.\d\d GiB, but only \d+\.\d\d GiB are free; free some space",
    ):
        check_free_space(tmp_path / "not" / "yet", free + 2**40, "A checkpoint")
