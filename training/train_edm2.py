"""Train an EDM2 model: `accelerate launch training/train_edm2.py --help`.

The one clock is `nimg`, the number of training images seen. Data order, noise, dropout, learning rate, EMA and all file
names are functions of it, so that a resumed run is the same run.
"""

import contextlib
import json
import platform
import resource
import signal
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import GradScalerKwargs, broadcast_object_list, gather_object, parse_flag_from_env
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from diffusers_edm2 import EDM2HeunScheduler, EDM2Loss, EDM2Pipeline, EDM2UNet2DModel, PowerFunctionEMA, checkpoint
from diffusers_edm2.checkpoint import CheckpointError
from diffusers_edm2.dataset import GlobalBatchSampler, TrainingImages, collate, open_source
from diffusers_edm2.ema import snapshot_name
from diffusers_edm2.files import atomic_file, atomic_folder, clean_leftovers, write_atomic
from diffusers_edm2.grid import image_grid
from diffusers_edm2.hub import BackgroundUploads, PublishError, open_repo
from diffusers_edm2.latents import RAW_MEAN, RAW_STD, load_vae, quantize_rgb, sample_posterior, scale_rgb
from diffusers_edm2.loss import drop_labels, noise_generators, stream_seed
from diffusers_edm2.monitoring import LossMeter, activation_magnitudes, weight_magnitudes
from diffusers_edm2.optim import guard_gradients, learning_rate
from diffusers_edm2.presets import format_images, get_preset
from diffusers_edm2.training_options import FREE_OPTIONS, fit_to_data, parse_options, resolve_batch


def main() -> None:
    args = parse_options()
    hub_token = args.hub_token
    del args.hub_token  # not among the options that are shown and written down
    # By itself, PartialState does not look at the flag that `accelerate launch --cpu` sets.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    with told(ValueError):
        resolve_batch(args, state.num_processes)
        if args.dry_run:
            return print_recipe(args) if state.is_main_process else None
        images, accelerator = set_up(args, state)
        run_dir, options = Path(args.output_dir), vars(args) | {"dataset_size": len(images)}
        checkpoint.check_config(run_dir, {"options": options}, set(FREE_OPTIONS))
    accelerator.wait_for_everyone()
    is_main = accelerator.is_main_process
    with told(CheckpointError), checkpoint.lock_run(run_dir, warn) if is_main else contextlib.nullcontext():
        if is_main:
            for sentence in clean_leftovers(run_dir):
                warn(sentence)
        uploads = start_uploads(args, hub_token, run_dir) if is_main else None
        try:
            train(args, options, images, run_dir, accelerator, uploads)
        except BaseException as error:
            # Frees the data loader, which ends its workers: they ignore the signal that Python ends them with.
            traceback.clear_frames(error.__traceback__)
            if uploads and (remaining := uploads.finish(timeout=0)):
                warn(remaining)
            raise


def set_up(args: Namespace, state: PartialState) -> tuple[TrainingImages, Accelerator]:
    if args.mixed_precision == "fp16" and state.device.type == "cpu":
        raise ValueError("--mixed_precision fp16 needs a GPU; use bf16 or no on a CPU.")
    images = open_images(args)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=Path(args.output_dir) / "logs",
        dynamo_backend="inductor" if args.compile else None,
        # No loss scaling and no skipped steps: guard_gradients is the one rule for what is not finite.
        kwargs_handlers=[GradScalerKwargs(enabled=False)],
    )
    args.mixed_precision = accelerator.mixed_precision
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    return images, accelerator


@contextlib.contextmanager
def told(kind: type[Exception]) -> Iterator[None]:
    """Errors that a user can mend end the program with their message alone."""
    try:
        yield
    except kind as error:
        raise SystemExit(f"train_edm2.py: error: {error}") from None


def train(
    args: Namespace,
    options: dict,
    images: TrainingImages,
    run_dir: Path,
    accelerator: Accelerator,
    uploads: BackgroundUploads | None,
) -> None:
    device, is_main = accelerator.device, accelerator.is_main_process
    world, rank = accelerator.num_processes, accelerator.process_index

    # ---- Network, optimizer, EMA -------------------------------------------------------------------------------------
    torch.manual_seed(args.seed)
    unet = build_unet(args)
    unet.normalize_in_forward = False  # the loop does it once per step, whatever the accumulation
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    trained = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    betas = (args.adam_beta1, args.adam_beta2)
    optimizer = torch.optim.Adam(trained.values(), betas=betas, eps=args.adam_epsilon, fused=device.type == "cuda")
    network, optimizer = accelerator.prepare(unet, optimizer)
    network.train()
    ema = PowerFunctionEMA(unet, args.ema_sigma_rel)
    scheduler = EDM2HeunScheduler(sigma_data=args.sigma_data)
    loss_function = EDM2Loss(args.P_mean, args.P_std)
    if is_main and args.pretrained_vae_model_name_or_path:
        build_pipeline(args, ema, scheduler)  # a VAE that does not fit shows now, not at the first grid
    meter = LossMeter(device)
    bad_images: set[str] = set()
    nimg = 0

    # ---- Resume ------------------------------------------------------------------------------------------------------
    if is_main:
        checkpoint.check_free_space(run_dir, memory(unet, args)["checkpoint"], "a checkpoint")
    found = [checkpoint.find_checkpoint(run_dir, args.resume_from_checkpoint, warn) if is_main else None]
    if (resumed := broadcast_object_list(found)[0]) is not None:
        tensors, state = checkpoint.load_checkpoint(resumed)
        nimg = state["nimg"]
        unet.load_state_dict(tensors["unet"])
        checkpoint.load_optimizer_tensors(optimizer.optimizer, trained.items(), tensors["optimizer"])
        tracks = {s: tensors[f"ema-{s}"] for s in args.ema_sigma_rel}
        ema.load_state_dict({"nimg": nimg, "sigma_rel": args.ema_sigma_rel, "tracks": tracks})
        meter.restore(tensors["meter"]["sums"], rank, world)
        bad_images.update(state["bad_images"])
        accelerator.print(f"Resuming from {resumed}, after {nimg} of {args.duration} images.")
        del tensors, tracks
    if is_main:
        is_local = not args.dataset_name or Path(args.dataset_name).expanduser().exists()  # later, nobody can tell
        config = {"options": options, "dataset_is_local": is_local, "versions": versions()}
        checkpoint.write_config(run_dir, config)
        checkpoint.truncate_metrics(run_dir / "metrics.jsonl", nimg)
        metrics_file = checkpoint.MetricsFile(run_dir / "metrics.jsonl")
    if accelerator.log_with:
        purge = {"tensorboard": {"purge_step": nimg + 1}} if args.report_to == "tensorboard" else {}
        accelerator.init_trackers("edm2", {name: str(value) for name, value in options.items()}, purge)

    # ---- Data, from image nimg on ------------------------------------------------------------------------------------
    loader = DataLoader(
        images,
        batch_sampler=GlobalBatchSampler(args.total_batch_size, args.train_batch_size, rank, world, nimg),
        num_workers=args.dataloader_num_workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # keeps the loader away from the global random state
    )
    stop = StopSignal()  # before the workers start, so that they are never without it
    batches = iter(loader)
    clock = Clock(nimg)
    bar = {"desc": "training", "unit": "img", "unit_scale": True, "mininterval": 1}
    progress = tqdm(total=args.duration, initial=nimg, disable=not is_main, **bar)

    while nimg < args.duration:
        # ---- One step: normalise, forward and backward, learning rate, Adam, EMA -------------------------------------
        unet.normalize_weights()
        for micro_batch in range(args.gradient_accumulation_steps):
            batch = next(batches)
            bad_images.update(batch["bad"])
            numbers = batch["number"].tolist()
            generators = noise_generators(args.seed, numbers, device)
            torch.manual_seed(stream_seed(args.seed, numbers[0], use=1))  # dropout
            clean = to_samples(batch["image"].to(device, non_blocking=True), generators, args)
            labels = batch["label"].to(device, non_blocking=True) if args.num_classes else None
            sigma, noise = loss_function.draw(clean, generators)
            if labels is not None:
                labels = drop_labels(labels, args.label_dropout, generators)
            with accelerator.accumulate(network):
                out = loss_function(network, scheduler, clean, labels, sigma, noise)
                accelerator.backward(out.loss)
            meter.add_samples(out.loss_per_sample, out.logvar, out.sigma)
            if micro_batch == 0:  # the same images on any number of processes, for the activations in the log
                shown = clean, labels, sigma, noise

        meter.add_step(*guard_gradients(trained.values()))
        lr = learning_rate(nimg, args.total_batch_size, args.learning_rate, args.lr_ref_batches, args.lr_rampup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        before, nimg = nimg, nimg + args.total_batch_size
        ema.update(nimg)
        progress.update(args.total_batch_size)

        # ---- What is due at this time --------------------------------------------------------------------------------
        finished = nimg >= args.duration
        interrupted = not finished and accelerator.reduce(torch.tensor(stop.received, device=device), "sum").item() > 0
        status, sample, snapshot, save = (
            finished or (every > 0 and before // every < nimg // every)
            for every in (args.status_every, args.sample_every, args.snapshot_every, args.checkpoint_every)
        )
        if status:
            bad_images.update(gather_object(sorted(bad_images)))
            means = meter.means(accelerator.reduce(meter.sums, "sum"))
            if is_main:
                clean, labels, sigma, noise = shown
                noisy = clean + sigma[:, None, None, None] * noise
                inputs = scheduler.precondition_inputs(noisy, sigma), scheduler.precondition_noise(sigma), labels
                record = {"nimg": nimg, **means, "learning_rate": lr, "bad_images": len(bad_images)}
                record |= weight_magnitudes(unet) | activation_magnitudes(unet, *inputs) | clock.measure(nimg)
                metrics_file.append(record)
                accelerator.log(record, step=nimg)
                progress.write(status_line(record))
            meter.reset()
        if is_main and sample:
            save_samples(run_dir, nimg, args, ema, scheduler)
        if is_main and snapshot:
            save_snapshots(run_dir, nimg, args, ema, scheduler)
            if uploads and args.hub_strategy == "snapshots" and not finished:
                uploads.submit(nimg)
        if save or interrupted:
            sums = accelerator.gather(meter.sums[None])
            bad_images.update(gather_object(sorted(bad_images)))
            if is_main:
                tensors = {
                    "unet": unet.state_dict(),
                    "optimizer": checkpoint.optimizer_tensors(optimizer.optimizer, trained.items()),
                    "meter": {"sums": sums},
                    **{f"ema-{s}": ema.averaged(s) for s in ema.sigma_rel},
                }
                state, limit = {"bad_images": sorted(bad_images)}, args.checkpoints_total_limit
                checkpoint.save_checkpoint(run_dir, nimg, tensors=tensors, state=state, total_limit=limit)
        if interrupted:
            break

    # ---- The end -----------------------------------------------------------------------------------------------------
    progress.close()
    accelerator.end_training()
    if is_main and bad_images:
        write_atomic(run_dir / "bad_images.json", json.dumps(sorted(bad_images), indent=2) + "\n")
        print(f"{len(bad_images)} images could not be used; {run_dir / 'bad_images.json'} lists them.")
    if nimg < args.duration:
        accelerator.print(f"Stopped after {nimg} of {args.duration} images; all is saved. The same command goes on.")
    else:
        accelerator.print(f"Finished after {nimg} images. The pipeline is in {run_dir / 'pipeline'}.")
    if uploads:
        if nimg >= args.duration:
            uploads.submit(nimg)
        if remaining := uploads.finish(interrupted=lambda: stop.received):
            warn(remaining)


# ----------------------------------------------------------------------------------------------------------------------
# Data and network


def open_images(args: Namespace) -> TrainingImages:
    """The training images, and `args` completed by what they are."""
    source = open_source(
        args.dataset_name,
        args.train_data_dir,
        config=args.dataset_config_name,
        split=args.dataset_split,
        image_column=args.image_column,
        label_column=args.label_column,
        cache_dir=args.cache_dir,
        revision=args.dataset_revision,
    )
    crop = "center" if args.center_crop else "dhariwal" if args.dhariwal_crop else "none"
    images = TrainingImages(source, args.seed, args.resolution, crop, args.random_flip, args.skip_bad_images)
    fit_to_data(args, images.image_shape, source.num_classes, source.is_latent)
    if args.latents_mean is not None and not source.is_latent:
        raise ValueError("--latents_mean and --latents_std are for stored latents; the data set holds pictures.")
    if source.is_latent and args.latents_mean is None:  # those of the data set, or else the papers'
        args.latents_mean, args.latents_std = source.latents_mean or RAW_MEAN, source.latents_std or RAW_STD
    # A wrong size, a broken file or a wrong number of statistics shows now, not after the set-up.
    to_samples(images[0]["image"][None], [torch.Generator()], args)
    return images


def to_samples(images: Tensor, generators: list[torch.Generator], args: Namespace) -> Tensor:
    """What the network learns: pictures scaled to [-1, 1], stored latents drawn anew from their posterior."""
    if images.dtype == torch.uint8:
        return scale_rgb(images)
    return sample_posterior(images, generators, args.latents_mean, args.latents_std, args.sigma_data)


def build_unet(args: Namespace) -> EDM2UNet2DModel:
    return EDM2UNet2DModel(
        sample_size=args.resolution,
        in_channels=args.in_channels,
        block_out_channels=args.block_out_channels,
        layers_per_block=args.layers_per_block,
        attention_resolutions=args.attention_resolutions,
        attention_head_dim=args.attention_head_dim,
        num_class_embeds=args.num_classes or None,
        dropout=args.dropout,
        label_dropout=args.label_dropout,
    )


# ----------------------------------------------------------------------------------------------------------------------
# What a run writes


def start_uploads(args: Namespace, token: str | None, run_dir: Path) -> BackgroundUploads | None:
    """Open the repository now, so that a wrong name or token shows at once; without a network the training goes on."""
    if not args.push_to_hub:
        return None
    repo, private, is_open = args.hub_model_id or run_dir.absolute().name, args.hub_private_repo or None, True
    try:
        repo = open_repo(repo, token, private)
    except PublishError as error:
        raise SystemExit(f"error: --push_to_hub: {error}") from error
    except ConnectionError as error:
        is_open = False
        warn(f"--push_to_hub: {error} The training goes on without; the uploads are tried in their time.")
    return BackgroundUploads(run_dir, repo, token=token, private=private, is_open=is_open, report=tqdm.write)


def averaged_unet(args: Namespace, weights: Mapping[str, Tensor]) -> EDM2UNet2DModel:
    """A network whose parameters are the EMA's own tensors: no copy, and no random numbers drawn."""
    with torch.device("meta"):
        unet = build_unet(args)
    unet.load_state_dict(weights, assign=True)
    return unet.eval()


def build_pipeline(args: Namespace, ema: PowerFunctionEMA, scheduler: EDM2HeunScheduler) -> EDM2Pipeline:
    """The first EMA track as a pipeline, with the VAE if there is one."""
    unet, vae = averaged_unet(args, ema.averaged(ema.sigma_rel[0])), None
    if args.pretrained_vae_model_name_or_path:
        vae = load_vae(args.pretrained_vae_model_name_or_path).to(unet.device)
    statistics = {"latents_mean": args.latents_mean, "latents_std": args.latents_std}
    pipeline = EDM2Pipeline(unet, EDM2HeunScheduler.from_config(scheduler.config), vae=vae, **statistics)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_snapshots(run_dir: Path, nimg: int, args: Namespace, ema: PowerFunctionEMA, scheduler) -> None:
    """Every EMA track as a model folder, and the first as the newest pipeline."""
    for sigma_rel in ema.sigma_rel:
        path = run_dir / "snapshots" / snapshot_name(nimg, sigma_rel)
        with checkpoint.explain_save_errors(run_dir, path), atomic_folder(path, replace=True) as folder:
            averaged_unet(args, ema.averaged(sigma_rel)).save_pretrained(folder)
    path = run_dir / "pipeline"
    with checkpoint.explain_save_errors(run_dir, path), atomic_folder(path, replace=True) as folder:
        build_pipeline(args, ema, scheduler).save_pretrained(folder)


def save_samples(run_dir: Path, nimg: int, args: Namespace, ema: PowerFunctionEMA, scheduler) -> None:
    """A grid of 4 rows: up to 10 classes side by side, from the same noise every time."""
    pipeline = build_pipeline(args, ema, scheduler)
    columns = min(args.num_classes or 10, 10)
    classes = [column * (args.num_classes or 0) // columns for column in range(columns)] * 4
    grid: list[Image.Image] = []
    for first in range(0, len(classes), 8):
        chosen = classes[first : first + 8]
        seeds = [stream_seed(args.seed, number, use=2) for number in range(first, first + len(chosen))]
        samples = pipeline(
            class_labels=chosen if args.num_classes else None,
            num_inference_steps=args.num_inference_steps,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="latent" if pipeline.vae is None else "pt",
        ).images
        pixels = quantize_rgb(samples if pipeline.vae is None else 2 * samples - 1)
        # of latents without a VAE, the first three channels are better than nothing to look at
        arrays = pixels[:, : 1 if pixels.shape[1] < 3 else 3].permute(0, 2, 3, 1).cpu().numpy()
        grid += [Image.fromarray(a[:, :, 0] if a.shape[2] == 1 else a) for a in arrays]
    labels = [str(c) if args.num_classes else "" for c in classes]
    path = run_dir / "samples" / f"{nimg:09d}.png"
    with checkpoint.explain_save_errors(run_dir, path), atomic_file(path) as file:
        image_grid(grid, labels, columns).save(file)


def status_line(record: Mapping[str, float]) -> str:
    speed = f"{record['images_per_second']:.1f} img/s  {record['memory_gib']:.1f} GiB"
    return (
        f"{format_images(int(record['nimg'])):>10}  loss {record['loss']:.4f}  u {record['logvar']:+.4f}  "
        f"lr {record['learning_rate']:.5f}  grad {record['grad_norm']:.3g}  {speed}"
        + (
            f"  non-finite gradients {record['nonfinite_gradients']:.3g} per step"
            if record["nonfinite_gradients"]
            else ""
        )
        + (f"  bad images {record['bad_images']:.0f}" if record["bad_images"] else "")
    )


class Clock:
    """Images per second since the last look, and the most memory used so far, in GiB."""

    def __init__(self, nimg: int):
        self.nimg, self.time = nimg, time.perf_counter()

    def measure(self, nimg: int) -> dict[str, float]:
        images, seconds = nimg - self.nimg, time.perf_counter() - self.time
        self.nimg, self.time = nimg, time.perf_counter()
        memory = {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
        if torch.cuda.is_available():
            memory["gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return {"images_per_second": images / seconds, "interval_seconds": seconds, **memory}


class StopSignal:
    """SIGTERM and SIGINT ask the loop to finish its step and save; one that follows five seconds later stops at once.

    Until then it is the same request: launchers pass on what the whole process group has got already.
    """

    def __init__(self):
        self.received, self.time = 0.0, 0.0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.receive)

    def receive(self, number: int, frame) -> None:
        if not self.received:
            self.received, self.time = 1.0, time.monotonic()
        elif time.monotonic() - self.time > 5:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def ignore_signals(worker: int) -> None:
    """A signal often goes to every process of a run; the data workers must not end before the main one has saved."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def versions() -> dict[str, str]:
    packages = ("torch", "diffusers", "accelerate", "diffusers-edm2")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


# ----------------------------------------------------------------------------------------------------------------------
# --dry_run


def memory(unet: nn.Module, args: Namespace) -> dict[str, int]:
    """Bytes per device that do not depend on the batch size, and those of a checkpoint on the disk."""
    weights = sum(4 * p.numel() for p in unet.parameters())
    parts = {
        "weights": weights,
        "gradients": weights,
        "optimizer": 2 * weights,
        "ema": weights * len(args.ema_sigma_rel),
    }
    return {**parts, "checkpoint": weights + parts["optimizer"] + parts["ema"]}


def print_recipe(args: Namespace) -> None:
    """The resolved recipe, the size and cost of the network, and the memory that it needs; nothing is written."""
    if args.dataset_name or args.train_data_dir:
        open_images(args)
    if args.resolution is None or args.in_channels is None:
        raise ValueError("--dry_run without data needs --resolution and --in_channels, or a --preset that gives them.")
    with FakeTensorMode():
        unet = build_unet(args).eval()
        with FlopCounterMode(display=False) as counter:
            unet(torch.zeros(1, args.in_channels, args.resolution, args.resolution), torch.zeros(1))
        parameters = sum(p.numel() for p in unet.parameters())
    for name, value in vars(args).items():
        print(f"{name:34} {format_images(value) if name in ('duration', 'lr_rampup') else value}")
    steps = -(-args.duration // args.total_batch_size)
    print(
        f"\n{parameters / 1e6:.1f} M parameters, {counter.get_total_flops() / 2e9:.3g} GMAC per image and network call"
    )
    print(f"{steps} optimizer steps of {args.total_batch_size} images")
    bytes_of = memory(unet, args)
    on_disk = bytes_of.pop("checkpoint")
    print(f"{sum(bytes_of.values()) / 2**30:.2f} GiB per device, without activations: ", end="")
    print(", ".join(f"{name} {size / 2**30:.2f}" for name, size in bytes_of.items()))
    print(f"{on_disk / 2**30:.2f} GiB per checkpoint, {bytes_of['ema'] / 2**30:.2f} GiB per snapshot of all EMA tracks")
    for score in get_preset(args.preset).published.scores if args.preset else ():
        guided = f", guidance {score.guidance_scale}" if score.guidance_scale != 1 else ""
        print(f"published {score.metric} {score.value} (sigma_rel {score.sigma_rel}{guided}, {score.source})")


if __name__ == "__main__":
    main()
