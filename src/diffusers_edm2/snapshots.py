"""Snapshot folders: finding and checking them, and building networks of any EMA length from them (post-hoc EMA).

A snapshot is a model folder (`config.json` and safetensors) that holds one average of a network at one time of its
training, named `unet-<nimg>-<sigma_rel>`. Others are sums of snapshots (EDM2 Section 3.2), which are computed here
tensor by tensor: each file is read once for all of them, and the memory is that of a few tensors.
"""

import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import torch
from diffusers.utils import logging
from torch import Tensor

from diffusers_edm2.ema import parse_snapshot_name, posthoc_coefficients, sigma_rel_to_gamma, snapshot_name
from diffusers_edm2.files import atomic_folder, clean_leftovers, make_folder
from diffusers_edm2.pipeline_edm2 import EDM2Pipeline
from diffusers_edm2.scheduling_edm2_heun import EDM2HeunScheduler
from diffusers_edm2.unet_edm2 import EDM2UNet2DModel

CONFIG = "config.json"
CACHE = "posthoc"
WARN_ABOVE = 0.01  # relative distance of profiles
WEIGHTS = "diffusion_pytorch_model.safetensors"

logger = logging.get_logger(__name__)

# As safetensors calls them, in the order in which it writes them: the widest first.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class SnapshotError(RuntimeError):
    """A file of a snapshot is damaged, or belongs to another network; the message names it."""


# ---- Finding them --------------------------------------------------------------------------------


class Snapshot(NamedTuple):
    """One average of a network's weights: after `nimg` images, of the length `sigma_rel`."""

    path: Path
    nimg: int
    sigma_rel: float


def list_snapshots(source: Path | Sequence[Path]) -> list[Snapshot]:
    """The snapshots of a run folder, of a folder of snapshots, or those in a list of folders; oldest first.

    Raises:
        ValueError: there is none, a folder of the list is not named like one, or two have the same time and length.
    """
    if isinstance(source, Path):
        folder = source / "snapshots" if (source / "snapshots").is_dir() else source
        paths = [path for path in folder.iterdir() if parse_snapshot_name(path.name)] if folder.is_dir() else []
        if not paths:
            raise ValueError(
                f"{source} has no snapshots; give a run folder of training/train_edm2.py, or a folder that holds "
                f'folders such as "{snapshot_name(524288, 0.05)}".'
            )
    else:
        paths = list(source)
    snapshots: dict[tuple[int, float], Snapshot] = {}
    for path in paths:
        if not (parsed := parse_snapshot_name(path.name)):
            raise ValueError(
                f'{path} is not named like a snapshot; the name gives its time and length: "unet-<nimg>-<sigma_rel>", '
                f'such as "{snapshot_name(524288, 0.05)}".'
            )
        if parsed in snapshots:
            raise ValueError(f"{path} and {snapshots[parsed].path} are of the same time and length; give one of them.")
        snapshots[parsed] = Snapshot(path, *parsed)
    return [snapshots[key] for key in sorted(snapshots)]


def find_networks(
    run_dir: Path,
    requests: Sequence[tuple[float | None, int | None]],
    progress: Callable[[Sequence[str]], Iterable[str]] = iter,
) -> list[Path]:
    """A model folder for each (sigma_rel, nimg): the snapshot that is just that, or else a reconstruction.

    Reconstructions are kept in `run_dir/posthoc`; the missing ones are made in one pass over the snapshots. Several
    processes may ask at the same time: one makes them, the others wait for it.

    Args:
        run_dir: a run folder, or a folder of snapshots.
        requests: for `sigma_rel`, None means the run's first track; for `nimg`, its newest snapshot.
        progress: see `reconstruct`.

    Raises:
        ValueError, SnapshotError: see `list_snapshots` and `reconstruct`.
    """
    there = {(snapshot.sigma_rel, snapshot.nimg): snapshot.path for snapshot in list_snapshots(run_dir)}
    snapshots = _complete(list_snapshots(run_dir))
    first, newest = newest_network(run_dir)
    wanted = [(first if s is None else s, newest if n is None else n) for s, n in requests]
    cache = run_dir / CACHE
    found = {(s, n): there.get((s, n), cache / snapshot_name(n, s)) for s, n in wanted}
    if not all(_is_current(path, n, snapshots) for (_, n), path in found.items()):
        import fcntl  # of POSIX; the package is imported elsewhere too, to draw images

        check_targets(snapshots, [target for target in wanted if target not in there])
        make_folder(cache)
        with open(cache / ".lock", "a") as lock:
            with suppress(OSError):  # a file system without locks: whoever is later fails
                fcntl.flock(lock, fcntl.LOCK_EX)
            clean_leftovers(cache)
            missing = {target: path for target, path in found.items() if not _is_current(path, target[1], snapshots)}
            if missing:
                targets, folders = list(missing), list(missing.values())
                reconstruct(snapshots, targets, folders, overwrite=True, progress=progress)
    return [found[target] for target in wanted]


def _complete(snapshots: Sequence[Snapshot]) -> list[Snapshot]:
    """Without a last time at which some tracks are missing: a training in progress writes them one after the other."""
    tracks, last = {s.sigma_rel for s in snapshots}, max(s.nimg for s in snapshots)
    before = [s for s in snapshots if s.nimg < last]
    return list(snapshots) if tracks == {s.sigma_rel for s in snapshots if s.nimg == last} or not before else before


def _is_current(path: Path, nimg: int, snapshots: Sequence[Snapshot]) -> bool:
    """Whether a network is there that is no older than the snapshots behind it, which a resumed run may write anew."""
    if not path.is_dir() or path.parent.name != CACHE:
        return path.is_dir()
    return path.stat().st_mtime >= max(s.path.stat().st_mtime for s in snapshots if s.nimg <= nimg)


def newest_network(run_dir: Path) -> tuple[float, int]:
    """(sigma_rel, nimg) of a run's first track, else the shortest there is, at the last time that has all tracks.

    Raises:
        ValueError: there is no snapshot.
    """
    snapshots, options = _complete(list_snapshots(run_dir)), run_options(run_dir)
    tracks = options.get("ema_sigma_rel") or [min(s.sigma_rel for s in snapshots)]
    return tracks[0], snapshots[-1].nimg


def run_sigma_data(run_dir: Path) -> float:
    """σ_data of a run: of its options, or else of its pipeline's scheduler, or else 0.5."""
    scheduler = run_dir / "pipeline" / "scheduler" / "scheduler_config.json"
    kept = _read_json(scheduler) if scheduler.exists() else {}
    return run_options(run_dir).get("sigma_data", kept.get("sigma_data", 0.5))


def run_options(run_dir: Path) -> dict:
    """The options that a run was started with; {} if the folder has no `config.json`."""
    path = run_dir / CONFIG
    return _read_json(path).get("options", {}) if path.exists() else {}


# ---- Reconstruction ------------------------------------------------------------------------------


def reconstruct(
    snapshots: Sequence[Snapshot],
    targets: Sequence[tuple[float, int]],
    folders: Sequence[Path],
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    progress: Callable[[Sequence[str]], Iterable[str]] = iter,
    template: Path | None = None,
) -> list[float]:
    """Write the network of each target, built from the snapshots (EDM2 eq. 151, Alg. 3), into its folder.

    The snapshots are read once for all targets, tensor by tensor: besides a constant, the memory is that of the
    largest tensor, in float32, times the number of targets + 2. Sums are float32, from the oldest snapshot to the
    newest. What does not train, the Fourier features, is taken from the snapshots as it is. A target that is one of
    the snapshots comes out as it is, too.

    Args:
        snapshots: of one network; those after all targets are not touched.
        targets: (sigma_rel, nimg) each; `nimg` is the time of one of the snapshots.
        folders: one for each target; each appears whole or not at all.
        dtype: float32, float16 or bfloat16; the modules that a network keeps in float32 stay in float32.
        overwrite: replace folders that exist.
        progress: wraps the list of the tensors' names while they are worked on; `tqdm` is such a function.
        template: a pipeline folder: write copies of it, with the reconstructed network as their `unet`.

    Returns:
        For each target the relative distance between the wanted profile and the one built.

    Raises:
        FileExistsError: a folder exists already.
        ValueError: a target that these snapshots cannot give; the lengths and times of `snapshots` tell what they can.
        SnapshotError: a file is damaged, or the snapshots are of different networks.
        OSError: the disk is full, or a folder cannot be written.
    """
    if len(set(folders)) < len(targets):
        raise ValueError(f"{len(targets)} targets need as many different folders, not {[str(f) for f in folders]}.")
    for folder in folders:
        if folder.exists() and not overwrite:
            raise FileExistsError(f"{folder} exists already; remove it or choose another name.")
    check_targets(snapshots, targets)
    used = [s for s in sorted(snapshots, key=lambda s: s[1:]) if s.nimg <= max(nimg for _, nimg in targets)]
    coefficients, errors = posthoc_coefficients([(s.sigma_rel, s.nimg) for s in used], targets)
    for folder, distance in zip(folders, errors, strict=True):
        if distance > WARN_ABOVE:
            logger.warning(
                f"{folder.name}: the nearest profile that these snapshots can build is {distance:.1%} away from the "
                "wanted one; more snapshots (--snapshot_every), or a sigma_rel closer to a tracked one, make it less."
            )
    contents = [_Contents(s.path) for s in used]
    config, trained = _common_network(contents)
    frozen = _common_frozen_tensors(contents, trained)
    layout = _layout(contents[0], trained, dtype)
    size = sum(math.prod(shape) * dtype.itemsize for dtype, shape in layout.values())
    _check_space(folders, size * len(targets))
    with ExitStack() as stack:
        files = []
        for folder in folders:
            place = stack.enter_context(atomic_folder(folder, replace=overwrite))
            if template is not None:
                shutil.copytree(template, place, ignore=_weights_of_unet(template), dirs_exist_ok=True)
                place = place / "unet"
            (place / CONFIG).write_bytes(config)
            files.append(stack.enter_context(open(place / WEIGHTS, "wb")))
            files[-1].write(_header(layout))
        _write_tensors(files, layout, contents, coefficients, frozen, progress)
    return errors.tolist()


def check_targets(snapshots: Sequence[Snapshot], targets: Sequence[tuple[float, int]]) -> None:
    """Raise ValueError if the snapshots cannot give one of the targets at all, well or not (`reconstruct`)."""
    times = sorted({snapshot.nimg for snapshot in snapshots})
    for sigma_rel, nimg in targets:
        sigma_rel_to_gamma(sigma_rel)
        if nimg not in times:
            raise ValueError(
                f"nimg={nimg}: there is no snapshot of this time; there are {len(times)}, from {times[0]} to "
                f"{times[-1]}, the nearest at {min(times, key=lambda time: abs(time - nimg))}."
            )
        usable = [s for s in snapshots if s.nimg <= nimg]
        if len(usable) == 1 and usable[0].sigma_rel != sigma_rel:
            raise ValueError(
                f"{usable[0].path} is the only snapshot up to nimg={nimg}: it can give nothing but its own "
                f"sigma_rel={usable[0].sigma_rel}, not {sigma_rel}; train with two --ema_sigma_rel or with a smaller "
                "--snapshot_every, or choose a later time."
            )


@contextmanager
def pipeline_template(source: Path) -> Iterator[Path]:
    """The pipeline folder of the run that `source` is, or is a folder of.

    If there is none, a temporary one: the Heun scheduler with the run's sigma_data, or 0.5, and no VAE.
    """
    places = [source.absolute()]
    if not (source / "snapshots").is_dir():
        places += source.absolute().parents[:2]
    for place in places:
        if (place / "pipeline" / "model_index.json").exists():
            yield place / "pipeline"
            return
    sigma_data = next((options["sigma_data"] for place in places if (options := run_options(place))), 0.5)
    logger.warning(
        f"{source} has no folder named pipeline: the pipelines get the Heun scheduler, sigma_data={sigma_data}, no VAE."
    )
    unet = EDM2UNet2DModel(8, 1, (8,), 1, (), 8)  # a stand-in for one of any shape
    with tempfile.TemporaryDirectory() as folder:
        EDM2Pipeline(unet, EDM2HeunScheduler(sigma_data=sigma_data)).save_pretrained(folder)
        yield Path(folder)


def open_pipeline(
    run_dir: str | os.PathLike,
    sigma_rel: float | None = None,
    nimg: int | None = None,
    guide: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> EDM2Pipeline:
    """What `EDM2Pipeline.from_run` does; its docstring is there."""
    run_dir, guide_dir = Path(run_dir), Path(run_dir)
    requests, guide_requests = [(sigma_rel, nimg)], []
    if guide is not None:
        unknown = guide.keys() - {"run_dir", "sigma_rel", "nimg"}
        if unknown:
            raise ValueError(f"guide has the unknown keys {sorted(unknown)}; it takes run_dir, sigma_rel and nimg.")
        guide_dir = Path(guide.get("run_dir") or run_dir)
        guide_requests = [(guide.get("sigma_rel"), guide.get("nimg"))]
        scales = [run_sigma_data(folder) for folder in (guide_dir, run_dir)]
        if scales[0] != scales[1]:
            raise ValueError(
                f"{guide_dir} was trained with sigma_data={scales[0]}, {run_dir} with {scales[1]}; a guide shares it."
            )
    if guide_dir == run_dir:  # one pass over the snapshots for both
        paths = find_networks(run_dir, requests + guide_requests)
    else:
        paths = find_networks(run_dir, requests) + find_networks(guide_dir, guide_requests)
    # All else in kwargs is for the pipeline; a type may be given by component, as for DiffusionPipeline.
    networks = []
    for path, name in zip(paths, ("unet", "guide_unet"), strict=False):
        types = {key: kwargs[key] for key in ("torch_dtype", "dtype") if key in kwargs}
        types = {k: t.get(name, t.get("default")) if isinstance(t, Mapping) else t for k, t in types.items()}
        networks.append(EDM2UNet2DModel.from_pretrained(path, **types))
    guide_unet = networks[1] if guide is not None else None
    with pipeline_template(run_dir) as template:
        return EDM2Pipeline.from_pretrained(template, unet=networks[0], guide_unet=guide_unet, **kwargs)


def _weights_of_unet(template: Path) -> Callable[[str, list[str]], list[str]]:
    """For `copytree`: leave out the weights that the reconstructed ones replace."""

    def ignored(folder: str, names: list[str]) -> list[str]:
        is_unet = Path(folder) == template / "unet"
        return [name for name in names if is_unet and name.startswith("diffusion_pytorch_model")]

    return ignored


def _check_space(folders: Sequence[Path], needed: int) -> None:
    existing = next(place for place in folders[0].absolute().parents if place.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(
            f"{len(folders)} networks need {needed / 2**30:.2f} GiB, but only {free / 2**30:.2f} GiB are free in "
            f"{existing}; free some space, or write to another disk."
        )


def _write_tensors(
    files: Sequence[BinaryIO],
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]],
    contents: Sequence["_Contents"],
    coefficients: np.ndarray,
    frozen: dict[str, bytes],
    progress: Callable[[Sequence[str]], Iterable[str]],
) -> None:
    """Append all tensors to each file; the buffers are made once, for the largest of them."""
    largest = max(math.prod(shape) for _, shape in layout.values())
    sums = [torch.empty(largest) for _ in files]
    scratch = torch.empty(largest)  # one snapshot's tensor in float32, then one sum in the type of the file
    stored = bytearray(max(tensor.nbytes for content in contents for tensor in content.tensors.values()))
    for name in progress(list(layout)):
        if name in frozen:
            for file in files:
                file.write(frozen[name])
            continue
        dtype, shape = layout[name]
        numel = math.prod(shape)
        views = [total[:numel].zero_() for total in sums]
        for content, row in zip(contents, coefficients, strict=True):
            if row.any():
                addend = content.tensors[name].read_into(stored)
                if addend.dtype != torch.float32:
                    addend = scratch[:numel].copy_(addend)
                for total, coefficient in zip(views, row, strict=True):
                    if coefficient:
                        total.add_(addend, alpha=float(coefficient))
        for file, total in zip(files, views, strict=True):
            result = total if dtype == torch.float32 else scratch.view(dtype)[:numel].copy_(total)
            file.write(result.view(torch.uint8).numpy().data)


# ---- Checking ------------------------------------------------------------------------------------


def _common_network(contents: Sequence["_Contents"]) -> tuple[bytes, set[str]]:
    """The `config.json` of the newest snapshot and the names of what trains; all snapshots must fit this network."""
    newest = contents[-1]
    network = _network(newest)
    tensors = network.state_dict(keep_vars=True)
    for content in contents:
        # As the class understands them: a snapshot of an older version may lack options that are new.
        options = network.config if content.config == newest.config else _network(content).config
        different = [key for key in network.config if key[0] != "_" and options[key] != network.config[key]]
        if different:
            raise SnapshotError(
                f"{content.path / CONFIG} belongs to another network than {newest.path / CONFIG}: {different[0]} is "
                f"{options[different[0]]}, there {network.config[different[0]]}. Give the snapshots of one run."
            )
        shapes = {name: tensor.shape for name, tensor in content.tensors.items()}
        wrong = [n for n in tensors | shapes if n not in shapes or n not in tensors or shapes[n] != tensors[n].shape]
        if wrong:
            name = wrong[0]
            found = f"is {list(shapes[name])}" if name in shapes else "is missing"
            wanted = f"{list(tensors[name].shape)}" if name in tensors else "no such tensor"
            raise SnapshotError(
                f"{content.path} does not fit its {CONFIG}: {name} {found}, the network has {wanted}. "
                "Restore the snapshot from a copy, or move it away."
            )
    return (newest.path / CONFIG).read_bytes(), {name for name, tensor in tensors.items() if tensor.requires_grad}


def _network(content: "_Contents") -> EDM2UNet2DModel:
    """The network of a snapshot, without memory for its weights."""
    path = content.path / CONFIG
    if content.config.get("_class_name") != EDM2UNet2DModel.__name__:
        raise SnapshotError(f"{path} is of the class {content.config.get('_class_name')}, not EDM2UNet2DModel.")
    try:
        with torch.device("meta"):
            return cast(EDM2UNet2DModel, EDM2UNet2DModel.from_config(content.config))
    except (TypeError, ValueError) as error:
        raise SnapshotError(f"{path} is damaged: {error}") from error


def _common_frozen_tensors(contents: Sequence["_Contents"], trained: set[str]) -> dict[str, bytes]:
    """The bytes of what does not train. It tells two networks of one shape apart: random features never change."""
    newest = contents[-1]
    frozen = {name: tensor.read() for name, tensor in newest.tensors.items() if name not in trained}
    for content in contents:
        for name, data in frozen.items():
            if content.tensors[name].read() != data:
                raise SnapshotError(
                    f"{content.path} and {newest.path} are of two different networks: {name}, which does not train, "
                    "differs. Give the snapshots of one run."
                )
    return frozen


def _layout(
    content: "_Contents", trained: set[str], dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of each tensor of a result, in the order of the file."""
    exact = set(EDM2UNet2DModel._keep_in_fp32_modules)
    types = {
        name: tensor.dtype if name not in trained else torch.float32 if exact & set(name.split(".")) else dtype
        for name, tensor in content.tensors.items()
    }
    order = list(_NAMES)
    names = sorted(types, key=lambda name: (order.index(types[name]), name))
    return {name: (types[name], content.tensors[name].shape) for name in names}


# ---- The safetensors format, by plain reads and writes: mapped files would count as memory ------------


class _Stored(NamedTuple):
    """Where a tensor is stored."""

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read_into(self, buffer: bytearray) -> Tensor:
        """The values, flat: a view of `buffer`."""
        rest = memoryview(buffer)[: self.nbytes]
        with _reading(self.file) as file:
            file.seek(self.offset)
            while rest:
                count = file.readinto(rest)  # not more than 2 GiB at once
                if not count:
                    raise SnapshotError(f"{self.file} has become shorter while it was read.")
                rest = rest[count:]
        return torch.frombuffer(buffer, dtype=self.dtype, count=math.prod(self.shape))

    def read(self) -> bytes:
        buffer = bytearray(self.nbytes)
        self.read_into(buffer)
        return bytes(buffer)


class _Contents:
    """The options and the tensors of a snapshot; only the beginnings of its files are read."""

    def __init__(self, path: Path):
        self.path = path
        self.config = _read_json(path / CONFIG)
        index = path / f"{WEIGHTS}.index.json"
        if index.exists():
            files = [path / name for name in sorted(set(_read_json(index).get("weight_map", {}).values()))]
        else:
            files = [path / WEIGHTS]
        self.tensors: dict[str, _Stored] = {}
        for file in files:
            self.tensors |= _read_header(file)


def _read_header(path: Path) -> dict[str, _Stored]:
    """The tensors of a safetensors file: 8 bytes with the length of the header, the header in JSON, the values."""
    with _reading(path) as file:
        size = path.stat().st_size
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= size - 8:
            raise SnapshotError(f"{path} is damaged: it does not begin like a safetensors file.")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            stored = {
                name: _Stored(
                    path, 8 + length + entry["data_offsets"][0], _DTYPES[entry["dtype"]], tuple(entry["shape"])
                )
                for name, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise SnapshotError(f"{path} is damaged: its header cannot be understood ({error!r}).") from error
    end = max((tensor.offset + tensor.nbytes for tensor in stored.values()), default=8 + length)
    if size != end:
        raise SnapshotError(f"{path} is damaged: it has {size} bytes, and its header speaks of {end}.")
    return stored


def _header(layout: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in layout.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


@contextmanager
def _reading(path: Path) -> Iterator[FileIO]:
    try:
        with open(path, "rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise SnapshotError(f"{path} cannot be read: {error.strerror}.") from error


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SnapshotError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise SnapshotError(f"{path} is damaged: it is not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise SnapshotError(f"{path} is damaged: it is not a JSON object.")
    return content
