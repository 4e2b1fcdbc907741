"""The magnitude-preserving U-Net of EDM2 (configuration G) as one self-contained Diffusers model file.

Papers: "Analyzing and Improving the Training Dynamics of Diffusion Models" (EDM2, arXiv 2312.02696) and
"Elucidating the Design Space of Diffusion-Based Generative Models" (EDM, arXiv 2206.00364).

Every layer keeps the root mean square of its activations at one: learned layers normalise their weights, sums and
concatenations are rescaled, and no layer has a bias or a normalisation with learned parameters.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------------------------------
# Magnitude-preserving operations


def normalize(x: Tensor, dim: int | Sequence[int] | None = None, eps: float = 1e-4) -> Tensor:
    """Scale `x` to unit root mean square over `dim` (EDM2 eq. 66); default: over all axes but the first.

        x / (eps + ||x|| * sqrt(number of norms / number of elements))

    The norm is taken in float32 or better; the result has the shape and type of `x`.
    """
    axes = list(range(1, x.ndim)) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    norm = torch.linalg.vector_norm(x, dim=axes, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    norm = eps + norm * math.sqrt(norm.numel() / x.numel())
    return x / norm.to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """silu(x) / 0.596: unit magnitude for normally distributed input (EDM2 eq. 81)."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """((1-t) a + t b) / sqrt((1-t)^2 + t^2) (EDM2 eq. 88)."""
    return torch.lerp(a, b, t) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """C [(1-t)/sqrt(Na) a, t/sqrt(Nb) b] along channels, C = sqrt((Na+Nb) / ((1-t)^2 + t^2)) (EDM2 eq. 103)."""
    n_a, n_b = a.shape[1], b.shape[1]
    c = math.sqrt((n_a + n_b) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (c * (1 - t) / math.sqrt(n_a)), b * (c * t / math.sqrt(n_b))], dim=1)


def resample_down(x: Tensor, taps: Sequence[float]) -> Tensor:
    """Halve H and W of [B,C,H,W]: depthwise convolution with the separable filter `taps`, stride 2."""
    if len(taps) == 2 and taps[0] == taps[1]:
        return F.avg_pool2d(x, 2)
    kernel, padding = _separable_kernel(x, taps)
    return F.conv2d(x, kernel, stride=2, padding=padding, groups=x.shape[1])


def resample_up(x: Tensor, taps: Sequence[float]) -> Tensor:
    """Double H and W of [B,C,H,W]: four times the transpose of `resample_down`."""
    if len(taps) == 2 and taps[0] == taps[1]:
        return F.interpolate(x, scale_factor=2, mode="nearest")
    kernel, padding = _separable_kernel(x, taps)
    return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=padding, groups=x.shape[1])


def _separable_kernel(x: Tensor, taps: Sequence[float]) -> tuple[Tensor, int]:
    f = torch.tensor(taps, dtype=torch.float32, device=x.device)
    f = f / f.sum()
    kernel = torch.outer(f, f).to(x.dtype)
    return kernel.expand(x.shape[1], 1, -1, -1), (len(taps) - 1) // 2


# ---------------------------------------------------------------------------------------------------------------------
# Layers


class MPConv2d(nn.Conv2d):
    """Bias-free convolution, zero padding: unit RMS in, unit RMS out (EDM2 eq. 47, 66).

    The stored weight ~ N(0, 1) acts as normalize(weight) / sqrt(fan_in), differentiated through.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, effective_weight(self.weight, input.dtype), padding=self.padding)


class MPLinear(nn.Linear):
    """Bias-free linear map in float32: unit RMS in, unit RMS out (EDM2 eq. 47, 66).

    It serves the embeddings only: a few vectors per image, where half precision would save nothing and cost digits.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input, effective_weight(self.weight, input.dtype))


def effective_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """normalize(w) / sqrt(fan_in) per output filter: computed in float32 or better, then cast to `dtype`."""
    w = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return (normalize(w) / math.sqrt(w[0].numel())).to(dtype)


class MPFourier(nn.Module):
    """Random Fourier features sqrt(2) cos(freqs x + phases) of [B] -> [B, num_channels], in float32 (EDM2 eq. 75).

    `freqs` ~ 2 pi N(0, 1) and `phases` ~ 2 pi U(0, 1) never change. They are frozen parameters, not buffers, because
    disk offload restores parameters only, and they stay float32 when the model is cast to half precision: the argument
    of the cosine reaches tens of radians.
    """

    def __init__(self, num_channels: int):
        super().__init__()
        self.freqs = nn.Parameter(2 * math.pi * torch.randn(num_channels), requires_grad=False)
        self.phases = nn.Parameter(2 * math.pi * torch.rand(num_channels), requires_grad=False)

    def _apply(self, fn, recurse=True):
        exact = {name: p.data for name, p in self.named_parameters()}
        super()._apply(fn, recurse)
        for name, p in self.named_parameters():
            if torch.finfo(p.dtype).bits < 32:
                p.data = exact[name].to(p.device, torch.float32)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return math.sqrt(2) * torch.cos(x.float()[:, None] * self.freqs.float() + self.phases.float())


class EDM2Block(nn.Module):
    """One encoder or decoder block: resampling, residual branch modulated by the embedding, optional self-attention.

    [B, in_channels, H, W], [B, embed_dim] -> [B, out_channels, H', W'],  H' = H, H/2 ("down") or 2H ("up")
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embed_dim: int,
        decoder: bool,
        resample: str = "keep",
        resample_filter: Sequence[float] = (1, 1),
        attention_head_dim: int | None = None,
        dropout: float = 0.0,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256.0,
    ):
        super().__init__()
        self.decoder = decoder
        self.resample = resample
        self.resample_filter = tuple(resample_filter)
        self.attention_head_dim = attention_head_dim
        self.dropout = dropout
        self.res_balance = res_balance
        self.attn_balance = attn_balance
        self.clip_act = clip_act
        self.emb_gain = nn.Parameter(torch.zeros([]))
        # The encoder changes width before its residual branch, the decoder within it.
        self.conv_res0 = MPConv2d(in_channels if decoder else out_channels, out_channels, kernel_size=3)
        self.emb_linear = MPLinear(embed_dim, out_channels)
        self.conv_res1 = MPConv2d(out_channels, out_channels, kernel_size=3)
        self.conv_skip = MPConv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        if attention_head_dim is not None:
            self.attn_qkv = MPConv2d(out_channels, 3 * out_channels, kernel_size=1)
            self.attn_proj = MPConv2d(out_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.resample == "down":
            x = resample_down(x, self.resample_filter)
        elif self.resample == "up":
            x = resample_up(x, self.resample_filter)

        if not self.decoder:
            if self.conv_skip is not None:
                x = self.conv_skip(x)
            x = normalize(x, dim=1)

        y = self.conv_res0(mp_silu(x))
        scale = 1 + self.emb_gain * self.emb_linear(emb)
        y = mp_silu(y * scale[:, :, None, None].to(y.dtype))
        y = self.conv_res1(F.dropout(y, self.dropout, self.training))

        if self.decoder and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, self.res_balance)

        if self.attention_head_dim is not None:
            x = mp_sum(x, self.attend(x), self.attn_balance)
        return x if self.clip_act is None else x.clamp(-self.clip_act, self.clip_act)

    def attend(self, x: Tensor) -> Tensor:
        """Multi-head self-attention with q, k, v normalised over each head's channels, [B,C,H,W] -> [B,C,H,W].

        Axes: b batch, h head, d channel of the head, s of q/k/v, l pixel.
        """
        y_bhdsl = self.attn_qkv(x).reshape(x.shape[0], -1, self.attention_head_dim, 3, x.shape[2] * x.shape[3])
        q_bhld, k_bhld, v_bhld = normalize(y_bhdsl, dim=2).permute(3, 0, 1, 4, 2).contiguous().unbind(0)
        y_bhld = F.scaled_dot_product_attention(q_bhld, k_bhld, v_bhld)
        return self.attn_proj(y_bhld.transpose(2, 3).reshape(x.shape))


# ---------------------------------------------------------------------------------------------------------------------
# The network


@dataclass
class EDM2UNet2DOutput(BaseOutput):
    """Output of [`EDM2UNet2DModel`].

    Args:
        sample (`Tensor` [B,C,H,W]): the raw network output F, before the preconditioning of the scheduler.
        logvar (`Tensor` [B], float32, *optional*): the uncertainty u, only with `return_logvar=True`.
    """

    sample: Tensor
    logvar: Tensor | None = None


class EDM2UNet2DModel(ModelMixin, ConfigMixin):
    """EDM2's magnitude-preserving U-Net, configuration G (arXiv 2312.02696, Section 2 and Appendix B).

    The network predicts the raw F of the preconditioned denoiser D(x; σ) = c_skip x + c_out F(c_in x; c_noise); the
    scheduler holds the preconditioning. Any height and width that are multiples of `2 ** (levels - 1)` work.

    Args:
        sample_size (`int`): height and width that the network is trained for; pixels of the image or the latent.
        in_channels (`int`): channels of the sample, and of the output.
        block_out_channels (`tuple[int]`): width of each resolution level, the highest resolution first.
        layers_per_block (`int`): residual blocks per level of the encoder; the decoder has one more.
        attention_resolutions (`tuple[int]`): the resolutions (at `sample_size`) whose blocks have self-attention.
        attention_head_dim (`int`): channels per attention head; divides the width of each level with attention.
        num_class_embeds (`int`, *optional*): number of classes; None for an unconditional network.
        dropout (`float`): dropout probability in the residual branches, in [0, 1).
        label_dropout (`float`): the share of its training images that the network saw without their class, in [0, 1).
            The network itself does not use it; above 0 it tells that classifier-free guidance makes sense.
        noise_embed_dim (`int`, *optional*): number of Fourier features of the noise level; default the first width.
        time_embed_dim (`int`, *optional*): width of the embedding; default the largest width.
        logvar_channels (`int`): Fourier features behind the uncertainty u(σ).
        label_balance, concat_balance, res_balance, attn_balance (`float`): weight t in [0, 1] of the label, the skip,
            the residual branch and the attention output in their magnitude-preserving sum or concatenation.
        resample_filter (`tuple[float]`): taps of the separable resampling filter, an even number of them.
        clip_act (`float`, *optional*): clip each block's output to ± this value; None for no clip.

    Half precision: with weights or input in float16 or bfloat16 the relative RMS error of F is about 1.4e-3 or 1.0e-2;
    the Fourier features and u(σ) stay float32.

    Forced weight normalisation (EDM2 Section 2.3): in training mode, with gradients, `forward` first replaces each
    weight by its normalised self. A loop that accumulates gradients saves the repetition: it sets
    `normalize_in_forward = False` and calls [`~EDM2UNet2DModel.normalize_weights`] once before each optimizer step.
    """

    config: Any  # with the arguments as attributes; Diffusers annotates a dict
    _supports_gradient_checkpointing = True
    _no_split_modules = ["EDM2Block"]
    _keep_in_fp32_modules = ["emb_fourier", "logvar_fourier", "logvar_linear"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 4,
        block_out_channels: Sequence[int] = (192, 384, 576, 768),
        layers_per_block: int = 3,
        attention_resolutions: Sequence[int] = (16, 8),
        attention_head_dim: int = 64,
        num_class_embeds: int | None = None,
        dropout: float = 0.0,
        label_dropout: float = 0.0,
        noise_embed_dim: int | None = None,
        time_embed_dim: int | None = None,
        logvar_channels: int = 128,
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        resample_filter: Sequence[float] = (1, 1),
        clip_act: float | None = 256.0,
    ):
        super().__init__()
        levels = len(block_out_channels)
        _check_config(
            sample_size,
            block_out_channels,
            attention_resolutions,
            attention_head_dim,
            num_class_embeds,
            resample_filter,
        )
        noise_embed_dim = noise_embed_dim or block_out_channels[0]
        embed_dim = time_embed_dim or max(block_out_channels)
        self.gradient_checkpointing = False
        self.normalize_in_forward = True

        self.emb_fourier = MPFourier(noise_embed_dim)
        self.emb_noise = MPLinear(noise_embed_dim, embed_dim)
        self.emb_label = MPLinear(num_class_embeds, embed_dim) if num_class_embeds else None

        def block(in_channels: int, out_channels: int, decoder: bool, attention: bool = False, resample: str = "keep"):
            return EDM2Block(
                in_channels,
                out_channels,
                embed_dim,
                decoder,
                resample,
                resample_filter,
                attention_head_dim if attention else None,
                dropout,
                res_balance,
                attn_balance,
                clip_act,
            )

        # Names follow the official checkpoints, so that conversion is a rule and not a table.
        self.enc = nn.ModuleDict()
        skips = []
        width = in_channels + 1  # the sample and a constant channel, which stands in for the missing biases
        for level, channels in enumerate(block_out_channels):
            res = sample_size >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = MPConv2d(width, channels, kernel_size=3)
                width = channels
            else:
                self.enc[f"{res}x{res}_down"] = block(width, width, decoder=False, resample="down")
            skips.append(width)
            for i in range(layers_per_block):
                self.enc[f"{res}x{res}_block{i}"] = block(
                    width, channels, decoder=False, attention=res in attention_resolutions
                )
                width = channels
                skips.append(channels)

        self.dec = nn.ModuleDict()
        for level, channels in reversed(list(enumerate(block_out_channels))):
            res = sample_size >> level
            if level == levels - 1:
                self.dec[f"{res}x{res}_in0"] = block(width, width, decoder=True, attention=True)
                self.dec[f"{res}x{res}_in1"] = block(width, width, decoder=True)
            else:
                self.dec[f"{res}x{res}_up"] = block(width, width, decoder=True, resample="up")
            for i in range(layers_per_block + 1):
                self.dec[f"{res}x{res}_block{i}"] = block(
                    width + skips.pop(), channels, decoder=True, attention=res in attention_resolutions
                )
                width = channels

        self.out_conv = MPConv2d(width, in_channels, kernel_size=3)
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.logvar_fourier = MPFourier(logvar_channels)
        self.logvar_linear = MPLinear(logvar_channels, 1)

    @torch.no_grad()
    def normalize_weights(self) -> None:
        """Forced weight normalisation: replace each learned layer's weight by normalize(weight) (EDM2 eq. 66)."""
        # By torch's classes: loaded as remote code a second time, this file replaces its own under a living network.
        weights = [module.weight for module in self.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
        # Not copy_: compiled by inductor, copies into convolution weights were lost and their gradients wrong.
        torch._foreach_copy_(weights, [normalize(weight) for weight in weights])

    @apply_forward_hook
    def logvar(self, timestep: float | Tensor) -> Tensor:
        """The learned uncertainty u(σ) (EDM2 eq. 14): timestep c_noise = ln(σ)/4, scalar or [B] -> [B], float32."""
        timestep = torch.as_tensor(timestep, device=self.out_gain.device).float().reshape(-1)
        return self.logvar_linear(self.logvar_fourier(timestep))[:, 0]

    def embed(self, timestep: Tensor, class_labels: Tensor | None) -> Tensor:
        """Noise level [B] and class labels (long [B], float [B,N] or None) -> embedding [B, time_embed_dim]."""
        emb = self.emb_noise(self.emb_fourier(timestep))
        if self.emb_label is None:
            return mp_silu(emb)
        num_classes = self.config.num_class_embeds
        if class_labels is None:
            one_hot = emb.new_zeros(len(emb), num_classes)
        elif class_labels.is_floating_point():
            one_hot = class_labels.to(emb.dtype)
        else:  # -1 matches no class: the row stays zero
            one_hot = (class_labels[:, None] == torch.arange(num_classes, device=emb.device)).to(emb.dtype)
        label = self.emb_label(one_hot * math.sqrt(num_classes))
        return mp_silu(mp_sum(emb, label, self.config.label_balance))

    def forward(
        self,
        sample: Tensor,
        timestep: float | Tensor,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        return_logvar: bool = False,
    ) -> EDM2UNet2DOutput | tuple[Tensor, ...]:
        """Raw network output F(c_in x; c_noise).

        Args:
            sample (`Tensor` [B,C,H,W]): the noisy sample times c_in, so about unit variance. Its type is the one that
                the network computes in, whatever the type of the weights, unless `torch.autocast` says otherwise.
            timestep (`float` or `Tensor`, scalar or [B]): c_noise = ln(σ)/4.
            class_labels (`Tensor`, *optional*): long [B] with values in [0, N), or -1 for no class; or float [B,N],
                a one-hot or a mixture, all zeros for no class; None: no class for the whole batch. Their range is
                checked on the CPU only: on an accelerator or in a compiled graph, a number out of range means no class.
            return_dict (`bool`): return an [`EDM2UNet2DOutput`] instead of a tuple.
            return_logvar (`bool`): also return u(σ) [B]. Training with DistributedDataParallel needs it: all parameters
                then take part in the one call of the wrapper.

        Raises:
            ValueError: the sample's or the labels' shape or range does not fit the network.
        """
        self._check_input(sample, timestep, class_labels)
        if self.training and self.normalize_in_forward and torch.is_grad_enabled():
            self.normalize_weights()

        timestep = torch.as_tensor(timestep, device=sample.device).float().reshape(-1).expand(sample.shape[0])
        emb = self.embed(timestep, class_labels)

        x = torch.cat([sample, torch.ones_like(sample[:, :1])], dim=1)
        skips = []
        for layer in self.enc.values():
            x = layer(x) if isinstance(layer, nn.Conv2d) else self._run(layer, x, emb)
            skips.append(x)
        for name, layer in self.dec.items():
            if "block" in name:
                x = mp_cat(x, skips.pop(), self.config.concat_balance)
            x = self._run(layer, x, emb)
        x = self.out_conv(x) * self.out_gain.to(x.dtype)

        u = self.logvar(timestep) if return_logvar else None
        if return_dict:
            return EDM2UNet2DOutput(sample=x, logvar=u)
        return (x,) if u is None else (x, u)

    def _run(self, block: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        if self.gradient_checkpointing and self._gradient_checkpointing_func and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, x, emb)
        return block(x, emb)

    def _check_input(self, sample: Tensor, timestep: float | Tensor, class_labels: Tensor | None) -> None:
        channels, multiple = self.config.in_channels, 2 ** (len(self.config.block_out_channels) - 1)
        if sample.ndim != 4 or sample.shape[1] != channels:
            raise ValueError(f"sample has shape {list(sample.shape)}, but the network takes [batch, {channels}, H, W].")
        if sample.shape[2] % multiple or sample.shape[3] % multiple:
            raise ValueError(
                f"sample is {sample.shape[2]}x{sample.shape[3]} pixels, but a network of "
                f"{len(self.config.block_out_channels)} levels needs multiples of {multiple}; crop or pad it."
            )
        if isinstance(timestep, Tensor) and timestep.numel() not in (1, sample.shape[0]):
            raise ValueError(
                f"timestep has {timestep.numel()} values for a batch of {sample.shape[0]}; pass one, or one per sample."
            )
        if class_labels is not None:
            self._check_labels(class_labels, batch=sample.shape[0])

    def _check_labels(self, labels: Tensor, batch: int) -> None:
        num_classes = self.config.num_class_embeds
        if not num_classes:
            raise ValueError("class_labels were given to an unconditional network (num_class_embeds=None); pass None.")
        shape = [batch, num_classes] if labels.is_floating_point() else [batch]
        if list(labels.shape) != shape:
            raise ValueError(
                f"class_labels have shape {list(labels.shape)} and type {labels.dtype}; this network takes long "
                f"[{batch}] or float [{batch}, {num_classes}]."
            )
        # Reading the values would stall an accelerator and break a compiled graph; the pipeline checks lists itself.
        if labels.is_floating_point() or labels.device.type != "cpu" or torch.compiler.is_compiling() or not batch:
            return
        labels = labels.long()
        if labels.min() < -1 or labels.max() >= num_classes:
            raise ValueError(
                f"class_labels {labels.tolist()} are not all in [0, {num_classes - 1}], the classes of this network; "
                "use -1 for no class."
            )


def _check_config(
    sample_size, block_out_channels, attention_resolutions, attention_head_dim, num_classes, taps
) -> None:
    levels = len(block_out_channels)
    multiple = 2 ** (levels - 1)
    if not isinstance(sample_size, int) or sample_size <= 0 or sample_size % multiple:
        raise ValueError(
            f"sample_size={sample_size} is not a positive multiple of {multiple}, which {levels} levels need; "
            "change it, or the number of block_out_channels."
        )
    resolutions = [sample_size >> level for level in range(levels)]
    unknown = [r for r in attention_resolutions if r not in resolutions]
    if unknown:
        raise ValueError(
            f"attention_resolutions {unknown} are not among this network's resolutions {resolutions}; choose from "
            "these, or () for attention at the bottom only."
        )
    lowest = resolutions[-1]  # the first block at the bottom always attends
    for resolution, channels in zip(resolutions, block_out_channels, strict=True):
        attends = resolution in attention_resolutions or resolution == lowest
        if attends and (attention_head_dim < 1 or channels % attention_head_dim):
            raise ValueError(
                f"attention_head_dim={attention_head_dim} does not divide the {channels} channels at resolution "
                f"{resolution}, which has attention; choose a divisor."
            )
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_class_embeds={num_classes} is not a positive number; use None for no classes.")
    if len(taps) % 2 or sum(taps) == 0:
        raise ValueError(f"resample_filter={tuple(taps)} needs an even number of taps with a sum other than 0.")
