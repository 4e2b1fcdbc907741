"""Publishing on the Hugging Face Hub: check a pipeline folder, write its model card, push it, also in the background.

The only module that knows `huggingface_hub`.
"""

import json
import os
import re
import shlex
import shutil
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import disable_progress_bars, yaml_dump
from safetensors import SafetensorError, safe_open

from diffusers_edm2.pipeline_edm2 import (
    CARD_BEGIN,
    CARD_END,
    CARD_TITLE,
    WEIGHTS,
    card_metadata,
    card_sections,
    generated_part,
    needed_variant,
)

# Formats that run code when they are opened the usual way, and those that may.
PICKLES = frozenset((".bin", ".ckpt", ".dill", ".joblib", ".pickle", ".pkl", ".pt", ".pth"))
MAY_HOLD_CODE = frozenset((".h5", ".hdf5", ".keras", ".mar", ".npy", ".npz", ".pt2"))
COMPRESSED = frozenset((".bz2", ".gz", ".lz4", ".xz", ".z", ".zst"))
HUB_NAME = re.compile(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*")
LIBRARIES = ("diffusers", "transformers")  # whose classes need no file in the folder
INDEX = re.compile(r".+\.safetensors\.index(?:\.(?P<variant>\w+))?\.json")
TASK = "unconditional-image-generation"

# What the card tells of a run's options.
RECIPE = (
    *("preset", "resolution", "in_channels", "num_classes", "block_out_channels", "layers_per_block"),
    *("attention_resolutions", "attention_head_dim", "dropout", "label_dropout", "duration", "total_batch_size"),
    *("learning_rate", "lr_ref_batches", "lr_rampup", "adam_beta1", "adam_beta2", "P_mean", "P_std", "sigma_data"),
    *("ema_sigma_rel", "mixed_precision", "random_flip", "seed"),
)

# Seconds between attempts: a hiccup, a restart, a short outage.
RETRY_DELAYS = (2.0, 10.0, 30.0, 60.0)


class PublishError(RuntimeError):
    """Something that cannot be published; the message says what, why, and what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# What is published


@dataclass(frozen=True)
class Release:
    """Files by their path in the repository, and what the card can say beside them.

    Attributes:
        files: the pipeline folder's, and samples.png if there is a grid; README.md is what the folder holds.
        run: the run's config.json, or empty.
        nimg: training images behind the weights, if known.
        metrics: one mapping per result, as `read_metrics` gives them.
        license: an SPDX or Hub identifier, or None.
    """

    files: dict[str, Path]
    run: Mapping[str, Any] = field(default_factory=dict)
    nimg: int | None = None
    metrics: Sequence[Mapping[str, Any]] = ()
    license: str | None = None


def find_run(folder: Path) -> tuple[Path, Path | None]:
    """The pipeline folder, and the run folder it belongs to or None; `folder` is either.

    Raises:
        PublishError: it is neither.
    """
    if (folder / "model_index.json").is_file():
        run = folder.absolute().parent
        return folder, run if folder.absolute().name == "pipeline" and _is_run(run) else None
    if _is_run(folder):
        return folder / "pipeline", folder
    raise PublishError(
        f"{folder} is neither a pipeline folder, which has a model_index.json, nor a run folder of train_edm2.py, "
        "which has a config.json; name one of them."
    )


def collect(
    folder: Path,
    run: Path | None = None,
    *,
    variant: str | None = None,
    sample_grid: Path | None = None,
    metrics: Path | None = None,
    license: str | None = None,
    nimg: int | None = None,
) -> Release:
    """What publishing the pipeline in `folder` means, after checking all of it.

    Args:
        run: the run folder it comes from, for the recipe, the newest grid and a metrics.json.
        variant: publish the weights of this variant ("fp16") only; default: all that are there.
        sample_grid, metrics: files to use instead of the run's, or the folder's own samples.png and metrics.json.
        nimg: images seen; default: as the run's newest snapshot says.

    Raises:
        PublishError: it holds pickles or paths of this machine, or parts are missing, damaged or incomplete; all
            problems are named.
    """
    files = check_folder(folder, variant)
    places = [folder] if run is None else [folder, run]
    if metrics is None:
        metrics = next((place / "metrics.json" for place in places if (place / "metrics.json").is_file()), None)
    if sample_grid is None and run is not None and "samples.png" not in files:
        sample_grid = max((run / "samples").glob("[0-9]*.png"), default=None, key=lambda path: int(path.stem))
    if sample_grid is not None:
        if not sample_grid.is_file():
            raise PublishError(f"--sample_grid {sample_grid} does not exist; name a PNG file, or leave it out.")
        files["samples.png"] = sample_grid
    if nimg is None and run is not None:
        snapshots = [re.match(r"unet-(\d+)-", path.name) for path in (run / "snapshots").glob("unet-*")]
        nimg = max((int(found[1]) for found in snapshots if found), default=None)
    config = {} if run is None else _read_json(run / "config.json")
    return Release(files, config, nimg, read_metrics(metrics) if metrics else (), license)


def check_folder(folder: Path, variant: str | None = None) -> dict[str, Path]:
    """All files of a pipeline folder by their path in it, without hidden ones and without weights of other variants.

    Raises:
        PublishError: names every pickle, every path of this machine, and what is missing, damaged or incomplete.
    """
    if not (folder / "model_index.json").is_file():
        raise PublishError(f"{folder} has no model_index.json, so it is no whole pipeline; save it again.")
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if not path.is_dir()}
    files = {name: path for name, path in paths.items() if not re.search(r"(^|/)(\.|__pycache__/)", name)}
    problems = [f"{name} {problem}" for name, path in files.items() if (problem := _code_problem(path))]
    files = {name: path for name, path in files.items() if variant is None or _variant(name) in ("", variant)}
    index = _read_json(folder / "model_index.json")
    for name in ("_class_name", "unet", "scheduler"):
        if not (index.get(name) or [None])[0]:
            problems.append(f"model_index.json names no {name}, so the pipeline is not whole; save it again")
    for name, entry in index.items():
        if name == "_class_name" and isinstance(entry, str):
            problems.append(f"model_index.json names {entry}, whose code is not there; save it again as EDM2Pipeline")
        elif name == "_class_name":
            problems += [] if f"{entry[0]}.py" in files else [f"{entry[0]}.py is missing"]
        elif isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str):
            problems += _component_problems(name, entry[0], files, variant)
    problems += [f"{name} {problem}" for name, path in files.items() if (problem := _file_problem(path))]
    if problems:
        raise PublishError(f"{folder} cannot be published:\n  " + "\n  ".join(problems))
    return files


def _component_problems(name: str, library: str, files: Mapping[str, Path], variant: str | None) -> list[str]:
    problems = []
    if library not in LIBRARIES and f"{name}/{library}.py" not in files:
        problems.append(f"{name}/{library}.py is missing, the code of this component")
    own = {path.removeprefix(f"{name}/") for path in files if path.startswith(f"{name}/")}
    if "config.json" in own:
        weights = {path: found for path in own if (found := WEIGHTS.fullmatch(path))}
        if not weights:
            problems.append(f"{name}/ has no weights" + (f" of variant {variant}" if variant else ""))
        for path, found in weights.items():
            shards = int(found["shards"] or 1)
            stem = re.sub(r"\d{5}-of", "{:05d}-of", path, count=1)
            problems += [f"{name}/{n} is missing" for i in range(shards) if (n := stem.format(i + 1)) not in own]
    elif not any(path.endswith("_config.json") for path in own):
        problems.append(f"{name}/ has no configuration, or is missing")
    return sorted(set(problems))


def _code_problem(path: Path) -> str | None:
    """A pickle by its name or, as anything can be called anything, by its first bytes or what its archive holds."""
    suffix = Path(path.stem if path.suffix.lower() in COMPRESSED else path.name).suffix.lower()
    if suffix in PICKLES or (path.is_file() and path.suffix != ".safetensors" and _is_pickle(path)):
        return "is a pickle, which runs code when it is loaded"
    return "may hold a pickle, which runs code when it is loaded" if suffix in MAY_HOLD_CODE else None


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        if re.fullmatch(rb"\x80[\x02-\x05]", file.read(2)):
            return True
    try:
        with zipfile.ZipFile(path) as archive:  # the form that torch.save writes has a data.pkl
            return any(name.lower().endswith(tuple(PICKLES)) for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def _file_problem(path: Path) -> str | None:
    if not path.is_file():
        return "is a link that leads nowhere"
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                return None
        except (SafetensorError, OSError) as error:
            return f"is damaged or incomplete ({error})"
    if path.suffix == ".json":
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            return f"is not JSON ({error})"
        name = content.get("_name_or_path") if isinstance(content, dict) else None
        if name and not (isinstance(name, str) and HUB_NAME.fullmatch(name)):
            return f"names {name}, a path of the machine it was saved on; take its _name_or_path out"
    return None


def _variant(name: str) -> str | None:
    """Of a weights file or its index: its variant, None for the plain one. Of any other file: the empty string."""
    found = WEIGHTS.fullmatch(name.rpartition("/")[2]) or INDEX.fullmatch(name.rpartition("/")[2])
    return found["variant"] if found else ""


def _is_run(folder: Path) -> bool:
    return (folder / "config.json").is_file() and "options" in _read_json(folder / "config.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PublishError(f"{path} cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise PublishError(f"{path} is not a JSON object.")
    return content


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Results from a JSON list like [{"metric": "FID", "value": 2.56, "dataset": "ImageNet", "images": 50000}].

    "metric" and "value" are needed; "dataset" says what was compared with; all else are settings of the measurement.

    Raises:
        PublishError: it cannot be read, or a result lacks its name or a number.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PublishError(f"{path} cannot be read: {error}.") from error
    results = [results] if isinstance(results, dict) else results
    for result in results if isinstance(results, list) else [results]:
        value = result.get("value") if isinstance(result, dict) else None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not result.get("metric"):
            raise PublishError(
                f'{path}: {json.dumps(result)} is not a result; write {{"metric": "FID", "value": 2.56, '
                '"dataset": "ImageNet"}, and a list of such for several.'
            )
    return results


# ---------------------------------------------------------------------------------------------------------------------
# The model card


def model_card(release: Release, repo: str, existing: str | None = None) -> str:
    """README.md for the Hub.

    Everything outside our two marks is kept as it is, and so is every field of the metadata, but for a licence that was
    asked for and for results that were measured again.

    Args:
        existing: the card that is on the Hub; default: the folder's.

    Raises:
        PublishError: the metadata of an existing card cannot be read.
    """
    own_text = release.files["README.md"].read_text(encoding="utf-8") if "README.md" in release.files else ""
    own_metadata, _ = _split(own_text)
    metadata, body = _split(existing if existing is not None else own_text)
    if not body.strip() or body.partition(CARD_BEGIN)[0].strip() == f"# {CARD_TITLE}":
        body = f"\n# {repo.rpartition('/')[2]}\n\n{CARD_BEGIN}{CARD_END}\n"

    present = _fields(metadata)
    fields = _fields(card_metadata()) | _fields(own_metadata)
    if dataset := _hub_dataset(release):
        fields.setdefault("datasets", [dataset])
    fields = {name: value for name, value in fields.items() if name not in present}
    if release.license:
        fields["license"] = release.license
    if release.metrics:
        fields["model-index"] = _model_index(release, repo, metadata)
    for name, value in fields.items():
        metadata = _without_field(metadata, name) + yaml_dump({name: value})

    sections = _sections(release, repo, own_text, license=_fields(metadata).get("license"))
    before, begin, rest = body.partition(CARD_BEGIN)
    after = rest.partition(CARD_END)[2] if begin else ""
    before = before if begin else f"{body.rstrip()}\n\n"
    return f"---\n{metadata}---\n{before}{generated_part(sections)}{after or chr(10)}"


def _split(card: str) -> tuple[str, str]:
    """The YAML lines at the top, and the rest."""
    found = re.match(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?(?:\n|\Z)(.*)", card, flags=re.DOTALL | re.MULTILINE)
    return (found[1], found[2]) if found else ("", f"\n{card}" if card.strip() else "")


def _fields(metadata: str) -> dict[str, Any]:
    try:
        return ModelCard(f"---\n{metadata}\n---\n", ignore_metadata_errors=True).data.to_dict() if metadata else {}
    except Exception as error:  # of the YAML library, whichever it is
        raise PublishError(f"the metadata at the top of README.md is not YAML; mend it: {error}") from error


def _without_field(metadata: str, name: str) -> str:
    """Less one top-level field and the indented or listed lines below it; comments and order of the others stay."""
    metadata = metadata if not metadata or metadata.endswith("\n") else f"{metadata}\n"
    return re.sub(rf"^{re.escape(name)}:.*\n(?:(?:[ \t]+.*|-.*|)\n)*", "", metadata, flags=re.MULTILINE)


def _model_index(release: Release, repo: str, metadata: str) -> list[dict[str, Any]]:
    """The Hub's form of the results, together with those that the card has of other measurements."""
    results = []
    for metric in release.metrics:
        settings = {key: value for key, value in metric.items() if key not in ("metric", "value", "dataset")}
        dataset = str(metric.get("dataset") or _training_data(release) or "unknown")
        kind = re.sub(r"[^a-z0-9]+", "_", str(metric["metric"]).lower()).strip("_")
        results.append(
            EvalResult(
                task_type=TASK,
                dataset_type=re.sub(r"[^\w./-]+", "-", dataset).lower(),
                dataset_name=dataset,
                metric_type=kind,
                metric_name=str(metric["metric"]),
                metric_value=metric["value"],
                metric_args=settings or None,
            )
        )
    before: Any = ModelCard(f"---\n{metadata}\n---\n", ignore_metadata_errors=True).data
    kept = [r for r in before.eval_results or [] if not any(r.is_equal_except_value(new) for new in results)]
    name = before.model_name or repo.rpartition("/")[2]
    return ModelCardData(model_name=name, eval_results=kept + results).to_dict()["model-index"]


def _sections(release: Release, repo: str, own_text: str, license: str | None) -> dict[str, str]:
    index, network = _read_json(release.files["model_index.json"]), _read_json(release.files["unet/config.json"])
    # Whoever saved the folder may have known a better scale for its two networks.
    scale = re.search(r"\bguidance_scale=(\d+(?:\.\d+)?)", own_text.partition(CARD_BEGIN)[2])
    settings = {"guidance_scale": float(scale[1])} if scale else {}
    sections = card_sections(index, network, repo, variant=needed_variant(release.files), **settings)
    limits, citation = sections.pop("Limits"), sections.pop("Citation")
    if "samples.png" in release.files:
        sections[""] += "\n\n![samples](samples.png)"
    sections["Recipe"] = _recipe(release)
    if release.metrics:
        sections["Results"] = _table(
            ("metric", "value", "compared with", "settings"),
            ((m["metric"], m["value"], m.get("dataset", ""), _settings(m)) for m in release.metrics),
        )
    sections["Training data"] = _training_data(release) or "Not stated."
    code = "The `.py` files are Apache-2.0, as the package they come from."
    sections["Licence"] = f"{f'The weights: {license}.' if license else 'None was stated for the weights.'} {code}"
    return sections | {"Limits": limits, "Citation": citation}


def _recipe(release: Release) -> str:
    """What was trained and how, as a table; without a run, the network alone."""
    options, versions = release.run.get("options", {}), release.run.get("versions", {})
    number = _parameters(release)
    rows = [("parameters", f"{number / 1e6:.1f} M" if number > 1e6 else f"{number}")]
    if not options:
        network = _read_json(release.files["unet/config.json"])
        rows += [(name, _show(value)) for name, value in network.items() if name[0] != "_" and value is not None]
    if release.nimg is not None:
        rows.append(("training images seen by these weights", f"{release.nimg}"))
    if options.get("ema_sigma_rel"):
        rows.append(("their EMA length (sigma_rel)", _show(options["ema_sigma_rel"][0])))
    rows += [(name, _show(options[name])) for name in RECIPE if options.get(name) is not None]
    rows += [(name, str(value)) for name, value in versions.items()]
    source = "As trained with `training/train_edm2.py` of `diffusers-edm2`, whose `--help` explains each option:"
    return f"{source if options else 'The network:'}\n\n{_table(('option', 'value'), rows)}"


def _parameters(release: Release) -> int:
    """Of the main network; a variant holds the same once more."""
    files = {n: p for n, p in release.files.items() if n.startswith("unet/") and p.suffix == ".safetensors"}
    first = min((_variant(name) or "" for name in files), default="")
    total = 0
    for name, path in files.items():
        if (_variant(name) or "") == first:
            with safe_open(path, framework="pt") as file:
                shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118, it is no mapping
            total += sum(_product(shape) for shape in shapes)
    return total


def _product(numbers: Iterable[int]) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result


def _training_data(release: Release) -> str | None:
    """Its name, without the path on this machine."""
    options = release.run.get("options", {})
    name = options.get("dataset_name") or options.get("train_data_dir")
    return name and (name if _hub_dataset(release) else Path(name).name)


def _hub_dataset(release: Release) -> str | None:
    """None where the run does not say that it came from the Hub: "prepared/digits" may have been a folder."""
    name = release.run.get("options", {}).get("dataset_name") or ""
    is_local = release.run.get("dataset_is_local", True)
    return name if not is_local and "/" in name and HUB_NAME.fullmatch(name) else None


def _settings(metric: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {_show(v)}" for k, v in metric.items() if k not in ("metric", "value", "dataset"))


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _show(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


# ---------------------------------------------------------------------------------------------------------------------
# The Hub


def open_repo(repo: str, token: str | None = None, private: bool | None = None, timeout: float = 30) -> str:
    """Create `repo` if it is not there, after checking that the token may write to it. Returns its full id.

    Args:
        repo: "name", in the token's own namespace, or "namespace/name".
        token: default: the environment's HF_TOKEN, or the one of `hf auth login`.
        timeout: seconds; a Hub that does not answer must not keep a training from starting.

    Raises:
        PublishError: no token, a bad one, or one without the permission.
        ConnectionError: the Hub cannot be reached, or has troubles of its own.
    """
    result: list[Any] = []

    def ask() -> None:
        try:
            result.append(_open_repo(HfApi(token=token), repo, private))
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    answer = result[0] if result else ConnectionError(f"the Hub does not answer within {timeout:.0f} s.")
    if isinstance(answer, Exception):
        raise answer
    return answer


def _open_repo(api: HfApi, repo: str, private: bool | None) -> str:
    with _explained(repo):
        return _create(api, repo, private)


def _create(api: HfApi, repo: str, private: bool | None) -> str:
    user = api.whoami()
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise PublishError(f"the token of {user['name']} can only read; make one that can write: {_TOKENS}.")
    repo = repo if "/" in repo else f"{user['name']}/{repo}"
    spaces = [user["name"], *(organisation["name"] for organisation in user.get("orgs", []))]
    if role == "write" and repo.partition("/")[0] not in spaces:  # finer tokens do not say all that they may
        raise PublishError(
            f"the token of {user['name']} cannot write to {repo}: it is not among {', '.join(spaces)}; name a "
            "repository there, or use another token."
        )
    return api.create_repo(repo, private=private, exist_ok=True).repo_id


def push(
    release: Release,
    repo: str,
    *,
    token: str | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    message: str = "Upload EDM2Pipeline",
    replace_card: bool = False,
) -> str:
    """Commit a release to a repository that is there; the card that it has is kept and completed. Returns the address.

    Args:
        create_pr: propose the commit as a pull request, which needs no permission to write.
        revision: a branch, made if it is not there; default main.
        replace_card: take the folder's README.md in place of the Hub's.

    Raises:
        PublishError: the Hub refuses it, or the existing card cannot be read.
        ConnectionError: the Hub cannot be reached, or has troubles of its own.
    """
    with _explained(repo):
        return _push(HfApi(token=token), release, repo, create_pr, revision, message, replace_card)


def _push(
    api: HfApi, release: Release, repo: str, create_pr: bool, revision: str | None, message: str, replace_card: bool
) -> str:
    if revision is not None and not create_pr:
        api.create_branch(repo, branch=revision, exist_ok=True)
    existing = None
    if not replace_card and api.file_exists(repo, "README.md", revision=revision):
        with TemporaryDirectory() as cache:  # of its own: a card may be newer than what the common one holds
            path = api.hf_hub_download(repo, "README.md", revision=revision, cache_dir=cache)
            existing = Path(path).read_text(encoding="utf-8")
    card = model_card(release, repo, existing)
    operations = [CommitOperationAdd(name, str(path)) for name, path in release.files.items() if name != "README.md"]
    operations.append(CommitOperationAdd("README.md", card.encode()))
    commit = api.create_commit(repo, operations, commit_message=message, create_pr=create_pr, revision=revision)
    return commit.pr_url or commit.commit_url


# Of the HTTP library (httpx or httpx2), of the system, and names that cannot be.
_TROUBLES: Any = (*HfHubHTTPError.__bases__, HFValidationError)
_TOKENS = "https://huggingface.co/settings/tokens"


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turn what the Hub or the way to it raises into one sentence: PublishError, or ConnectionError, which may pass."""
    try:
        yield
    except _TROUBLES as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if isinstance(error, LocalTokenNotFoundError):
            text = f"there is no token for the Hub; set HF_TOKEN, or log in with `hf auth login`: {_TOKENS}."
        elif status == 401:
            text = f"the Hub refuses the token (401); set another HF_TOKEN, or log in with `hf auth login`: {_TOKENS}."
        elif status == 403:
            text = f"the token may not write to {repo} (403); use one that may, or another repository."
        elif status == 404:
            text = f"{repo} does not exist, or this token may not see it (404)."
        refused = status is not None and status < 500 and status not in (408, 409, 412, 429)
        permanent = refused or isinstance(error, (LocalTokenNotFoundError, HFValidationError))
        raise (PublishError if permanent else ConnectionError)(text) from error


# ---------------------------------------------------------------------------------------------------------------------
# In the background of a training


class BackgroundUploads:
    """Pushes a run's newest pipeline from a thread of its own, so that neither the training nor its end hangs on it.

    What is pushed is a copy (hard links where the disk has them), because the next snapshot replaces the folder.
    While one is on its way, only the newest of the others waits.

    Args:
        run_dir: the run folder; the copies are made there.
        repo: full id, as `open_repo` gives it; not opened yet if `is_open` is False.
        report: gets a sentence for each pipeline that was pushed, or that could not be.
    """

    def __init__(
        self,
        run_dir: Path,
        repo: str,
        *,
        token: str | None = None,
        private: bool | None = None,
        is_open: bool = True,
        report: Callable[[str], Any] = print,
        delays: Sequence[float] = RETRY_DELAYS,
    ):
        self.run_dir, self.repo, self.token, self.private = run_dir, repo, token, private
        self.is_open, self.report, self.delays = is_open, report, delays
        self.waiting: tuple[int, Path] | None = None
        self.newest: int | None = None  # images behind the last one that was asked for
        self.pushed: int | None = None
        self.closing = False
        self.changed = threading.Condition()
        disable_progress_bars()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def submit(self, nimg: int) -> None:
        """Have the pipeline, as it is now, after `nimg` images, pushed some time later."""
        self.newest = nimg
        copy = self.run_dir / f".tmp-{os.getpid()}-upload-{nimg:09d}"  # a name that the run folder's cleaning knows
        try:
            shutil.copytree(self.run_dir / "pipeline", copy, copy_function=_link)
            grids = sorted((self.run_dir / "samples").glob("[0-9]*.png"), key=lambda path: int(path.stem))
            if grids:
                _link(grids[-1], copy / "samples.png")
        except OSError as error:
            shutil.rmtree(copy, ignore_errors=True)
            self.report(f"The pipeline after {nimg} images was not copied for the Hub: {error}.")
            return
        with self.changed:
            superseded, self.waiting = self.waiting, (nimg, copy)
            self.changed.notify_all()
        if superseded:
            shutil.rmtree(superseded[1], ignore_errors=True)

    def finish(
        self, timeout: float = 900, interrupted: Callable[[], Any] = lambda: False, grace: float = 5
    ) -> str | None:
        """Wait for what is on its way, and say what is still to be pushed and how, or None.

        Args:
            timeout: seconds.
            interrupted: asked meanwhile; once it is true, only `grace` seconds are left.
        """
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        start, told, ending = time.monotonic(), False, False
        end = start + timeout
        while self.thread.is_alive() and (now := time.monotonic()) < end:
            if not ending and interrupted():
                ending, end = True, min(end, now + grace)
            if not told and not ending and now - start > 1:
                told = True
                self.report(
                    f"Waiting for the Hub, {timeout / 60:.0f} minutes at most; Ctrl-C ends it, nothing is lost."
                )
            self.thread.join(max(0.0, min(0.2, end - now)))
        if self.newest == self.pushed:
            return None
        words = ["python", "pipelines/publish.py", str(self.run_dir), self.repo, *["--private"] * bool(self.private)]
        return f"The pipeline after {self.newest} images is not on the Hub yet. Push it with: {shlex.join(words)}"

    def _work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.closing)
                if self.waiting is None:
                    return
                (nimg, copy), self.waiting = self.waiting, None
            try:
                self._push(nimg, copy)
            finally:
                shutil.rmtree(copy, ignore_errors=True)

    def _push(self, nimg: int, copy: Path) -> None:
        """Several attempts, until it is there, cannot be, or a newer one waits."""
        for delay in (*self.delays, None):
            try:
                if not self.is_open:
                    self.repo, self.is_open = _open_repo(HfApi(token=self.token), self.repo, self.private), True
                release = replace(collect(copy), run=_read_json(self.run_dir / "config.json"), nimg=nimg)
                address = push(release, self.repo, token=self.token, message=f"EDM2Pipeline after {nimg} images")
            except Exception as error:  # whatever it is, the training goes on
                if delay is None or isinstance(error, PublishError):
                    return self.report(f"The pipeline after {nimg} images was not pushed to {self.repo}: {error}")
                with self.changed:
                    if self.changed.wait_for(lambda: self.waiting, delay):
                        return None
            else:
                self.pushed = nimg
                return self.report(f"Pushed the pipeline after {nimg} images: {address}")
        return None


def _link(source: Path | str, target: Path | str) -> None:
    """Another name for the same file, which outlives the first; a copy where the disk has no such names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
