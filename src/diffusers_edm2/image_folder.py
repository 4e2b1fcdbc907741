"""A folder of drawn images: their numbers, seeds and classes, their files, and the settings that they were drawn with.

    generation.json                every setting; a folder takes images of one setting only
    001000/001234.png              the image of number 1234, in most cases of seed 1234
    dataset.json                   the class of each, once all are there, as in EDM2's data sets

or, in the format "npz", `parts/001000/001234.png` until all are there, and then one `images.npz`. Files appear whole or
not at all, so what is there is complete, whenever a process was ended.
"""

import hashlib
import json
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from PIL import Image

from diffusers_edm2.files import atomic_file, clean_leftovers, discard, write_atomic

PER_FOLDER = 1000
NPZ, PARTS, SETTINGS = "images.npz", "parts", "generation.json"
CLASS_RULES = ("all", "balanced", "random", "none")


class Numbering:
    """Which seed and class an image has, as a function of its number alone.

    A number is a seed, or, where every class is drawn for every seed, seed * num_classes + class.

    Args:
        rule: "random": a class drawn from the seed's generator, as `EDM2Pipeline` does by itself; "balanced": seed
            modulo the number of classes; a list: its classes in turn, seed modulo its length; "all": every class for
            every seed; "none": no class. None: "random", or "none" for a network without classes.
        num_classes: classes of the network; 0 for none.
        shape: of the network's sample, (C, H, W).

    Raises:
        ValueError: a class that the network does not have, or any for one without classes.
    """

    def __init__(self, rule: str | Sequence[int] | None, num_classes: int, shape: tuple[int, int, int]):
        if not num_classes and rule not in (None, "none"):
            raise ValueError("classes were asked for, but the network has none; leave --class_labels out.")
        self.rule = rule if rule is not None else "random" if num_classes else "none"
        if not isinstance(self.rule, str) and not all(0 <= label < num_classes for label in self.rule):
            raise ValueError(f"the classes of this network are 0 to {num_classes - 1}, and not {list(self.rule)}.")
        self.num_classes, self.shape = num_classes, shape
        self.per_seed = num_classes if self.rule == "all" else 1

    def of_seed(self, seed: int) -> range:
        """The numbers of a seed's images."""
        return range(seed * self.per_seed, (seed + 1) * self.per_seed)

    def place(self, number: int) -> tuple[int, int]:
        """Seed and class of an image; -1: no class."""
        seed, position = divmod(number, self.per_seed)
        if not isinstance(self.rule, str):
            return seed, self.rule[seed % len(self.rule)]
        if self.rule == "random":
            generator = torch.Generator().manual_seed(seed)
            torch.randn((1, *self.shape), generator=generator)  # the pipeline draws the noise first
            return seed, int(torch.randint(self.num_classes, (1,), generator=generator))
        return seed, {"none": -1, "all": position, "balanced": seed % max(self.num_classes, 1)}[self.rule]


class ImageFolder:
    """The images of one folder, in the format "png" or "npz"."""

    def __init__(self, folder: Path, image_format: str, numbering: Numbering):
        self.folder, self.numbering = folder, numbering
        self.npz = folder / NPZ if image_format == "npz" else None
        self.images = folder / PARTS if self.npz else folder  # where PNG files go

    def open(
        self,
        settings: Mapping[str, Any],
        source: Mapping[str, Any],
        environment: Mapping[str, str],
        seeds: Sequence[int],
    ) -> list[str]:
        """Make the folder ready for the images of `seeds`: in the main process, before any other writes.

        Args:
            settings: all that decides about the images.
            source: where the model comes from, to read; the settings tell models apart.
            environment: versions and device, which should stay the same.

        Returns:
            Sentences to tell the user.

        Raises:
            ValueError: it holds images of other settings, all differences named; or something else than images.
        """
        before = check_settings(self.folder, settings)
        told = clean_leftovers(self.folder) + (clean_leftovers(self.images) if self.npz else [])
        packed = self._packed()
        if self.npz and packed and self.missing(self.numbers(seeds)):  # what it has becomes part of the next .npz
            for number, array in zip(packed, read_npz(self.npz), strict=True):
                self.save(number, to_picture(array))
        environments = before.get("environments", [])
        if environment not in environments:
            if environments:
                told.append(f"{self.folder} was begun with other versions or on another device; rounding may differ.")
            environments = [*environments, environment]
        seeds = sorted({*parse_seeds(before["seeds"]), *seeds}) if before else seeds
        content = {"settings": settings, "source": source, "seeds": format_seeds(seeds), "environments": environments}
        write_atomic(self.folder / SETTINGS, json.dumps(content, indent=2) + "\n")
        return told

    def numbers(self, seeds: Iterable[int]) -> list[int]:
        """The numbers of all images of some seeds."""
        return [number for seed in seeds for number in self.numbering.of_seed(seed)]

    def missing(self, wanted: Iterable[int]) -> list[int]:
        """The numbers of `wanted` that are not drawn yet."""
        there = existing_images(self.images).union(self._packed())
        return [number for number in wanted if number not in there]

    def save(self, number: int, picture: Image.Image) -> None:
        """Raises OSError with the file's name if it cannot be written."""
        path = image_path(self.images, number)
        try:
            with atomic_file(path) as file:
                picture.save(file)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error

    def complete(self) -> None:
        """Make of the images what was asked for: PNG files with a list of their classes, or one .npz file."""
        numbers = sorted(existing_images(self.images))
        paths = [image_path(self.images, number) for number in numbers]
        if not self.npz:
            names = [str(path.relative_to(self.folder)) for path in paths]
            classes = [self.numbering.place(number)[1] for number in numbers]
            listed = None if self.numbering.rule == "none" else list(zip(names, classes, strict=True))
            write_atomic(self.folder / "dataset.json", json.dumps({"labels": listed}) + "\n")
        elif self.images.is_dir():
            if not set(numbers) <= set(self._packed()):
                places = [self.numbering.place(number) for number in numbers]
                classes = None if self.numbering.rule == "none" else [label for _, label in places]
                with atomic_file(self.npz) as file:
                    write_npz(file, map(read_image, paths), [seed for seed, _ in places], classes)
            discard(self.images)

    def read(self, numbers: Sequence[int]) -> list[Image.Image]:
        """Pictures of a complete folder."""
        if not self.npz:
            return [to_picture(read_image(image_path(self.images, number))) for number in numbers]
        chosen = set(numbers)
        found = {n: array for n, array in zip(self._packed(), read_npz(self.npz), strict=True) if n in chosen}
        return [to_picture(found[number]) for number in numbers]

    def _packed(self) -> list[int]:
        """The numbers of the images in the .npz file, which are in this order there."""
        if not (self.npz and self.npz.is_file()):
            return []
        with np.load(self.npz) as archive:
            seeds = archive["seeds"].tolist()
            positions = archive["arr_1"].tolist() if self.numbering.per_seed > 1 else [0] * len(seeds)
        return [s * self.numbering.per_seed + p for s, p in zip(seeds, positions, strict=True)]


# ---- Files ---------------------------------------------------------------------------------------


def image_path(folder: Path, number: int) -> Path:
    """`folder/001000/001234.png` for number 1234: each sub-folder is named after its first number."""
    return folder / f"{number - number % PER_FOLDER:06d}" / f"{number:06d}.png"


def existing_images(folder: Path) -> set[int]:
    """The numbers of all PNG files in `folder`, which need not exist."""
    subfolders = [p for p in folder.iterdir() if re.fullmatch(r"\d{6,}", p.name)] if folder.is_dir() else []
    names = (path.name for subfolder in subfolders for path in subfolder.iterdir())
    return {int(match[1]) for name in names if (match := re.fullmatch(r"(\d{6,})\.png", name))}


def read_image(path: Path) -> np.ndarray:
    """A PNG file as uint8 [H,W,C], C = 1 or 3."""
    with Image.open(path) as image:
        array = np.asarray(image)
    return array if array.ndim == 3 else array[:, :, None]


def to_picture(array: np.ndarray) -> Image.Image:
    """uint8 [H,W,C], C = 1 or 3, as a picture."""
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def write_npz(path: Path, images: Iterable[np.ndarray], seeds: Sequence[int], classes: Sequence[int] | None) -> None:
    """Write images uint8 [H,W,C], one by one, as an uncompressed .npz file; the same images give the same bytes.

    It holds `arr_0` uint8 [N,H,W,C], the images; `arr_1` int64 [N], their classes, if there are any (the two names are
    those of `np.savez(path, images, classes)`, which ADM's evaluator reads); and `seeds` int64 [N].

    Raises:
        ValueError: images of several shapes, or not one seed and class for each image.
    """
    count, shape = 0, None
    # Each entry as a ZipInfo, which has a fixed date: with a name alone it would get the present time.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
            for count, image in enumerate(images, 1):
                if shape is None:
                    shape = image.shape
                    header = {"descr": "|u1", "fortran_order": False, "shape": (len(seeds), *shape)}
                    npy.write_array_header_1_0(file, header)
                if image.shape != shape or image.dtype != np.uint8:
                    raise ValueError(f"image {count} is {image.dtype} {image.shape}, and the first one uint8 {shape}.")
                file.write(image.tobytes())
        if not count == len(seeds) == len(seeds if classes is None else classes):
            raise ValueError(f"there are {count} images and {len(seeds)} seeds; each image needs a seed and a class.")
        for name, values in {"arr_1": classes, "seeds": seeds}.items():
            if values is not None:
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as file:
                    npy.write_array(file, np.asarray(values, np.int64))


def read_npz(path: Path) -> Iterator[np.ndarray]:
    """The images of a file by `write_npz`, uint8 [H,W,C], one by one."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        npy.read_magic(file)
        (count, *shape), _, dtype = npy.read_array_header_1_0(file)
        for _ in range(count):
            yield np.frombuffer(file.read(int(np.prod(shape))), dtype).reshape(shape)


# ---- Settings ------------------------------------------------------------------------------------


def fingerprint(network: torch.nn.Module) -> str:
    """SHA-256 of the configuration and the weights of a Diffusers model, wherever it lies."""
    config = json.dumps(public(network.config), sort_keys=True, default=str)
    digest = hashlib.sha256(config.encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def public(config: Any) -> dict[str, Any]:
    """A Diffusers configuration without what it says about files and versions."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def check_settings(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What generation.json of `folder` says; {} for a folder without images, which takes any settings.

    Raises:
        ValueError: the folder holds images of other settings, or something else.
    """
    path = folder / SETTINGS
    if not path.exists():
        names = sorted(file.name for file in folder.iterdir() if file.name[0] != ".") if folder.is_dir() else []
        if names:
            raise ValueError(f"{folder} is not empty ({names[0]}) and has no {SETTINGS}; give another --output_dir.")
        return {}
    if not (folder / NPZ).exists() and not any(map(existing_images, (folder, folder / PARTS))):
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        before = dict(content["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); restore it, or give another --output_dir.") from error
    now = json.loads(json.dumps(settings))  # tuples as lists, as in the file
    differences = [
        f"{name}: was {_show(before, name)}, now {_show(now, name)}"
        for name in sorted(before.keys() | now.keys())
        if _show(before, name) != _show(now, name)
    ]
    if differences:
        listed = "\n  ".join(differences)
        raise ValueError(
            f"{folder} holds images of other settings:\n  {listed}\n"
            "Give the same settings to go on, or another --output_dir."
        )
    return content


def _show(settings: Mapping[str, Any], name: str) -> str:
    return json.dumps(settings[name], sort_keys=True) if name in settings else "(not set)"


def parse_seeds(text: str, maximum: int = 2**32 - 1) -> list[int]:
    """The text "0-3,20" as [0, 1, 2, 3, 20], sorted and without repetitions.

    Raises:
        ValueError: a part that is no whole number and no range of them, or is above `maximum`.
    """
    seeds: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not first <= last <= maximum:
            raise ValueError(f"{part!r} is no seed and no range of seeds from 0 to {maximum}, such as 0-9,20,30-39.")
        seeds.update(range(first, last + 1))
    return sorted(seeds)


def format_seeds(seeds: Sequence[int]) -> str:
    """Sorted seeds as the text that `parse_seeds` reads: [0, 1, 2, 3, 20] as "0-3,20"."""
    ranges: list[list[int]] = []
    for seed in seeds:
        if ranges and seed == ranges[-1][-1] + 1:
            ranges[-1][1:] = [seed]
        else:
            ranges.append([seed])
    return ",".join("-".join(map(str, ends)) for ends in ranges)
