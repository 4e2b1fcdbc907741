"""Publish a pipeline on the Hugging Face Hub: `python pipelines/publish.py --help`."""

import argparse
from pathlib import Path

from diffusers_edm2 import hub


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="publish.py",
        description="Check a pipeline folder, complete its model card, and push both to the Hub. The repository then "
        "loads everywhere: with diffusers-edm2 installed without running its code, and elsewhere with "
        "trust_remote_code=True. Text that people wrote into the card stays.",
        epilog="Example: python pipelines/publish.py runs/digits somebody/digits --license apache-2.0 --dry_run",
    )
    parser.add_argument(
        "folder",
        type=Path,
        metavar="FOLDER",
        help="a pipeline folder, or a run folder of train_edm2.py, whose newest pipeline, recipe and sample "
        "grid are then used",
    )
    parser.add_argument(
        "repo",
        metavar="REPO",
        help="name in your own namespace, or namespace/name; made if it is not there",
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="list what would be uploaded, with sizes, and send nothing",
    )
    parser.add_argument(
        "--create_pr",
        action="store_true",
        help="propose it as a pull request to a repository that exists",
    )
    parser.add_argument(
        "--private",
        action="store_true",
        help="make a new repository private (default: as your namespace has it)",
    )
    parser.add_argument(
        "--revision",
        metavar="BRANCH",
        help="branch to push to, made if it is not there (default: main)",
    )
    parser.add_argument(
        "--variant",
        metavar="NAME",
        help='publish only the weights that were saved with save_pretrained(..., variant=NAME), such as "fp16" '
        "(default: all weights in the folder)",
    )
    parser.add_argument(
        "--commit_message",
        default="Upload EDM2Pipeline",
        metavar="TEXT",
        help="(default: %(default)s)",
    )
    parser.add_argument(
        "--license",
        metavar="ID",
        help="of the weights, as the Hub names it: apache-2.0, cc-by-nc-sa-4.0, ... (default: what the card "
        "says already)",
    )
    parser.add_argument(
        "--metrics",
        type=Path,
        metavar="FILE",
        help='results for the card, a JSON list such as [{"metric": "FID", "value": 2.56, "dataset": '
        '"ImageNet", "images": 50000}] (default: metrics.json in FOLDER, if there is one)',
    )
    parser.add_argument(
        "--sample_grid",
        type=Path,
        metavar="PNG",
        help="picture for the card (default: samples.png in FOLDER, or the newest grid of the run)",
    )
    parser.add_argument(
        "--replace_card",
        action="store_true",
        help="take FOLDER/README.md in place of the card that is on the Hub",
    )
    parser.add_argument(
        "--token",
        help="to write with (default: HF_TOKEN in the environment, or that of `hf auth login`, where others on "
        "this machine cannot see it)",
    )
    return parser


def main() -> None:
    args = build_parser().parse_args()
    try:
        folder, run = hub.find_run(args.folder)
        release = hub.collect(
            folder,
            run,
            variant=args.variant,
            sample_grid=args.sample_grid,
            metrics=args.metrics,
            license=args.license,
        )
        if args.dry_run:
            return show(release, args.repo)
        if "samples.png" not in release.files:
            print("The card gets no picture; --sample_grid names one.")
        repo = args.repo if args.create_pr else hub.open_repo(args.repo, args.token, args.private or None)
        address = hub.push(
            release,
            repo,
            token=args.token,
            create_pr=args.create_pr,
            revision=args.revision,
            message=args.commit_message,
            replace_card=args.replace_card,
        )
    except (hub.PublishError, ConnectionError) as error:
        raise SystemExit(f"error: {error}") from error
    print(address)


def show(release: hub.Release, repo: str) -> None:
    """What would be pushed, and the card as it is without the one on the Hub."""
    card = hub.model_card(release, repo)
    sizes = {name: path.stat().st_size for name, path in release.files.items()} | {"README.md": len(card.encode())}
    for name, size in sorted(sizes.items()):
        print(f"{readable(size):>10}  {name}")
    print(f"{readable(sum(sizes.values())):>10}  in all, to {repo}; nothing was sent. The model card:\n\n{card}")


def readable(size: int) -> str:
    number, units = float(size), ["B", "KiB", "MiB", "GiB"]
    while number >= 1024 and len(units) > 1:
        number /= 1024
        units.pop(0)
    return f"{number:.0f} {units[0]}" if units[0] == "B" else f"{number:.1f} {units[0]}"


if __name__ == "__main__":
    main()
