"""Reading tests/golden (its README gives the provenance)."""

import json
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from diffusers_edm2.unet_edm2 import EDM2UNet2DModel

GOLDEN = Path(__file__).parent / "golden"


def load_golden(name: str) -> tuple[dict[str, Tensor], dict]:
    """All tensors of a file, and its metadata with the JSON values decoded where they are JSON."""
    with safe_open(GOLDEN / name, "pt") as file:
        metadata = {k: json.loads(v) if v[0] in '{["-0123456789' else v for k, v in file.metadata().items()}
        return {k: file.get_tensor(k) for k in file.keys()}, metadata  # noqa: SIM118


def select(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under `prefix/`, with the names of our modules."""
    return {
        k.removeprefix(f"{prefix}/").removeprefix("unet."): v for k, v in tensors.items() if k.startswith(f"{prefix}/")
    }


def build_unet(config: dict, **options) -> EDM2UNet2DModel:
    """The network of a golden file's constructor arguments."""
    base = config["model_channels"]
    same = ("resample_filter", "label_balance", "concat_balance", "res_balance", "attn_balance", "clip_act")
    return EDM2UNet2DModel(
        sample_size=config["img_resolution"],
        in_channels=config["img_channels"],
        block_out_channels=[base * m for m in config["channel_mult"]],
        layers_per_block=config["num_blocks"],
        attention_resolutions=config["attn_resolutions"],
        attention_head_dim=config["channels_per_head"],
        num_class_embeds=config["label_dim"] or None,
        noise_embed_dim=base * config["channel_mult_noise"] if "channel_mult_noise" in config else None,
        time_embed_dim=base * config["channel_mult_emb"] if "channel_mult_emb" in config else None,
        **{k: v for k, v in config.items() if k in (*same, "logvar_channels")},
        **options,
    )
