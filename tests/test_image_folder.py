"""The folder of drawn images: numbers, seeds and classes, and files that appear whole."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_edm2 import EDM2HeunScheduler, EDM2Pipeline
from diffusers_edm2.dataset import open_source
from diffusers_edm2.image_folder import (
    ImageFolder,
    Numbering,
    check_settings,
    existing_images,
    fingerprint,
    format_seeds,
    image_path,
    parse_seeds,
    read_npz,
    write_npz,
)
from test_unet_edm2 import active_unet

SHAPE = (3, 8, 8)
HERE = {"torch": "2.11"}


def folder_with(path, image_format="png", rule="balanced", seeds=(), settings=None) -> ImageFolder:
    """An image of each seed, in the colour of its number."""
    folder = ImageFolder(path, image_format, Numbering(rule, 3, SHAPE))
    assert folder.open(settings or {"steps": 4}, {"model": "m"}, HERE, seeds) == []
    for number in folder.missing(folder.numbers(seeds)):
        folder.save(number, Image.new("RGB", (4, 2), (number % 256, number // 256, 7)))
    folder.complete()
    return folder


@pytest.mark.parametrize(
    "text, seeds, shortest",
    [
        ("0-3", [0, 1, 2, 3], "0-3"),
        ("5, 1,0", [0, 1, 5], "0-1,5"),
        ("7-8,3-7", [3, 4, 5, 6, 7, 8], "3-8"),
        ("9-9", [9], "9"),
    ],
)
def test_seeds_are_read_and_written(text, seeds, shortest):
    assert parse_seeds(text) == seeds
    assert format_seeds(seeds) == shortest
    assert parse_seeds(shortest) == seeds


@pytest.mark.parametrize("text", ["", "3-1", "-4", "1,,2", "a", "1.5", "4294967296"])
def test_seeds_that_are_none(text):
    with pytest.raises(ValueError, match=r"no seed and no range of seeds from 0 to 4294967295, such as 0-9,20,30-39\."):
        parse_seeds(text)


def test_classes_are_a_function_of_the_number():
    def places(rule, seeds=range(4, 8), num_classes=3):
        numbering = Numbering(rule, num_classes, SHAPE)
        return [numbering.place(number) for seed in seeds for number in numbering.of_seed(seed)]

    assert places("balanced") == [(4, 1), (5, 2), (6, 0), (7, 1)]
    assert places([2, 0]) == [(4, 2), (5, 0), (6, 2), (7, 0)]
    assert places("none") == places(None, num_classes=0) == [(4, -1), (5, -1), (6, -1), (7, -1)]
    assert places("all", [4]) == [(4, 0), (4, 1), (4, 2)]
    assert [Numbering("all", 3, SHAPE).of_seed(seed) for seed in (0, 1)] == [range(0, 3), range(3, 6)]
    assert places(None) == places("random")


def test_random_classes_are_those_of_the_pipeline():
    """All that a seed decides is the same as in `pipe(generator=...)`: here the class, told by the network's input."""
    unet, seen = active_unet(sample_size=8, attention_resolutions=(4,)), []
    unet.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    pipe = EDM2Pipeline(unet, EDM2HeunScheduler())
    pipe.set_progress_bar_config(disable=True)
    pipe(generator=[torch.Generator().manual_seed(seed) for seed in range(50, 90)], num_inference_steps=1)
    numbering = Numbering("random", 10, SHAPE)
    assert [numbering.place(seed)[1] for seed in range(50, 90)] == seen[0].tolist()
    assert len(set(seen[0].tolist())) == 10


@pytest.mark.parametrize(
    "rule, num_classes, message",
    [
        ([0, 3], 3, r"the classes of this network are 0 to 2, and not \[0, 3\]\."),
        ([0], 0, "classes were asked for, but the network has none; leave --class_labels out."),
        ("balanced", 0, "classes were asked for, but the network has none; leave --class_labels out."),
    ],
)
def test_classes_that_the_network_does_not_have(rule, num_classes, message):
    with pytest.raises(ValueError, match=message):
        Numbering(rule, num_classes, SHAPE)


def test_files_lie_in_subfolders_of_a_thousand(tmp_path):
    folder = folder_with(tmp_path / "out", seeds=[0, 999, 1000, 1234567])
    files = sorted(str(path.relative_to(tmp_path / "out")) for path in tmp_path.rglob("*.png"))
    assert files == ["000000/000000.png", "000000/000999.png", "001000/001000.png", "1234000/1234567.png"]
    assert existing_images(tmp_path / "out") == {0, 999, 1000, 1234567}
    assert folder.missing([999, 1001, 1000]) == [1001]
    assert folder.read([999])[0].getpixel((0, 0)) == (231, 3, 7)


def test_the_list_of_classes_makes_it_a_data_set(tmp_path):
    folder_with(tmp_path / "out", seeds=[4, 5, 6])
    source = open_source(None, str(tmp_path / "out"))
    assert [source.name(i)[-10:] for i in range(3)] == ["000004.png", "000005.png", "000006.png"]
    assert list(source.labels) == [1, 2, 0]
    folder_with(tmp_path / "none", seeds=[4], rule="none")
    assert json.loads((tmp_path / "none/dataset.json").read_text()) == {"labels": None}


def test_npz_holds_images_classes_and_seeds(tmp_path):
    folder = folder_with(tmp_path / "out", "npz", seeds=[4, 300])
    with np.load(tmp_path / "out/images.npz") as archive:
        assert sorted(archive) == ["arr_0", "arr_1", "seeds"]
        assert archive["arr_0"].dtype == np.uint8 and archive["arr_0"].shape == (2, 2, 4, 3)
        assert archive["arr_0"][:, 0, 0].tolist() == [[4, 0, 7], [44, 1, 7]]
        assert archive["arr_1"].tolist() == [1, 0] and archive["seeds"].tolist() == [4, 300]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["generation.json", "images.npz"]
    assert folder.missing([300, 5]) == [5]
    assert folder.read([300])[0].getpixel((0, 0)) == (44, 1, 7)
    without = folder_with(tmp_path / "none", "npz", seeds=[4], rule="none")
    assert sorted(np.load(without.npz)) == ["arr_0", "seeds"]


@pytest.mark.parametrize("rule", ["balanced", "all", "none"])
def test_npz_takes_more_images(tmp_path, rule):
    """In two goes, or with a process killed between the two steps of the end: the same bytes as at once."""
    at_once = folder_with(tmp_path / "one", "npz", rule, seeds=[0, 2, 3, 5])
    folder_with(tmp_path / "two", "npz", rule, seeds=[2, 5])
    two = folder_with(tmp_path / "two", "npz", rule, seeds=[0, 3])
    assert two.npz.read_bytes() == at_once.npz.read_bytes()
    assert json.loads((tmp_path / "two/generation.json").read_text())["seeds"] == "0,2-3,5"

    before = two.npz.stat().st_mtime_ns
    two.save(0, two.read([0])[0])  # parts that are in the .npz already
    two.complete()
    assert two.npz.stat().st_mtime_ns == before and not (tmp_path / "two/parts").exists()


def test_gray_images_stay_gray(tmp_path):
    folder = ImageFolder(tmp_path / "out", "npz", Numbering(None, 0, (1, 8, 8)))
    folder.save(0, Image.new("L", (4, 2), 9))
    folder.complete()
    assert np.load(folder.npz)["arr_0"].shape == (1, 2, 4, 1)
    assert folder.read([0])[0].mode == "L"


def test_npz_reads_one_image_after_the_other(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 4, 1), np.uint8)
    write_npz(tmp_path / "a.npz", iter(images), range(5), None)
    stream = read_npz(tmp_path / "a.npz")
    assert all(np.array_equal(next(stream), image) for image in images)
    write_npz(tmp_path / "b.npz", iter(images), range(5), None)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with pytest.raises(ValueError, match=r"image 2 is uint8 \(2, 4, 1\), and the first one uint8 \(3, 4, 1\)\."):
        write_npz(tmp_path / "c.npz", [images[0], images[0, :2]], range(2), None)
    with pytest.raises(ValueError, match="there are 5 images and 4 seeds; each image needs a seed and a class."):
        write_npz(tmp_path / "c.npz", iter(images), range(4), None)


def test_a_folder_takes_one_setting(tmp_path):
    path, settings = tmp_path / "out", {"steps": 4, "interval": (1, 2)}
    folder = folder_with(path, seeds=[0], settings=settings)
    message = (
        r"out holds images of other settings:\n  churn: was \(not set\), now 3\n  steps: was 4, now 5\nGive the same"
    )
    with pytest.raises(ValueError, match=message):
        folder.open({"steps": 5, "interval": [1, 2], "churn": 3}, {}, HERE, [0])
    told = folder.open(settings, {"model": "moved"}, {"torch": "2.12"}, [8, 9])
    assert told == [f"{path} was begun with other versions or on another device; rounding may differ."]
    content = json.loads((path / "generation.json").read_text())
    assert content["environments"] == [HERE, {"torch": "2.12"}]
    assert (content["source"], content["seeds"]) == ({"model": "moved"}, "0,8-9")
    assert content["settings"] == {"steps": 4, "interval": [1, 2]}
    assert folder.open(settings, {}, HERE, [0]) == []
    (path / "generation.json").write_text("{")
    with pytest.raises(ValueError, match="generation.json is damaged .* restore it, or give another --output_dir."):
        folder.open(settings, {}, HERE, [0])


def test_settings_are_free_until_there_is_an_image(tmp_path):
    assert check_settings(tmp_path / "new", {"steps": 4}) == {}
    folder_with(tmp_path / "out", settings={"steps": 4})
    folder_with(tmp_path / "out", settings={"steps": 5}, seeds=[0])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    with pytest.raises(ValueError, match=r"mine is not empty \(thesis.tex\) and has no generation.json; give another"):
        check_settings(tmp_path / "mine", {})


def test_what_cannot_be_written_is_named(tmp_path):
    folder = ImageFolder(tmp_path / "out", "png", Numbering(None, 0, SHAPE))
    path = image_path(tmp_path / "out", 7)
    path.mkdir(parents=True)
    with pytest.raises(IsADirectoryError) as caught:
        folder.save(7, Image.new("RGB", (4, 4)))
    assert caught.value.filename == str(path)


def test_fingerprints_tell_networks_apart(tmp_path):
    unet = active_unet(sample_size=8, attention_resolutions=(4,))
    unet.save_pretrained(tmp_path)
    first = fingerprint(unet)
    assert fingerprint(type(unet).from_pretrained(tmp_path)) == first
    assert fingerprint(unet.half()) != first
    assert fingerprint(active_unet(sample_size=8, attention_resolutions=(4,), res_balance=0.4)) != first
    changed = active_unet(sample_size=8, attention_resolutions=(4,))
    changed.out_gain.data += 1e-6
    assert fingerprint(changed) != first
