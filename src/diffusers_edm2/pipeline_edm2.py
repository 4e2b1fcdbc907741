"""Sampling images from EDM2 models as one self-contained Diffusers pipeline file.

Papers: EDM2 (arXiv 2312.02696) for the networks, EDM (arXiv 2206.00364) for the sampler, "Guiding a Diffusion Model
with a Bad Version of Itself" (arXiv 2406.02507) for guidance by a second network, and "Applying Guidance in a Limited
Interval" (arXiv 2404.07724) for guidance at some noise levels only.
"""

import inspect
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

# Statistics of the latents of stabilityai/sd-vae-ft-mse, fed with images in [0, 1], over ImageNet (EDM2 Appendix B).
SD_VAE_LATENTS_MEAN = (5.81, 3.25, 0.12, -2.15)
SD_VAE_LATENTS_STD = (4.17, 4.62, 3.71, 3.28)

Generators = torch.Generator | list[torch.Generator] | None


class EDM2Pipeline(DiffusionPipeline):
    """Images from an EDM2 network: unconditional or by class, in pixels or in the latents of a VAE.

    Args:
        unet ([`EDM2UNet2DModel`]): the network; predicts F from c_in x and the timestep ln(σ)/4.
        scheduler ([`EDM2HeunScheduler`], or [`EDMEulerScheduler`], [`EDMDPMSolverMultistepScheduler`]).
        guide_unet (*optional*): a second network of the same sample shape and σ_data, away from which `guidance_scale`
            extrapolates: an unconditional one, or a smaller or less trained one, or one of another EMA. Without it,
            a network that was trained with label dropout guides itself, as no class (classifier-free guidance).
        vae ([`AutoencoderKL`], *optional*): decodes latents; it was fed with images in [0, 1].
        latents_mean, latents_std (`list[float]`, *optional*): statistics of the raw latents, per channel; the network
            sees latents with mean 0 and standard deviation σ_data. Default: those of sd-vae-ft-mse.
    """

    config: Any  # with the arguments as attributes; Diffusers annotates a dict
    # Without the guide, which would move with every call: components outside the sequence stay until the end.
    model_cpu_offload_seq = "unet->vae"
    _optional_components = ["guide_unet", "vae"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        guide_unet: ModelMixin | None = None,
        vae: ModelMixin | None = None,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, guide_unet=guide_unet, vae=vae)
        if vae is not None:
            latents_mean = list(SD_VAE_LATENTS_MEAN if latents_mean is None else latents_mean)
            latents_std = list(SD_VAE_LATENTS_STD if latents_std is None else latents_std)
            channels = unet.config.in_channels
            if not len(latents_mean) == len(latents_std) == vae.config.latent_channels == channels:
                raise ValueError(
                    f"the network has {channels} channels and the VAE {vae.config.latent_channels}, but latents_mean "
                    f"has {len(latents_mean)} values and latents_std {len(latents_std)}; pass one value per channel."
                )
        self.register_to_config(latents_mean=latents_mean, latents_std=latents_std)

    # Set by the package: run folders belong to training, and this file alone knows nothing of them.
    _open_run: Callable[..., "EDM2Pipeline"] | None = None

    @classmethod
    def from_run(
        cls,
        run_dir: str | os.PathLike,
        sigma_rel: float | None = None,
        nimg: int | None = None,
        guide: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> "EDM2Pipeline":
        """The pipeline of a run folder, with the EMA length and the moment of your choice (EDM2 Section 3.2).

        What is not among the run's snapshots is reconstructed from them, and kept in its folder `posthoc`.

        Args:
            run_dir: a run folder of the training script.
            sigma_rel (*optional*): EMA length, a fraction of the training in (0, 0.2886]. Default: the first tracked.
            nimg (*optional*): after how many training images, one of the snapshots'. Default: the last.
            guide (*optional*): `{"run_dir": ..., "sigma_rel": ..., "nimg": ...}`, all of them optional, of the network
                to guide with. Without `run_dir` it is of the same run, such as an early moment of it (autoguidance,
                arXiv 2406.02507).
            kwargs: for `from_pretrained`, such as `torch_dtype`.

        Raises:
            ValueError: there is no such snapshot, the length is out of range, or the guide has another σ_data.
            RuntimeError: this class is not that of the installed package.
        """
        if cls._open_run is None:
            raise RuntimeError("from_run needs the package: pip install diffusers-edm2, and import diffusers_edm2.")
        return cls._open_run(run_dir, sigma_rel, nimg, guide, **kwargs)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | np.ndarray | Tensor | None = None,
        num_inference_steps: int = 32,
        generator: Generators = None,
        guidance_scale: float | Sequence[float] | Tensor = 1.0,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["EDM2Pipeline", int, Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        batch_size: int | None = None,
        guidance_interval: tuple[float, float] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Draw images.

        Args:
            class_labels (*optional*): a class, or a list, array or tensor with one per image, -1 for no class; or
                float [B,N], mixtures of classes. Default: classes drawn at random, if the network knows any.
            num_inference_steps (`int`): N; the Heun scheduler makes 2N-1 network calls.
            generator (*optional*): one, or a list with one per image, which makes each image independent of its batch.
            guidance_scale (`float`, or one per image): w in D_guide + w (D - D_guide) (arXiv 2406.02507 eq. 3). Images
                of scale 1 are not guided, and the guide is not called for them.
            latents (`Tensor` [B,C,H,W], *optional*): unit Gaussian noise to start from; float64 is kept.
            output_type (`str`): "pil", "np" [B,H,W,C] in [0, 1], "pt" [B,C,H,W] in [0, 1], or "latent": the sampler's
                result as it is.
            return_dict (`bool`): return an [`ImagePipelineOutput`] instead of a tuple.
            callback_on_step_end (*optional*): called as `f(pipeline, i, timestep, {"latents": ...})` after each network
                call; it may return a dict with new latents. The second half of a Heun step starts over from where the
                first half did, so replace latents at odd i, or at the last.
            callback_on_step_end_tensor_inputs: names of the tensors that the callback gets; "latents" is the only one.
            batch_size (`int`, *optional*): number of images, where neither labels, generators nor latents tell it.
            guidance_interval (*optional*): (σ_lo, σ_hi); guidance only where σ_lo < σ <= σ_hi, and elsewhere no call of
                the guide (arXiv 2404.07724). Default: at all noise levels.

        Raises:
            ValueError: arguments that do not fit the network or each other.
        """
        self._check_inputs(output_type, callback_on_step_end_tensor_inputs)
        labels = None if class_labels is None else torch.as_tensor(class_labels)
        generator = list(generator) if isinstance(generator, tuple) else generator
        batch_size = self._batch_size(batch_size, labels, generator, latents, guidance_scale)
        device = self._execution_device
        weights = self._prepare_weights(guidance_scale, batch_size)
        low, high = _interval(guidance_interval)

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        self.scheduler.set_begin_index(0)
        sample = self._prepare_latents(latents, batch_size, generator, device)
        sample = (
            sample * self.scheduler.config.sigma_max
        )  # not init_noise_sigma: Diffusers' own add the data's variance
        labels = self._prepare_labels(labels, batch_size, generator, device)

        step_options: dict[str, Any] = {"return_dict": False}
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            step_options["generator"] = generator
        progress: Any = self.progress_bar
        noise_levels = getattr(self.scheduler, "call_sigmas", self.scheduler.sigmas).tolist()  # of the network calls
        with progress(total=len(self.scheduler.timesteps)) as progress_bar:
            for i, t in enumerate(self.scheduler.timesteps):
                if hasattr(self.scheduler, "churn"):
                    sample = self.scheduler.churn(sample, t, generator)
                network_input = self.scheduler.scale_model_input(sample, t)
                is_guided = weights is not None and low < noise_levels[i] <= high
                network_output = self._predict(network_input, t, labels, weights if is_guided else None)
                sample = self.scheduler.step(network_output, t, sample, **step_options)[0]
                if callback_on_step_end is not None:
                    tensors = {"latents": sample} if "latents" in callback_on_step_end_tensor_inputs else {}
                    sample = (callback_on_step_end(self, i, t, tensors) or {}).get("latents", sample)
                progress_bar.update()

        images: Any = sample if output_type == "latent" else self._decode(sample, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _predict(self, network_input: Tensor, t: Tensor, labels: Tensor | None, weights: Tensor | None) -> Tensor:
        """F, guided if `weights` are given; both networks share σ_data, so that guiding F guides D."""
        output = _call(self.unet, network_input, t, labels)
        if weights is None:
            return output
        rows = weights != 1  # on the CPU: no device sync
        weights = weights[rows].to(output.device, output.dtype).reshape(-1, 1, 1, 1)
        if rows.all():
            return torch.lerp(self._guide(network_input, t, labels), output, weights)
        rows = rows.nonzero()[:, 0].to(output.device)
        guide = self._guide(network_input[rows], t, None if labels is None else labels[rows])
        return output.index_copy(0, rows, torch.lerp(guide, output[rows], weights))

    def _guide(self, network_input: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """F of the network to be guided away from: the guide, or the same network without a class."""
        if self.guide_unet is None:
            return _call(self.unet, network_input, t, None)
        return _call(self.guide_unet, network_input, t, labels)

    def _decode(self, latents: Tensor, output_type: str) -> list[Image.Image] | np.ndarray | Tensor:
        """Samples with σ_data = 0.5 to images in [0, 1]: pixels as (x + 1)/2, whitened latents through the VAE."""
        if self.vae is None:
            images = (latents + 1) / 2
        else:
            mean = torch.tensor(self.config.latents_mean, device=latents.device).reshape(1, -1, 1, 1)
            std = torch.tensor(self.config.latents_std, device=latents.device).reshape(1, -1, 1, 1)
            raw = latents.float() * (std / self.scheduler.config.sigma_data) + mean
            images = self.vae.decode(raw.to(self.vae.dtype)).sample
        images = images.float().clamp(0, 1)
        if output_type == "pt":
            return images
        arrays = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "np":
            return arrays
        return [Image.fromarray(a[:, :, 0] if a.shape[2] == 1 else a) for a in (arrays * 255).round().astype("uint8")]

    # -----------------------------------------------------------------------------------------------------------------
    # Arguments

    def _check_inputs(self, output_type: str, tensor_inputs: Sequence[str]) -> None:
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r} is unknown; use 'pil', 'np', 'pt' or 'latent'.")
        channels = self.unet.config.in_channels if self.vae is None else self.vae.config.out_channels
        if output_type == "pil" and channels not in (1, 3):
            raise ValueError(f"output_type='pil' needs 1 or 3 channels, not {channels}; use 'np', 'pt' or 'latent'.")
        unknown = [name for name in tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs={unknown}: only {self._callback_tensor_inputs} exist."
            )

    def _prepare_weights(self, guidance_scale: float | Sequence[float] | Tensor, batch_size: int) -> Tensor | None:
        """Guidance weights [B], float64 on the CPU; None where no image is guided."""
        weights = torch.as_tensor(guidance_scale, dtype=torch.float64, device="cpu")
        if weights.ndim > 1 or not weights.isfinite().all():
            raise ValueError(f"guidance_scale={guidance_scale} must be a finite number, or one per image.")
        if (weights == 1).all():
            return None
        main, guide = self.unet.config, None if self.guide_unet is None else self.guide_unet.config
        if guide is None and not (main.num_class_embeds and main.get("label_dropout", 0) > 0):
            raise ValueError(
                f"guidance_scale={guidance_scale} needs a guide_unet in the pipeline, or a network with classes that "
                "was trained with label dropout to guide itself; add a guide, or use 1."
            )
        if guide is not None:
            shapes = [f"{c.in_channels} channels of {c.sample_size}x{c.sample_size}" for c in (guide, main)]
            if shapes[0] != shapes[1]:
                raise ValueError(f"guide_unet has {shapes[0]} and unet {shapes[1]}; a guide works on the same samples.")
            if guide.num_class_embeds and main.num_class_embeds not in (None, 0, guide.num_class_embeds):
                raise ValueError(
                    f"guide_unet knows {guide.num_class_embeds} classes and unet {main.num_class_embeds}; "
                    "a guide knows the same classes, or none."
                )
        return weights.expand(batch_size)

    def _batch_size(
        self,
        batch_size: int | None,
        labels: Tensor | None,
        generator: Generators,
        latents: Tensor | None,
        guidance_scale: float | Sequence[float] | Tensor,
    ) -> int:
        """The number of images, on which all arguments have to agree."""
        sizes = {
            "batch_size": batch_size,
            "class_labels": None if labels is None or labels.ndim == 0 else len(labels),
            "generator": len(generator) if isinstance(generator, list) else None,
            "latents": None if latents is None else len(latents),
            "guidance_scale": torch.as_tensor(guidance_scale).numel() if np.ndim(guidance_scale) else None,
        }
        sizes = {name: size for name, size in sizes.items() if size is not None}
        if len(set(sizes.values())) > 1 or 0 in sizes.values():
            found = ", ".join(f"{name}: {size}" for name, size in sizes.items())
            raise ValueError(f"the arguments disagree on the number of images, or it is 0 ({found}).")
        return next(iter(sizes.values()), 1)

    def _prepare_latents(
        self, latents: Tensor | None, batch_size: int, generator: Generators, device: torch.device
    ) -> Tensor:
        """Unit noise [B,C,H,W], float32 or better."""
        channels, size = self.unet.config.in_channels, self.unet.config.sample_size
        if latents is None:
            return randn_tensor((batch_size, channels, size, size), generator, device=device, dtype=torch.float32)
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise ValueError(f"latents have shape {list(latents.shape)}; the network takes [batch, {channels}, H, W].")
        return latents.to(device, torch.promote_types(latents.dtype, torch.float32))

    def _prepare_labels(
        self, labels: Tensor | None, batch_size: int, generator: Generators, device: torch.device
    ) -> Tensor | None:
        """Long [B] or float [B,N] for the network; None for one without classes."""
        num_classes = self.unet.config.num_class_embeds
        if not num_classes:
            if labels is not None:
                raise ValueError(
                    f"class_labels={labels.tolist()}, but this pipeline's network is unconditional; pass none."
                )
            return None
        if labels is None:
            generators = generator if isinstance(generator, list) else [generator] * batch_size
            draws = [torch.randint(num_classes, (1,), generator=g, device=g.device if g else None) for g in generators]
            return torch.cat([draw.to(device) for draw in draws])
        labels = labels if labels.is_floating_point() else labels.long()
        if not labels.is_floating_point() and (labels.min() < -1 or labels.max() >= num_classes):
            raise ValueError(
                f"class_labels={labels.tolist()} are not all in [0, {num_classes - 1}], the classes of this network; "
                "use -1 for no class."
            )
        return labels.expand(batch_size).to(device) if labels.ndim == 0 else labels.to(device)

    # -----------------------------------------------------------------------------------------------------------------
    # Saving: one folder that loads where the package is installed and, from the code it carries, where it is not

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save as Diffusers does, in safetensors, with the code files and a model card; a README.md that exists stays.

        Raises:
            ValueError: `safe_serialization=False`.
        """
        if not safe_serialization:
            raise ValueError(
                "safe_serialization=False would write pickles, which run code when they are loaded; leave it out."
            )
        names = ("repo_id", "commit_message", "private", "token", "create_pr")
        upload = {name: kwargs.pop(name) for name in names if name in kwargs}
        super().save_pretrained(save_directory, variant=variant, max_shard_size=max_shard_size, **kwargs)
        card = Path(save_directory, "README.md")
        if not card.exists():
            text = self._model_card(CARD_TITLE, "path/to/this/folder", save_directory)
            card.write_text(text, encoding="utf-8")
        if push_to_hub:
            self.push_to_hub(upload.pop("repo_id", Path(save_directory).name), variant=variant, **upload)

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write the index and the code files that it names; where a component was loaded from stays on this machine."""
        for name, cls in self._carried_classes().items():
            folder = Path(save_directory, "" if name == "_class_name" else name)
            folder.mkdir(parents=True, exist_ok=True)
            source = inspect.getsource(sys.modules[cls.__module__])
            (folder / f"{_file_name(cls)}.py").write_text(source, encoding="utf-8")
        for path in Path(save_directory).glob("*/config.json"):
            config = json.loads(path.read_text(encoding="utf-8"))
            if config.pop("_name_or_path", None) is not None:  # a local path cannot be told from the name of a model
                path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        super().save_config(save_directory, push_to_hub, **kwargs)

    def to_json_string(self) -> str:
        """The index, in which the classes that the folder carries go by the names of their files."""
        index = json.loads(super().to_json_string())
        index.pop("_name_or_path", None)
        index |= {name: [_file_name(cls), cls.__name__] for name, cls in self._carried_classes().items()}
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def _carried_classes(self) -> dict[str, type]:
        """The pipeline's class and its components', by their names in the index, as far as their code goes along."""
        parts = {"_class_name": self, **self.components}
        classes = {name: type(getattr(part, "_orig_mod", part)) for name, part in parts.items()}  # not the compiled one
        # Where a class comes from this package or, through trust_remote_code, from another such folder.
        carried = ("diffusers_edm2", "diffusers_modules")
        return {name: cls for name, cls in classes.items() if cls.__module__.partition(".")[0] in carried}

    def _upload_folder(self, working_dir: str | os.PathLike, repo_id: str, *args: Any, **kwargs: Any):
        """Diffusers has put the Hub's model card there, or one that says nothing, in whose place ours goes."""
        card = Path(working_dir, "README.md")
        if "model card has been automatically generated" in card.read_text(encoding="utf-8"):
            card.write_text(self._model_card(repo_id.rpartition("/")[2], repo_id, working_dir), encoding="utf-8")
        return super()._upload_folder(working_dir, repo_id, *args, **kwargs)

    def _model_card(self, title: str, location: str, folder: str | os.PathLike) -> str:
        """A README.md with what the pipeline knows of itself, and of the weights in `folder`."""
        names = (path.relative_to(folder).as_posix() for path in Path(folder).glob("*/*.safetensors"))
        sections = card_sections(self.config, self.unet.config, location, variant=needed_variant(names))
        return f"---\n{card_metadata()}---\n\n# {title}\n\n{generated_part(sections)}\n"

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any):
        """Another pipeline of the same components; those in `kwargs` take the place of `pipeline`'s."""
        # Diffusers carries over networks of exactly the annotated class, which a self-contained file cannot name.
        expected, _ = cls._get_signature_keys(cls)
        own = {name: part for name, part in pipeline.components.items() if name in expected}
        return super().from_pipe(pipeline, **(own | kwargs))


def _interval(guidance_interval: tuple[float, float] | None) -> tuple[float, float]:
    if guidance_interval is None:
        return -math.inf, math.inf
    if len(guidance_interval) != 2 or not 0 <= guidance_interval[0] < guidance_interval[1]:
        raise ValueError(
            f"guidance_interval={guidance_interval} must be two noise levels, 0 <= lo < hi, such as (0.28, 2.9)."
        )
    return guidance_interval


def _call(unet, network_input: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
    """F in the type of `network_input`: the sampler's state stays float32 or better whatever a network returns."""
    labels = labels if unet.config.num_class_embeds else None
    return unet(network_input.to(unet.dtype), t, labels, return_dict=False)[0].to(network_input.dtype)


# For loading, a component is an argument without default: plain DiffusionPipeline does not look at a pipeline's list of
# optional ones, and would take the folder's guide or VAE in place of one that is passed, or of a None.
_init: Any = EDM2Pipeline.__init__
_arguments = inspect.signature(_init).parameters.values()
_init.__signature__ = inspect.Signature(
    [arg.replace(default=arg.empty) if arg.name in EDM2Pipeline._optional_components else arg for arg in _arguments]
)


def _file_name(cls: type) -> str:
    return cls.__module__.rpartition(".")[2]


# ---------------------------------------------------------------------------------------------------------------------
# The model card

CARD_BEGIN, CARD_END = "<!-- diffusers-edm2:begin -->", "<!-- diffusers-edm2:end -->"
CARD_TITLE = "EDM2 pipeline"  # of a folder, which has no name of its own
WEIGHTS = re.compile(r"(?:\w+_)?model(?:\.(?P<variant>\w+))?(?:-\d{5}-of-(?P<shards>\d{5}))?\.safetensors")


def card_metadata() -> str:
    """YAML at the top of a model card."""
    return "library_name: diffusers\npipeline_tag: unconditional-image-generation\ntags:\n- edm2\n"


def needed_variant(names: Iterable[str]) -> str | None:
    """The `variant` that `from_pretrained` must be given, or None; `names` are paths in a pipeline folder."""
    variants: dict[str, set[str]] = {}
    for component, _, name in (path.rpartition("/") for path in names):
        if found := WEIGHTS.fullmatch(name):
            variants.setdefault(component, set()).add(found["variant"] or "")
    return next((min(own) for _, own in sorted(variants.items()) if "" not in own), None)


def card_sections(
    index: Mapping[str, Any],
    network: Mapping[str, Any],
    location: str,
    *,
    guidance_scale: float = 1.5,
    variant: str | None = None,
) -> dict[str, str]:
    """Markdown of the model card by heading, "" for the text before the first.

    Args:
        index, network: contents of model_index.json and unet/config.json.
        location: Hub id or path that `from_pretrained` takes.
        guidance_scale: of the example, where there is a second network to guide with.
        variant: of the weights, where there are no others.
    """
    has = {name: bool((index.get(name) or [None])[0]) for name in ("guide_unet", "vae")}
    size, channels, classes = (network[key] for key in ("sample_size", "in_channels", "num_class_embeds"))
    sample = f"samples of {size} × {size} × {channels}"
    if has["vae"]:
        sample = f"images that its VAE decodes from latents of {size} × {size} × {channels}"
    elif channels in (1, 3):
        sample = f"{'grey' if channels == 1 else 'RGB'} images of {size} × {size} pixels"
    labels = f"class_labels=[0, {classes - 1}], " if classes and classes > 1 else ""
    scale = f", guidance_scale={guidance_scale}" if has["guide_unet"] else ""
    source = f'"{location}"' + (f', variant="{variant}"' if variant else "")
    call = f"images = pipe({labels}num_inference_steps=32{scale}).images"
    about = (
        f"An [EDM2](https://arxiv.org/abs/2312.02696) diffusion model for [Diffusers]({_DIFFUSERS}): {sample}, "
        f"{f'in {classes} classes' if classes else 'without classes'}"
        f"{', with a second network that guides it' if has['guide_unet'] else ''}. "
        "The weights are safetensors; no pickle is among them."
    )
    use = f"""With the package `diffusers-edm2` installed, no code of this repository is run:

```python
import diffusers_edm2  # makes the classes known to Diffusers
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({source})
{call}
```

Without the package, Diffusers runs the `.py` files of this repository, which are the package's own; read them first:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({source}, trust_remote_code=True)
{call}
```"""
    limits = (
        "The model draws images like those it was trained on, with their gaps and biases, and some that no "
        "training image would pass for. It takes no text, has no safety filter, and was made for one size of image. "
        "Figures hold for the settings they were measured with."
    )
    return {"": about, "Use": use, "Limits": limits, "Citation": f"```bibtex\n{_BIBTEX}```"}


def generated_part(sections: Mapping[str, str]) -> str:
    """The sections between two marks, so that they can be written anew and what people wrote around them stays."""
    parts = [f"## {heading}\n\n{text}" if heading else text for heading, text in sections.items()]
    return "\n\n".join([CARD_BEGIN, *parts, CARD_END])


_DIFFUSERS = "https://github.com/huggingface/diffusers"
_BIBTEX = """@inproceedings{Karras2024edm2,
  title     = {Analyzing and Improving the Training Dynamics of Diffusion Models},
  author    = {Tero Karras and Miika Aittala and Jaakko Lehtinen and Janne Hellsten and Timo Aila and Samuli Laine},
  booktitle = {Proc. CVPR},
  year      = {2024},
}
"""
