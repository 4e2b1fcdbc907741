"""Official EDM2 pickles to our model, pipeline and run folders, without executing them.

A network pickle holds `ema`, an object of the class `Precond` with its constructor's arguments, `encoder` (how images
become samples) and `loss_fn`. A training state holds `net` and `ema`, objects or state dicts. `pickle_reader` reads
both as inert records; this file finds the network in them, works out its settings twice, from the arguments and from
the shapes of the tensors, and gives every tensor its place.
"""

import fcntl
import hashlib
import http.client
import json
import math
import mmap
import os
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.modeling_utils import ModelMixin

from diffusers_edm2.ema import snapshot_name
from diffusers_edm2.files import atomic_folder, make_folder, sync
from diffusers_edm2.pickle_reader import Array, ConvertError, Object, Tensor, read_pickle, show
from diffusers_edm2.pipeline_edm2 import EDM2Pipeline, card_metadata, card_sections, generated_part
from diffusers_edm2.scheduling_edm2_heun import EDM2HeunScheduler
from diffusers_edm2.unet_edm2 import EDM2UNet2DModel

MAX_TENSORS = 2_500  # of a network; the largest official one has about 220
MAX_LIST = 64  # numbers of one setting, such as channel_mult
LICENSE = "cc-by-nc-sa-4.0"  # of the weights that EDM2's authors published

# The official constructor's arguments: what each has to be, and its default; the first three have none.
_ARGUMENTS: dict[str, tuple[str, Any]] = {
    "img_resolution": ("integer", None),
    "img_channels": ("integer", None),
    "label_dim": ("integer", None),
    "use_fp16": ("bool or integer", True),
    "sigma_data": ("number", 0.5),
    "logvar_channels": ("integer", 128),
    "model_channels": ("integer", 192),
    "channel_mult": ("integers", [1, 2, 3, 4]),
    "channel_mult_noise": ("integer or None", None),
    "channel_mult_emb": ("integer or None", None),
    "num_blocks": ("integer", 3),
    "attn_resolutions": ("integers", [16, 8]),
    "label_balance": ("number", 0.5),
    "concat_balance": ("number", 0.5),
    "resample_filter": ("numbers", [1, 1]),
    "channels_per_head": ("integer", 64),
    "dropout": ("number", 0.0),
    "res_balance": ("number", 0.3),
    "attn_balance": ("number", 0.3),
    "clip_act": ("number or None", 256),
}
_REQUIRED = ("img_resolution", "img_channels", "label_dim")
_POSITIONAL = tuple(_ARGUMENTS)[:6]
# Arguments that our configuration has under the same name, and the shapes of the tensors do not tell.
_SAME_NAME = (
    "dropout",
    "label_balance",
    "concat_balance",
    "res_balance",
    "attn_balance",
    "resample_filter",
    "clip_act",
)


@dataclass
class Checkpoint:
    """A network that was found in a file, complete and consistent; its tensors are still there.

    Args:
        source: name of the file.
        config: arguments of `EDM2UNet2DModel`.
        tensors: by their names in `EDM2UNet2DModel`.
        sigma_data: standard deviation of the data, which our scheduler holds.
        latents_mean, latents_std: statistics of the raw VAE latents per channel; None for a network of pixels.
        vae_name: the VAE of a network of latents, if the file says it.
        nimg: training images seen, if known.
        sigma_rel: length of the EMA, if known; 0 for weights without.
        remarks: sentences on what was chosen or assumed.
    """

    source: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    sigma_data: float
    latents_mean: list[float] | None = None
    latents_std: list[float] | None = None
    vae_name: str | None = None
    nimg: int | None = None
    sigma_rel: float | None = None
    remarks: list[str] = field(default_factory=list)

    def load_unet(self) -> EDM2UNet2DModel:
        """The network, in evaluation mode; weights bit by bit in the type of the file, Fourier features float32.

        Raises:
            ConvertError: a tensor is damaged, or its numbers are not finite.
        """
        with torch.device("meta"):
            unet = EDM2UNet2DModel(**self.config)
        state = {}
        for name, tensor in self.tensors.items():
            try:
                weight = tensor.load()
            except ConvertError as error:
                raise ConvertError(f"{self.source}: the tensor {name} cannot be read: {error}") from error
            # As the model keeps them, whatever type it is cast to.
            state[name] = weight.float() if name.endswith((".freqs", ".phases")) else weight
        unet.load_state_dict(state, assign=True)
        return unet.eval()


# ---- Reading a file ------------------------------------------------------------------------------


def read_checkpoint(path: Path, sigma_rel: float | None = None) -> Checkpoint:
    """Find the network in an official network pickle or training state. Nothing in the file is executed.

    Args:
        path: a `.pkl` by training or post-hoc reconstruction, or a `training-state-*.pt`.
        sigma_rel: which EMA of a training state, 0 for the weights without; default its first. Pickles have one.

    Raises:
        ConvertError: the file cannot be read, is damaged, or holds something else; the message says what.
    """
    try:
        with open(path, "rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise ConvertError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ConvertError(f"{path} is empty.") from error
    try:
        checkpoint = interpret(data, path.name, sigma_rel)
    except ConvertError as error:
        raise ConvertError(f"{path} cannot be converted: {error}") from error
    if checkpoint.nimg is None and (named := parse_file_name(path.name)):
        checkpoint.nimg, checkpoint.sigma_rel = named
    return checkpoint


def interpret(data: bytes | memoryview, source: str, sigma_rel: float | None = None) -> Checkpoint:
    """`read_checkpoint` of bytes in memory; `source` is their name."""
    content, tensors = read_pickle(data)
    if type(content) is not dict:
        raise ConvertError(f"it holds {show(content)}, not the dict of an EDM2 network or training state.")
    if isinstance(content.get("ema"), Object) and "net" not in content:
        if sigma_rel is not None:
            raise ConvertError("it holds one network; sigma_rel chooses among the EMAs of a training state.")
        checkpoint = _from_network_pickle(content, tensors, source)
    elif "net" in content:
        checkpoint = _from_training_state(content, source, sigma_rel)
    else:
        keys = ", ".join(show(key) for key in list(content)[:8]) or "nothing"
        raise ConvertError(
            f"it holds {keys}, but no network: neither 'ema' with an object, as a network pickle has, nor 'net', as a "
            "training state."
        )
    if len(checkpoint.tensors) > MAX_TENSORS:
        raise ConvertError(f"its network has {len(checkpoint.tensors)} tensors; no network of these has so many.")
    size = sum(_checked_size(name, tensor) for name, tensor in checkpoint.tensors.items())
    storages = {id(tensor.storage.data) for tensor in checkpoint.tensors.values()}
    if len(storages) < len(checkpoint.tensors) or size > len(data):
        raise ConvertError("several of its tensors share the same numbers.")
    _place_tensors(checkpoint)
    return checkpoint


def _checked_size(name: str, tensor: Tensor) -> int:
    try:
        return tensor.check()
    except ConvertError as error:
        raise ConvertError(f"the tensor {name}: {error}") from error


def _from_network_pickle(content: dict, tensors: list[Tensor], source: str) -> Checkpoint:
    network = content["ema"]
    named, objects = _walk(network)
    elsewhere = {id(tensor) for tensor in tensors} - {id(tensor) for tensor in named.values()}
    if elsewhere:
        stray = [f"{list(t.shape)} at byte {t.position}" for t in tensors if id(t) in elsewhere]
        raise ConvertError(f"{len(stray)} tensors belong to no module of the network: {_some(stray)}.")
    return _checkpoint(content, source, _settings(network), named, objects)


def _from_training_state(content: dict, source: str, sigma_rel: float | None) -> Checkpoint:
    """One of the networks of a training state: `net`, or one of `ema`, which has `stds` and `emas`."""
    ema = content.get("ema")
    ema = ema.state if isinstance(ema, Object) else ema
    ema = ema if type(ema) is dict else {}
    stds, emas = ema.get("stds", []), ema.get("emas", [])
    if not _is("numbers", stds) or type(emas) is not list or len(stds) != len(emas):
        raise ConvertError("the 'ema' of the training state has no list 'stds' with a network in the list 'emas' each.")
    networks = {**dict(zip(stds, emas, strict=True)), 0: content["net"]}
    chosen = next(iter(networks)) if sigma_rel is None else sigma_rel
    if chosen not in networks:
        raise ConvertError(f"it has no EMA of length {chosen}; it has {_some(map(str, networks))} (0: without EMA).")
    network = networks[chosen]

    described = next((n for n in (network, content["net"]) if isinstance(n, Object)), None)
    loss = content.get("loss_fn")
    loss = loss.state if isinstance(loss, Object) else loss
    objects: dict[str, Object] = {}
    if isinstance(network, Object):
        named, objects = _walk(network)
    elif type(network) is dict and all(type(k) is str and isinstance(v, Tensor) for k, v in network.items()):
        named = network
    else:
        raise ConvertError(f"the network is {show(network)}; an object or a state dict of tensors is expected.")
    remarks = [f"of a training state with the EMA lengths {_some(map(str, networks))} (0: none), took {chosen}"]
    if described is not None:
        settings = _settings(described)
    else:
        settings = {name: default for name, (_, default) in _ARGUMENTS.items()}
        remarks.append("the file has no constructor arguments: what shapes do not tell has the official defaults")
        if type(loss) is dict and _is("number", loss.get("sigma_data")):
            settings["sigma_data"] = loss["sigma_data"]
    checkpoint = _checkpoint(content, source, settings, named, objects, described is not None)
    state = content.get("state")
    nimg = state.get("cur_nimg") if type(state) is dict else None
    checkpoint.nimg = nimg if _is("integer", nimg) else None
    checkpoint.sigma_rel, checkpoint.remarks = chosen, remarks
    return checkpoint


def _checkpoint(
    content: dict,
    source: str,
    settings: dict[str, Any],
    tensors: dict[str, Tensor],
    objects: dict[str, Object],
    described: bool = True,
) -> Checkpoint:
    """All that a file says about a network, if its parts agree."""
    config = _config(settings, tensors, described)
    _check_attributes(objects, settings, tensors)
    _check_sigma_data(content.get("loss_fn"), settings["sigma_data"])
    mean, std, vae_name = _whitening(content.get("encoder"), config["in_channels"], settings["sigma_data"])
    return Checkpoint(source, config, tensors, settings["sigma_data"], mean, std, vae_name)


# ---- Modules -------------------------------------------------------------------------------------


def _walk(network: Object) -> tuple[dict[str, Tensor], dict[str, Object]]:
    """The tensors and the modules of a network by their full names, as PyTorch would name them."""
    if network.kind != "Precond":
        raise ConvertError(
            f"its network is of the class {show(network.kind)}; only the class Precond of EDM2 (configuration G) "
            "can be converted."
        )
    tensors: dict[str, Tensor] = {}
    objects: dict[str, Object] = {"": network}
    seen = {id(network)}
    waiting = [""]
    while waiting:
        path = waiting.pop()
        state = objects[path].state or {}
        for group in ("_parameters", "_buffers", "_modules"):
            children = state.get(group, {})
            if type(children) is not dict:
                raise ConvertError(f"{group} of the module {path or 'at the top'} is {show(children)}, not a dict.")
            for name, child in children.items():
                if type(name) is not str or not re.fullmatch(r"\w{1,64}", name, re.ASCII) or path.count(".") > 8:
                    raise ConvertError(f"{show(name)} in {path or 'the network'} is not the name of a module's part.")
                full = f"{path}.{name}" if path else name
                if child is None:
                    continue
                if not isinstance(child, Object if group == "_modules" else Tensor):
                    raise ConvertError(f"{full} is {show(child)}, which does not belong into {group}.")
                if id(child) in seen or full in tensors or full in objects:
                    raise ConvertError(f"{full} stands in the network twice.")
                seen.add(id(child))
                if isinstance(child, Tensor):
                    tensors[full] = child
                else:
                    objects[full] = child
                    waiting.append(full)
    return tensors, objects


def _place_tensors(checkpoint: Checkpoint) -> None:
    """Give the tensors the names of `EDM2UNet2DModel`: a one-to-one match in name and shape, or an error."""
    with torch.device("meta"):
        try:
            unet = EDM2UNet2DModel(**checkpoint.config)
        except (ValueError, RuntimeError) as error:  # or sizes that torch cannot count
            raise ConvertError(f"its settings make no network: {error}") from error
    expected = {name: tuple(t.shape) for name, t in unet.state_dict().items()}
    placed: dict[str, Tensor] = {}
    for name, tensor in checkpoint.tensors.items():
        ours = name.removeprefix("unet.")
        if ours in placed or any(tensor is other for other in placed.values()):
            raise ConvertError(f"the tensor {show(ours)} stands in it twice.")
        placed[ours] = tensor
    problems = {
        "missing": [name for name in expected if name not in placed],
        "unknown": [show(name) for name in placed if name not in expected],
        "of another shape": [
            f"{name} {list(placed[name].shape)} for {list(shape)}"
            for name, shape in expected.items()
            if name in placed and placed[name].shape != shape
        ],
        "not of floating point": [n for n, t in placed.items() if not t.storage.header()[0].is_floating_point],
    }
    if any(problems.values()):
        lists = "; ".join(f"{kind}: {_some(names)}" for kind, names in problems.items() if names)
        raise ConvertError(f"its tensors are not those of the network that its settings describe: {lists}.")
    checkpoint.tensors = {name: placed[name] for name in expected}


# ---- Settings ------------------------------------------------------------------------------------


def _settings(network: Object) -> dict[str, Any]:
    """The constructor's arguments, with the official defaults where none was given."""
    state = network.state or {}
    args, kwargs = state.get("_init_args", ()), state.get("_init_kwargs", {})
    if type(args) not in (tuple, list) or type(kwargs) is not dict:
        raise ConvertError("its network does not say what arguments it was made with.")
    given = dict(zip(_POSITIONAL, args, strict=False))
    twice = given.keys() & kwargs.keys()
    given.update(kwargs)
    unknown = [show(name) for name in given if name not in _ARGUMENTS]
    missing = [name for name in _REQUIRED if name not in given]
    if unknown or missing or twice or len(args) > len(_POSITIONAL):
        raise ConvertError(
            f"its constructor's arguments are not those of EDM2's Precond: unknown {_some(unknown)}; "
            f"missing {_some(missing)}; twice {_some(twice)}; {len(args)} without a name."
        )
    settings = {name: default for name, (_, default) in _ARGUMENTS.items()}
    for name, value in given.items():
        settings[name] = _plain(value)
        if not _is(_ARGUMENTS[name][0], settings[name]):
            raise ConvertError(f"its constructor's argument {name} is {show(value)}, not {_ARGUMENTS[name][0]}.")
    return settings


def _plain(value: Any) -> Any:
    """Numpy numbers and arrays as Python's, short tuples as lists."""
    if isinstance(value, Array):
        return value.tolist()
    if type(value) in (list, tuple) and len(value) <= MAX_LIST:
        # Numbers only: an array that stands in many lists many times would become as many copies.
        return [item.tolist() if isinstance(item, Array) and item.shape == () else item for item in value]
    return value


def _is(kind: str, value: Any) -> bool:
    """Whether `value` is of a kind in `_ARGUMENTS`, and no absurd number."""
    if kind.endswith(" or None"):
        return value is None or _is(kind.removesuffix(" or None"), value)
    if kind.endswith("s"):
        return type(value) is list and len(value) <= MAX_LIST and all(_is(kind[:-1], item) for item in value)
    types = {"integer": (int,), "bool or integer": (bool, int), "number": (int, float)}
    return type(value) in types[kind] and abs(value) < 2**31


def _structure(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the names and shapes of the tensors say about our configuration."""
    shapes = {name.removeprefix("unet."): tensor.shape for name, tensor in tensors.items()}
    blocks = [re.fullmatch(r"dec\.([0-9]{1,5})x\1_block([0-9]{1,3})\.conv_res1\.weight", name) for name in shapes]
    found = [(int(match[1]), int(match[2]), match[0]) for match in blocks if match]
    if not found:
        raise ConvertError("its tensors have no names such as dec.64x64_block0.conv_res1.weight: not an EDM2 network.")
    resolutions = sorted({resolution for resolution, _, _ in found}, reverse=True)
    widths = {resolution: shapes[name][0] for resolution, _, name in found if shapes[name]}

    def size(name: str, axis: int) -> int | None:
        shape = shapes.get(name, ())
        return shape[axis] if axis < len(shape) else None

    structure = {
        "sample_size": resolutions[0],
        "in_channels": size("out_conv.weight", 0),
        "block_out_channels": [widths.get(resolution) for resolution in resolutions],
        "layers_per_block": max(number for _, number, _ in found),  # the decoder has one more, counted from 0
        "attention_resolutions": [r for r in resolutions if f"dec.{r}x{r}_block0.attn_qkv.weight" in shapes],
        "num_class_embeds": size("emb_label.weight", 1),
        "noise_embed_dim": size("emb_noise.weight", 1),
        "time_embed_dim": size("emb_noise.weight", 0),
        "logvar_channels": size("logvar_linear.weight", 1),
    }
    if len(found) != len(resolutions) * (structure["layers_per_block"] + 1):
        raise ConvertError(f"its {len(found)} decoder blocks are not the same number at each of {resolutions}.")
    unclear = [name for name, value in structure.items() if value is None and name != "num_class_embeds"]
    if unclear or None in structure["block_out_channels"]:
        raise ConvertError(f"its tensors lack what says its {_some(unclear or ['block_out_channels'])}.")
    return structure


def _config(settings: Mapping[str, Any], tensors: Mapping[str, Tensor], described: bool) -> dict[str, Any]:
    """Arguments of `EDM2UNet2DModel`, on which the constructor's arguments, if `described`, and the tensors agree."""
    shown = _structure(tensors)
    told = _structure_of_arguments(settings) if described else shown
    different = [f"{name} {told[name]} and {shown[name]}" for name in shown if told[name] != shown[name]]
    if different:
        raise ConvertError(f"its constructor's arguments and its tensors contradict each other: {_some(different)}.")
    if not settings["sigma_data"] > 0:
        raise ConvertError(f"its sigma_data is {settings['sigma_data']}, not a positive number.")
    return {
        **shown,
        "noise_embed_dim": None
        if shown["noise_embed_dim"] == shown["block_out_channels"][0]
        else shown["noise_embed_dim"],
        "time_embed_dim": None
        if shown["time_embed_dim"] == max(shown["block_out_channels"])
        else shown["time_embed_dim"],
        "attention_head_dim": settings["channels_per_head"],
        **{name: settings[name] for name in _SAME_NAME},
    }


def _structure_of_arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the constructor's arguments say about our configuration, as far as `_structure` tells it too."""
    base, noise, embedding = (settings[n] for n in ("model_channels", "channel_mult_noise", "channel_mult_emb"))
    widths = [base * multiple for multiple in settings["channel_mult"]]
    resolutions = [settings["img_resolution"] >> level for level in range(len(widths))]
    return {
        "sample_size": settings["img_resolution"],
        "in_channels": settings["img_channels"],
        "block_out_channels": widths,
        "layers_per_block": settings["num_blocks"],
        # The official code passes over resolutions that the network does not have.
        "attention_resolutions": [r for r in resolutions if r in settings["attn_resolutions"]],
        "num_class_embeds": settings["label_dim"] or None,
        "noise_embed_dim": (widths or [None])[0] if noise is None else base * noise,
        "time_embed_dim": max(widths, default=None) if embedding is None else base * embedding,
        "logvar_channels": settings["logvar_channels"],
    }


def _check_attributes(
    objects: Mapping[str, Object], settings: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """The modules' own copies of the settings, with which the official network computes, have to agree with them."""
    for path, module in objects.items():
        state = module.state or {}
        expected: dict[str, Any] = {}
        if path == "":
            expected = {name: settings[name] for name in (*_REQUIRED, "sigma_data")}
        elif path == "unet":
            expected = {name: settings[name] for name in ("label_balance", "concat_balance")}
        elif f"{path}.conv_res1.weight" in tensors:
            names = ("resample_filter", "dropout", "res_balance", "attn_balance", "clip_act")
            expected = {name: settings[name] for name in names}
            width = (tensors[f"{path}.conv_res1.weight"].shape or (0,))[0]
            attends = f"{path}.attn_qkv.weight" in tensors
            expected["num_heads"] = width // max(settings["channels_per_head"], 1) if attends else 0
        for name, value in expected.items():
            found = _plain(state.get(name, value))
            if not isinstance(found, (int, float, list, type(None))) or found != value:
                raise ConvertError(
                    f"its settings contradict each other: {name} is {show(found)} in {path or 'the network'}, and "
                    f"{value} by the constructor's arguments."
                )


def _check_sigma_data(loss: Any, sigma_data: float) -> None:
    """The loss that the network was trained with has to have the network's own σ_data."""
    state = loss.state if isinstance(loss, Object) else loss
    found = _plain(state.get("sigma_data", sigma_data)) if type(state) is dict else sigma_data
    if not _is("number", found) or found != sigma_data:
        raise ConvertError(f"sigma_data is {show(found)} in its loss, and {sigma_data} in its network.")


def _whitening(
    encoder: Any, channels: int, sigma_data: float
) -> tuple[list[float] | None, list[float] | None, str | None]:
    """Mean and standard deviation of the raw latents, and the VAE's name, of an encoder: sample = raw * scale + bias.

    The pipeline takes raw = sample * std / σ_data + mean, so std = σ_data / scale and mean = -bias / scale.
    """
    if encoder is None or (isinstance(encoder, Object) and encoder.kind == "StandardRGBEncoder"):
        return None, None, None
    state = encoder.state if isinstance(encoder, Object) else None
    if not state or "scale" not in state or "bias" not in state:
        kind = encoder.kind if isinstance(encoder, Object) else encoder
        raise ConvertError(
            f"its encoder is {show(kind)}, without a scale and a bias: neither of pixels nor of latents."
        )
    scale, bias = (_per_channel(state[name]) for name in ("scale", "bias"))
    if not (_is("numbers", scale) and _is("numbers", bias) and len(scale) == len(bias) == channels and min(scale) > 0):
        raise ConvertError(f"its encoder's scale and bias are not {channels} numbers each, or a scale is not positive.")
    mean, std = [-b / s for s, b in zip(scale, bias, strict=True)], [sigma_data / s for s in scale]
    kwargs = state.get("_init_kwargs")
    kwargs = kwargs if type(kwargs) is dict else {}
    for name, values in (("raw_mean", mean), ("raw_std", std)):
        told = _plain(kwargs.get(name, values))
        # float32 is what the official code computes scale and bias in
        if not _is("numbers", told) or len(told) != channels or not all(map(_nearly, told, values)):
            raise ConvertError(f"its encoder was made with another {name} than its scale and bias say, {values}.")
    vae_name = state.get("vae_name", kwargs.get("vae_name"))
    return mean, std, vae_name if type(vae_name) is str else None


def _per_channel(value: Any) -> Any:
    """The numbers of an array of any shape, such as [C] or [1, C, 1, 1]."""
    return np.ravel(value.tolist()).tolist() if isinstance(value, Array) else _plain(value)


def _nearly(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-5)


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return (", ".join(names[:8]) + (f" and {len(names) - 8} others" if len(names) > 8 else "")) or "none"


# ---- Model and pipeline folders ------------------------------------------------------------------


def build_pipeline(main: Checkpoint, guide: Checkpoint | None = None, vae: ModelMixin | None = None) -> EDM2Pipeline:
    """A pipeline with the networks, the whitening and the σ_data of the files.

    Raises:
        ConvertError: the guide or the VAE does not work on the same samples, or a tensor is damaged.
    """
    if guide is not None:
        for name in ("sample_size", "in_channels"):
            if main.config[name] != guide.config[name]:
                raise ConvertError(
                    f"{guide.source} cannot guide {main.source}: its {name} is {guide.config[name]}, not "
                    f"{main.config[name]}; take a guide that was trained on the same samples."
                )
        for name in ("sigma_data", "latents_mean", "latents_std"):
            ours, theirs = getattr(main, name), getattr(guide, name)
            if ours is not None and theirs is not None and ours != theirs:
                raise ConvertError(f"{guide.source} cannot guide {main.source}: {name} is {theirs}, not {ours}.")
    if vae is not None and (channels := vae.config["latent_channels"]) != main.config["in_channels"]:
        raise ConvertError(
            f"the VAE has {channels} channels and {main.source} {main.config['in_channels']}; give the VAE that it was "
            f"trained with{f', {show(main.vae_name)}' if main.vae_name else ', or none for a network of pixels'}."
        )
    return EDM2Pipeline(
        main.load_unet(),
        EDM2HeunScheduler(sigma_data=main.sigma_data),
        guide_unet=guide.load_unet() if guide is not None else None,
        vae=vae,
        latents_mean=main.latents_mean,
        latents_std=main.latents_std,
    )


def write_folder(
    model: EDM2Pipeline | EDM2UNet2DModel,
    output_dir: Path,
    card: str,
    guidance_scale: float = 1.5,
    metrics: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Save a pipeline or a network with its model card, whole or not at all.

    The part of the card that every pipeline has is put behind `card`; its example guides with `guidance_scale`. Scores
    go to metrics.json, which publishing enters into the card.

    Raises:
        FileExistsError: `output_dir` exists.
    """
    with atomic_folder(output_dir) as folder:
        model.save_pretrained(folder)
        generated = ""
        if isinstance(model, EDM2Pipeline):
            location = "path/to/this/folder"
            generated = generated_part(
                card_sections(model.config, model.unet.config, location, guidance_scale=guidance_scale)
            )
        if metrics:
            (folder / "metrics.json").write_text(json.dumps(list(metrics), indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(f"{card}\n{generated}\n", encoding="utf-8")


def model_card(sources: Sequence[str], license: str, facts: Sequence[str] = ()) -> str:
    """The README.md of what was converted: where it comes from, its licence, what is known about it.

    Args:
        sources: names or URLs of the files.
        license: an identifier of the Hub, such as "cc-by-nc-sa-4.0".
        facts: sentences for a list.
    """
    terms = (
        "The weights are the work of EDM2's authors, NVIDIA, under "
        "[CC BY-NC-SA 4.0](https://creativecommons.org/licenses/by-nc-sa/4.0/): not for commercial use, and what is "
        "made from them stays under this licence. This folder is an adaptation: names and file format are changed, the "
        "numbers are not."
        if license == LICENSE
        else f"The weights: {license}."
    )
    listed = "\n".join(f"- {line}" for line in [*(f"source: `{source}`" for source in sources), *facts])
    return f"""---
license: {license}
{card_metadata()}---

# EDM2, converted from the official format

{listed}

## Licence of the weights

{terms}
"""


# ---- Snapshots of a run --------------------------------------------------------------------------


def parse_file_name(name: str) -> tuple[int, float] | None:
    """Images seen and EMA length of a file called `<anything>-<kimg>-<std>.pkl`, as all official ones are; or None.

    The name has thousands of images, rounded down. Of these thousand numbers, the one that is divisible by the highest
    power of two is taken: training snapshots are whole batches of 2^11, and usually 2^20 or more, images apart.
    """
    match = re.fullmatch(r"(?:.*-)?([0-9]{4,10})-(0\.[0-9]{1,6})\.pkl", name)
    if not match:
        return None
    first = int(match[1]) * 1000
    for power in range(40, -1, -1):
        nimg = -(-first >> power) << power
        if nimg < first + 1000:
            return nimg, float(match[2])
    raise AssertionError("1 divides every number")


def read_snapshots(folder: Path, progress: Callable[[list[Path]], Iterable[Path]] = iter) -> dict[str, Path]:
    """The raw snapshots of a training run, by the names that their folders get; all are checked, none is loaded.

    They are closed again: a run may have more files than a process may have open.

    Args:
        folder: has files such as `network-snapshot-0134217-0.050.pkl`; others are left out.
        progress: wraps the list of files, to show where it is.

    Raises:
        ConvertError: there is none, one cannot be converted, or they are of different networks.
    """
    paths = sorted(path for path in folder.iterdir() if parse_file_name(path.name))
    found: dict[str, Path] = {}
    first = None
    for path in progress(paths):
        checkpoint = read_checkpoint(path)
        first = first or checkpoint
        for name in ("config", "sigma_data", "latents_mean", "latents_std"):
            if getattr(first, name) != getattr(checkpoint, name):
                raise ConvertError(f"{path} is of another network than {folder / first.source}: {name} differs.")
        assert checkpoint.nimg is not None and checkpoint.sigma_rel is not None  # by its name
        if (name := snapshot_name(checkpoint.nimg, checkpoint.sigma_rel)) in found:
            raise ConvertError(f"{path} and {found[name].name} are of the same time and length; remove one of them.")
        found[name] = path
    if not found:
        raise ConvertError(f"{folder} has no files named like network-snapshot-0134217-0.050.pkl (kimg, EMA length).")
    return found


def write_snapshots(
    paths: Mapping[str, Path], run_dir: Path, progress: Callable[[list[str]], Iterable[str]] = iter
) -> list[str]:
    """Write `run_dir/snapshots/<name>` of each, one after the other. Returns the names that were there before.

    Each folder appears whole or not at all, so that an interrupted conversion goes on where it stopped.

    Raises:
        ConvertError: a file cannot be converted.
    """
    kept = []
    for name in progress(list(paths)):
        path = run_dir / "snapshots" / name
        if path.exists():
            kept.append(name)
            continue
        with atomic_folder(path) as folder:
            read_checkpoint(paths[name]).load_unet().save_pretrained(folder)
    return kept


# ---- Download ------------------------------------------------------------------------------------


def public_url(url: str) -> str:
    """A URL for people to read: without user, password, query and fragment, which may be secrets."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        return show(url.partition(":")[0]) + ":…"
    return ascii(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}")[1:-1]


def download(
    url: str,
    cache_dir: Path,
    progress: Callable[[int, int], Any] = lambda done, total: None,
    retries: int = 4,
    wait: float = 2.0,
) -> Path:
    """Fetch a file into `cache_dir`, unless it is there. Returns its path.

    It is written to a `.part` file, which an interrupted download leaves and the next one continues, and gets its name
    when it has the size that the server said. A version of the file with another ETag has another `.part` file.

    Args:
        url: http or https; its query, which may be a secret, is sent and never shown.
        progress: called with the bytes that are there and the size.
        retries: how many times in a row a connection may fail without a byte more.
        wait: seconds before the first retry; twice as long before each next one.

    Raises:
        ConvertError: the server does not have the file, cannot be reached, or sends something else than it said.
    """
    shown = public_url(url)
    name = urllib.parse.unquote(urllib.parse.urlsplit(shown).path).rpartition("/")[2]
    # Other characters than these cannot be sent, and the errors about them would show all of the URL.
    plain = re.fullmatch(r"(?i:https?)://[!-~]+", url)
    if not plain or not re.fullmatch(r"\w[\w.+-]{0,200}", name, re.ASCII):
        raise ConvertError(f"{shown} is not the http(s) address of a file.")
    if "@" in urllib.parse.urlsplit(url).netloc:
        raise ConvertError(f"{shown} was given with a user name, which is not sent; download it and give the file.")
    folder = cache_dir / hashlib.sha256(url.encode()).hexdigest()[:16]  # files of one name on two servers
    path = folder / name
    if path.exists():
        return path
    failures, before = 0, -1
    while True:
        part = None
        try:
            size, etag = _ask_size(url)
            make_folder(folder)
            part = folder / f"{name}.{hashlib.sha256(etag.encode()).hexdigest()[:8]}.part"
            _fetch(url, part, size, progress)
            os.replace(part, path)
            sync(folder)
            return path
        except urllib.error.HTTPError as error:
            error.close()
            if error.code < 500 and error.code != 429:
                raise ConvertError(
                    f"{shown} cannot be downloaded: the server says {error.code} "
                    f"{http.client.responses.get(error.code, '')}."
                ) from error
            reason: Exception = error
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            reason = error
        done = part.stat().st_size if part and part.exists() else 0
        failures = 0 if done > before else failures + 1
        before = max(before, done)
        if failures > retries:
            raise ConvertError(
                f"{shown} cannot be downloaded: {getattr(reason, 'reason', reason)}. {done} bytes are there; the same "
                "command goes on from them."
            ) from reason
        time.sleep(wait * 2 ** max(failures - 1, 0))


def _ask_size(url: str) -> tuple[int, str]:
    with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=30) as response:
        length = response.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise ConvertError(
                f"{public_url(url)}: the server does not say how large it is, so that it cannot be checked."
            )
        return int(length), response.headers.get("ETag") or response.headers.get("Last-Modified") or ""


def _fetch(url: str, part: Path, size: int, progress: Callable[[int, int], Any]) -> None:
    """Append to `part` what it lacks to `size` bytes, and never more."""
    shown = public_url(url)
    with open(part, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConvertError(f"{part} is being downloaded by another process; wait for it.") from error
        done = file.seek(0, os.SEEK_END)
        if size - done > (free := shutil.disk_usage(part.parent).free):
            raise ConvertError(f"{shown} has {size - done} more bytes, but only {free} are free in {part.parent}.")
        request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
        if done < size:
            with urllib.request.urlopen(request, timeout=30) as response:
                if done and response.status != 206:  # it does not know ranges
                    done = 0
                    file.truncate(0)
                elif done and not response.headers.get("Content-Range", "").startswith(f"bytes {done}-"):
                    raise ConvertError(f"{shown}: the server sends another part of the file than the one asked for.")
                while (block := response.read(2**20)) and (done := done + len(block)) <= size:
                    file.write(block)
                    progress(done, size)
        file.flush()
        os.fsync(file.fileno())
        if done > size:
            file.truncate(0)
            raise ConvertError(f"{shown} has sent more than the {size} bytes that it had announced; try again.")
        if done < size:
            raise ConnectionError(f"the connection ended after {done} of {size} bytes")
