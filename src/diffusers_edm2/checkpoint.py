"""The run folder: resume state, configuration, metrics, and the lock that keeps one writer in it.

A checkpoint is a folder of safetensors files, one per group of tensors, a `state.json`, and a `manifest.json` with the
size and the SHA-256 of each file; it is there whole or not at all. No pickle is written and none is read. Needs a POSIX
system: runs are locked.
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import socket
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diffusers_edm2.files import atomic_folder, discard, make_folder, sync, write_atomic

FORMAT = 1  # of the checkpoint folder; another layout gets another number
LOCK = ".lock"


class CheckpointError(RuntimeError):
    """A file of the run cannot be written, found or trusted; the message says which, why, and what to do."""


# ---- One run, one writer, enough room ------------------------------------------------------------


@contextmanager
def lock_run(run_dir: Path, warn: Callable[[str], Any] = warnings.warn) -> Iterator[None]:
    """Keep other processes from writing in `run_dir`, until the block or this process ends, however it ends.

    A launcher that is killed can leave its workers training: started again, two runs would write one folder.
    The lock is a POSIX record lock: it is not inherited by data loading workers. On a file system that has no
    locks, the run goes on with a warning.

    Raises:
        CheckpointError: another process holds the lock; the message names it.
    """
    make_folder(run_dir)
    with open(run_dir / LOCK, "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise CheckpointError(
                    f"{run_dir} is in use by {file.read()}; wait for it or end it, or give another --output_dir."
                ) from error
            warn(f"{run_dir} cannot be locked ({error.strerror}); see that no other process trains in it.")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def check_free_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Raise CheckpointError if the disk of `folder`, which need not exist yet, has less than `needed_bytes` free.

    Args:
        what: What needs the room, for the message: "a checkpoint".
    """
    existing = next(place for place in [folder.absolute(), *folder.absolute().parents] if place.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise CheckpointError(
            f"{what} in {folder} needs {needed_bytes / 2**30:.2f} GiB, but only {free / 2**30:.2f} GiB are free; "
            "free some space, or give an --output_dir on another disk."
        )


@contextmanager
def explain_save_errors(run_dir: Path, path: Path) -> Iterator[None]:
    """Re-raise what goes wrong while `path` is written (disk full, no permission) as a CheckpointError.

    Its message names the path, the reason and the last complete checkpoint of `run_dir`, which is still there.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        complete = list_checkpoints(run_dir)
        kept = f"the last complete checkpoint is {complete[-1]}" if complete else "there is no complete checkpoint yet"
        raise CheckpointError(
            f"Writing {path} failed: {reason}; {kept}. Free some space or mend the cause, and start the run again."
        ) from error


# ---- Checkpoints ---------------------------------------------------------------------------------


def save_checkpoint(
    run_dir: Path,
    nimg: int,
    *,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    state: Mapping[str, Any],
    total_limit: int | None = None,
) -> Path:
    """Write `run_dir/checkpoints/<nimg>`, then delete the oldest ones beyond `total_limit`. Returns its path.

    A checkpoint of the same `nimg` is replaced: a run that fell back behind a damaged checkpoint reaches it again.

    Args:
        nimg: Images seen.
        tensors: Tensors by name, by group; each group becomes `<group>.safetensors`. Any device, dtype of safetensors,
            strides and shared storage; the values are kept bit by bit, strides and sharing are not.
        state: What JSON can hold; `nimg` is added to it. Tuples come back as lists, keys as strings.
        total_limit: How many checkpoints stay, the new one included and never deleted; None keeps all.

    Raises:
        ValueError: `total_limit` is less than 1.
        CheckpointError: it could not be written; all former checkpoints are still there.
    """
    if total_limit is not None and total_limit < 1:
        raise ValueError(
            f"--checkpoints_total_limit {total_limit} would keep no checkpoint; give 1 or more, or leave it out."
        )
    path = run_dir / "checkpoints" / f"{nimg:09d}"
    state_text = json.dumps({**state, "nimg": nimg}, indent=2)
    with explain_save_errors(run_dir, path):
        with atomic_folder(path, replace=True) as folder:
            for group, named in tensors.items():
                save_file(_storable(named), folder / f"{group}.safetensors")
            (folder / "state.json").write_text(state_text, encoding="utf-8")
            files = {
                file.name: {"size": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(folder.iterdir())
            }
            manifest = {"format": FORMAT, "files": files, "sha256": _listing_sha256(files)}
            (folder / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        if total_limit is not None:
            others = [other for other in list_checkpoints(run_dir) if other != path]
            for other in others[: max(len(others) - (total_limit - 1), 0)]:
                discard(other)
    return path


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first. Each was written whole; `verify_checkpoint` tells if it still is."""
    folder = run_dir / "checkpoints"
    found = [path for path in folder.iterdir() if re.fullmatch("[0-9]{9,}", path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name))


def verify_checkpoint(path: Path) -> list[str]:
    """Read every file of a checkpoint and compare it with the manifest. Returns the names of the files.

    Raises:
        CheckpointError: names the first file that is missing, unreadable, or not what was written.
    """
    manifest = _read_json(path / "manifest.json")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path / 'manifest.json'} has format version {manifest.get('format')}, this program reads {FORMAT}; "
            "use the version of diffusers_edm2 that wrote it."
        )
    files = manifest.get("files", {})
    if manifest.get("sha256") != _listing_sha256(files):
        raise CheckpointError(f"{path / 'manifest.json'} is damaged: its checksum is wrong.")
    for name, written in files.items():
        file = path / name
        try:
            size = file.stat().st_size
            if size != written["size"]:
                raise CheckpointError(f"{file} is damaged: it has {size} bytes, {written['size']} were written.")
            if _sha256(file) != written["sha256"]:
                raise CheckpointError(f"{file} is damaged: its checksum is wrong.")
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
    return list(files)


def load_checkpoint(
    path: Path, device: str | torch.device = "cpu"
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """Verify a checkpoint, then return the `tensors` (on `device`) and the `state` it was saved with.

    Raises:
        CheckpointError: see `verify_checkpoint`.
    """
    groups = [name for name in verify_checkpoint(path) if name.endswith(".safetensors")]
    tensors = {name.removesuffix(".safetensors"): load_file(path / name, device=str(device)) for name in groups}
    return tensors, _read_json(path / "state.json")


def find_checkpoint(run_dir: Path, which: str = "latest", warn: Callable[[str], Any] = warnings.warn) -> Path | None:
    """The checkpoint to resume from.

    Args:
        which: "latest": the newest that verifies, or None if the run has no checkpoint. Otherwise the number of
            images of a checkpoint of this run ("524288", "000524288"), or a path; `load_checkpoint` verifies it.
        warn: Called with one sentence for each damaged checkpoint that was passed over.

    Raises:
        CheckpointError: there are checkpoints, but all are damaged, or there is not the one asked for.
    """
    existing = list_checkpoints(run_dir)
    if which != "latest":
        path = next((path for path in existing if which.isdecimal() and int(which) == int(path.name)), Path(which))
        if not path.is_dir():
            raise CheckpointError(
                f"--resume_from_checkpoint {which}: there is no such checkpoint; {run_dir} has "
                f"{', '.join(path.name for path in existing) or 'none'}. Give one of these, a path, or latest."
            )
        return path
    damage = []
    for path in reversed(existing):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            damage.append(str(error))
        else:
            for sentence in damage:
                warn(f"{sentence} Using {path} instead.")
            return path
    if damage:
        raise CheckpointError(
            f"No checkpoint of {run_dir} can be used: {' '.join(damage)} "
            "Restore one from a copy, or start anew with another --output_dir."
        )
    return None


def _storable(named: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Dense CPU tensors that share no memory, as safetensors wants them; copied only where necessary."""
    storages, result = set(), {}
    for name, tensor in named.items():
        tensor = tensor.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if address in storages else tensor
        storages.add(address)
    return result


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _listing_sha256(files: Any) -> str:
    """Of the manifest's own table, so that a changed manifest is not blamed on the files it lists."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: it is not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: it is not a JSON object.")
    return content


# ---- Optimizer state as tensors ------------------------------------------------------------------


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, torch.nn.Parameter]]
) -> dict[str, torch.Tensor]:
    """The state of an optimizer as `{parameter name}.{exp_avg, exp_avg_sq, step, ...}`.

    A number becomes a 0-dim tensor under `{parameter name}.{key}:number`; a parameter without state (no gradient yet)
    an empty tensor under its own name. The learning rate and other options are not state: they come from the recipe.
    The tensors are the optimizer's own, not copies: save them before the next step.

    Raises:
        ValueError: `named_parameters` lacks a parameter of the optimizer.
        TypeError: a value is neither a tensor nor a number.
    """
    tensors = {}
    for name, parameter in _by_name(optimizer, named_parameters).items():
        state = optimizer.state.get(parameter, {})
        if not state:
            tensors[name] = torch.empty(0)
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{name}.{key}"] = value
            elif isinstance(value, (int, float)):
                dtype = torch.float64 if isinstance(value, float) else None  # None: bool and int64
                tensors[f"{name}.{key}:number"] = torch.tensor(value, dtype=dtype)
            else:
                raise TypeError(
                    f"{type(optimizer).__name__} keeps a {type(value).__name__} as {key} of {name}; "
                    "only tensors and numbers can be saved: use another optimizer."
                )
    return tensors


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Give an optimizer the state that `optimizer_tensors` returned; the next step is bitwise the same.

    The tensors are copied. Those of a parameter's shape get its strides: the fused kernels walk both in step.

    Raises:
        ValueError: state is missing, of an unknown parameter, or does not fit a parameter's shape.
    """
    parameters = _by_name(optimizer, named_parameters)
    states: dict[str, dict[str, Any]] = {}
    unexpected, misfits = [], []
    for full_name, tensor in tensors.items():
        if full_name in parameters:
            states[full_name] = {}
            continue
        name, _, key = full_name.rpartition(".")
        if name not in parameters:
            unexpected.append(full_name)
            continue
        parameter, state = parameters[name], states.setdefault(name, {})
        if key.endswith(":number"):
            state[key.removesuffix(":number")] = tensor.item()
        elif tensor.shape == parameter.shape:
            state[key] = torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
        elif _spreads_to(tensor.shape, parameter.shape):
            state[key] = tensor.to("cpu", copy=True)  # load_state_dict moves it, where the optimizer wants that
        else:
            misfits.append(f"{full_name} {tuple(tensor.shape)} for {tuple(parameter.shape)}")
    missing = [name for name in parameters if name not in states]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": misfits}
    if any(problems.values()):
        lists = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names)
        raise ValueError(
            f"The optimizer state does not fit the network: {lists}. Resume with the network it was saved with."
        )
    options = optimizer.state_dict()["param_groups"]
    states_by_index = {index: states[name] for index, name in enumerate(parameters) if states[name]}
    optimizer.load_state_dict({"state": states_by_index, "param_groups": options})


def _by_name(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, torch.nn.Parameter]]
) -> dict[str, torch.nn.Parameter]:
    """The optimizer's parameters, in its own order."""
    names = {parameter: name for name, parameter in named_parameters}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    unnamed = [tuple(parameter.shape) for parameter in parameters if parameter not in names]
    if unnamed:
        raise ValueError(
            f"The optimizer holds parameters of shapes {unnamed} that are not among the named ones; "
            "pass named_parameters() of the network it was made for."
        )
    return {names[parameter]: parameter for parameter in parameters}


def _spreads_to(shape: torch.Size, target: torch.Size) -> bool:
    """Scalars (a step count), rows and columns (factored moments)."""
    return not shape or (len(shape) == len(target) and all(n in (1, m) for n, m in zip(shape, target, strict=True)))


# ---- Configuration -------------------------------------------------------------------------------


def write_config(run_dir: Path, config: Mapping[str, Any]) -> None:
    """Write `run_dir/config.json`: a JSON object with the resolved recipe under "options"."""
    path = run_dir / "config.json"
    with explain_save_errors(run_dir, path):
        write_atomic(path, json.dumps(config, indent=2) + "\n")


def check_config(run_dir: Path, config: Mapping[str, Any], free: set[str]) -> bool:
    """True if `run_dir` holds a run of the same "options", False if it holds nothing yet.

    Args:
        free: Names of options that may change from one start to the next.

    Raises:
        ValueError: the folder holds something else, its config.json is broken, or options differ; all are listed.
    """
    path = run_dir / "config.json"
    if not path.exists():
        # A killed first start may have left these two.
        names = [name for name in (os.listdir(run_dir) if run_dir.exists() else []) if name != LOCK]
        if any(not name.startswith(".tmp-") for name in names):
            raise ValueError(f"{run_dir} is not empty and not a run folder: it has no config.json. {_ANOTHER_FOLDER}")
        return False
    try:
        before = _read_json(path)["options"]
    except (CheckpointError, KeyError) as error:
        reason = 'it has no "options".' if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is broken: {reason} Restore it from a copy. {_ANOTHER_FOLDER}") from error
    now = json.loads(json.dumps(config["options"]))  # tuples as lists, as in the file
    differences = [
        f"{name}: was {_show(before, name)}, now {_show(now, name)}"
        for name in sorted(before.keys() | now.keys())
        if name not in free and _show(before, name) != _show(now, name)
    ]
    if differences:
        raise ValueError(
            f"{run_dir} is a run with other options:\n  "
            + "\n  ".join(differences)
            + f"\nGive the same options to resume it. {_ANOTHER_FOLDER}"
        )
    return True


_ANOTHER_FOLDER = "Give another --output_dir to start a new run."


def _show(options: Mapping[str, Any], name: str) -> str:
    return json.dumps(options[name], sort_keys=True) if name in options else "(not set)"


# ---- Metrics -------------------------------------------------------------------------------------


class MetricsFile:
    """One strict JSON object per line; each has "nimg", the images seen, and is on the disk when `append` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with explain_save_errors(path.parent, path):
            make_folder(path.parent)
            path.touch()
            sync(path.parent)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line. NaN and infinity become null, which JSON has and every reader knows.

        Raises:
            ValueError: `record` has no "nimg", by which `truncate_metrics` would drop it.
            CheckpointError: it could not be written.
        """
        if "nimg" not in record:
            raise ValueError(f'A line of {self.path} needs "nimg", the images seen; it has {sorted(record)}.')
        line = json.dumps(_finite(record), allow_nan=False) + "\n"
        with explain_save_errors(self.path.parent, self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def truncate_metrics(path: Path, nimg: int) -> int:
    """Drop the lines after `nimg` images and any that is not whole, in one step. Returns how many.

    So a run that resumes from a checkpoint at `nimg` writes each line once. A file that does not exist has no lines.
    """
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _is_within(line, nimg)]
    if len(kept) < len(lines):
        with explain_save_errors(path.parent, path):
            write_atomic(path, b"".join(kept))
    return len(lines) - len(kept)


def _is_within(line: bytes, nimg: int) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["nimg"] <= nimg
    except (ValueError, KeyError, TypeError):
        return False


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
