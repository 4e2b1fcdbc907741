"""Training images from any source, in an order that is a pure function of (seed, images seen).

An `ImageSource` is a finite, numbered collection of images and labels. `TrainingImages` turns the number of a training
image, counted from the start of the run, into an image: every image once per pass. `GlobalBatchSampler` deals those
numbers out to the processes. None of them remembers anything, so a run resumed at any number is the same run.
"""

import io
import json
import math
import os
import struct
import weakref
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset, Sampler

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
LATENT_SUFFIX = ".npy"
LABEL_COLUMNS = ("label", "labels", "class", "cls")  # tried in this order where the data set declares no class column


class BadImageError(ValueError):
    """One image cannot be used as it is: it cannot be decoded, or has the wrong size or number of channels."""


# ---------------------------------------------------------------------------------------------------------------------
# One image


def decode_picture(data: bytes, mode: str | None = None) -> np.ndarray:
    """The pixels of an encoded image, upright: uint8 [H, W, 1] for grayscale, [H, W, 3] for everything else.

    The orientation noted in EXIF is applied. Palette, CMYK, YCbCr and Lab become RGB, 1-bit becomes grayscale. A
    transparent image is laid over white; an opaque alpha channel just goes.

    Args:
        data: the content of an image file.
        mode: Pillow mode to convert to first, for data sets that declare one.

    Raises:
        ValueError: samples of more than 8 bits (modes "I", "I;16", "F"), which cannot be had in 8 without a choice.
        Exception: whatever Pillow raises for damaged data.
    """
    image = Image.open(io.BytesIO(data))
    image.load()
    image = ImageOps.exif_transpose(image)
    if mode is not None:
        image = image.convert(mode)
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"its samples have more than 8 bits (mode {image.mode}); convert it to 8 bits")
    gray = image.mode in {"1", "L", "La", "LA"}
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = np.asarray(image.convert("L" if gray else "RGB"))
    return pixels.reshape(*pixels.shape[:2], -1)


def decode_latents(data: bytes) -> np.ndarray:
    """Stored latents from the content of an NPY file: float32 [C, H, W].

    Raises:
        ValueError: not a finite array of floating-point numbers with three axes, or not an NPY file.
    """
    return check_latents(np.load(io.BytesIO(data)))


def check_latents(array: np.ndarray) -> np.ndarray:
    """Stored latents, float [C, H, W], as float32; raises ValueError if that is not what they are."""
    if array.ndim != 3 or not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"it holds {array.dtype} {list(array.shape)}; stored latents are float [C, H, W]")
    if not np.isfinite(array).all():
        raise ValueError("it holds numbers that are not finite")
    return array.astype(np.float32)


def center_crop(pixels: np.ndarray, resolution: int) -> np.ndarray:
    """The centred square over the shorter side, resized with Lanczos: uint8 [H, W, C] to a square."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    image = _to_pillow(pixels[top : top + side, left : left + side])
    return _from_pillow(image.resize((resolution, resolution), Image.Resampling.LANCZOS))


def dhariwal_crop(pixels: np.ndarray, resolution: int) -> np.ndarray:
    """The centre crop of ADM (Dhariwal and Nichol 2021), used for ImageNet by EDM2: uint8 [H, W, C] to a square.

    Halve with a box filter while the shorter side is at least twice `resolution`, bring the shorter side to
    `resolution` with a bicubic filter, then cut out the centre.
    """
    image = _to_pillow(pixels)
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    top, left = (image.height - resolution) // 2, (image.width - resolution) // 2
    return _from_pillow(image)[top : top + resolution, left : left + resolution]


def wide_crop(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """The centred part of the shape width : height, resized with Lanczos, on a black square: uint8 [width, width, C].

    Args:
        pixels: uint8 [H, W, C].
        width, height: pixels of the part, height <= width; the square has `width` pixels a side.
    """
    full_height, full_width = pixels.shape[:2]
    scale = min(full_width / width, full_height / height)
    part_width, part_height = (min(round(n * scale), full) for n, full in ((width, full_width), (height, full_height)))
    top, left = (full_height - part_height) // 2, (full_width - part_width) // 2
    image = _to_pillow(pixels[top : top + part_height, left : left + part_width])
    square = np.zeros((width, width, pixels.shape[2]), np.uint8)
    above = (width - height) // 2
    square[above : above + height] = _from_pillow(image.resize((width, height), Image.Resampling.LANCZOS))
    return square


CROPS: dict[str, Callable[..., np.ndarray] | None] = {"none": None, "center": center_crop, "dhariwal": dhariwal_crop}


def _to_pillow(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def _from_pillow(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels.reshape(*pixels.shape[:2], -1)


# ---------------------------------------------------------------------------------------------------------------------
# Sources


class ImageSource(ABC):
    """A finite collection: `source[i]` is (image, label), for i from 0 to `len(source) - 1`.

    An image is a picture, uint8 [H, W, 1 or 3], or, where `is_latent`, stored latents, float32 [C, H, W]. A label is
    0 to num_classes - 1, or -1 in a source without labels. Sources can be pickled, and read in several processes.

    Latents may know the statistics of their raw channels, `latents_mean` and `latents_std`: C/2 numbers each, or None.

    Args:
        title: what to call the whole source in messages.
        labels: int [N]; all -1 where there are no labels.
        class_names: one name per class, if the source has names.

    Raises:
        ValueError: no images, or a label outside of the classes.
    """

    is_latent: bool = False
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    def __init__(self, title: str, labels: Iterable[int], class_names: list[str] | None = None):
        self.title = title
        self.labels = np.fromiter(labels, np.int64)
        if len(self) == 0:
            raise ValueError(f"{title} holds no images; name another data set, or another split of it.")
        if (self.labels == -1).all():
            self.class_names, self.num_classes = None, 0
            return
        self.class_names = class_names
        self.num_classes = max(int(self.labels.max()), 0) + 1 if class_names is None else len(class_names)
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= self.num_classes))
        if wrong.size:
            raise ValueError(
                f"{self.name(int(wrong[0]))} has label {self.labels[wrong[0]]}; the labels of {self.num_classes} "
                f"classes are 0 to {self.num_classes - 1}. Correct or remove it ({wrong.size} such images)."
            )

    @abstractmethod
    def name(self, index: int) -> str:
        """Where image `index` comes from, for people."""

    @abstractmethod
    def read(self, index: int) -> np.ndarray:
        """Image `index`; raises `BadImageError` if it cannot be decoded."""

    def fit(
        self,
        image: np.ndarray,
        index: int,
        shape: tuple[int, int, int],
        crop: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> np.ndarray:
        """What `read(index)` gave, as the whole data set has it: [C, H, W], latents float32, pictures uint8.

        Args:
            shape: (C, H, W) of the result. Grayscale pictures in a data set in colour get three equal channels.
            crop: from a picture to one of the right size, for example `partial(center_crop, resolution=64)`.

        Raises:
            BadImageError: latents of another shape; pictures of another size, or in colour in a data set without.
        """
        channels, height, width = shape
        if self.is_latent:
            if image.shape != shape:
                raise BadImageError(
                    f"{self.name(index)} is {_times(image.shape)}; all latents must be {_times(shape)} (channels x "
                    "height x width), by the first of them and --resolution. Change --resolution, or prepare it again."
                )
            return image
        if image.shape[2] > channels:
            raise BadImageError(
                f"{self.name(index)} has {image.shape[2]} channels, in a data set that is grayscale by the first "
                "images looked at. Convert the images, all to grayscale or all to RGB."
            )
        if crop is not None:
            image = crop(image)
        if image.shape[:2] != (height, width):
            raise BadImageError(
                f"{self.name(index)} is {_times(image.shape[:2])} pixels; without a crop all images must be "
                f"{_times((height, width))} (height x width). Add --center_crop or --dhariwal_crop, or "
                "change --resolution."
            )
        return np.broadcast_to(image, (height, width, channels)).transpose(2, 0, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.read(index), int(self.labels[index])

    @property
    def channels(self) -> int:
        return self.shape[0]

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images, judged by up to 16 of them, spread over the source.

        Height and width are those of the first. Pictures count as RGB if one of the 16 is: collections in colour
        contain grayscale images too (ImageNet does), and those lose nothing by becoming RGB.

        Raises:
            BadImageError: none of them can be read.
        """
        shapes, error = [], None
        for index in np.linspace(0, len(self) - 1, min(len(self), 16)).astype(int):
            try:
                image = self.read(int(index))
            except BadImageError as bad:  # reported, or left out, when its turn comes in the training
                error = bad
                continue
            shapes.append(image.shape if self.is_latent else (image.shape[2], *image.shape[:2]))
        if not shapes:
            raise BadImageError(f"None of the images tried in {self.title} can be used. {error}") from error
        _, height, width = shapes[0]
        return shapes[0][0] if self.is_latent else max(channels for channels, _, _ in shapes), height, width

    def _take_statistics(self, record: Mapping[str, Any], title: str) -> None:
        """Take over `latents_mean` and `latents_std` from `record`, called `title`, if it has them."""
        found: tuple[Any, Any] = record.get("latents_mean"), record.get("latents_std")
        if found == (None, None):
            return
        try:
            mean, std = (tuple(map(float, numbers)) for numbers in found)
        except (TypeError, ValueError):
            mean, std = (), ()
        if not mean or len(mean) != len(std) or min(std) <= 0 or not all(map(math.isfinite, mean + std)):
            raise ValueError(
                f"{title} gives latents_mean {found[0]} and latents_std {found[1]}; they must be one finite number per "
                "channel each, deviations greater than 0. Correct them, or prepare the data again."
            )
        self.latents_mean, self.latents_std = mean, std


class DigitsSource(ImageSource):
    """The 1797 handwritten digits that come with scikit-learn: grayscale 8x8, 0..16 scaled to 0..255, 10 classes.

    Args:
        split: "test" is 50 images of each class, "train" the other 1297, always the same ones.
    """

    def __init__(self, split: str = "train"):
        from sklearn.datasets import load_digits

        if split not in {"train", "test"}:
            raise ValueError(f'The digits have no split "{split}"; the splits are "train" and "test".')
        digits: Any = load_digits()
        shuffled = permutation(seed=0, number_of_pass=0, length=len(digits.target))
        test = np.concatenate([shuffled[digits.target[shuffled] == label][:50] for label in range(10)])
        chosen = np.isin(np.arange(len(digits.target)), test, invert=split == "train")
        self.images = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)[..., None]
        super().__init__(f"digits ({split})", digits.target[chosen], class_names=list("0123456789"))

    def name(self, index: int) -> str:
        return f"{self.title} number {index}"

    def read(self, index: int) -> np.ndarray:
        return self.images[index]


class HuggingFaceSource(ImageSource):
    """A data set of the `datasets` library: from the Hub, or a folder of parquet, Arrow or image files.

    A column of floating-point `Array3D` holds stored latents; the statistics of their raw channels, if known, stand in
    the data set's description as JSON: {"latents_mean": [...], "latents_std": [...]}.

    Args:
        dataset_name: Hub id, or local folder, also one that `Dataset.save_to_disk` wrote.
        config: configuration ("subset") of a data set that has several.
        split: a split or slice of it ("train[:10%]"). By default "train", or the only one.
        image_column: by default the only column of images, or the one called "image"; without images, of latents.
        label_column: of integers or strings. By default the only class-label column, or else the first of "label",
            "labels", "class", "cls" that exists; without any, the source has no labels.
        cache_dir, revision: as in `datasets.load_dataset`.

    Raises:
        ValueError: no such folder, split or column, or a choice that only the user can make.
    """

    def __init__(
        self,
        dataset_name: str,
        config: str | None = None,
        split: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        cache_dir: str | None = None,
        revision: str | None = None,
    ):
        import datasets

        rows = _load_rows(dataset_name, config, split, cache_dir, revision).with_format(None)
        self.title = dataset_name if rows.split is None else f"{dataset_name} ({rows.split})"
        features = rows.features
        images = [name for name in features if isinstance(features[name], datasets.Image)]
        classes = [name for name in features if isinstance(features[name], datasets.ClassLabel)]
        others = [name for name in LABEL_COLUMNS if name in features and name not in images]
        arrays = [name for name in features if isinstance(features[name], datasets.Array3D)]
        latents = [name for name in arrays if features[name].dtype.startswith("float")]

        image_column = self._choose(features, "--image_column", image_column, images or latents, preferred="image")
        if image_column not in (*images, *latents):
            raise ValueError(
                f"{self.title} has no images in {image_column or 'any column'}; {_describe(features)}. "
                "Name one that holds images with --image_column, or another data set."
            )
        label_column = self._choose(features, "--label_column", label_column, classes or others[:1], preferred="label")

        self.column, self.is_latent = image_column, image_column in latents
        self.rows = rows.select_columns([image_column])
        if self.is_latent:
            self.rows = self.rows.with_format("arrow")  # its "numpy" fails beside torchvision, up to 4.7
            self._take_statistics(_json_object(rows.info.description), f"The description of {self.title}")
        else:
            self.mode = features[image_column].mode
            self.rows = self.rows.cast_column(image_column, datasets.Image(decode=False))
        if label_column is None:
            super().__init__(self.title, [-1] * len(rows))
        else:
            labels = rows.select_columns([label_column])[:][label_column]
            names = getattr(features[label_column], "names", None)
            super().__init__(self.title, *self._to_classes(labels, names, label_column))

    def _choose(
        self, features: Mapping[str, Any], option: str, asked: str | None, candidates: list[str], preferred: str
    ) -> str | None:
        """The column asked for; else the preferred or the only candidate; else None."""
        if asked is not None:
            if asked not in features:
                raise ValueError(f"{option} {asked} is not in {self.title}; {_describe(features)}.")
            return asked
        if preferred in candidates:
            return preferred
        if len(candidates) > 1:
            raise ValueError(
                f"Several columns of {self.title} would do: {', '.join(candidates)}. Choose one with {option}."
            )
        return candidates[0] if candidates else None

    def _to_classes(
        self, labels: list[Any], names: list[str] | None, column: str
    ) -> tuple[list[int], list[str] | None]:
        """Integers as they are; strings as their position among the sorted, distinct ones."""
        if labels and all(isinstance(label, str) for label in labels):
            names = sorted(set(labels))
            position = {name: index for index, name in enumerate(names)}
            return [position[label] for label in labels], names
        wrong = [index for index, label in enumerate(labels) if not isinstance(label, int)]
        if wrong:
            raise ValueError(
                f"{self.name(wrong[0])} has {labels[wrong[0]]!r} in column {column}; labels are integers, or all "
                f"strings. Correct it ({len(wrong)} such rows), or choose another column with --label_column."
            )
        return labels, names

    def name(self, index: int) -> str:
        value = None if self.is_latent else self.rows[index][self.column]
        file = f" ({value['path']})" if value and value["path"] else ""
        return f"{self.title} row {index}{file}"

    def read(self, index: int) -> np.ndarray:
        value = self.rows[index][self.column]
        if self.is_latent:
            value = None if value.null_count else value.chunk(0).to_numpy(zero_copy_only=False)[0]
        if value is None:
            raise BadImageError(f"{self.name(index)} has no image.")
        if self.is_latent:
            return _decode(self, index, check_latents, value)
        data = Path(value["path"]).read_bytes() if value["bytes"] is None else value["bytes"]
        return _decode(self, index, decode_picture, data, self.mode)


def _json_object(text: str) -> dict[str, Any]:
    """What a description says in JSON; nothing if it is written for people."""
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _describe(features: Mapping[str, Any]) -> str:
    return "its columns: " + ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())


def _load_rows(
    dataset_name: str, config: str | None, split: str | None, cache_dir: str | None, revision: str | None
) -> Any:
    """One split, as a `datasets.Dataset`."""
    import datasets

    folder = Path(dataset_name).expanduser()
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():  # by `save_to_disk`
        loaded: Any = datasets.load_from_disk(str(folder))
        if not isinstance(loaded, dict):
            loaded = {str(loaded.split or "train"): loaded}
    else:
        is_path = dataset_name.startswith((".", "/", "~")) or dataset_name.lower().endswith(".zip")
        if folder.is_file() or (is_path and not folder.is_dir()):
            raise ValueError(
                f"--dataset_name {dataset_name} is neither a folder nor a Hub id. Name the folder that holds the "
                "files (parquet, Arrow or images), an EDM2 ZIP, or a Hub id such as uoft-cs/cifar10."
            )
        path = str(folder) if folder.is_dir() else dataset_name
        loaded = datasets.load_dataset(path, config, split=split, cache_dir=cache_dir, revision=revision)
        if split is not None:
            return loaded
    if split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    split = "train" if split is None else split
    if split not in loaded:
        raise ValueError(
            f'{dataset_name} has no split "{split}"; choose one of its splits with --dataset_split: '
            f"{', '.join(loaded)}."
        )
    return loaded[split]


class FileSource(ImageSource):
    """Picture or NPY files in a folder or a ZIP: class folders (ImageNet style), or a data set in EDM2's own format.

    Files are found at any depth and sorted by name; those whose name, or a folder's, begins with "." or "__MACOSX"
    are left out. NPY files are stored latents. The labels are
        - what `dataset.json` at the top says, {"labels": [["00000/img00000000.png", 3], ...]} or {"labels": null};
          it may also hold "class_names", and the "latents_mean" and "latents_std" of latents;
        - without it, the top folders that the files are in, numbered in sorted order;
        - without those, because all files are at the top, none.

    Raises:
        ValueError: no such folder or ZIP, no images, pictures and latents mixed, images beside class folders, a
            `dataset.json` that cannot be used or lacks a file.
    """

    def __init__(self, path: str | Path):
        path = Path(path).expanduser()
        if not path.exists():
            raise ValueError(f"{path} does not exist; name a folder of images or a ZIP of them.")
        self.files = ZipFiles(path) if path.is_file() else FolderFiles(path)
        suffixes = {
            i: os.path.splitext(name)[1].lower() for i, name in enumerate(self.files.names) if not _is_hidden(name)
        }
        latents = [i for i, suffix in suffixes.items() if suffix == LATENT_SUFFIX]
        pictures = [i for i, suffix in suffixes.items() if suffix in IMAGE_SUFFIXES]
        if not latents and not pictures:
            raise ValueError(
                f"{path} holds no images ({', '.join(sorted(IMAGE_SUFFIXES | {LATENT_SUFFIX}))}). If it holds parquet "
                "or Arrow files, name it with --dataset_name."
            )
        if latents and pictures:
            raise ValueError(
                f"{path} mixes stored latents ({self.files.names[latents[0]]}) and pictures "
                f"({self.files.names[pictures[0]]}); keep them in separate folders."
            )
        self.is_latent = bool(latents)
        self.rows = np.array(latents or pictures)
        names = [self.files.names[i] for i in self.rows]
        if "dataset.json" in self.files.names:
            listing, title = self.files.read(self.files.names.index("dataset.json")), f"{path}/dataset.json"
            super().__init__(str(path), *_listed_labels(title, listing, names))
            if self.is_latent:
                self._take_statistics(json.loads(listing), title)
        else:
            super().__init__(str(path), *_folder_labels(str(path), names))

    def name(self, index: int) -> str:
        return f"{self.title}/{self.files.names[self.rows[index]]}"

    def read(self, index: int) -> np.ndarray:
        data = self.files.read(self.rows[index])
        return _decode(self, index, decode_latents if self.is_latent else decode_picture, data)


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def _listed_labels(title: str, text: bytes, names: list[str]) -> tuple[list[int], list[str] | None]:
    """The label of each file as `dataset.json` lists it, all -1 where it lists none, and the names of the classes."""
    try:
        content = json.loads(text)
        labels, class_names = content["labels"], content.get("class_names")
        class_names = None if class_names is None else list(map(str, class_names))
        listed = None if labels is None else dict(labels)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{title} must be {{"labels": [[file, class], ...]}} or {{"labels": null}}, and is not ({error!r}). '
            "Correct it, or remove it to take the folders as classes."
        ) from error
    if listed is None:
        return [-1] * len(names), None
    wrong = [name for name in names if not isinstance(listed.get(name), int)]
    if wrong:
        raise ValueError(
            f"{title} gives {wrong[0]} the label {listed.get(wrong[0])}; it must give every image an integer, or have "
            f'"labels": null. Correct it, or remove the image ({len(wrong)} such images).'
        )
    return [listed[name] for name in names], class_names


def _folder_labels(title: str, names: list[str]) -> tuple[list[int], list[str] | None]:
    """The label of each file by its top folder, and the names of these folders."""
    folders = [name.rpartition("/")[0].partition("/")[0] for name in names]
    classes = sorted({*folders} - {""})
    if not classes:
        return [-1] * len(names), None
    if "" in folders:
        raise ValueError(
            f"{title} has class folders ({classes[0]}, ...), but {names[folders.index('')]} is in none of them. "
            f"Move it into one ({folders.count('')} such images)."
        )
    position = {name: index for index, name in enumerate(classes)}
    return [position[folder] for folder in folders], classes


class FolderFiles:
    """The files below a folder: `names`, sorted, with "/" between their parts, and `read(i)`. Follows links."""

    def __init__(self, path: Path):
        self.path = path
        self.names: list[str] = []
        for top, _, files in os.walk(path, followlinks=True):
            folder = "" if Path(top) == path else f"{Path(top).relative_to(path).as_posix()}/"
            self.names.extend(folder + file for file in files)
        self.names.sort()

    def read(self, index: int) -> bytes:
        return (self.path / self.names[index]).read_bytes()


class ZipFiles:
    """The files in a ZIP, stored or deflated: `names`, sorted, and `read(i)`, which several processes may call.

    It keeps where each file lies, not a `zipfile.ZipFile`: that one moves a position that forked processes share, and
    opened again in every worker it would take about 1 GB each for ImageNet.

    Raises:
        ValueError: not a ZIP, or one that is encrypted or packed in another way.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                members = sorted((m for m in archive.infolist() if not m.is_dir()), key=lambda m: m.filename)
        except zipfile.BadZipFile as error:
            raise ValueError(
                f"{path} is not a whole ZIP ({error}). Name a folder or a ZIP, or copy it again."
            ) from error
        for member in members:
            if member.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED} or member.flag_bits & 1:
                raise ValueError(
                    f"{path}/{member.filename} is encrypted, or packed in another way than stored or deflated. "
                    "Zip the files again without that."
                )
        self.names = [m.filename for m in members]
        self._offset = np.array([m.header_offset for m in members], np.int64)
        self._size = np.array([m.compress_size for m in members], np.int64)
        self._checksum = np.array([m.CRC for m in members], np.int64)
        self._is_deflated = np.array([m.compress_type == zipfile.ZIP_DEFLATED for m in members], bool)
        self._open()

    def _open(self) -> None:
        self._file = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def read(self, index: int) -> bytes:
        """The content of file `index`; raises `BadImageError` where it is not what was packed."""
        offset = int(self._offset[index])
        lengths = struct.unpack("<HH", os.pread(self._file, 4, offset + 26))  # of name and extras in the local header
        data = os.pread(self._file, int(self._size[index]), offset + 30 + sum(lengths))
        try:
            data = zlib.decompress(data, wbits=-zlib.MAX_WBITS) if self._is_deflated[index] else data
        except zlib.error:
            data = None
        if data is None or zlib.crc32(data) != self._checksum[index]:
            raise BadImageError(f"{self.path}/{self.names[index]} is damaged: it does not match its checksum.")
        return data


def _decode(source: ImageSource, index: int, decoder: Callable[..., np.ndarray], data: bytes, *args: Any) -> np.ndarray:
    try:
        return decoder(data, *args)
    except Exception as error:  # Pillow reports damage as OSError, SyntaxError, ValueError, struct.error and others
        raise BadImageError(f"{source.name(index)} cannot be decoded: {error}.") from error


def open_source(
    dataset_name: str | None = None,
    train_data_dir: str | None = None,
    *,
    config: str | None = None,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    cache_dir: str | None = None,
    revision: str | None = None,
) -> ImageSource:
    """The source that the options of the training script name; the bundled digits where they name none.

    Args:
        dataset_name: "digits", a Hub id, or a local folder of parquet, Arrow or image files. A ZIP, or a folder with
            a `dataset.json`, is taken as `train_data_dir`.
        train_data_dir: a folder of images in class folders, or a data set in EDM2's own format, folder or ZIP.
        config, split, image_column, label_column, revision: see `HuggingFaceSource`, for whose data sets they are;
            the digits have a `split` too.
        cache_dir: where `datasets` keeps what it downloads and prepares.

    Raises:
        ValueError: both a data set and a folder; an option that the source has no use for; what the source raises.
    """
    if dataset_name is not None and train_data_dir is not None:
        raise ValueError(
            f"--dataset_name {dataset_name} and --train_data_dir {train_data_dir} both name the images; give one."
        )
    given = {
        "--dataset_config_name": config,
        "--dataset_split": split,
        "--image_column": image_column,
        "--label_column": label_column,
        "--dataset_revision": revision,
    }
    path = train_data_dir
    if dataset_name is not None and dataset_name != "digits":
        if not _is_edm2_format(Path(dataset_name).expanduser()):
            return HuggingFaceSource(dataset_name, config, split, image_column, label_column, cache_dir, revision)
        path = dataset_name
    if path is None:
        del given["--dataset_split"]
    unused = [f"{option} {value}" for option, value in given.items() if value is not None]
    if unused:
        raise ValueError(
            f"{', '.join(unused)} says nothing about {path or 'the digits'}; leave it out. It belongs to data sets "
            "from the Hub, and to folders of parquet, Arrow or image files, named with --dataset_name."
        )
    return DigitsSource(split or "train") if path is None else FileSource(path)


def _is_edm2_format(path: Path) -> bool:
    return (path / "dataset.json").is_file() or (path.suffix.lower() == ".zip" and path.is_file())


# ---------------------------------------------------------------------------------------------------------------------
# The stream of training images


def permutation(seed: int, number_of_pass: int, length: int) -> np.ndarray:
    """The order of one pass over `length` images: int64 [length], a pure function of its arguments.

    It sorts the words of the Philox counter, which do not change between NumPy versions; those of
    `Generator.permutation` may.
    """
    words = np.random.Philox(key=_key(seed, 0), counter=(0, 0, number_of_pass, 0)).random_raw(length)
    return np.argsort(words, kind="stable")


def is_mirrored(seed: int, number: int) -> bool:
    """Whether training image `number` is mirrored, with probability 1/2: a pure function of its arguments."""
    return bool(np.random.Philox(key=_key(seed, 1), counter=(number, 0, 0, 0)).random_raw() & 1)


def _key(seed: int, use: int) -> np.ndarray:
    return np.array([seed, use], np.uint64)


class TrainingImages(Dataset):
    """The images of a training run by their number, counted from 0 without end: every image once per pass.

    An item is a pure function of the source, the seed and the number, whichever process asks for it, and when:
        "image": torch uint8 [C, H, W], or float32 [C, H, W] for stored latents; the shape is `image_shape`.
        "label": int, -1 without labels.
        "number": int.
        "bad": names of the images that were left out at this place, nearly always none.

    Grayscale images in a source in colour get three equal channels.

    Args:
        source: where the images come from.
        seed: of the order and of the flips, 0 to 2**64 - 1.
        resolution: height and width in pixels; by default as the source has them.
        crop: "none" refuses images of another size; "center" and "dhariwal" are `center_crop`, `dhariwal_crop`.
        random_flip: mirror half of the images, left to right.
        skip_bad_images: take the next good image of the same pass in place of one that cannot be used.

    Raises:
        ValueError: options that the source does not allow. On reading an item, `BadImageError` (a ValueError) with
            the name of the image; with `skip_bad_images`, a ValueError if there is no good one.
    """

    def __init__(
        self,
        source: ImageSource,
        seed: int = 0,
        resolution: int | None = None,
        crop: str = "none",
        random_flip: bool = False,
        skip_bad_images: bool = False,
    ):
        if not 0 <= seed < 2**64:
            raise ValueError(f"--seed {seed} is out of range; choose one from 0 to 2**64 - 1.")
        if crop not in CROPS:
            raise ValueError(f'There is no crop "{crop}"; choose one of {", ".join(CROPS)}.')
        if resolution is not None and resolution < 1:
            raise ValueError(f"--resolution {resolution} is no size; give the height and width in pixels, 1 or more.")
        if crop != "none" and resolution is None:
            raise ValueError(f"--{crop}_crop does not say to which size; add --resolution.")
        if source.is_latent and (random_flip or crop != "none"):
            raise ValueError(
                f"{'--random_flip' if random_flip else f'--{crop}_crop'} cannot act on the stored latents of "
                f"{source.title}: a flipped or cropped latent is not the latent of the flipped or cropped image. "
                "Leave it out, or prepare the latents from images treated so."
            )
        channels, height, width = source.shape
        self.image_shape = (channels, resolution or height, resolution or width)
        self.source, self.seed = source, seed
        cropped = CROPS[crop]
        self.crop = cropped and partial(cropped, resolution=resolution)
        self.random_flip, self.skip_bad_images = random_flip, skip_bad_images
        self._pass, self._order = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        """The images in one pass. Numbers go on beyond it."""
        return len(self.source)

    def __getitem__(self, number: int) -> dict[str, Any]:
        number_of_pass, place = divmod(number, len(self))
        if number_of_pass != self._pass:
            self._pass, self._order = number_of_pass, permutation(self.seed, number_of_pass, len(self))
        bad: list[str] = []
        while len(bad) < len(self):
            index = int(self._order[(place + len(bad)) % len(self)])
            try:
                image, label = self.source[index]
                image = self.source.fit(image, index, self.image_shape, self.crop)
            except BadImageError as error:
                if not self.skip_bad_images:
                    raise BadImageError(f"{error} Or leave out all such images with --skip_bad_images.") from error
                bad.append(self.source.name(index))
                continue
            if self.random_flip and is_mirrored(self.seed, number):
                image = image[..., ::-1]
            return {"image": torch.from_numpy(image.copy()), "label": label, "number": number, "bad": bad}
        raise ValueError(
            f"None of the {len(self)} images of {self.source.title} can be used, though --skip_bad_images leaves out "
            "those that cannot. Run without it to see what is wrong with the first."
        )


def _times(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))


class GlobalBatchSampler(Sampler[list[int]]):
    """Deals the numbers of the training images to the processes, from `start_image` without end.

    The optimizer step that starts after n images takes n to n + total_batch_size - 1, and micro-batch m of process r
    takes `micro_batch_size` of them, from n + (m * world_size + r) * micro_batch_size. So no image is lost or repeated
    for any number of processes, and a run resumes by its number of images alone.
    For `DataLoader(batch_sampler=...)`; it yields total_batch_size / (micro_batch_size * world_size) batches per step.

    Args:
        total_batch_size: images per optimizer step, over all processes.
        micro_batch_size: images per forward pass of one process.
        rank, world_size: this process and how many there are.
        start_image: images seen before.

    Raises:
        ValueError: a batch size below 1, or a total that the micro-batches of all processes do not divide.
    """

    def __init__(
        self,
        total_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start_image: int = 0,
    ):
        if micro_batch_size < 1 or total_batch_size < 1:
            raise ValueError(
                f"--train_batch_size {micro_batch_size} and --total_batch_size {total_batch_size} must both be 1 or "
                "more."
            )
        together = micro_batch_size * world_size
        if total_batch_size % together:
            low = total_batch_size // together * together
            ways = f"{low} or {low + together}" if low else f"{together}"
            raise ValueError(
                f"--total_batch_size {total_batch_size} is not a multiple of --train_batch_size {micro_batch_size} x "
                f"{world_size} processes; use {ways}."
            )
        self.total_batch_size, self.micro_batch_size = total_batch_size, micro_batch_size
        self.rank, self.world_size, self.start_image = rank, world_size, start_image

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start_image + self.rank * self.micro_batch_size
        while True:
            yield list(range(first, first + self.micro_batch_size))
            first += self.micro_batch_size * self.world_size


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Items of `TrainingImages` as a batch of B.

    "image": uint8 or float32 [B, C, H, W]; "label", "number": int64 [B]; "bad": the names left out, in one list
    (a `collections.Counter` adds them up).
    """
    return {
        "image": torch.stack([item["image"] for item in items]),
        "label": torch.tensor([item["label"] for item in items]),
        "number": torch.tensor([item["number"] for item in items]),
        "bad": [name for item in items for name in item["bad"]],
    }
