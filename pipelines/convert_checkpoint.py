"""Convert official EDM2 pickles without executing them: `python pipelines/convert_checkpoint.py --help`."""

import argparse
import os
import re
from argparse import Namespace
from pathlib import Path

from diffusers import AutoencoderKL
from tqdm.auto import tqdm

from diffusers_edm2.convert import (
    LICENSE,
    Checkpoint,
    ConvertError,
    build_pipeline,
    download,
    model_card,
    parse_file_name,
    public_url,
    read_checkpoint,
    read_snapshots,
    write_folder,
    write_snapshots,
)
from diffusers_edm2.published import POSTHOC_ROOT, PUBLISHED

EPILOG = f"""
examples:
  one of the published settings, main network and guide in one pipeline, downloaded (float16: 0.25 GB for xs
  to 3 GB for xxl, each):
    python pipelines/convert_checkpoint.py --preset edm2-img512-s-guid-fid --vae stabilityai/sd-vae-ft-mse \\
        --output_dir edm2-s
  a network of your own, trained with the official code:
    python pipelines/convert_checkpoint.py network-snapshot-0134217-0.100.pkl --license mit --output_dir mine
  all snapshots of an official training run, for training/reconstruct_ema.py:
    python pipelines/convert_checkpoint.py training-runs/00000 --license mit --output_dir runs/mine

The pickles are read by a reader of this package that makes plain data and tensors only: nothing in them is called,
imported or compiled. It was tested with files of the official structure that the tests write, of configuration G, with
and without classes, of pixels and of latents, in float16 and float32. Training states (training-state-*.pt) are read as
zip files by torch.save whose "net" and "ema" ("stds", "emas") are state dicts or network objects; state dicts do not
say everything: the width of attention heads (64) and the weights of the magnitude-preserving sums are then assumed to
be the official defaults.

presets:
  {" ".join(PUBLISHED)}
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Convert EDM2 networks from official pickles to Diffusers folders, without executing the pickles.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "checkpoint",
        nargs="?",
        help="file or URL of a network (.pkl) or a training state (.pt); or a folder with the snapshots of a training "
        "run, <anything>-<kimg>-<std>.pkl, which becomes a run folder",
    )
    add("--output_dir", type=Path, required=True, help="folder to write; it must not exist (a run folder may)")
    add("--preset", metavar="NAME", help="one of the 36 published settings (below), in place of a checkpoint")
    add("--local_dir", type=Path, help="folder that has the files of the --preset; default: they are downloaded")
    default_cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "diffusers_edm2"
    add(
        "--cache_dir",
        type=Path,
        default=default_cache,
        help="where downloads are kept; an interrupted one is continued (default: %(default)s)",
    )
    add("--guide", help="file or URL of a second network, which guides the first")
    add(
        "--guidance_scale",
        type=float,
        help="weight of the guide, noted in the model card; 1 is no guidance (default: the preset's, else 1)",
    )
    add(
        "--vae",
        help="AutoencoderKL (folder or Hub id) to put into a pipeline of latents, which the pickles do not hold",
    )
    add("--vae_subfolder", default="", help="subfolder of --vae (default: none)")
    add(
        "--sigma_rel",
        type=float,
        help="which EMA of a training state, as a fraction of the run; 0: the weights without EMA (default: its first)",
    )
    add("--model_only", action="store_true", help="write the network alone, not a pipeline")
    add(
        "--license",
        default=LICENSE,
        help="licence in the model card, as the Hub writes it; for weights that are your own (default: %(default)s)",
    )
    return parser


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    if (args.checkpoint is None) == (args.preset is None):
        parser.error("give either a checkpoint or a --preset.")
    if args.preset is not None and args.preset not in PUBLISHED:
        parser.error(f"--preset {args.preset} is not one of the published settings; --help lists them.")
    if args.local_dir and not args.preset:
        parser.error("--local_dir goes with --preset; otherwise give the file itself.")
    if args.preset and args.guide:
        parser.error("--preset has its own guide; give the files in place of --preset to choose another.")
    if args.guidance_scale is not None and not (args.guide or (args.preset and PUBLISHED[args.preset].guide)):
        parser.error(f"--guidance_scale {args.guidance_scale} without a guide; add --guide.")
    if args.model_only and (args.guide or args.vae or (args.preset and PUBLISHED[args.preset].guide)):
        parser.error("--model_only writes one network; a guide and a --vae belong to a pipeline: leave it out.")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", args.license):
        parser.error(f"--license {args.license!r} is not an identifier such as mit, apache-2.0 or {LICENSE}.")
    args.cache_dir = args.cache_dir.expanduser()
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        if args.checkpoint and not is_url(args.checkpoint) and Path(args.checkpoint).is_dir():
            convert_run(args)
        else:
            convert_networks(args)
    except (ConvertError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


def convert_networks(args: Namespace) -> None:
    """One or two files to a pipeline or model folder."""
    if os.path.lexists(args.output_dir):
        raise FileExistsError(f"--output_dir {args.output_dir} exists already; remove it or choose another name.")
    sources = [args.checkpoint, args.guide]
    scale, facts, metrics = 1.0 if args.guidance_scale is None else args.guidance_scale, [], []
    if args.preset:
        published = PUBLISHED[args.preset]
        sources = [file and locate(args.local_dir, file) for file in (published.net, published.guide)]
        scale = published.guidance_scale if args.guidance_scale is None else args.guidance_scale
        facts.append(
            f"Published setting `{args.preset}`: {published.metric} {published.score} (50 000 images, 32 steps)"
        )
        if scale == published.guidance_scale:
            resolution = re.search(r"img(\d+)", args.preset)[1]
            score = {
                "metric": published.metric,
                "value": published.score,
                "dataset": f"ImageNet {resolution}x{resolution}",
            }
            metrics.append(score | {"images": 50000, "guidance_scale": scale, "source": "published by the authors"})
    vae = load_vae(args) if args.vae else None
    networks = [read_checkpoint(fetch(source, args.cache_dir), args.sigma_rel) for source in sources if source]
    main_network, guide = networks[0], networks[1] if len(networks) > 1 else None
    facts += [describe(network) for network in networks]
    if guide:
        facts.append(f"`guide_unet` is {guide.source}; guidance_scale {scale:g}")
    names = [public_url(source) if is_url(source) else Path(source).name for source in sources if source]
    card = model_card(names, args.license, facts)

    if args.model_only:
        write_folder(main_network.load_unet(), args.output_dir, card)
    else:
        write_folder(
            build_pipeline(main_network, guide, vae), args.output_dir, card, scale if scale != 1 else 1.5, metrics
        )
    for fact in facts:
        print(fact)
    print(f"Wrote {args.output_dir}.")
    if main_network.latents_mean and vae is None and not args.model_only:
        known = (
            f" {ascii(main_network.vae_name)[1:-1]}" if main_network.vae_name else " the VAE that it was trained with"
        )
        print(f"It makes latents: to have images, convert again with --vae{known}.")


def convert_run(args: Namespace) -> None:
    """A folder of raw snapshots to a run folder; the newest one of the shortest EMA also as its pipeline."""
    if args.guide or args.sigma_rel is not None or args.model_only:
        raise ConvertError(
            f"{args.checkpoint} is a folder of snapshots; --guide, --sigma_rel and --model_only are for single files."
        )
    vae = load_vae(args) if args.vae else None
    paths = read_snapshots(Path(args.checkpoint), lambda paths: tqdm(paths, desc="checking", unit="file"))
    kept = write_snapshots(paths, args.output_dir, lambda names: tqdm(names, desc="converting", unit="file"))
    print(f"Wrote {len(paths) - len(kept)} snapshots to {args.output_dir / 'snapshots'}", end="")
    print(f"; {len(kept)} were there before." if kept else ".")
    if not (args.output_dir / "pipeline").exists():
        newest = read_checkpoint(min(paths.values(), key=newest_first))
        card = model_card([newest.source], args.license, [describe(newest)])
        write_folder(build_pipeline(newest, vae=vae), args.output_dir / "pipeline", card)
        print(f"Wrote {args.output_dir / 'pipeline'}, of {newest.source}.")


def newest_first(path: Path) -> tuple[int, float]:
    """Sorts snapshots from late to early, those of one time by the length of their EMA."""
    nimg, sigma_rel = parse_file_name(path.name)
    return -nimg, sigma_rel


def locate(local_dir: Path | None, file: str) -> str:
    """Path or URL of a published file."""
    return f"{POSTHOC_ROOT}/{file}" if local_dir is None else str(local_dir / file)


def is_url(source: str) -> bool:
    return re.match(r"\w+://", source) is not None


def fetch(source: str, cache_dir: Path) -> Path:
    """A local path as it is; a URL's file in the cache."""
    if not is_url(source):
        return Path(source)
    with tqdm(desc=public_url(source).rpartition("/")[2], unit="B", unit_scale=True) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return download(source, cache_dir, show)


def load_vae(args: Namespace) -> AutoencoderKL:
    try:
        return AutoencoderKL.from_pretrained(args.vae, subfolder=args.vae_subfolder)
    except (OSError, ValueError) as error:
        raise ConvertError(f"--vae {args.vae} cannot be loaded: {error}") from error


def describe(network: Checkpoint) -> str:
    config = network.config
    kind = f"{config['num_class_embeds']} classes" if config["num_class_embeds"] else "without classes"
    space = "latents" if network.latents_mean else "samples"
    parts = [f"{config['sample_size']}x{config['sample_size']}x{config['in_channels']} {space}, {kind}"]
    parts += [f"widths {', '.join(map(str, config['block_out_channels']))}", f"σ_data {network.sigma_data:g}"]
    parts += [f"{network.nimg} training images"] if network.nimg is not None else []
    parts += [f"EMA length {network.sigma_rel:g}"] if network.sigma_rel is not None else []
    return f"{network.source}: {'; '.join([*parts, *network.remarks])}"


if __name__ == "__main__":
    main()
