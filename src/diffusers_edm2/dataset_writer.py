"""Writing a prepared data set: EDM2's ZIP, or a folder of parquet files, in shards that are whole or not there.

Any number of processes write the shards, in any order and in any number of attempts, beside the output, in a folder of
its name and `.part`. The last step puts them together, and only then the output appears:

    <output>.part/plan.json            what is being made; another start must ask for the same
    <output>.part/shards/00012.zip     the images of one shard (of a ZIP)
    <output>.part/result/data/...      likewise (of parquet: the files of the output, which need no copying)
    <output>.part/records/00012.json   written after the shard: its labels, and what was noted about it
"""

import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from diffusers_edm2.files import atomic_file, clean_leftovers, discard, make_folder, sync, write_atomic

ROWS_PER_GROUP = 128  # of a parquet file: what is kept in memory while it is written


class DatasetWriterError(RuntimeError):
    """The output exists, or another one was begun; the message says which and what to do."""


class DatasetWriter:
    """The data set at `output` while it is made.

    Args:
        output: a path that ends in `.zip`, or any other for a folder of parquet files.
        num_images: N, how many are expected; they are numbered 0 to N - 1.
        shard_size: images per shard, and per parquet file.
        latents_shape: [2C, h, w] of stored latents; None for pictures.
        class_names: of the labels, if they have names.
        has_labels: whether the images have any.
    """

    def __init__(
        self,
        output: Path,
        num_images: int,
        shard_size: int,
        latents_shape: tuple[int, int, int] | None = None,
        class_names: Sequence[str] | None = None,
        has_labels: bool = True,
    ):
        self.output, self.part = output, output.with_name(f"{output.name}.part")
        self.shards = [range(first, min(first + shard_size, num_images)) for first in range(0, num_images, shard_size)]
        self.latents_shape, self.class_names, self.has_labels = latents_shape, class_names, has_labels
        self.is_zip = output.suffix.lower() == ".zip"
        self._records = self.part / "records"
        self._result = self.part / ("result.zip" if self.is_zip else "result")

    # ---- Begin ---------------------------------------------------------------------------------------------------

    def check_output(self) -> bool:
        """True if there is nothing at `output`; False if a finished attempt was killed before it had cleaned up.

        Raises:
            DatasetWriterError: something is there.
        """
        if not os.path.lexists(self.output):
            return True
        is_moved = not (self.part / "shards").exists() and not self._result.exists()
        if is_moved and self._records.is_dir() and not self.missing():
            return False
        raise DatasetWriterError(f"{self.output} exists already; remove it, or give another --output.")

    def begin(self, plan: Mapping[str, Any]) -> None:
        """Start, or go on with what was begun with the same `plan` (which JSON can hold).

        Raises:
            DatasetWriterError: another plan; all differences are listed.
        """
        path = self.part / "plan.json"
        if not self._records.is_dir() or not any(self._records.iterdir()):  # nothing that another plan could lose
            for folder in (self.part / "shards", self._result):
                shutil.rmtree(folder, ignore_errors=True)
        elif path.exists():
            before, now = json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(plan))
            differences = [
                f"{name}: was {before.get(name)}, now {now.get(name)}"
                for name in sorted(before.keys() | now.keys())
                if before.get(name) != now.get(name)
            ]
            if differences:
                raise DatasetWriterError(
                    f"{self.part} was begun with other options:\n  " + "\n  ".join(differences) + "\nGive the same "
                    f"options to go on, another --output, or remove {self.part} to start anew."
                )
        for folder in (self.part, self.part / "shards", self._result / "data"):
            clean_leftovers(folder)
        make_folder(self._records)
        write_atomic(path, json.dumps(plan, indent=2) + "\n")

    def missing(self) -> list[int]:
        """The numbers of the shards that are not written yet."""
        written = set(os.listdir(self._records)) if self._records.is_dir() else set()
        return [number for number in range(len(self.shards)) if f"{number:05d}.json" not in written]

    def images_written(self) -> int:
        """How many images the shards have that are written, those included that were left out of them."""
        return sum(map(len, self.shards)) - sum(len(self.shards[number]) for number in self.missing())

    # ---- Shards --------------------------------------------------------------------------------------------------

    @contextmanager
    def shard(self, number: int) -> Iterator["ZipShard | ParquetShard"]:
        """Write one shard: `add` its images to what this yields, and note in its `record` what JSON can hold."""
        make = ZipShard if self.is_zip else partial(ParquetShard, features=self._features())
        with atomic_file(self._shard_path(number)) as path, make(path) as shard:
            yield shard
        write_atomic(self._records / f"{number:05d}.json", json.dumps({"labels": shard.labels, **shard.record}))

    def records(self) -> list[dict[str, Any]]:
        """Of each shard: "labels", [[name, label], ...], and what was noted in its `record`."""
        names = [f"{number:05d}.json" for number in range(len(self.shards))]
        return [json.loads((self._records / name).read_text(encoding="utf-8")) for name in names]

    def _shard_path(self, number: int) -> Path:
        if self.is_zip:
            return self.part / "shards" / f"{number:05d}.zip"
        return self._result / "data" / f"train-{number:05d}-of-{len(self.shards):05d}.parquet"

    def _features(self) -> Any:
        import datasets

        if self.latents_shape is None:
            features: dict[str, Any] = {"image": datasets.Image()}
        else:
            features = {"latents": datasets.Array3D(self.latents_shape, "float32")}
        if self.has_labels:
            names = self.class_names
            features["label"] = datasets.Value("int64") if names is None else datasets.ClassLabel(names=list(names))
        return datasets.Features(features)

    # ---- End -----------------------------------------------------------------------------------------------------

    def finish(self, info: Mapping[str, Any], progress: Callable[[int], Any] = lambda images: None) -> None:
        """Make the output of the shards, which must all be there, and remove the folder of parts.

        Args:
            info: what readers may want to know, beside labels and class names; JSON.
            progress: called with a number of images as they are copied into a ZIP.

        Raises:
            DatasetWriterError: not enough room for the ZIP beside its shards, or the output exists by now.
        """
        if self.is_zip:
            if not self._result.exists():
                self._merge(info, progress)
            if (self.part / "shards").exists():
                shutil.rmtree(self.part / "shards")
        else:
            write_atomic(self._result / "README.md", self._readme(info))
        if os.path.lexists(self.output):
            raise DatasetWriterError(
                f"{self.output} has appeared meanwhile; move it away and run the same command again."
            )
        os.rename(self._result, self.output)
        sync(self.output.parent)
        self.remove_part()

    def remove_part(self) -> None:
        """Remove the folder of parts."""
        discard(self.part)

    def _merge(self, info: Mapping[str, Any], progress: Callable[[int], Any]) -> None:
        shards = [self._shard_path(number) for number in range(len(self.shards))]
        needed, free = sum(path.stat().st_size for path in shards), shutil.disk_usage(self.part).free
        if free < needed:
            raise DatasetWriterError(
                f"all images are ready in {self.part}, but the ZIP made of them needs {needed / 2**30:.2f} GiB and "
                f"only {free / 2**30:.2f} GiB are free. Free some space and run the same command again."
            )
        labels = [pair for record in self.records() for pair in record["labels"]]
        content = {"labels": labels if self.has_labels else None}
        if self.class_names is not None:
            content["class_names"] = list(self.class_names)
        with atomic_file(self._result) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            for path in shards:
                with zipfile.ZipFile(path) as shard:
                    for member in shard.infolist():
                        archive.writestr(_entry(member.filename), shard.read(member))
                        progress(1)
            archive.writestr(_entry("dataset.json"), json.dumps({**content, **info}))

    def _readme(self, info: Mapping[str, Any]) -> str:
        """A data set card. `datasets` hands its `description` on, also from the Hub: readers find `info` there."""
        lines = ["---", "configs:", "- config_name: default", "  data_files:", "  - split: train"]
        lines += ["    path: data/train-*", "dataset_info:"]
        lines += [f"  description: {json.dumps(json.dumps(info))}", "---", ""]  # a JSON string is a YAML one
        images = sum(len(record["labels"]) for record in self.records())
        what = "pictures" if self.latents_shape is None else f"VAE latents, {self.latents_shape} (means, deviations)"
        return "\n".join([*lines, f"# {self.output.name}", "", f"{images} {what}, prepared for EDM2 training.", ""])


class ZipShard:
    """A ZIP of PNG or NPY files, stored without compression; `labels` is [[name, label], ...] so far."""

    def __init__(self, path: Path):
        self.labels: list[list[Any]] = []
        self.record: dict[str, Any] = {}
        self._archive = zipfile.ZipFile(path, "w")

    def __enter__(self) -> "ZipShard":
        return self

    def __exit__(self, *error: object) -> None:
        self._archive.close()

    def add(self, number: int, data: bytes | np.ndarray, label: int) -> None:
        """Image `number` of the data set: the content of a PNG file, or latents float32 [2C, h, w]."""
        name = _file_name(number, "png" if isinstance(data, bytes) else "npy")
        if not isinstance(data, bytes):
            buffer = io.BytesIO()
            np.save(buffer, data)
            data = buffer.getvalue()
        self._archive.writestr(_entry(name), data)
        self.labels.append([name, label])


class ParquetShard:
    """A parquet file that `datasets` reads; `labels` is [[name, label], ...] so far."""

    def __init__(self, path: Path, features: Any):
        import pyarrow.parquet

        self.labels: list[list[Any]] = []
        self.record: dict[str, Any] = {}
        self._features = features
        self._rows: list[tuple[Any, ...]] = []
        self._file = pyarrow.parquet.ParquetWriter(path, self._table([]).schema)

    def __enter__(self) -> "ParquetShard":
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self._file.write_table(self._table(self._rows))
        self._file.close()

    def add(self, number: int, data: bytes | np.ndarray, label: int) -> None:
        """Image `number` of the data set: the content of a PNG file, or latents float32 [2C, h, w]."""
        name = _file_name(number, "png").rpartition("/")[2]
        self._rows.append(({"bytes": data, "path": name} if isinstance(data, bytes) else data, label))
        self.labels.append([name, label])
        if len(self._rows) == ROWS_PER_GROUP:
            self._file.write_table(self._table(self._rows))
            self._rows = []

    def _table(self, rows: Sequence[tuple[Any, ...]]) -> Any:
        import datasets

        columns = {name: [row[i] for row in rows] for i, name in enumerate(self._features)}
        return datasets.Dataset.from_dict(columns, features=self._features).data.table


def _file_name(number: int, suffix: str) -> str:
    return f"{number // 1000:05d}/img{number:08d}.{suffix}"


def _entry(name: str) -> zipfile.ZipInfo:
    """A member of the same bytes whenever and by whomever it is written."""
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.external_attr = 0o644 << 16
    return entry
