"""Finding snapshots, and networks of other EMA lengths from them: real folders, written by an EMA in a small loop."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers_edm2 import EDM2UNet2DModel, PowerFunctionEMA
from diffusers_edm2.ema import posthoc_coefficients, snapshot_name
from diffusers_edm2.snapshots import (
    WEIGHTS,
    Snapshot,
    SnapshotError,
    _check_space,
    find_networks,
    list_snapshots,
    reconstruct,
)

TRACKS, THIRD = (0.05, 0.10), 0.075
STEP, TOTAL, SNAPSHOTS = 16, 25600, 32  # images per update and in all; times at which all tracks are saved
END = TOTAL


def build(seed: int = 0, **options) -> EDM2UNet2DModel:
    torch.manual_seed(seed)
    return EDM2UNet2DModel(
        sample_size=8,
        in_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        attention_resolutions=(),
        attention_head_dim=8,
        **options,
    )


def trained(network: torch.nn.Module) -> list[str]:
    return [name for name, p in network.named_parameters() if p.requires_grad]


def save_tracks(folder: Path, ema: PowerFunctionEMA, lengths: tuple[float, ...]) -> None:
    network = build()
    for sigma_rel in lengths:
        ema.copy_to(network, sigma_rel)
        network.save_pretrained(folder / snapshot_name(ema.nimg, sigma_rel))


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """A run folder of a network whose weights walk at random; a third track is saved apart, in `direct`."""
    run_dir = tmp_path_factory.mktemp("walk")
    network = build()
    ema = PowerFunctionEMA(network, [*TRACKS, THIRD])
    moving = [p for p in network.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(1)
    for nimg in range(STEP, TOTAL + 1, STEP):
        with torch.no_grad():
            for p in moving:
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
        ema.update(nimg)
        if nimg % (TOTAL // SNAPSHOTS) == 0:
            save_tracks(run_dir / "snapshots", ema, TRACKS)
            save_tracks(run_dir / "direct", ema, (THIRD,))
    return run_dir


@pytest.fixture
def copy(walk, tmp_path):
    """A copy, to be damaged, of the last two times of the walk."""
    for snapshot in list_snapshots(walk)[-4:]:
        shutil.copytree(snapshot.path, tmp_path / "run/snapshots" / snapshot.path.name)
    return tmp_path / "run"


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def flat(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([weights[name].flatten().double() for name in trained(build())])


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return ((flat(a) - flat(b)).norm() / flat(b).norm()).item()


def rebuild(source: Path, folder: Path, sigma_rel: float = THIRD, nimg: int = END, **options) -> Path:
    reconstruct(list_snapshots(source), [(sigma_rel, nimg)], [folder], **options)
    return folder


# ---- What comes out ------------------------------------------------------------------------------


def test_reconstruction_agrees_with_a_tracked_average(walk, tmp_path):
    """The weights walk at random: other averages are far. From 4 times on, twice as many come 3 times nearer."""
    direct = weights_of(walk / "direct" / snapshot_name(END, THIRD))
    snapshots = list_snapshots(walk)
    errors, bounds = [], []
    for count in (1, 2, 4, 8, 16, 32):
        chosen = [s for s in snapshots if s.nimg % (TOTAL // count) == 0]
        assert len(chosen) == 2 * count
        bounds += reconstruct(chosen, [(THIRD, END)], [tmp_path / str(count)])
        errors.append(distance(weights_of(tmp_path / str(count)), direct))
    print(f"error {errors}, of the profile {bounds}")
    nearest = min(distance(weights_of(s.path), direct) for s in snapshots)
    assert nearest > 0.03
    assert errors[0] < nearest / 2
    assert all(later < earlier for earlier, later in pairwise(errors))
    assert all(later < earlier / 3 for earlier, later in pairwise(errors[2:]))
    assert errors[-1] < 3e-5
    earlier = weights_of(rebuild(walk, tmp_path / "earlier", nimg=END // 2))
    assert distance(earlier, weights_of(walk / "direct" / snapshot_name(END // 2, THIRD))) < 2e-4


def test_sums_are_exact_to_float32(walk, tmp_path):
    """Float64 sums of the same files differ by the rounding of the terms, which are up to 10 times the sum."""
    targets = [(0.03, END), (0.07, END), (0.20, END)]
    snapshots = list_snapshots(walk)
    reconstruct(snapshots, targets, [tmp_path / str(i) for i in range(3)])
    coefficients, _ = posthoc_coefficients([(s.sigma_rel, s.nimg) for s in snapshots], targets)
    exact = torch.stack([flat(weights_of(s.path)) for s in snapshots]).T @ torch.from_numpy(coefficients)
    for i in range(3):
        error = (flat(weights_of(tmp_path / str(i))) - exact[:, i]).norm() / exact[:, i].norm()
        print(f"relative rounding {error:.1e}, sum of the coefficients' sizes {np.abs(coefficients[:, i]).sum():.1f}")
        assert error < 1e-6


def test_file_is_that_of_save_file_and_loads(walk, tmp_path):
    folder = rebuild(walk, tmp_path / "out")
    network = EDM2UNet2DModel.from_pretrained(folder)
    save_file(network.state_dict(), tmp_path / "same", metadata={"format": "pt"})
    assert (tmp_path / "same").read_bytes() == (folder / WEIGHTS).read_bytes()
    network(torch.randn(1, 1, 8, 8), torch.zeros(1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "same"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_equals_loading_in_half_precision(walk, tmp_path, dtype):
    whole, half = rebuild(walk, tmp_path / "whole"), rebuild(walk, tmp_path / "half", dtype=dtype)
    expected = EDM2UNet2DModel.from_pretrained(whole, torch_dtype=dtype).state_dict()
    stored = weights_of(half)
    assert {t.dtype for t in stored.values()} == {dtype, torch.float32}
    assert stored.keys() == expected.keys()
    loaded = EDM2UNet2DModel.from_pretrained(half, torch_dtype=dtype).state_dict()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype
        assert torch.equal(stored[name].to(tensor.dtype), tensor), name
    assert all(stored[name].dtype == torch.float32 for name in stored if "fourier" in name)
    save_file(stored, tmp_path / "same", metadata={"format": "pt"})
    assert (tmp_path / "same").read_bytes() == (half / WEIGHTS).read_bytes()


def test_half_precision_snapshots_are_summed_in_float32(walk, copy, tmp_path):
    """All snapshots of the copy but one in bfloat16: the sum is that of their values, not rounded on the way."""
    snapshots = list_snapshots(copy)
    for snapshot in snapshots[1:]:
        EDM2UNet2DModel.from_pretrained(snapshot.path).to(torch.bfloat16).save_pretrained(snapshot.path)
    assert weights_of(snapshots[1].path)["emb_noise.weight"].dtype == torch.bfloat16
    result = weights_of(rebuild(copy, tmp_path / "out"))
    coefficients, _ = posthoc_coefficients([(s.sigma_rel, s.nimg) for s in snapshots], [(THIRD, END)])
    exact = torch.stack([flat(weights_of(s.path)) for s in snapshots]).T @ torch.from_numpy(coefficients[:, 0])
    assert (flat(result) - exact).norm() / exact.norm() < 1e-6
    assert result["emb_noise.weight"].dtype == torch.float32


def test_what_does_not_train_is_copied_bitwise(walk, tmp_path):
    """Large coefficients, as those of 0.03, would change the last digits of a sum."""
    newest = weights_of(list_snapshots(walk)[-1].path)
    result = weights_of(rebuild(walk, tmp_path / "out", sigma_rel=0.03))
    frozen = result.keys() - set(trained(build()))
    assert len(frozen) == 4
    for name in result:
        assert torch.equal(result[name], newest[name]) == (name in frozen)


def test_snapshot_comes_out_as_it_is(walk, tmp_path):
    folder = rebuild(walk, tmp_path / "out", sigma_rel=0.10)
    snapshot = walk / "snapshots" / snapshot_name(END, 0.10)
    for name in (WEIGHTS, "config.json"):
        assert (folder / name).read_bytes() == (snapshot / name).read_bytes()


def test_later_snapshots_have_no_part(walk, copy, tmp_path):
    """Those after the target may be damaged; the outcome is that of a run that had ended there."""
    for snapshot in list_snapshots(copy)[2:]:
        (snapshot.path / WEIGHTS).write_bytes(b"damaged")
    earlier = list_snapshots(copy)[1].nimg
    rebuild(copy, tmp_path / "out", nimg=earlier)
    for snapshot in list_snapshots(copy)[2:]:
        shutil.rmtree(snapshot.path)
    rebuild(copy, tmp_path / "same", nimg=earlier)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "same" / WEIGHTS).read_bytes()


def test_snapshots_in_several_files(copy, tmp_path):
    whole = rebuild(copy, tmp_path / "whole")
    for snapshot in list_snapshots(copy)[1:]:
        network = EDM2UNet2DModel.from_pretrained(snapshot.path)
        (snapshot.path / WEIGHTS).unlink()
        network.save_pretrained(snapshot.path, max_shard_size="20KB")
        assert len(list(snapshot.path.glob("*.safetensors"))) > 2 and not (snapshot.path / WEIGHTS).exists()
    assert (rebuild(copy, tmp_path / "out") / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


def test_each_file_is_read_once_for_all_outputs(walk, tmp_path):
    """By the kernel's count of bytes read. The headers are read too, and the tensors that do not train twice."""

    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    snapshots = list_snapshots(walk)
    total = sum((s.path / WEIGHTS).stat().st_size for s in snapshots)
    for count in (1, 5):
        before = bytes_read()
        targets = [(0.06 + 0.01 * i, END) for i in range(count)]
        reconstruct(snapshots, targets, [tmp_path / f"{count}-{i}" for i in range(count)])
        assert total < bytes_read() - before < 1.2 * total


def test_progress_and_profile_errors(walk, tmp_path):
    seen = []

    def progress(names):
        for name in names:
            seen.append(name)
            yield name

    targets = [(0.03, END), (0.075, END)]
    errors = reconstruct(list_snapshots(walk), targets, [tmp_path / "a", tmp_path / "b"], progress=progress)
    assert sorted(seen) == sorted(build().state_dict())
    _, expected = posthoc_coefficients([(s.sigma_rel, s.nimg) for s in list_snapshots(walk)], targets)
    assert errors == expected.tolist() and errors[0] > 0.01 > errors[1] > 0


# ---- What is refused -----------------------------------------------------------------------------


def refuse(source: Path, folder: Path, message: str, error=SnapshotError, **options) -> None:
    with pytest.raises(error, match=message):
        rebuild(source, folder, **options)
    assert not list(folder.parent.glob(f"*{folder.name}*"))


def damage_config(path: Path, **changes) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


DAMAGES = {
    "cut off": (WEIGHTS, lambda data: data[:-1], r"is damaged: it has \d+ bytes, and its header speaks of \d+"),
    "too long": (WEIGHTS, lambda data: data + b"x", r"is damaged: it has \d+ bytes, and its header speaks of \d+"),
    "empty": (WEIGHTS, lambda data: b"", "is damaged: it does not begin like a safetensors file"),
    "no header": (WEIGHTS, lambda data: b"\xff" * len(data), "is damaged: it does not begin like a safetensors file"),
    "bad header": (WEIGHTS, lambda data: data[:9] + b"\xff" + data[10:], "is damaged: its header cannot be understood"),
    "bad type": (WEIGHTS, lambda data: data.replace(b'"F32"', b'"I32"', 1), "its header cannot be understood"),
    "other name": (WEIGHTS, lambda data: data.replace(b"out_gain", b"out_main", 1), "does not fit its config.json: "),
    "config cut off": ("config.json", lambda data: data[:-3], "is damaged: it is not JSON"),
    "config no object": ("config.json", lambda data: b"[]", "is damaged: it is not a JSON object"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_snapshot_is_named(copy, tmp_path, damage):
    name, change, message = DAMAGES[damage]
    file = list_snapshots(copy)[1].path / name
    file.write_bytes(change(file.read_bytes()))
    refuse(copy, tmp_path / "out", f"{file.parent}.*{message}")


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_missing_file_is_named(copy, tmp_path, name):
    file = list_snapshots(copy)[2].path / name
    file.unlink()
    refuse(copy, tmp_path / "out", f"{file} cannot be read: No such file or directory")


def test_two_networks_in_one_folder(copy, tmp_path):
    path = list_snapshots(copy)[1].path
    build(seed=1).save_pretrained(path)
    refuse(copy, tmp_path / "out", f"{path} and .* are of two different networks: emb_fourier.freqs")
    build(seed=0, dropout=0.1).save_pretrained(path)
    refuse(copy, tmp_path / "out", f"{path / 'config.json'} belongs to another network .*: dropout is 0.1, there 0.0")
    build(seed=0, num_class_embeds=3).save_pretrained(path)
    refuse(copy, tmp_path / "out", "num_class_embeds is 3, there None")


def test_configurations_of_other_versions_and_classes(copy, tmp_path):
    path = list_snapshots(copy)[1].path
    config = json.loads((path / "config.json").read_text())
    del config["clip_act"]  # as from a version that did not know this option yet
    (path / "config.json").write_text(json.dumps(config | {"_diffusers_version": "0.1"}))
    rebuild(copy, tmp_path / "out")
    damage_config(path, layers_per_block=2)
    refuse(copy, tmp_path / "no", "layers_per_block is 2, there 1")
    damage_config(path, layers_per_block=1, attention_head_dim=7)
    refuse(copy, tmp_path / "no", f"{path / 'config.json'} is damaged: attention_head_dim=7")
    damage_config(path, _class_name="UNet2DModel")
    refuse(copy, tmp_path / "no", f"{path / 'config.json'} is of the class UNet2DModel, not EDM2UNet2DModel")


def test_targets_that_cannot_be_met(walk, copy, tmp_path):
    out = tmp_path / "out"
    refuse(walk, out, r"sigma_rel=0.3 is not in \(0, 0.2886\]", ValueError, sigma_rel=0.3)
    message = "nimg=1000: there is no snapshot of this time; there are 32, from 800 to 25600, the nearest at 800"
    refuse(walk, out, message, ValueError, nimg=1000)
    one = list_snapshots(copy)[0]
    with pytest.raises(ValueError, match=rf"{one.path} is the only snapshot up to nimg={one.nimg}: .* sigma_rel=0.05"):
        reconstruct([one], [(0.10, one.nimg)], [out])
    reconstruct([one], [(0.05, one.nimg)], [out])
    assert (out / WEIGHTS).read_bytes() == (one.path / WEIGHTS).read_bytes()


def test_existing_folders(walk, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(FileExistsError, match=f"{out} exists already"):
        rebuild(walk, out)
    assert [path.name for path in out.iterdir()] == ["mine"]
    rebuild(walk, out, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", WEIGHTS]
    with pytest.raises(ValueError, match="2 targets need as many different folders"):
        reconstruct(list_snapshots(walk), [(0.07, END), (0.08, END)], [out, out])


def test_space_is_checked_before_the_work(tmp_path):
    with pytest.raises(
        OSError, match=r"2 networks need 1073741824.00 GiB, but only \d+\.\d\d GiB are free in .*; free"
    ):
        _check_space([tmp_path / "a/b", tmp_path / "c"], 2**60)


def test_error_on_the_way_leaves_nothing(walk, tmp_path):
    def fail(names):
        yield names[0]
        raise KeyboardInterrupt

    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        targets = [(0.07, END), (0.08, END)]
        reconstruct(list_snapshots(walk), targets, [tmp_path / "out/a", tmp_path / "out/b"], progress=fail)
    assert list((tmp_path / "out").iterdir()) == []


# ---- Finding -------------------------------------------------------------------------------------


def test_list_snapshots(walk, tmp_path):
    snapshots = list_snapshots(walk)
    assert len(snapshots) == 64
    assert snapshots[0] == Snapshot(walk / "snapshots/unet-000000800-0.050", 800, 0.05)
    assert snapshots == list_snapshots(walk / "snapshots")
    assert list_snapshots([s.path for s in reversed(snapshots)]) == snapshots
    for empty in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ValueError, match=f"{empty} has no snapshots; give a run folder"):
            list_snapshots(empty)
    with pytest.raises(ValueError, match=f"{walk} is not named like a snapshot"):
        list_snapshots([walk])
    with pytest.raises(ValueError, match="are of the same time and length; give one of them"):
        list_snapshots([snapshots[0].path, snapshots[0].path])


def test_find_networks(copy):
    first, second = sorted({s.nimg for s in list_snapshots(copy)})
    snapshots, cache = copy / "snapshots", copy / "posthoc"
    assert find_networks(copy, [(None, None), (0.1, first)]) == [
        snapshots / snapshot_name(second, 0.05),
        snapshots / snapshot_name(first, 0.10),
    ]
    assert not cache.exists()
    (copy / "config.json").write_text(json.dumps({"options": {"ema_sigma_rel": [0.1, 0.05]}}))
    found = find_networks(copy, [(None, None), (0.07, None), (0.0725, first), (0.07, second)])
    made = [cache / snapshot_name(second, 0.07), cache / snapshot_name(first, 0.0725)]
    assert found == [snapshots / snapshot_name(second, 0.10), *made, made[0]]
    for path, target in zip(made, ((0.07, second), (0.0725, first)), strict=True):
        reconstruct(list_snapshots(copy), [target], [copy / "same"], overwrite=True)
        assert (path / WEIGHTS).read_bytes() == (copy / "same" / WEIGHTS).read_bytes()
    before = [(path / WEIGHTS).stat().st_ino for path in made]
    assert find_networks(copy, [(0.07, None), (0.0725, first), (0.08, None)])[:2] == made
    assert [(path / WEIGHTS).stat().st_ino for path in made] == before
    with pytest.raises(ValueError, match=r"sigma_rel=0.3 is not in"):
        find_networks(copy, [(0.3, None)])
