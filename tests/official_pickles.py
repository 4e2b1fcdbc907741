"""Files of the official structure, written with classes of our own that carry the official names for that moment.

The official code has decorated classes whose instances are pickled as a call with one dict: the source text of their
module, the class name, and the instance's `__dict__`, in which the constructor's arguments are kept.
"""

import io
import pickle
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffusers_edm2.latents import RAW_MEAN, RAW_STD
from diffusers_edm2.unet_edm2 import EDM2UNet2DModel
from golden_files import load_golden

SOURCE = "import os\nos.system('echo executed')\nclass Precond: pass\n"  # what nobody must run


class EasyDict(dict):
    """A dict subclass, which pickle rebuilds by an empty instance and its items."""


def _reconstruct_persistent_obj(meta: dict) -> None:
    raise AssertionError("only its name is pickled")


EasyDict.__module__, EasyDict.__qualname__ = "dnnlib.util", "EasyDict"
_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


@contextmanager
def official_names() -> Iterator[None]:
    """pickle looks each name up before it writes it."""
    modules = {
        name: types.ModuleType(name) for name in ("dnnlib", "dnnlib.util", "torch_utils", "torch_utils.persistence")
    }
    modules["dnnlib.util"].EasyDict = EasyDict
    modules["torch_utils.persistence"]._reconstruct_persistent_obj = _reconstruct_persistent_obj
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


class Persistent:
    """An object of a decorated class that is not a module, such as the encoder."""

    def __init__(self, class_name: str, state: dict[str, Any]):
        self.class_name, self.state = class_name, state

    def __reduce__(self):
        meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": self.class_name, "state": self.state}
        return _reconstruct_persistent_obj, (meta,), None


class PersistentModule(nn.Module):
    """An object of a decorated module class."""

    def __init__(self, class_name: str, kwargs: dict[str, Any], **attributes: Any):
        super().__init__()
        self.class_name = class_name
        self.attributes = {"_init_args": (), "_init_kwargs": EasyDict(kwargs), **attributes}

    def __reduce__(self):
        state = {k: v for k, v in self.__dict__.items() if k not in ("class_name", "attributes")} | self.attributes
        return Persistent(self.class_name, state).__reduce__()


def module_tree(tensors: dict[str, Tensor], config: dict[str, Any]) -> PersistentModule:
    """Modules of the official classes around `tensors`, which have the official full names."""
    defaults = {"resample_filter": [1, 1], "res_balance": 0.3, "attn_balance": 0.3, "clip_act": 256, "dropout": 0}
    defaults |= {"label_balance": 0.5, "concat_balance": 0.5, "sigma_data": 0.5, "channels_per_head": 64}
    told = defaults | config

    def make(path: str) -> nn.Module:
        prefix = f"{path}." if path else ""
        below = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        if path == "":
            names = ("img_resolution", "img_channels", "label_dim", "sigma_data")
            module = PersistentModule("Precond", config, use_fp16=True, **{n: told[n] for n in names})
        elif path == "unet":
            module = PersistentModule("UNet", config, **{n: told[n] for n in ("label_balance", "concat_balance")})
        elif path in ("unet.enc", "unet.dec"):
            module = nn.ModuleDict()
        elif "freqs" in below:
            module = PersistentModule("MPFourier", {"num_channels": len(below["freqs"])})
        elif "weight" in below:
            module = PersistentModule("MPConv", {"kernel": []}, out_channels=len(below["weight"]))
        else:
            heads = len(below["conv_res1.weight"]) // told["channels_per_head"] if "attn_qkv.weight" in below else 0
            names = ("resample_filter", "dropout", "res_balance", "attn_balance", "clip_act")
            module = PersistentModule("Block", {}, num_heads=heads, **{n: told[n] for n in names})
            for name in ("conv_skip", "attn_qkv", "attn_proj"):
                module.register_module(name, None)
        for name, tensor in below.items():
            if "." not in name and name in ("freqs", "phases"):
                module.register_buffer(name, tensor.clone())
            elif "." not in name:
                module.register_parameter(name, nn.Parameter(tensor.clone(), requires_grad=False))
        for child in dict.fromkeys(name.partition(".")[0] for name in below if "." in name):
            module.add_module(child, make(f"{path}.{child}" if path else child))
        return module

    return make("")


def latent_encoder() -> Persistent:
    """The official VAE encoder: whitening in float32, sample = raw * scale + bias."""
    scale = np.float32(0.5) / np.float32(RAW_STD)
    kwargs = EasyDict(vae_name="stabilityai/sd-vae-ft-mse", raw_mean=list(RAW_MEAN), raw_std=list(RAW_STD))
    state = {"_init_args": (), "_init_kwargs": kwargs, "vae_name": "stabilityai/sd-vae-ft-mse", "batch_size": 8}
    return Persistent(
        "StabilityVAEEncoder", state | {"scale": scale, "bias": -np.float32(RAW_MEAN) * scale, "_vae": None}
    )


def golden_content(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, Any]:
    """What an official pickle holds, with the network of a golden file; `changes` of its constructor's arguments."""
    tensors, metadata = load_golden(f"unet_g_{name}.safetensors")
    parameters = {k.removeprefix("param/"): v.to(dtype) for k, v in tensors.items() if k.startswith("param/")}
    config = metadata["config"] | changes
    return content_of(parameters, config)


def content_of(parameters: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Any]:
    loss = {"P_mean": -0.4, "P_std": 1.0, "sigma_data": config.get("sigma_data", 0.5), "_init_args": ()}
    return EasyDict(
        ema=module_tree(parameters, config),
        encoder=latent_encoder()
        if config["img_channels"] == 4
        else Persistent("StandardRGBEncoder", {"_init_args": ()}),
        dataset_kwargs=EasyDict(class_name="training.dataset.ImageFolderDataset", path="/data/x.zip", use_labels=True),
        loss_fn=Persistent("EDM2Loss", loss),
    )


def tiny_content(seed: int = 0, dtype: torch.dtype = torch.float16, width: int = 4, head: int = 2) -> dict[str, Any]:
    """A network of latents with random weights, as small as it gets."""
    generator = torch.Generator().manual_seed(seed)
    config = {"img_resolution": 4, "img_channels": 4, "label_dim": 2, "model_channels": width, "channel_mult": [1]}
    config |= {"num_blocks": 1, "attn_resolutions": [], "channels_per_head": head, "logvar_channels": 4}
    unet = EDM2UNet2DModel(4, 4, (width,), 1, (), head, 2, logvar_channels=4)
    fixed = torch.Generator().manual_seed(0)  # Fourier features do not train: the same in all snapshots of a run
    parameters = {
        ("" if name.startswith("logvar") else "unet.") + name: torch.randn(
            t.shape, generator=fixed if "fourier" in name else generator
        ).to(dtype)
        for name, t in unet.state_dict().items()
    }
    return content_of(parameters, config)


def training_state(nimg: int = 2**20, objects: bool = False) -> dict[str, Any]:
    """A training state with state dicts, or with small network objects; each network has other weights."""
    if objects:
        networks = [tiny_content(seed)["ema"] for seed in range(3)]
    else:  # 64 channels: the width of attention heads is not in the shapes
        networks = [tiny_content(seed, torch.float32, width=64, head=64)["ema"].state_dict() for seed in range(3)]
    moments = {i: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)} for i in range(2)}
    return {
        "state": EasyDict(cur_nimg=nimg, total_elapsed_time=1.5),
        "net": networks[0],
        "loss_fn": {"P_mean": -0.4, "P_std": 1.0, "sigma_data": 0.5},
        "optimizer": {"state": moments, "param_groups": [{"lr": 0.01, "betas": (0.9, 0.99), "params": [0, 1]}]},
        "ema": {"stds": [0.05, 0.1], "emas": networks[1:]},
    }


def dumps(content: Any, protocol: int = 4) -> bytes:
    with official_names():
        return pickle.dumps(content, protocol)


def save_training_state(content: Any, path: Path | io.BytesIO) -> None:
    with official_names():
        torch.save(content, path)
