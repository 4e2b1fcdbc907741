"""Conversion: what the network computes, what it is made of, and files that contradict themselves."""

import contextlib
import copy
import hashlib
import io
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, DiffusionPipeline

from diffusers_edm2 import EDM2UNet2DModel
from diffusers_edm2.convert import (
    ConvertError,
    build_pipeline,
    download,
    interpret,
    model_card,
    parse_file_name,
    public_url,
    read_checkpoint,
    read_snapshots,
    write_folder,
    write_snapshots,
)
from diffusers_edm2.latents import RAW_MEAN, RAW_STD
from diffusers_edm2.snapshots import list_snapshots
from golden_files import build_unet, load_golden, select
from official_pickles import (
    Persistent,
    dumps,
    golden_content,
    latent_encoder,
    save_training_state,
    tiny_content,
    training_state,
)

GOLDEN = ["rgb_cond", "latent_uncond", "options"]


def convert(content, **options):
    return interpret(dumps(content), "test.pkl", **options)


def state_bytes(content) -> bytes:
    buffer = io.BytesIO()
    save_training_state(content, buffer)
    return buffer.getvalue()


# ---- The network ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN)
def test_network_computes_the_reference_numbers(name):
    tensors, metadata = load_golden(f"unet_g_{name}.safetensors")
    checkpoint = convert(golden_content(name))
    unet = checkpoint.load_unet()
    sigma, sd = tensors["sigma"], metadata["config"].get("sigma_data", 0.5)
    assert checkpoint.sigma_data == sd
    c_in = 1 / (sd**2 + sigma**2).sqrt()
    with torch.no_grad():
        F, u = unet(
            tensors["x"] * c_in[:, None, None, None],
            sigma.log() / 4,
            tensors.get("class_labels"),
            return_dict=False,
            return_logvar=True,
        )
    # float32 on the CPU; rtol covers another order of the sums only
    torch.testing.assert_close(F, tensors["raw_output"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(u, tensors["logvar"].flatten(), rtol=1e-5, atol=1e-5)
    expected, config = dict(build_unet(metadata["config"]).config), dict(EDM2UNet2DModel(**checkpoint.config).config)
    for found in (config, expected):
        found.pop("_use_default_values")  # how it was said, not what
        found.update({key: tuple(value) for key, value in found.items() if isinstance(value, list)})
    assert config == expected


@pytest.mark.parametrize("name", GOLDEN)
def test_half_precision_stays_exact(name, tmp_path):
    tensors, _ = load_golden(f"unet_g_{name}.safetensors")
    halves = {key: t.half() for key, t in select(tensors, "param").items()}
    unet = convert(golden_content(name, torch.float16)).load_unet()
    write_folder(unet, tmp_path / "unet", "")
    for network in (unet, EDM2UNet2DModel.from_pretrained(tmp_path / "unet")):
        state = network.state_dict()
        assert state.keys() == halves.keys()
        assert all(state[key].equal(t.to(state[key].dtype)) for key, t in halves.items())
    fourier = [key for key in halves if "fourier" in key]
    assert len(fourier) == 4 and all(unet.state_dict()[key].dtype == torch.float32 for key in fourier)
    assert {t.dtype for key, t in unet.state_dict().items() if key not in fourier} == {torch.float16}


def test_arguments_left_out_have_the_official_defaults():
    """The defaults stand in the arguments of no file, but in the behaviour: here they meet the modules' own copies."""
    content = golden_content("rgb_cond")
    told = content["ema"].attributes["_init_kwargs"]
    assert {"res_balance", "clip_act", "label_balance", "sigma_data"}.isdisjoint(told)
    config = convert(content).config
    assert (config["label_balance"], config["concat_balance"]) == (0.5, 0.5)
    assert (config["res_balance"], config["attn_balance"], config["clip_act"]) == (0.3, 0.3, 256)
    del told["model_channels"]
    with pytest.raises(ConvertError, match=r"block_out_channels \[192, 384\] and \[8, 16\]"):
        convert(content)


def test_resolutions_that_the_network_does_not_have_are_passed_over():
    content = golden_content("rgb_cond", attn_resolutions=[64, 8])
    assert convert(content).config["attention_resolutions"] == [8]


def test_arguments_without_a_name():
    content = golden_content("rgb_cond")
    attributes = content["ema"].attributes
    kwargs = attributes["_init_kwargs"]
    attributes["_init_args"] = tuple(kwargs.pop(name) for name in ("img_resolution", "img_channels", "label_dim"))
    assert convert(content).config == convert(golden_content("rgb_cond")).config


# ---- Latents and σ_data --------------------------------------------------------------------------


def test_whitening_becomes_the_statistics_of_the_latents():
    checkpoint = convert(golden_content("latent_uncond"))
    # float32 is what the official encoder computes its scale and bias in
    assert checkpoint.latents_mean == pytest.approx(RAW_MEAN, rel=1e-6)
    assert checkpoint.latents_std == pytest.approx(RAW_STD, rel=1e-6)
    assert checkpoint.vae_name == "stabilityai/sd-vae-ft-mse"
    raw = np.float64([[1.0, -2.0, 3.0, 0.5]])
    scale, bias = np.float32(0.5) / np.float32(RAW_STD), -np.float32(RAW_MEAN) * (np.float32(0.5) / np.float32(RAW_STD))
    sample = raw * scale + bias
    back = sample * np.array(checkpoint.latents_std) / checkpoint.sigma_data + np.array(checkpoint.latents_mean)
    np.testing.assert_allclose(back, raw, rtol=1e-12)  # the inverse of what the encoder does, not of what it means


def test_whitening_of_any_shape():
    content = tiny_content()
    content["encoder"].state.update({k: content["encoder"].state[k].reshape(1, 4, 1, 1) for k in ("scale", "bias")})
    assert convert(content).latents_mean == convert(tiny_content()).latents_mean


def test_pipeline_holds_everything_and_loads(tmp_path):
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    pipeline = build_pipeline(convert(tiny_content()), convert(tiny_content(seed=1)), vae)
    write_folder(pipeline, tmp_path / "pipeline", model_card(["a.pkl"], "mit"))
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert loaded.config.latents_mean == pytest.approx(RAW_MEAN, rel=1e-6)
    assert loaded.scheduler.config.sigma_data == 0.5
    images = [
        p(
            class_labels=[0, 1], generator=torch.Generator().manual_seed(0), num_inference_steps=2, guidance_scale=1.5
        ).images
        for p in (pipeline.to(torch.float32), loaded.to(torch.float32))
    ]
    assert len(images[0]) == 2 and all(a.tobytes() == b.tobytes() for a, b in zip(*images, strict=True))


def test_sigma_data_of_the_file_is_the_schedulers():
    assert build_pipeline(convert(golden_content("options"))).scheduler.config.sigma_data == 0.7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(scale=s["scale"][:3]), "not 4 numbers each"),
        (lambda s: s.update(scale=-s["scale"]), "a scale is not positive"),
        (lambda s: s.update(bias=s["bias"] * np.float32("nan")), "not 4 numbers each"),
        (lambda s: s.update(bias=np.array([1, "a", 2, 3], dtype=object)), "only numbers are read"),
        (lambda s: s.pop("scale"), "StabilityVAEEncoder', without a scale"),
        (lambda s: s["_init_kwargs"].update(raw_std=[1, 2, 3, 4]), "another raw_std"),
    ],
)
def test_damaged_whitening_is_refused(change, message):
    content = tiny_content()
    content["encoder"] = latent_encoder()
    change(content["encoder"].state)
    with pytest.raises(ConvertError, match=message):
        convert(content)


# ---- Files that contradict themselves ------------------------------------------------------------


def module(content, path: str):
    return content["ema"].get_submodule(path)


def rename(content, path: str, new: str):
    parent, _, name = path.rpartition(".")
    children = module(content, parent)._modules
    children[new] = children.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: rename(c, "unet.enc.16x16_block0", "16x16_block7"),
            r"missing: enc.16x16_block0.*unknown: 'enc.16x16_block7",
        ),
        (lambda c: module(c, "unet.enc.8x8_down")._parameters.pop("emb_gain"), "missing: enc.8x8_down.emb_gain"),
        (lambda c: module(c, "unet")._buffers.update(extra=torch.ones(2)), "unknown: 'extra'"),
        (lambda c: c["ema"]._parameters.update({"out_gain": torch.ones([])}), "'out_gain' stands in it twice"),
        (lambda c: module(c, "unet").attributes.update(extra=torch.ones(2)), r"1 tensors belong to no module.*\[2\]"),
        (lambda c: c["encoder"].state.update(extra=torch.ones(3)), r"1 tensors belong to no module.*\[3\]"),
        (
            lambda c: module(c, "unet.enc.8x8_down.conv_res0")._parameters.update(weight=torch.ones(8, 8, 3, 2)),
            r"of another shape: enc.8x8_down.conv_res0.weight \[8, 8, 3, 2\] for \[8, 8, 3, 3\]",
        ),
        (
            lambda c: module(c, "unet.enc.8x8_down.conv_res0")._parameters.update(
                weight=module(c, "unet.enc.8x8_down.conv_res1").weight
            ),
            "stands in the network twice",
        ),
        (
            lambda c: module(c, "unet.enc.8x8_down.conv_res0")._parameters.update(weight=torch.ones(8, 8, 3, 3).long()),
            "not of floating point: enc.8x8_down.conv_res0.weight",
        ),
        (lambda c: module(c, "unet.enc")._modules.update({"a.b": None}), "not the name of a module's part"),
        (lambda c: c["ema"].attributes["_init_kwargs"].update(img_resolution=32), "sample_size 32 and 16"),
        (lambda c: c["ema"].attributes["_init_kwargs"].update(num_blocks=2), "layers_per_block 2 and 1"),
        (lambda c: c["ema"].attributes["_init_kwargs"].update(attn_resolutions=[]), r"resolutions \[\] and \[8\]"),
        (lambda c: c["ema"].attributes["_init_kwargs"].update(label_dim=9), "num_class_embeds 9 and 10"),
        (lambda c: c["ema"].attributes["_init_kwargs"].update(channels_per_head=4), "num_heads is 2 in unet.*, and 4"),
        (
            lambda c: c["ema"].attributes["_init_kwargs"].update(sigma_data=0.7),
            "is 0.5 in the network, and 0.7",
        ),
        (lambda c: c["loss_fn"].state.update(sigma_data=0.7), "sigma_data is 0.7 in its loss"),
        (
            lambda c: module(c, "unet.enc.8x8_down").attributes.update(res_balance=0.4),
            "is 0.4 in unet.enc.8x8",
        ),
        (lambda c: module(c, "unet").attributes.update(concat_balance=0.4), "concat_balance is 0.4 in unet"),
        (lambda c: c["ema"].attributes["_init_kwargs"].update(magic=1), "unknown 'magic'"),
        (lambda c: c["ema"].attributes["_init_kwargs"].pop("label_dim"), "missing label_dim"),
        (lambda c: c["ema"].attributes.update(_init_args=(16,)), "twice img_resolution"),
        (lambda c: c["ema"].attributes["_init_kwargs"].update(channel_mult="12"), "channel_mult is '12', not integers"),
        (lambda c: c["ema"].attributes["_init_kwargs"].update(clip_act=float("nan")), "clip_act is nan"),
        (lambda c: c["ema"].attributes["_init_kwargs"].update(sigma_data=-0.5), "sigma_data"),
        (lambda c: c["ema"].attributes.update(_init_kwargs=None), "does not say what arguments"),
        (lambda c: setattr(c["ema"], "class_name", "EDMPrecond"), "of the class 'EDMPrecond'"),
        (lambda c: c.pop("ema"), "holds 'encoder', 'dataset_kwargs', 'loss_fn', but no network"),
        (lambda c: c.update(ema=None), "but no network"),
        (lambda c: c.update(encoder=Persistent("Other", {})), "its encoder is 'Other'"),
    ],
)
def test_contradiction_is_refused(change, message):
    content = golden_content("rgb_cond")
    change(content)
    with pytest.raises(ConvertError, match=message):
        convert(content)


def test_numbers_that_are_not_finite_are_refused():
    content = tiny_content()
    with torch.no_grad():
        content["ema"].unet.out_gain.fill_(float("inf"))
    checkpoint = convert(content)
    with pytest.raises(ConvertError, match="test.pkl: the tensor out_gain cannot be read: .* not finite"):
        checkpoint.load_unet()


def test_messages_name_the_file(tmp_path):
    (tmp_path / "a.pkl").write_bytes(dumps({"weights": 1}))
    (tmp_path / "b.pkl").write_bytes(b"")
    with pytest.raises(ConvertError, match="a.pkl cannot be converted: it holds 'weights', but no network"):
        read_checkpoint(tmp_path / "a.pkl")
    with pytest.raises(ConvertError, match="b.pkl is empty"):
        read_checkpoint(tmp_path / "b.pkl")
    with pytest.raises(ConvertError, match="c.pkl cannot be read: No such file"):
        read_checkpoint(tmp_path / "c.pkl")


# ---- Training states -----------------------------------------------------------------------------


@pytest.mark.parametrize("objects", [True, False])
@pytest.mark.parametrize(("sigma_rel", "number"), [(None, 1), (0.05, 1), (0.1, 2), (0, 0)])
def test_training_state(objects, sigma_rel, number, tmp_path):
    content = training_state(objects=objects)
    save_training_state(content, tmp_path / "training-state-0001048.pt")
    networks = [content["net"], *content["ema"]["emas"]]
    expected = networks[number].state_dict() if objects else networks[number]
    checkpoint = read_checkpoint(tmp_path / "training-state-0001048.pt", sigma_rel)
    state = checkpoint.load_unet().state_dict()
    assert {("" if k.startswith("logvar") else "unet.") + k for k in state} == set(expected)
    assert all(t.equal(expected[("" if k.startswith("logvar") else "unet.") + k]) for k, t in state.items())
    assert (checkpoint.nimg, checkpoint.sigma_rel) == (2**20, sigma_rel if sigma_rel is not None else 0.05)
    assert "0.05, 0.1, 0 (0: none)" in checkpoint.remarks[0]
    assert any("official defaults" in remark for remark in checkpoint.remarks) == (not objects)


def share_numbers(state: dict[str, torch.Tensor]) -> None:
    state["unet.enc.4x4_block0.conv_res0.weight"] = state["unet.enc.4x4_block0.conv_res1.weight"][:]


@pytest.mark.parametrize(
    ("change", "sigma_rel", "message"),
    [
        (lambda c: None, 0.07, "no EMA of length 0.07; it has 0.05, 0.1, 0"),
        (lambda c: c["ema"].update(stds=[0.05]), None, "no list 'stds' with a network in the list 'emas' each"),
        (lambda c: c.update(net={"a": 1}), 0, "the network is a dict"),
        (lambda c: c.update(net={"a": torch.ones(1)}), 0, "not an EDM2 network"),
        (lambda c: c["net"].pop("unet.out_conv.weight"), 0, "lack what says its in_channels"),
        (lambda c: c["net"].update({"unet.extra": torch.ones(1)}), 0, "unknown: 'extra'"),
        (lambda c: share_numbers(c["net"]), 0, "share the same numbers"),
        (lambda c: c["loss_fn"].update(sigma_data=-1), None, "not a positive number"),
    ],
)
def test_training_state_that_is_not_understood(change, sigma_rel, message):
    content = training_state()
    change(content)
    with pytest.raises(ConvertError, match=message):
        interpret(state_bytes(content), "state.pt", sigma_rel)


def test_network_pickle_has_one_network():
    with pytest.raises(ConvertError, match="it holds one network; sigma_rel chooses"):
        convert(tiny_content(), sigma_rel=0.05)


# ---- Pipelines -----------------------------------------------------------------------------------


def test_guide_and_vae_have_to_fit():
    rgb, latent = convert(golden_content("rgb_cond")), convert(golden_content("latent_uncond"))
    with pytest.raises(ConvertError, match="cannot guide test.pkl: its in_channels is 4, not 3"):
        build_pipeline(rgb, latent)
    other = copy.copy(latent)
    other.sigma_data = 1.0
    with pytest.raises(ConvertError, match="sigma_data is 1.0, not 0.5"):
        build_pipeline(latent, other)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2)
    with pytest.raises(ConvertError, match="the VAE has 2 channels and test.pkl 4; .*'stabilityai/sd-vae-ft-mse'"):
        build_pipeline(latent, vae=vae)


def test_nothing_is_overwritten_and_nothing_is_left(tmp_path):
    unet = convert(tiny_content()).load_unet()
    write_folder(unet, tmp_path / "unet", "card")
    before = {path: path.read_bytes() for path in (tmp_path / "unet").iterdir()}
    with pytest.raises(FileExistsError, match="unet exists already"):
        write_folder(convert(tiny_content(seed=1)).load_unet(), tmp_path / "unet", "card")
    assert {path: path.read_bytes() for path in (tmp_path / "unet").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["unet"]


@pytest.mark.parametrize("license", ["cc-by-nc-sa-4.0", "mit"])
def test_card_is_valid(license):
    card = model_card(["a.pkl"], license, ["one fact"])
    _, front, body = card.split("---\n", 2)
    data = yaml.safe_load(front)
    assert data["license"] == license and data["library_name"] == "diffusers"
    assert data["pipeline_tag"] == "unconditional-image-generation" and "edm2" in data["tags"]
    assert "- one fact" in body and "- source: `a.pkl`" in body
    assert ("CC BY-NC-SA 4.0" in body) == (license == "cc-by-nc-sa-4.0")


# ---- Snapshots -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("edm2-img512-s-2147483-0.130.pkl", (2**31, 0.13)),
        ("edm2-img512-s-uncond-2147483-0.070.pkl", (2**31, 0.07)),
        ("edm2-img512-xxl-0939524-0.075.pkl", (896 * 2**20, 0.075)),
        ("edm2-img512-l-1879048-0.015.pkl", (1792 * 2**20, 0.015)),
        ("edm2-img64-xl-0671088-0.040.pkl", (640 * 2**20, 0.04)),
        ("network-snapshot-0134217-0.100.pkl", (2**27, 0.1)),
        ("network-snapshot-0008388-0.050.pkl", (2**23, 0.05)),
        ("network-snapshot-0000000-0.050.pkl", (0, 0.05)),
        ("training-state-0134217.pt", None),
        ("network-snapshot-0134217.pkl", None),
        ("network-snapshot-0134217-0.050.pkl.part", None),
    ],
)
def test_file_names_tell_time_and_length(name, expected):
    assert parse_file_name(name) == expected


@pytest.mark.parametrize("step", [1, 3, 8, 64])
def test_all_official_snapshot_times_are_recovered(step):
    """Snapshots every `step` Mi images: the name keeps only thousands, and that is enough."""
    for nimg in range(0, 2**31 + 1, step * 2**20):
        assert parse_file_name(f"network-snapshot-{nimg // 1000:07d}-0.050.pkl") == (nimg, 0.05)


def snapshot_folder(folder: Path) -> Path:
    folder.mkdir()
    for seed, (kimg, std) in enumerate([(1048, 0.05), (1048, 0.1), (2097, 0.05), (2097, 0.1)]):
        (folder / f"network-snapshot-{kimg:07d}-{std:.3f}.pkl").write_bytes(dumps(tiny_content(seed)))
    save_training_state(training_state(objects=True), folder / "training-state-0002097.pt")
    (folder / "log.txt").write_text("text")
    return folder


def test_raw_snapshots_become_a_run_folder(tmp_path):
    found = read_snapshots(snapshot_folder(tmp_path / "raw"))
    assert write_snapshots(found, tmp_path / "run") == []
    snapshots = list_snapshots(tmp_path / "run")
    assert [(s.nimg, s.sigma_rel) for s in snapshots] == [(2**20, 0.05), (2**20, 0.1), (2**21, 0.05), (2**21, 0.1)]
    for seed, snapshot in enumerate(snapshots):
        expected = convert(tiny_content(seed)).load_unet().state_dict()
        state = EDM2UNet2DModel.from_pretrained(snapshot.path).state_dict()
        assert all(state[key].equal(t.to(state[key].dtype)) for key, t in expected.items())


def test_interrupted_conversion_of_snapshots_goes_on(tmp_path):
    found = read_snapshots(snapshot_folder(tmp_path / "raw"))

    def two(names):
        yield from names[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_snapshots(found, tmp_path / "run", two)
    assert len(list((tmp_path / "run/snapshots").iterdir())) == 2
    assert write_snapshots(found, tmp_path / "run") == list(found)[:2]
    assert len(list_snapshots(tmp_path / "run")) == 4


def test_one_snapshot_is_open_at_a_time(tmp_path):
    """A process may often have no more than 1024 open files."""
    raw = tmp_path / "raw"
    raw.mkdir()
    data = dumps(tiny_content(width=64, head=64))  # large tensors stay in the file until they are loaded
    for kimg in range(1048, 1056):
        (raw / f"network-snapshot-{kimg:07d}-0.050.pkl").write_bytes(data)
    before, counts = len(os.listdir("/proc/self/fd")), []

    def count(things):
        for thing in things:
            yield thing
            counts.append(len(os.listdir("/proc/self/fd")) - before)

    assert len(write_snapshots(read_snapshots(raw, count), tmp_path / "run", count)) == 0
    assert len(counts) == 16 and max(counts) <= 3  # the first, to compare with; the last; the listing itself


def test_wrong_folders_of_snapshots(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConvertError, match="has no files named like network-snapshot"):
        read_snapshots(tmp_path / "empty")
    mixed = snapshot_folder(tmp_path / "mixed")
    (mixed / "network-snapshot-0003145-0.050.pkl").write_bytes(dumps(golden_content("rgb_cond")))
    with pytest.raises(ConvertError, match="0003145-0.050.pkl is of another network than .*: config differs"):
        read_snapshots(mixed)
    double = snapshot_folder(tmp_path / "double")
    (double / "edm2-1048-0.050.pkl").write_bytes(dumps(tiny_content()))
    with pytest.raises(ConvertError, match="are of the same time and length"):
        read_snapshots(double)
    damaged = snapshot_folder(tmp_path / "damaged")
    path = damaged / "network-snapshot-0002097-0.050.pkl"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConvertError, match="0002097-0.050.pkl cannot be converted: .* truncated"):
        read_snapshots(damaged)


# ---- Downloads -----------------------------------------------------------------------------------

CONTENT = bytes(range(256)) * 20_000  # 5 MB


class Server:
    """An HTTP server of one file, which can break connections and do without ranges.

    Args:
        breaks: bytes after which each of the first connections ends.
        more: how often it sends the content again, without a word on how much there will be.
    """

    def __init__(
        self,
        content: bytes = CONTENT,
        breaks=(),
        ranges: bool = True,
        length: int | None = None,
        status: int = 200,
        more: int = 0,
    ):
        self.content, self.breaks, self.requests, self.targets = content, list(breaks), [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args) -> None:
                pass

            def do_HEAD(self) -> None:
                outer.requests.append("HEAD")
                self.send_response(status)
                self.send_header("Content-Length", str(length or len(outer.content)))
                self.send_header("ETag", hashlib.sha256(outer.content).hexdigest())
                self.end_headers()

            def do_GET(self) -> None:
                outer.targets.append(self.path)
                start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if ranges else 0
                outer.requests.append(f"GET {start}")
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(outer.content) - 1}/{len(outer.content)}")
                if not more:
                    self.send_header("Content-Length", str(len(outer.content) - start))
                self.end_headers()
                body = outer.content[start:] + more * outer.content
                with contextlib.suppress(ConnectionError):  # who asked has gone
                    self.wfile.write(body[: outer.breaks.pop(0)] if outer.breaks else body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/edm2/x-1048-0.050.pkl"

    def __enter__(self) -> "Server":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args) -> None:
        self.server.shutdown()
        self.server.server_close()


def test_download_is_kept(tmp_path):
    seen = []
    with Server() as server:
        path = download(server.url, tmp_path, lambda done, total: seen.append((done, total)))
        assert path.name == "x-1048-0.050.pkl" and path.read_bytes() == CONTENT
        assert seen[-1] == (len(CONTENT), len(CONTENT))
        assert download(server.url, tmp_path) == path
        assert server.requests == ["HEAD", "GET 0"]
    assert download(server.url, tmp_path) == path  # without the server
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_broken_connection_goes_on_where_it_ended(tmp_path):
    with Server(breaks=[2 * 2**20, 2**20]) as server:
        assert download(server.url, tmp_path, wait=0.01).read_bytes() == CONTENT
        gets = [request for request in server.requests if request.startswith("GET")]
        assert gets == ["GET 0", f"GET {2 * 2**20}", f"GET {3 * 2**20}"]


def test_interrupted_download_goes_on_the_next_time(tmp_path):
    def interrupt(done, total):
        if done > 2**21:
            raise KeyboardInterrupt

    with Server() as server:
        with pytest.raises(KeyboardInterrupt):
            download(server.url, tmp_path, interrupt)
        (part,) = tmp_path.glob("*/*")
        assert part.suffix == ".part"
        size = part.stat().st_size
        assert download(server.url, tmp_path).read_bytes() == CONTENT
        assert server.requests[-1] == f"GET {size}" and size > 2**21


def test_another_version_of_the_file_starts_anew(tmp_path):
    with Server(breaks=[2**20] * 9) as server:
        with pytest.raises(ConvertError, match="1048576 bytes are there; the same command goes on"):
            server.breaks = [2**20] + [0] * 9
            download(server.url, tmp_path, retries=2, wait=0.01)
        server.breaks, server.content = [], bytes(reversed(CONTENT))
        assert download(server.url, tmp_path).read_bytes() == server.content
        assert server.requests[-1] == "GET 0"


def test_server_without_ranges(tmp_path):
    with Server(breaks=[2**20], ranges=False) as server:
        assert download(server.url, tmp_path, wait=0.01).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": len(CONTENT) + 1}, "cannot be downloaded: the connection ended after 5120000 of 5120001"),
        ({"length": len(CONTENT) - 1}, "has sent more than the 5119999 bytes that it had announced"),
        ({"status": 404}, "the server says 404"),
        ({"status": 503}, "cannot be downloaded: Service Unavailable"),
    ],
)
def test_wrong_answers(options, message, tmp_path):
    with Server(**options) as server, pytest.raises(ConvertError, match=message):
        download(server.url, tmp_path, retries=1, wait=0.01)
    assert not list(tmp_path.glob("*/*.pkl"))


def test_server_that_sends_too_much_does_not_fill_the_disk(tmp_path):
    seen = []

    def look(done, total):
        seen.append(done)
        assert all(path.stat().st_size <= total for path in tmp_path.glob("*/*"))

    with Server(more=9) as server, pytest.raises(ConvertError, match="sent more than the 5120000 bytes"):
        download(server.url, tmp_path, look)
    assert 2**20 <= max(seen) <= len(CONTENT)
    assert [path.stat().st_size for path in tmp_path.glob("*/*")] == [0]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://me:secret@host:8000/a/b.pkl?token=secret#secret", "https://host:8000/a/b.pkl"),
        ("https://host/b.pkl", "https://host/b.pkl"),
        ("http://[::1]:80/b.pkl?secret", "http://[::1]:80/b.pkl"),
        ("http://[secret/b.pkl", "'http':…"),
        ("http://host/\x1b[2J\u202e.pkl?secret", r"http://host/\x1b[2J\u202e.pkl"),
    ],
)
def test_urls_are_shown_without_secrets(url, expected):
    assert public_url(url) == expected


@pytest.mark.parametrize("options", [{"length": 10**7}, {"length": 9}, {"status": 404}, {"status": 503}, {"more": 1}])
def test_no_message_shows_the_query_of_an_address(options, tmp_path):
    with Server(**options) as server, pytest.raises(ConvertError) as caught:
        download(f"{server.url}?token=secret", tmp_path, retries=0, wait=0.01)
    assert "secret" not in str(caught.value) and server.url in str(caught.value)


@pytest.mark.parametrize("rest", ["x y=secret", "\nsecret", "σ-secret", "\x7fsecret"])
def test_addresses_that_cannot_be_sent(rest, tmp_path):
    with pytest.raises(ConvertError, match="http://127.0.0.1:1/a.pkl is not the http") as caught:
        download(f"http://127.0.0.1:1/a.pkl?{rest}", tmp_path)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("port", ["", ":1"])
def test_address_with_a_password(port, tmp_path):
    with pytest.raises(ConvertError, match="host.invalid.* was given with a user name, which is not sent") as caught:
        download(f"http://me:secret@host.invalid{port}/a.pkl", tmp_path, retries=0)
    assert "secret" not in str(caught.value) and not list(tmp_path.iterdir())


def test_server_that_is_not_there(tmp_path):
    with Server() as server:
        url = server.url
    with pytest.raises(ConvertError, match="Connection refused. 0 bytes are there"):
        download(url, tmp_path, retries=1, wait=0.01)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://x/a.pkl",
        "http://x.pkl",
        "http://[x/a.pkl",
        "http://x/",
        "http://x/..",
        "http://x/a%2F..",
        "http://x/.a",
    ],
)
def test_addresses_that_are_not_of_a_file(url, tmp_path):
    with pytest.raises(ConvertError, match="is not the http"):
        download(url, tmp_path)
