import io
import itertools
import json
import pickle
import zipfile
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

from diffusers_edm2.dataset import (
    BadImageError,
    DigitsSource,
    FileSource,
    GlobalBatchSampler,
    HuggingFaceSource,
    ImageSource,
    TrainingImages,
    center_crop,
    collate,
    decode_picture,
    dhariwal_crop,
    is_mirrored,
    open_source,
    permutation,
    wide_crop,
)


def pixels(number: int, height: int = 8, width: int = 8, channels: int = 3) -> np.ndarray:
    """Noise that differs from one `number` to the next."""
    return np.random.default_rng(number).integers(0, 256, (height, width, channels), np.uint8)


def encode(array: np.ndarray, file_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(buffer, file_format, **options)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_zip(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def listing(labels: dict[str, int] | None) -> bytes:
    return json.dumps({"labels": None if labels is None else list(labels.items())}).encode()


def class_folders(folder: Path, count: int = 6, **size) -> Path:
    return write(folder, {f"{'ab'[n % 2]}/{n}.png": encode(pixels(n, **size)) for n in range(count)})


# --- one image


def test_lossless_formats_keep_every_pixel():
    for channels, file_format in itertools.product((1, 3), ("PNG", "BMP", "PPM", "TIFF")):
        assert np.array_equal(
            decode_picture(encode(pixels(0, channels=channels), file_format)), pixels(0, channels=channels)
        )
    jpeg = decode_picture(encode(np.full((8, 8, 3), 200, np.uint8), "JPEG"))
    assert np.abs(jpeg.astype(int) - 200).max() <= 2


@pytest.mark.parametrize("mode, channels", [("1", 1), ("L", 1), ("LA", 1), ("P", 3), ("RGBA", 3), ("CMYK", 3)])
def test_other_modes_become_grayscale_or_rgb(mode, channels):
    image = Image.fromarray(np.repeat(pixels(0, 8, 8, 1) // 128 * 255, 3, axis=2)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    expected = pixels(0, 8, 8, 1) // 128 * 255  # black and white, which every one of these modes can hold
    assert np.array_equal(decode_picture(buffer.getvalue()), np.repeat(expected, channels, axis=2))


def test_transparency_is_laid_over_white_and_orientation_applied():
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0]]], np.uint8)
    assert decode_picture(encode(rgba)).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    assert np.array_equal(decode_picture(encode(pixels(0, 4, 8), exif=exif)), np.rot90(pixels(0, 4, 8), -1))


def test_more_than_8_bits_are_refused(tmp_path):
    source = FileSource(write(tmp_path, {"deep.png": encode(np.zeros((8, 8), np.uint16)[..., None])}))
    with pytest.raises(
        BadImageError, match=r"deep\.png cannot be decoded: its samples have more than 8 bits .*convert it"
    ):
        source[0]


def test_center_crop_cuts_the_centred_square():
    image = pixels(0, 6, 10)
    assert np.array_equal(center_crop(image, 6), image[:, 2:8])
    assert np.array_equal(center_crop(image.transpose(1, 0, 2), 6), image.transpose(1, 0, 2)[2:8])
    assert center_crop(pixels(0, 6, 10, 1), 4).shape == (4, 4, 1)
    flat = np.full((30, 50, 3), 77, np.uint8)
    assert (center_crop(flat, 8) == 77).all()


def test_dhariwal_crop_halves_by_box_then_cuts_the_centre():
    image = pixels(0, 16, 32)
    box = image.reshape(8, 2, 16, 2, 3).mean(axis=(1, 3))
    assert np.abs(dhariwal_crop(image, 8) - box[:, 4:12]).max() <= 1  # Pillow rounds after each of the two axes
    assert np.array_equal(dhariwal_crop(image, 16), image[:, 8:24])  # nothing to resize
    assert dhariwal_crop(pixels(0, 100, 33, 1), 8).shape == (8, 8, 1)


def test_dhariwal_crop_uses_a_bicubic_filter_below_a_factor_of_2():
    image = Image.fromarray(pixels(0, 12, 15))
    expected = np.asarray(image.resize((10, 8), Image.Resampling.BICUBIC))[:, 1:9]
    assert np.array_equal(dhariwal_crop(pixels(0, 12, 15), 8), expected)


def test_wide_crop_lays_the_centred_part_on_a_black_square():
    image = pixels(0, 6, 16)
    square = wide_crop(image, 8, 6)  # nothing to resize: the part is as high as the image
    assert np.array_equal(square[1:7], image[:, 4:12])
    assert not square[[0, 7]].any()
    tall = wide_crop(pixels(0, 20, 8, 1), 8, 4)  # as wide as the image
    assert np.array_equal(tall[2:6], pixels(0, 20, 8, 1)[8:12])
    flat = wide_crop(np.full((31, 50, 3), 77, np.uint8), 16, 9)
    assert (flat[3:12] == 77).all() and not flat[:3].any() and not flat[12:].any()
    assert np.array_equal(wide_crop(pixels(1, 9, 9), 4, 4), center_crop(pixels(1, 9, 9), 4))


# --- sources


def test_digits_are_scikit_learns_split_by_class():
    train, test = DigitsSource(), DigitsSource("test")
    assert (len(train), len(test), train.num_classes, train.shape) == (1297, 500, 10, (1, 8, 8))
    assert np.bincount(test.labels).tolist() == [50] * 10
    bundled = load_digits()
    # every digit is in exactly one of the two, with its own label
    known = {(image.tobytes(), label) for image, label in zip(bundled.images, bundled.target, strict=True)}
    ours = [
        ((image[..., 0] * (16 / 255)).round().tobytes(), label) for source in (train, test) for image, label in source
    ]
    assert len(known) == len(ours) == 1797
    assert set(ours) == known
    assert (train.images.min(), train.images.max()) == (0, 255)
    with pytest.raises(ValueError, match='The digits have no split "valid"; the splits are "train" and "test"'):
        DigitsSource("valid")


def test_class_folders_are_read_in_sorted_order(tmp_path):
    files = {"cat/deep/2.png": 2, "cat/1.PNG": 1, "ant/3.png": 3, ".hidden/4.png": 4, "__MACOSX/cat/5.png": 5}
    write(tmp_path, {name: encode(pixels(number)) for name, number in files.items()} | {"cat/notes.txt": b""})
    source = open_source(train_data_dir=str(tmp_path))
    assert [source.name(i) for i in range(3)] == [
        f"{tmp_path}/{n}" for n in ("ant/3.png", "cat/1.PNG", "cat/deep/2.png")
    ]
    assert (source.class_names, source.num_classes, source.channels) == (["ant", "cat"], 2, 3)
    assert [label for _, label in map(source.__getitem__, range(3))] == [0, 1, 1]
    for index, number in enumerate((3, 1, 2)):
        assert np.array_equal(source[index][0], pixels(number))


def test_images_without_class_folders_have_no_labels(tmp_path):
    source = FileSource(write(tmp_path, {"1.png": encode(pixels(1)), "2.png": encode(pixels(2))}))
    assert (source.labels.tolist(), source.num_classes, source.class_names) == ([-1, -1], 0, None)


@pytest.mark.parametrize("form", ["folder", "stored", "deflated"])
@pytest.mark.parametrize("labels", [{"00000/img0.png": 4, "00000/img1.png": 0}, None])
def test_official_data_sets_take_their_labels_from_dataset_json(tmp_path, form, labels):
    files = {f"00000/img{n}.png": encode(pixels(n)) for n in (1, 0)} | {"dataset.json": listing(labels)}
    if form == "folder":
        path = write(tmp_path / "set", files)
    else:
        compression = zipfile.ZIP_STORED if form == "stored" else zipfile.ZIP_DEFLATED
        path = write_zip(tmp_path / "set.zip", files, compression)
    for source in (
        open_source(train_data_dir=str(path)),
        open_source(str(path)),
        pickle.loads(pickle.dumps(FileSource(path))),
    ):
        assert source.labels.tolist() == ([4, 0] if labels else [-1, -1])
        assert source.num_classes == (5 if labels else 0)
        assert source.name(1) == f"{path}/00000/img1.png"
        assert all(np.array_equal(source[n][0], pixels(n)) for n in (0, 1))


def test_stored_latents_are_float32_as_they_are(tmp_path):
    latents = np.random.default_rng(0).standard_normal((2, 8, 4, 4))
    files = {f"00000/img{n}.npy": npy(latents[n].astype(np.float32 if n else np.float16)) for n in (0, 1)}
    path = write_zip(tmp_path / "vae.zip", files | {"dataset.json": listing(dict.fromkeys(files, 1))})
    images = TrainingImages(FileSource(path))
    assert (images.source.is_latent, images.source.shape) == (True, (8, 4, 4))
    for item in (images[0], images[1]):
        assert (item["image"].dtype, item["label"]) == (torch.float32, 1)
        assert any(torch.allclose(item["image"].double(), torch.from_numpy(x), atol=2e-3) for x in latents)  # fp16


def test_dataset_json_may_hold_class_names_and_the_statistics_of_latents(tmp_path):
    content = {"labels": [["0.npy", 1]], "class_names": ["a", "b", "c"], "prepared": {"vae": "somebody/vae"}}
    content |= {"latents_mean": [1, 2.5], "latents_std": [3, 4]}
    files = {"0.npy": npy(np.zeros((4, 2, 2), np.float32)), "dataset.json": json.dumps(content).encode()}
    source = FileSource(write(tmp_path / "named", files))
    assert (source.class_names, source.num_classes) == (["a", "b", "c"], 3)
    assert (source.latents_mean, source.latents_std) == ((1, 2.5), (3, 4))
    files["dataset.json"] = listing(None)
    source = FileSource(write(tmp_path / "plain", files))
    assert (source.class_names, source.latents_mean, source.latents_std) == (None, None, None)


@pytest.mark.parametrize(
    "statistics",
    [
        {"latents_mean": [1.0]},
        {"latents_mean": [1.0], "latents_std": [0.0]},
        {"latents_mean": 1, "latents_std": 1},
        {"latents_mean": [1.0, 2.0], "latents_std": [1.0]},
        {"latents_mean": [float("nan")], "latents_std": [1.0]},
    ],
)
def test_wrong_statistics_are_named(tmp_path, statistics):
    content = json.dumps({"labels": None, **statistics}).encode()
    files = {"0.npy": npy(np.zeros((2, 2, 2), np.float32)), "dataset.json": content}
    with pytest.raises(ValueError, match=r"dataset\.json gives latents_mean .* deviations greater than 0\. Correct"):
        FileSource(write(tmp_path, files))


@pytest.mark.parametrize(
    "options, error",
    [
        (
            {"random_flip": True},
            "--random_flip cannot act on the stored latents of .*: a flipped or cropped latent is not",
        ),
        ({"crop": "center", "resolution": 4}, "--center_crop cannot act on the stored latents"),
        ({"crop": "dhariwal", "resolution": 4}, "--dhariwal_crop cannot act on the stored latents"),
    ],
)
def test_stored_latents_cannot_be_flipped_or_cropped(tmp_path, options, error):
    source = FileSource(write(tmp_path, {"0.npy": npy(np.zeros((8, 4, 4), np.float32))}))
    with pytest.raises(ValueError, match=error):
        TrainingImages(source, **options)


@pytest.mark.parametrize(
    "array, error",
    [
        (
            np.zeros((8, 4, 4), np.uint8),
            r"bad\.npy cannot be decoded: it holds uint8 \[8, 4, 4\]; stored latents are float",
        ),
        (np.zeros((4, 4), np.float32), r"bad\.npy cannot be decoded: it holds float32 \[4, 4\]"),
        (np.full((8, 4, 4), np.nan, np.float32), r"bad\.npy cannot be decoded: it holds numbers that are not finite"),
        (np.array([print], object), r"bad\.npy cannot be decoded: Object arrays cannot be loaded"),
        (np.zeros((8, 4, 2), np.float32), r"bad\.npy is 8 x 4 x 2; all latents must be 8 x 4 x 4 .*--resolution"),
    ],
)
def test_latents_of_another_kind_are_named(tmp_path, array, error):
    images = TrainingImages(
        FileSource(write(tmp_path, {"a.npy": npy(np.zeros((8, 4, 4), np.float32)), "bad.npy": npy(array)}))
    )
    with pytest.raises(BadImageError, match=error):
        [images[number] for number in range(2)]


@pytest.mark.parametrize(
    "files, error",
    [
        ({}, r"holds no images \(\.bmp, .*\.webp\)\. If it holds parquet .* with --dataset_name"),
        ({"a/1.png": b"", "2.png": b""}, r"class folders \(a, \.\.\.\), but 2\.png is in none of them\. Move it into"),
        ({"1.png": b"", "2.npy": b""}, r"mixes stored latents \(2\.npy\) and pictures \(1\.png\); keep them in"),
        (
            {"1.png": b"", "dataset.json": b"{"},
            r'dataset\.json must be {"labels": \[\[file, class\], \.\.\.\]} or .*Correct',
        ),
        ({"1.png": b"", "dataset.json": b'{"labels": [1]}'}, r"dataset\.json must be .* and is not \(TypeError"),
        ({"1.png": b"", "dataset.json": listing({})}, r"json gives 1\.png the label None; it must give every image"),
        ({"1.png": b"", "dataset.json": listing({"1.png": 0.5})}, r"json gives 1\.png the label 0\.5; .*an integer"),
        (
            {"1.png": b"", "2.png": b"", "dataset.json": listing({"1.png": 3, "2.png": -2})},
            r"2\.png has label -2; the labels of 4 classes are 0 to 3",
        ),
    ],
)
def test_unusable_folders_are_refused_with_the_reason(tmp_path, files, error):
    with pytest.raises(ValueError, match=error):
        FileSource(write(tmp_path, files))


def test_unusable_zips_are_refused_with_the_reason(tmp_path):
    with pytest.raises(ValueError, match=r"x\.zip does not exist; name a folder of images or a ZIP"):
        FileSource(tmp_path / "x.zip")
    whole = write_zip(tmp_path / "whole.zip", {"1.png": encode(pixels(1))}).read_bytes()
    with pytest.raises(ValueError, match=r"cut\.zip is not a whole ZIP .*copy it again"):
        FileSource(write(tmp_path, {"cut.zip": whole[:-10]}) / "cut.zip")
    with pytest.raises(
        ValueError, match=r"lzma\.zip/1\.png is encrypted, or packed in another way .*Zip the files again"
    ):
        FileSource(write_zip(tmp_path / "lzma.zip", {"1.png": b""}, zipfile.ZIP_LZMA))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damage_inside_a_zip_is_named(tmp_path, compression):
    files = {f"{n}.npy": npy(np.full((8, 4, 4), n, np.float32)) for n in (1, 2)}
    path = write_zip(tmp_path / "x.zip", files, compression)
    data = bytearray(path.read_bytes())
    data[100] ^= 1  # inside of the first file
    path.write_bytes(data)
    source = FileSource(path)
    with pytest.raises(BadImageError, match=r"x\.zip/1\.npy is damaged: it does not match its checksum"):
        source[0]
    assert (source[1][0] == 2).all()


# --- Hugging Face data sets


def rows(count: int = 6, **columns) -> datasets.Dataset:
    """Columns img and label, and those named: of images where the feature is one, else of 0, 1, 2, 0, 1, ..."""
    named = {"img": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y", "z"])} | columns
    features = datasets.Features({name: feature for name, feature in named.items() if feature is not None})
    images = [{"bytes": encode(pixels(n)), "path": f"{n}.png"} for n in range(count)]
    labels = [n % 3 for n in range(count)]
    data = {name: images if isinstance(feature, datasets.Image) else labels for name, feature in features.items()}
    return datasets.Dataset.from_dict(data, features)


def parquet(folder: Path, dataset: datasets.Dataset, split: str = "train") -> str:
    folder.mkdir(exist_ok=True)
    dataset.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


@pytest.fixture
def cache(tmp_path) -> str:
    return str(tmp_path / "cache")


def test_parquet_arrow_and_saved_folders_give_the_same_source(tmp_path, cache):
    rows().save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=rows(), test=rows(3)).save_to_disk(tmp_path / "saved_dict")
    arrow = write(tmp_path / "arrow", {"train.arrow": next((tmp_path / "saved").glob("*.arrow")).read_bytes()})
    paths = [parquet(tmp_path / "parquet", rows()), str(arrow), str(tmp_path / "saved"), str(tmp_path / "saved_dict")]
    for path in paths:
        source = open_source(path, cache_dir=cache)
        assert (len(source), source.shape, source.num_classes) == (6, (3, 8, 8), 3)
        assert source.class_names == ["x", "y", "z"]
        assert all(np.array_equal(source[n][0], pixels(n)) and source[n][1] == n % 3 for n in range(6))
        assert source.name(4).startswith(path)
        assert source.name(4).endswith("row 4 (4.png)")
    assert len(open_source(str(tmp_path / "saved_dict"), split="test")) == 3
    parquet(tmp_path / "parquet", rows(3), "test")
    assert len(open_source(str(tmp_path / "parquet"), split="test", cache_dir=cache)) == 3
    assert len(open_source(str(tmp_path / "parquet"), split="train[:50%]", cache_dir=cache)) == 3


def test_imagefolder_is_read_like_class_folders(tmp_path, cache):
    path = class_folders(tmp_path / "pictures")
    ours, theirs = FileSource(path), open_source(str(path), cache_dir=cache)
    assert theirs.class_names == ours.class_names == ["a", "b"]
    assert [x.tobytes() for x, _ in map(theirs.__getitem__, range(6))] == [
        x.tobytes() for x, _ in map(ours.__getitem__, range(6))
    ]
    assert theirs.labels.tolist() == ours.labels.tolist()
    assert theirs.name(1).endswith(f"({path}/a/2.png)")


def test_latents_in_parquet_and_saved_folders(tmp_path, cache):
    latents = np.random.default_rng(0).standard_normal((5, 6, 4, 4)).astype(np.float32)
    features = datasets.Features({"z": datasets.Array3D((6, 4, 4), "float32"), "label": datasets.Value("int64")})
    dataset = datasets.Dataset.from_dict({"z": list(latents), "label": [0, 1, 2, 1, 0]}, features)
    dataset.info.description = json.dumps({"latents_mean": [1, 2, 3], "latents_std": [4, 5, 6]})
    dataset.save_to_disk(tmp_path / "saved")
    for path, known in ((str(tmp_path / "saved"), True), (parquet(tmp_path / "parquet", dataset), False)):
        source = open_source(path, cache_dir=cache)
        assert (source.is_latent, source.shape, source.num_classes) == (True, (6, 4, 4), 3)
        assert (source.latents_mean, source.latents_std) == (((1, 2, 3), (4, 5, 6)) if known else (None, None))
        for image in (source[3][0], pickle.loads(pickle.dumps(source))[3][0]):
            assert image.dtype == np.float32
            assert np.array_equal(image, latents[3])
        assert source.name(3).endswith("row 3")
        assert sorted(item["number"] for item in map(TrainingImages(source).__getitem__, range(5))) == list(range(5))


def test_latents_that_are_not_finite_are_named(tmp_path, cache):
    features = datasets.Features({"z": datasets.Array3D((2, 1, 1), "float32")})
    dataset = datasets.Dataset.from_dict({"z": [[[[0.0]], [[1.0]]], [[[0.0]], [[float("inf")]]]]}, features)
    source = open_source(parquet(tmp_path / "parquet", dataset), cache_dir=cache)
    assert source[0][0].shape == (2, 1, 1)
    with pytest.raises(BadImageError, match=r"row 1 cannot be decoded: it holds numbers that are not finite"):
        source[1]


def test_grayscale_and_declared_modes(tmp_path, cache):
    gray = datasets.Dataset.from_dict(
        {"image": [encode(pixels(n, channels=1)) for n in range(3)]}, datasets.Features({"image": datasets.Image()})
    )
    source = open_source(parquet(tmp_path / "gray", gray), cache_dir=cache)
    assert (source.shape, source.num_classes, source.labels.tolist()) == ((1, 8, 8), 0, [-1, -1, -1])
    assert np.array_equal(source[2][0], pixels(2, channels=1))
    gray.cast_column("image", datasets.Image(mode="RGB")).save_to_disk(tmp_path / "declared")
    assert open_source(str(tmp_path / "declared")).shape == (3, 8, 8)


def test_columns_are_found_or_asked_for(tmp_path):
    integer, image = datasets.Value("int64"), datasets.Image()
    classes = datasets.ClassLabel(names=["x", "y", "z"])

    def source(dataset, **options):
        dataset.save_to_disk(tmp_path / "d")
        return HuggingFaceSource(str(tmp_path / "d"), **options)

    found = source(rows(label=None, cls=integer))
    assert (found.labels.tolist(), found.num_classes, found.class_names) == ([0, 1, 2, 0, 1, 2], 3, None)
    assert source(rows(label=integer, fine=classes)).class_names == ["x", "y", "z"]  # declared goes before plain
    assert source(rows(image=image)).column == "image"
    assert source(rows(image=image), image_column="img").column == "img"

    texts = datasets.Dataset.from_dict({"img": [encode(pixels(0))] * 3, "label": ["owl", "cat", "owl"]})
    named = source(texts.cast_column("img", image))
    assert (named.labels.tolist(), named.class_names) == ([1, 0, 1], ["cat", "owl"])

    for dataset, options, error in [
        (rows(img=None), {}, r"has no images in any column; its columns: label \(ClassLabel\)\. Name one"),
        (
            rows(),
            {"image_column": "label"},
            r"has no images in label; its columns: img \(Image\), label \(ClassLabel\)",
        ),
        (rows(), {"image_column": "photo"}, r"--image_column photo is not in .*; its columns: img \(Image\), label"),
        (rows(), {"label_column": "kind"}, r"--label_column kind is not in .*; its columns: img \(Image\), label"),
        (rows(img2=image), {}, r"Several columns of .* would do: img, img2\. Choose one with --image_column"),
        (
            rows(label=None, fine=classes, coarse=classes),
            {},
            r"would do: fine, coarse\. Choose one with --label_column",
        ),
        (
            rows(label=datasets.Value("float32")),
            {},
            r"row 0 \(0\.png\) has 0\.0 in column label; labels are integers, or all",
        ),
        (rows(), {"split": "test"}, r'd has no split "test"; choose one of its splits with --dataset_split: train'),
    ]:
        with pytest.raises(ValueError, match=error):
            source(dataset, **options)


@pytest.mark.parametrize(
    "labels, error",
    [
        (
            [0, -1, 2],
            r"row 1 has label -1; the labels of 3 classes are 0 to 2\. Correct or remove it \(1 such images\)",
        ),
        ([0, 1, None], r"row 2 has None in column label; labels are integers, or all strings"),
    ],
)
def test_some_missing_labels_are_named_but_none_at_all_is_no_classes(tmp_path, labels, error):
    def save(labels):
        dataset = datasets.Dataset.from_dict({"image": [encode(pixels(n)) for n in range(3)], "label": labels})
        dataset.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "d")
        return str(tmp_path / "d")

    with pytest.raises(ValueError, match=error):
        open_source(save(labels))
    assert open_source(save([-1, -1, -1])).num_classes == 0


def test_label_beyond_the_declared_classes_is_named(tmp_path):
    rows().save_to_disk(tmp_path / "d")
    info = json.loads((tmp_path / "d" / "dataset_info.json").read_text())
    info["features"]["label"]["names"] = ["x", "y"]
    (tmp_path / "d" / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match=r"row 2 \(2\.png\) has label 2; the labels of 2 classes are 0 to 1"):
        open_source(str(tmp_path / "d"))


def test_open_source_refuses_what_does_not_fit_together(tmp_path):
    assert open_source().title == open_source("digits").title == "digits (train)"
    assert len(open_source("digits", split="test")) == 500
    with pytest.raises(ValueError, match="--dataset_name x and --train_data_dir y both name the images; give one"):
        open_source("x", "y")
    with pytest.raises(ValueError, match="--label_column fine says nothing about the digits; leave it out"):
        open_source("digits", label_column="fine")
    with pytest.raises(ValueError, match="--dataset_split test, --image_column img says nothing about y; leave it out"):
        open_source(train_data_dir="y", split="test", image_column="img")
    file = write(tmp_path, {"rows.parquet": b""}) / "rows.parquet"
    for name in (file, tmp_path / "nowhere", "missing.zip"):
        with pytest.raises(
            ValueError, match=f"--dataset_name {name} is neither a folder nor a Hub id. Name the folder"
        ):
            open_source(str(name))


class OwnSource(ImageSource):
    def name(self, index: int) -> str:
        return f"own {index}"

    def read(self, index: int) -> np.ndarray:
        return pixels(index)


def test_a_source_of_ones_own_needs_two_methods_and_labels():
    source = OwnSource("mine", [1, 0, 2])
    assert (len(source), source.num_classes, source.shape, source.channels) == (3, 3, (3, 8, 8), 3)
    assert source[2][1] == 2
    with pytest.raises(ValueError, match="mine holds no images; name another data set, or another split of it"):
        OwnSource("mine", [])
    with pytest.raises(ValueError, match="own 1 has label 9; the labels of 2 classes are 0 to 1"):
        OwnSource("mine", [0, 9], ["cat", "dog"])


# --- the stream


def test_permutation_is_a_fixed_function_of_seed_and_pass():
    # NumPy promises the words of Philox for ever; these positions must never change, or runs could not be resumed
    assert permutation(0, 0, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    orders = {tuple(permutation(seed, number, 100)) for seed in (0, 1, 2**64 - 1) for number in range(5)}
    assert len(orders) == 15
    assert all(sorted(order) == list(range(100)) for order in orders)


def test_every_image_is_used_once_per_pass(tmp_path):
    source = FileSource(class_folders(tmp_path, 7))
    images = TrainingImages(source, seed=3)
    seen = [images[number]["image"].numpy().tobytes() for number in range(7 * 4)]
    passes = [seen[start : start + 7] for start in range(0, 28, 7)]
    assert all(len(set(one)) == 7 for one in passes)
    assert len({tuple(one) for one in passes}) == 4  # each in its own order
    again = TrainingImages(source, seed=3)
    backwards = [again[number]["image"].numpy().tobytes() for number in reversed(range(28))]
    assert backwards[::-1] == seen  # whatever was asked for before
    assert [TrainingImages(source, seed=4)[n]["image"].numpy().tobytes() for n in range(28)] != seen


def test_pictures_and_labels_arrive_unchanged(tmp_path):
    source = FileSource(class_folders(tmp_path, height=4, width=6))
    images = TrainingImages(source)
    assert (len(images), images.image_shape) == (6, (3, 4, 6))
    for number in range(12):
        item = images[number]
        index = permutation(0, number // 6, 6)[number % 6]
        assert item["image"].dtype == torch.uint8
        assert np.array_equal(item["image"].permute(1, 2, 0).numpy(), source[index][0])
        assert (item["label"], item["number"], item["bad"]) == (source[index][1], number, [])


def test_half_of_the_images_are_mirrored_anew_in_each_pass(tmp_path):
    source = FileSource(class_folders(tmp_path, 4))
    plain, flipped = TrainingImages(source, seed=5), TrainingImages(source, seed=5, random_flip=True)
    for number in range(40):
        expected = plain[number]["image"]
        expected = expected.flip(-1) if is_mirrored(5, number) else expected
        assert torch.equal(flipped[number]["image"], expected)
    mirrored = np.array([[is_mirrored(seed, number) for number in range(4000)] for seed in (5, 6)])
    assert np.abs(mirrored.mean(axis=1) - 0.5).max() < 0.032  # 4 standard deviations
    assert abs((mirrored[0] == mirrored[1]).mean() - 0.5) < 0.032
    assert abs((mirrored[:, 1:] == mirrored[:, :-1]).mean() - 0.5) < 0.032


def test_crops_bring_every_image_to_the_resolution(tmp_path):
    source = FileSource(write(tmp_path, {"1.png": encode(pixels(1, 9, 20)), "2.png": encode(pixels(2, 31, 17))}))
    for crop, function in (("center", center_crop), ("dhariwal", dhariwal_crop)):
        images = TrainingImages(source, resolution=8, crop=crop)
        for number in range(2):
            expected = function(source[permutation(0, 0, 2)[number]][0], 8)
            assert np.array_equal(images[number]["image"].permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize(
    "options, error",
    [
        ({"seed": -1}, r"--seed -1 is out of range; choose one from 0 to 2\*\*64 - 1"),
        ({"crop": "corner"}, 'There is no crop "corner"; choose one of none, center, dhariwal'),
        ({"crop": "center"}, "--center_crop does not say to which size; add --resolution"),
        ({"resolution": 0}, "--resolution 0 is no size; give the height and width in pixels"),
    ],
)
def test_contradictory_options_are_refused(options, error):
    with pytest.raises(ValueError, match=error):
        TrainingImages(DigitsSource(), **options)


BROKEN = {
    "truncated.png": (encode(pixels(9))[:-60], r"truncated\.png cannot be decoded: .*truncated"),
    "text.png": (b"not an image", r"text\.png cannot be decoded: cannot identify image file"),
    "empty.png": (b"", r"empty\.png cannot be decoded"),
    "wide.png": (
        encode(pixels(9, 8, 10, 1)),
        r"wide\.png is 8 x 10 pixels; .* must be 8 x 8 .* Add --center_crop or --dhariwal_crop, or change",
    ),
    "colour.png": (encode(pixels(9)), r"colour\.png has 3 channels, in a .* that is grayscale .*Convert"),
}


@pytest.fixture
def grays(tmp_path) -> Path:
    """60 good grayscale images; what is added first as 02-* is not one of the 16 that the source is judged by."""
    return write(tmp_path, {f"{n:02}.png": encode(pixels(n, channels=1)) for n in range(60)})


def test_a_bad_image_is_an_error_with_its_name(grays):
    for name, (data, error) in BROKEN.items():
        path = grays / f"02-{name}"
        path.write_bytes(data)
        images = TrainingImages(FileSource(grays), seed=1)
        with pytest.raises(BadImageError, match=error + ".* Or leave out all such images with --skip_bad_images"):
            for number in range(61):
                images[number]
        path.unlink()


def test_skipped_images_are_replaced_by_the_next_and_named(grays):
    names = sorted(str(grays / f"02-{name}") for name in BROKEN)
    write(grays, {f"02-{name}": data for name, (data, _) in BROKEN.items()})
    source = FileSource(grays)
    images = TrainingImages(source, seed=1, skip_bad_images=True)
    items = [images[number] for number in range(130)]
    bad = Counter(name for item in items for name in item["bad"])
    assert sorted(bad) == names
    assert min(bad.values()) >= 2  # each one in both passes
    for number, item in enumerate(items):
        order = permutation(1, number // 65, 65)
        left_out = [source.name(order[(number + step) % 65]) for step in range(len(item["bad"]))]
        assert item["bad"] == left_out
        expected = source[order[(number + len(left_out)) % 65]][0]
        assert np.array_equal(item["image"].permute(1, 2, 0).numpy(), expected)


def test_only_bad_images_are_an_error(tmp_path):
    with pytest.raises(BadImageError, match=r"None of the images tried in .* can be used\. .*1\.png cannot be decoded"):
        TrainingImages(FileSource(write(tmp_path, {"1.png": b""})), skip_bad_images=True)
    path = write(tmp_path, {"1.png": encode(pixels(1))})
    images = TrainingImages(FileSource(path), resolution=4, skip_bad_images=True)
    with pytest.raises(ValueError, match="None of the 1 images of .* can be used, .*Run without it to see"):
        images[0]


def test_grayscale_images_in_a_colour_data_set_become_rgb(tmp_path):
    write(tmp_path, {"1.png": encode(pixels(1, channels=1)), "2.png": encode(pixels(2))})
    images = TrainingImages(FileSource(tmp_path))
    first = int(permutation(0, 0, 2).tolist().index(0))
    assert images.image_shape == (3, 8, 8)
    assert torch.equal(images[first]["image"], torch.from_numpy(pixels(1, channels=1)).permute(2, 0, 1).expand(3, 8, 8))


# --- batches


def take(loader, count: int) -> list[dict]:
    return list(itertools.islice(loader, count))


def numbers(start: int = 0, **options) -> list[list[int]]:
    return take(GlobalBatchSampler(12, 3, start_image=start, **options), 8)


def test_processes_share_each_step_without_loss_or_repetition():
    alone = numbers()
    assert alone[:4] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    first, second = numbers(rank=0, world_size=2), numbers(rank=1, world_size=2)
    # micro-batch m of process r is micro-batch 2m + r of a single process
    assert [batch for pair in zip(first, second, strict=True) for batch in pair] == alone + numbers(24)
    for step in range(2):
        taken = [numbers(rank=rank, world_size=4)[step] for rank in range(4)]
        assert sorted(itertools.chain(*taken)) == list(range(12 * step, 12 * (step + 1)))


def test_a_resumed_sampler_continues_as_if_never_stopped():
    for rank in range(2):
        whole = take(GlobalBatchSampler(12, 3, rank, 2), 10)
        assert take(GlobalBatchSampler(12, 3, rank, 2, start_image=36), 4) == whole[6:]


@pytest.mark.parametrize(
    "total, micro, world, error",
    [
        (100, 8, 3, "--total_batch_size 100 is not a multiple of --train_batch_size 8 x 3 processes; use 96 or 120"),
        (4, 8, 1, r"--total_batch_size 4 is not a multiple of --train_batch_size 8 x 1 processes; use 8\."),
        (8, 0, 1, "--train_batch_size 0 and --total_batch_size 8 must both be 1 or more"),
    ],
)
def test_batches_that_do_not_divide_are_refused(total, micro, world, error):
    with pytest.raises(ValueError, match=error):
        GlobalBatchSampler(total, micro, world_size=world)


@pytest.mark.parametrize("form", ["zip", "parquet"])
def test_worker_processes_give_the_same_batches(tmp_path, cache, form):
    if form == "zip":
        path = write_zip(
            tmp_path / "x.zip", {f"{'abc'[n % 3]}/{n}.png": encode(pixels(n)) for n in range(6)}, zipfile.ZIP_DEFLATED
        )
    else:
        path = parquet(tmp_path / "x", rows())
    images = TrainingImages(open_source(str(path), cache_dir=cache), seed=2, random_flip=True)
    images[0]  # the files are open before the workers start

    def batches(workers: int, count: int, start: int = 0) -> list[dict]:
        sampler = GlobalBatchSampler(8, 4, start_image=start)  # more images per step than the source has
        options = {"num_workers": workers, "persistent_workers": workers > 0, "collate_fn": collate}
        return take(DataLoader(images, batch_sampler=sampler, **options), count)

    expected = batches(0, 8)
    for got in (batches(2, 8), expected[:4] + batches(2, 4, start=16)):
        for batch, (number, reference) in zip(got, enumerate(expected), strict=True):
            assert batch["number"].tolist() == list(range(4 * number, 4 * number + 4))
            assert batch["image"].shape == (4, 3, 8, 8)
            assert all(torch.equal(batch[key], reference[key]) for key in ("image", "label", "number"))
            assert batch["label"].dtype == torch.int64


def test_a_bad_image_is_named_through_worker_processes_and_batches(grays):
    write(grays, {"02-truncated.png": BROKEN["truncated.png"][0]})
    options = {"batch_sampler": GlobalBatchSampler(61, 61), "num_workers": 2, "collate_fn": collate}
    with pytest.raises(BadImageError, match=r"02-truncated\.png cannot be decoded"):
        take(DataLoader(TrainingImages(FileSource(grays)), **options), 1)
    images = TrainingImages(FileSource(grays), skip_bad_images=True)
    left_out = [name for batch in take(DataLoader(images, **options), 2) for name in batch["bad"]]
    assert set(left_out) == {f"{grays}/02-truncated.png"}
