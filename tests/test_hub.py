"""What is published and what is refused, the model card, and uploads that troubles of the Hub cannot hurt."""

import gzip
import json
import pickle
import re
import shlex
import shutil
import threading
import time
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from diffusers_edm2 import EDM2HeunScheduler, EDM2Pipeline
from diffusers_edm2.hub import (
    BackgroundUploads,
    PublishError,
    Release,
    check_folder,
    collect,
    find_run,
    model_card,
    open_repo,
    push,
    read_metrics,
)
from diffusers_edm2.pipeline_edm2 import card_sections, generated_part
from model_hub import READ_TOKEN, TOKEN, ModelHub, model_hub
from test_unet_edm2 import active_unet

OPTIONS = {"dataset_name": "digits", "train_data_dir": None, "resolution": 16, "duration": 4096, "learning_rate": 0.01}
OPTIONS |= {"block_out_channels": [8, 16], "ema_sigma_rel": [0.05, 0.1], "output_dir": "/home/me/secret place"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run folder with a pipeline, snapshots and grids."""
    run = tmp_path_factory.mktemp("saved") / "run"
    guide = active_unet(seed=4, num_class_embeds=None)
    EDM2Pipeline(active_unet(), EDM2HeunScheduler(), guide).save_pretrained(run / "pipeline")
    for name in ("unet-000002048-0.050", "unet-000004096-0.050"):
        (run / "snapshots" / name).mkdir(parents=True)
    (run / "samples").mkdir()
    for nimg in (512, 4096):
        (run / "samples" / f"{nimg:09d}.png").write_bytes(b"grid of %d" % nimg)
    (run / "config.json").write_text(json.dumps({"options": OPTIONS, "versions": {"torch": "2.11.0"}}))
    return run


@pytest.fixture
def run(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


@pytest.fixture
def hub(monkeypatch):
    with model_hub() as hub:
        template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


# --- What is published -----------------------------------------------------------------------------------------------


def test_a_run_folder_and_its_pipeline_are_the_same_thing(run, saved, tmp_path):
    assert find_run(run) == (run / "pipeline", run) == find_run(run / "pipeline")
    alone = Path(shutil.copytree(saved / "pipeline", tmp_path / "elsewhere" / "pipeline"))
    assert find_run(alone) == (alone, None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        PublishError, match="empty is neither a pipeline folder, .* nor a run folder .*; name one of them"
    ):
        find_run(tmp_path / "empty")


def test_everything_is_collected(run):
    (run / "pipeline" / ".cache").mkdir()
    (run / "pipeline" / ".cache" / "secret.txt").write_text("mine")
    (run / "pipeline" / "notes.txt").write_text("ours")
    release = collect(run / "pipeline", run)
    own = {path.relative_to(run / "pipeline").as_posix() for path in (run / "pipeline").rglob("*") if path.is_file()}
    assert release.files.keys() == own - {".cache/secret.txt"} | {"samples.png"}
    assert {"pipeline_edm2.py", "unet/unet_edm2.py", "guide_unet/unet_edm2.py", "notes.txt"} < release.files.keys()
    assert release.files["samples.png"] == run / "samples" / "000004096.png"
    assert release.nimg == 4096 and release.run["options"] == OPTIONS
    assert collect(run / "pipeline").files.keys() == own - {".cache/secret.txt"}


def test_one_variant_can_be_published(run):
    pipe = EDM2Pipeline.from_pretrained(run / "pipeline")
    pipe.save_pretrained(run / "pipeline", variant="fp16")
    both, half = (check_folder(run / "pipeline", variant) for variant in (None, "fp16"))
    plain = {f"{name}/diffusion_pytorch_model.safetensors" for name in ("unet", "guide_unet")}
    assert both.keys() - half.keys() == plain
    assert {name.replace(".safetensors", ".fp16.safetensors") for name in plain} < half.keys()
    for pipeline, variant in ((both, None), (half, "fp16")):  # none is named where none is needed
        card = model_card(Release(pipeline), "somebody/digits")
        asked = re.findall(r'from_pretrained\("somebody/digits"(?:, variant="(\w+)")?[,)]', card)
        assert asked == [variant or ""] * 2
    with pytest.raises(PublishError, match=r"guide_unet/ has no weights of variant bf16\n  unet/ has no weights of"):
        check_folder(run / "pipeline", "bf16")


def test_a_folder_without_plain_weights_says_how_it_is_loaded(tmp_path):
    EDM2Pipeline(active_unet(), EDM2HeunScheduler()).save_pretrained(tmp_path, variant="fp16")
    own = (tmp_path / "README.md").read_text(encoding="utf-8")
    published = model_card(collect(tmp_path), "x/y")
    for card, source in ((own, "path/to/this/folder"), (published, "x/y")):
        assert f'from_pretrained("{source}", variant="fp16")' in card
        assert f'from_pretrained("{source}", variant="fp16", trust_remote_code=True)' in card


@pytest.mark.parametrize("scale", [2, 1.85])
def test_the_example_guides_as_the_folder_says(run, scale):
    index, network = (json.loads((run / "pipeline" / n).read_text()) for n in ("model_index.json", "unet/config.json"))
    sections = card_sections(index, network, "here", guidance_scale=scale)
    assert sections["Use"].count(f"guidance_scale={scale})") == 2
    (run / "pipeline" / "README.md").write_text(f"# Ours\n\n{generated_part(sections)}\n", encoding="utf-8")
    assert model_card(release_of(run), "x/y").count(f"guidance_scale={float(scale)})") == 2


PICKLED = pickle.dumps({"weights": [1.0]}, protocol=4)


@pytest.mark.parametrize("name", ["a.dat", "weights", "unet/b.safetensors.old", "samples.png", "C.SAFETENSORS"])
@pytest.mark.parametrize("form", ["plain", "zip"])
def test_a_pickle_is_known_by_what_it_holds(run, name, form):
    path = run / "pipeline" / name
    if form == "plain":
        path.write_bytes(PICKLED)
    else:  # as torch.save writes it
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("weights/data.pkl", PICKLED)
    with pytest.raises(PublishError) as refused:
        check_folder(run / "pipeline")
    assert str(refused.value).splitlines()[1:] == [f"  {name} is a pickle, which runs code when it is loaded"]


@pytest.mark.parametrize("name", ["a.pt2", "b.h5", "c.npy", "unet/d.NPZ"])
def test_formats_that_may_hold_pickles_are_refused(run, name):
    (run / "pipeline" / name).write_bytes(b"")
    with pytest.raises(PublishError, match=f"{name} may hold a pickle, which runs code when it is loaded"):
        check_folder(run / "pipeline")


def test_a_compressed_pickle_is_one_and_other_files_are_none(run):
    (run / "pipeline" / "old.pkl.gz").write_bytes(gzip.compress(PICKLED))
    with pytest.raises(PublishError, match="old.pkl.gz is a pickle"):
        check_folder(run / "pipeline")
    (run / "pipeline" / "old.pkl.gz").unlink()
    with zipfile.ZipFile(run / "pipeline" / "pictures.zip", "w") as archive:
        archive.writestr("0.png", b"picture")
    (run / "pipeline" / "empty.txt").write_bytes(b"")
    assert {"pictures.zip", "empty.txt"} < check_folder(run / "pipeline").keys()


@pytest.mark.parametrize("path", ["/home/me/secret", "../vae", "~/vae", "C:\\me\\vae", "runs/digits/vae"])
def test_paths_of_this_machine_are_refused(run, path):
    """Our own saving leaves them out; other programs' does not."""
    config = run / "pipeline" / "unet" / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"_name_or_path": path}))
    message = f"unet/config.json names {path}, a path of the machine it was saved on; take its _name_or_path out"
    with pytest.raises(PublishError, match=re.escape(message)):
        check_folder(run / "pipeline")
    config.write_text(json.dumps(content | {"_name_or_path": "stabilityai/sd-vae-ft-mse"}))
    assert check_folder(run / "pipeline")


def damage(pipeline: Path, how: str) -> None:
    weights = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    if how == "pickles":
        (pipeline / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"")
        (pipeline / "old.PKL").write_bytes(b"")
    elif how == "half a file":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif how == "no code":
        (pipeline / "pipeline_edm2.py").unlink()
        (pipeline / "guide_unet" / "unet_edm2.py").unlink()
    elif how == "no name of a file":
        index = json.loads((pipeline / "model_index.json").read_text())
        (pipeline / "model_index.json").write_text(json.dumps(index | {"_class_name": "EDM2Pipeline"}))
    elif how in ("no network named", "a null for a scheduler"):
        index = json.loads((pipeline / "model_index.json").read_text())
        index |= {"scheduler": [None, None]} if "null" in how else {}
        (pipeline / "model_index.json").write_text(
            json.dumps({k: v for k, v in index.items() if "null" in how or k != "unet"})
        )
    elif how == "no weights":
        weights.unlink()
    elif how == "no component":
        shutil.rmtree(pipeline / "scheduler")
    elif how == "no index":
        (pipeline / "model_index.json").unlink()
    elif how == "one shard of two":
        weights.rename(weights.with_name("diffusion_pytorch_model-00002-of-00002.safetensors"))
    elif how == "broken configuration":
        (pipeline / "unet" / "config.json").write_text("{")
    elif how == "broken link":
        (pipeline / "extra.txt").symlink_to("nowhere")


@pytest.mark.parametrize(
    "how, messages",
    [
        (
            "pickles",
            ["unet/diffusion_pytorch_model.bin is a pickle, which runs code when it is loaded", "old.PKL is a"],
        ),
        ("half a file", ["unet/diffusion_pytorch_model.safetensors is damaged or incomplete ("]),
        ("no code", ["pipeline_edm2.py is missing", "guide_unet/unet_edm2.py is missing, the code of this component"]),
        ("no name of a file", ["names EDM2Pipeline, whose code is not there; save it again as EDM2Pipeline"]),
        ("no network named", ["model_index.json names no unet, so the pipeline is not whole; save it again"]),
        ("a null for a scheduler", ["model_index.json names no scheduler, so the pipeline is not whole"]),
        ("no weights", ["unet/ has no weights"]),
        (
            "no component",
            ["scheduler/ has no configuration, or is missing", "scheduler/scheduling_edm2_heun.py is miss"],
        ),
        ("no index", ["has no model_index.json, so it is no whole pipeline"]),
        ("one shard of two", ["unet/diffusion_pytorch_model-00001-of-00002.safetensors is missing"]),
        ("broken configuration", ["unet/config.json is not JSON ("]),
        ("broken link", ["extra.txt is a link that leads nowhere"]),
    ],
)
def test_what_is_not_whole_is_refused(run, how, messages):
    damage(run / "pipeline", how)
    with pytest.raises(PublishError) as refused:
        collect(run / "pipeline", run)
    problems = str(refused.value).splitlines()
    assert len(problems) <= 1 + len(messages)  # what is meant, and nothing else
    for message in messages:
        assert message in str(refused.value)


def test_pickles_are_not_written_either(tmp_path):
    with pytest.raises(ValueError, match="safe_serialization=False would write pickles, which run code"):
        EDM2Pipeline(active_unet(), EDM2HeunScheduler()).save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text, message",
    [
        ("[1]", r"metrics.json: 1 is not a result; write \{"),
        ('[{"metric": "FID"}]', "is not a result"),
        ('[{"metric": "FID", "value": "2.5"}]', "is not a result"),
        ("[", "metrics.json cannot be read"),
    ],
)
def test_results_that_are_none_are_refused(tmp_path, text, message):
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(PublishError, match=message):
        read_metrics(tmp_path / "metrics.json")


# --- The model card --------------------------------------------------------------------------------------------------

RESULTS = [
    {"metric": "FID", "value": 2.56, "dataset": "ImageNet", "images": 50000},
    {"metric": "FD-DINOv2", "value": 68.64, "dataset": "ImageNet", "images": 50000},
]


def release_of(run_dir: Path, **kwargs) -> Release:
    release = collect(run_dir / "pipeline", run_dir)
    return Release(**{**vars(release), **kwargs})


def body(card: str) -> str:
    return card.split("\n---\n", 1)[1]


def test_a_card_says_what_is_known(run):
    card = model_card(release_of(run, metrics=RESULTS, license="apache-2.0"), "somebody/digits")
    data = ModelCard(card).data
    assert (data.library_name, data.license, data.tags) == ("diffusers", "apache-2.0", ["edm2"])
    assert data.pipeline_tag == "unconditional-image-generation"
    found = {result.metric_type: result for result in data.eval_results}
    assert found.keys() == {"fid", "fd_dinov2"} and data.model_name == "digits"
    assert (found["fid"].metric_value, found["fid"].dataset_name) == (2.56, "ImageNet")
    assert found["fid"].metric_args == {"images": 50000}
    headings = re.findall("^#+ (.*)$", body(card), flags=re.MULTILINE)
    sections = ["Use", "Recipe", "Results", "Training data", "Licence", "Limits", "Citation"]
    assert headings == ["digits", *sections]
    assert "RGB images of 16 × 16 pixels, in 10 classes, with a second network that guides it" in card
    assert "![samples](samples.png)" in card and "guidance_scale=1.5" in card
    for row in ("block_out_channels | 8, 16", "duration | 4096", "seen by these weights | 4096", "torch | 2.11.0"):
        assert f"{row} |" in card
    assert "| FID | 2.56 | ImageNet | images 50000 |" in card
    assert f"| parameters | {sum(p.numel() for p in active_unet().parameters())} |" in card
    assert "secret place" not in card and str(run) not in card  # paths are nobody's business


def test_a_card_without_a_run_describes_the_network(run):
    card = model_card(collect(run / "pipeline"), "somebody/digits")
    assert "| sample_size | 16 |" in card and "## Results" not in card
    assert "None was stated for the weights." in card and ModelCard(card).data.license is None
    assert "samples.png" not in card


def test_a_saved_folder_has_a_card_and_keeps_its_own(tmp_path):
    pipe = EDM2Pipeline(active_unet(), EDM2HeunScheduler())
    pipe.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert ModelCard(card).data.library_name == "diffusers"
    assert 'DiffusionPipeline.from_pretrained("path/to/this/folder", trust_remote_code=True)' in card
    (tmp_path / "README.md").write_text("mine")
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("dataset, is_hub", [("cifar10", False), ("a/b", True), ("a/b/c", False), ("/a/b", False)])
@pytest.mark.parametrize("known", [{"dataset_is_local": False}, {"dataset_is_local": True}, {}])
def test_training_data_are_named_as_far_as_others_can_find_them(run, dataset, is_hub, known):
    """A folder's path does not go along, nor is it taken for a data set of the Hub, in whatever folder we are now."""
    is_hub = is_hub and known == {"dataset_is_local": False}
    for options in ({"dataset_name": dataset}, {"train_data_dir": f"/home/me/{dataset}", "dataset_name": None}):
        card = model_card(release_of(run, run={"options": OPTIONS | options} | known), "x/y")
        is_named = is_hub and "train_data_dir" not in options
        assert f"## Training data\n\n{dataset if is_named else Path(dataset).name}\n" in card
        assert ModelCard(card).data.datasets == ([dataset] if is_named else None)


PERSON = """---
# a comment of mine
license: mit   # mine too
tags:
- cats
datasets: [me/cats]
model-index:
- name: cats
  results:
  - task: {type: unconditional-image-generation}
    dataset: {name: ImageNet, type: imagenet}
    metrics:
    - {type: fid, name: FID, value: 3.0, args: {images: 50000}}
    - {type: fid, name: FID, value: 4.0, args: {images: 1000}}
language: en
---
# My cats

Drawn by *me*.
"""


def test_what_a_person_wrote_stays(run):
    card = model_card(release_of(run), "somebody/digits", PERSON)
    metadata, text = card.split("\n---\n", 1)
    assert metadata.startswith(PERSON.split("\n---\n")[0])  # to the letter, with what was missing behind it
    assert ModelCard(card).data.library_name == "diffusers"
    assert text.startswith("# My cats\n\nDrawn by *me*.\n\n<!-- diffusers-edm2:begin -->")
    assert "The weights: mit." in card


def test_a_card_is_completed_once_and_its_marked_part_renewed(run):
    first = model_card(release_of(run), "somebody/digits", PERSON)
    assert model_card(release_of(run), "somebody/digits", first) == first
    edited = first.replace("# My cats", "# Our cats") + "\nWritten behind it.\n"
    later = model_card(release_of(run, nimg=8192), "somebody/digits", edited)
    assert later == edited.replace("these weights | 4096 |", "these weights | 8192 |") != edited


def test_results_replace_those_of_the_same_measurement(run):
    card = model_card(release_of(run, metrics=RESULTS, license="apache-2.0"), "somebody/digits", PERSON)
    data = ModelCard(card).data
    found = sorted((r.metric_type, r.metric_value, r.metric_args["images"]) for r in data.eval_results)
    assert found == [("fd_dinov2", 68.64, 50000), ("fid", 2.56, 50000), ("fid", 4.0, 1000)]
    assert (data.model_name, data.license, data.tags, data.language) == ("cats", "apache-2.0", ["cats"], "en")
    assert "# a comment of mine\n" in card


def test_the_folders_card_speaks_where_the_hub_has_none(run):
    (run / "pipeline" / "README.md").write_text("---\nlicense: cc-by-nc-sa-4.0\n---\n# Converted\n")
    card = model_card(release_of(run), "somebody/digits")
    assert body(card).startswith("# Converted\n\n<!--") and ModelCard(card).data.license == "cc-by-nc-sa-4.0"
    on_hub = model_card(release_of(run), "somebody/digits", "# On the Hub\n")
    assert body(on_hub).startswith("\n# On the Hub\n") and ModelCard(on_hub).data.license == "cc-by-nc-sa-4.0"


def test_metadata_that_cannot_be_read_are_not_overwritten(run):
    with pytest.raises(PublishError, match="the metadata at the top of README.md is not YAML; mend it"):
        model_card(release_of(run), "somebody/digits", "---\nlicense: [mit\n---\ntext\n")


# --- The Hub ---------------------------------------------------------------------------------------------------------


def test_push_makes_a_commit_of_everything(run, hub):
    repo = open_repo("digits", TOKEN, private=True)
    assert repo == "somebody/digits" and hub.private[repo]
    release = collect(run / "pipeline", run)
    address = push(release, repo, token=TOKEN, message="first")
    assert address.startswith(f"{hub.endpoint}/somebody/digits/commit/")
    (commit,) = hub.commits
    assert (commit["message"], commit["revision"]) == ("first", "main")
    on_hub = hub.files[repo]["main"]
    assert on_hub.keys() == release.files.keys()
    assert all(on_hub[name] == path.read_bytes() for name, path in release.files.items() if name != "README.md")
    assert on_hub["README.md"].decode() == model_card(release, repo)
    assert (run / "pipeline" / "README.md").read_text(encoding="utf-8") != on_hub["README.md"].decode()  # untouched


def test_push_to_a_branch_and_as_a_pull_request(run, hub):
    release = collect(run / "pipeline", run)
    hub.add("other/model", {"README.md": PERSON.encode()})
    address = push(release, "other/model", token=TOKEN, create_pr=True)
    assert address == f"{hub.endpoint}/other/model/discussions/1"
    assert hub.files["other/model"]["main"].keys() == {"README.md"}
    assert "# My cats" in hub.files["other/model"]["refs/pr/1"]["README.md"].decode()
    repo = open_repo("digits", TOKEN)
    push(release, repo, token=TOKEN, revision="trial")
    assert hub.files[repo]["main"] == {} and hub.files[repo]["trial"].keys() == release.files.keys()


def test_the_card_on_the_hub_is_kept_unless_asked(run, hub):
    hub.add("somebody/digits", {"README.md": PERSON.encode()})
    (run / "pipeline" / "README.md").write_text("# In the folder\n")
    release = collect(run / "pipeline", run)
    push(release, "somebody/digits", token=TOKEN)
    assert "# My cats" in hub.files["somebody/digits"]["main"]["README.md"].decode()
    push(release, "somebody/digits", token=TOKEN, replace_card=True)
    assert "# My cats" not in hub.files["somebody/digits"]["main"]["README.md"].decode()
    assert "# In the folder" in hub.files["somebody/digits"]["main"]["README.md"].decode()


@pytest.mark.parametrize(
    "repo, token, kind, message",
    [
        ("digits", "hf_wrong", PublishError, r"the Hub refuses the token \(401\); set another HF_TOKEN"),
        ("digits", READ_TOKEN, PublishError, "the token of somebody can only read; make one that can write"),
        ("other/digits", TOKEN, PublishError, "cannot write to other/digits: it is not among somebody; name a repos"),
        ("bad name!", TOKEN, PublishError, "HFValidationError: Repo id must "),
    ],
)
def test_a_wrong_token_or_name_shows_at_once(hub, repo, token, kind, message):
    with pytest.raises(kind, match=message):
        open_repo(repo, token)
    assert not hub.files


def test_no_token_is_explained(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(
        PublishError, match="there is no token for the Hub; set HF_TOKEN, or log in with `hf auth login`"
    ):
        open_repo("digits")


@pytest.mark.parametrize(
    "trouble, message", [(500, "500"), (503, "503"), (429, "429|rate limit"), ("hang", "does not answer wi")]
)
def test_troubles_of_the_hub_may_pass(hub, trouble, message):
    hub.trouble = lambda method, path: trouble
    with pytest.raises(ConnectionError, match=message):
        open_repo("digits", TOKEN, timeout=0.5)


@pytest.mark.parametrize("status, kind", [(403, PublishError), (404, PublishError), (500, ConnectionError)])
def test_a_commit_that_fails_changes_nothing(run, hub, status, kind):
    hub.add("somebody/digits", {})
    hub.trouble = lambda method, path: status if "/commit/" in path else None
    with pytest.raises(kind, match=str(status)):
        push(collect(run / "pipeline", run), "somebody/digits", token=TOKEN)
    assert hub.files["somebody/digits"]["main"] == {}


def test_a_card_that_cannot_be_fetched_is_not_overwritten(run, hub):
    """A network that fails between two requests must not look like a repository without a card."""
    hub.add("somebody/digits", {"README.md": PERSON.encode()})
    for method in ("HEAD", "GET"):
        hub.trouble = lambda m, path, method=method: 500 if m == method and "README" in path else None
        with pytest.raises(ConnectionError):
            push(collect(run / "pipeline", run), "somebody/digits", token=TOKEN)
    assert hub.files["somebody/digits"]["main"] == {"README.md": PERSON.encode()}


# --- In the background -----------------------------------------------------------------------------------------------


def uploads(run: Path, **kwargs) -> tuple[BackgroundUploads, list[str]]:
    said: list[str] = []
    options = {"token": TOKEN, "delays": (0.05, 0.05), "report": said.append} | kwargs
    return BackgroundUploads(run, "somebody/digits", **options), said


def test_an_upload_is_a_copy_of_its_moment(run, hub: ModelHub):
    """The next snapshot replaces the folder while this one is still on its way."""
    hub.add("somebody/digits", {})
    go_on = threading.Event()
    hub.trouble = lambda method, path: None if go_on.wait(60) else 500
    weights = run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    then = weights.read_bytes()
    background, said = uploads(run)
    background.submit(4096)
    shutil.rmtree(run / "pipeline")
    go_on.set()
    assert background.finish() is None
    on_hub = hub.files["somebody/digits"]["main"]
    assert on_hub["unet/diffusion_pytorch_model.safetensors"] == then and on_hub["samples.png"] == b"grid of 4096"
    assert "seen by these weights | 4096 |" in on_hub["README.md"].decode()
    assert said == [f"Pushed the pipeline after 4096 images: {hub.endpoint}/somebody/digits/commit/"
                    f"{hub.sha('somebody/digits', 'main')}"]  # fmt: skip
    assert not list(run.glob(".tmp-*"))


def test_only_the_newest_waits(run, hub: ModelHub):
    hub.add("somebody/digits", {})
    go_on, began = threading.Event(), threading.Event()

    def slow(method: str, path: str) -> None:
        began.set()
        assert go_on.wait(60)

    hub.trouble = slow
    background, _ = uploads(run)
    background.submit(1)
    assert began.wait(60)
    for nimg in (2, 3, 4):
        background.submit(nimg)
    assert len(list(run.glob(".tmp-*"))) == 2
    go_on.set()
    assert background.finish() is None
    assert [commit["message"] for commit in hub.commits] == [f"EDM2Pipeline after {n} images" for n in (1, 4)]
    assert not list(run.glob(".tmp-*"))


def test_troubles_that_pass_are_outlasted(run, hub: ModelHub):
    """Also a Hub that could not be reached when the training began."""
    answers = iter([500, 503])
    hub.trouble = lambda method, path: next(answers, None)
    background, said = uploads(run, is_open=False)
    background.submit(4096)
    assert background.finish() is None
    assert len(hub.commits) == 1 and said[0].startswith("Pushed the pipeline after 4096 images")
    assert next(answers, None) is None


def test_what_remains_is_said(run, hub: ModelHub):
    hub.trouble = lambda method, path: 500
    background, said = uploads(run, is_open=False, private=True)
    background.submit(4096)
    command = f"python pipelines/publish.py {run} somebody/digits --private"
    assert background.finish() == f"The pipeline after 4096 images is not on the Hub yet. Push it with: {command}"
    assert said[0].startswith("The pipeline after 4096 images was not pushed to somebody/digits: HfHubHTTPError: ")
    assert hub.requests.count("GET /api/whoami-v2") == 3
    assert not list(run.glob(".tmp-*"))


def test_a_refusal_is_not_repeated(run, hub: ModelHub):
    hub.add("somebody/digits", {})
    hub.trouble = lambda method, path: 403 if "/commit/" in path else None
    background, said = uploads(run)
    background.submit(4096)
    assert background.finish()
    assert len([request for request in hub.requests if "/commit/" in request]) == 1
    assert said[0].endswith(
        "the token may not write to somebody/digits (403); use one that may, or another repository."
    )


def test_the_command_that_is_said_can_be_pasted(saved, tmp_path, hub: ModelHub):
    spaced = Path(shutil.copytree(saved, tmp_path / "my run"))
    hub.trouble = lambda method, path: 500
    background, _ = uploads(spaced, is_open=False)
    background.submit(4096)
    command = background.finish().partition("Push it with: ")[2]
    assert shlex.split(command) == ["python", "pipelines/publish.py", str(spaced), "somebody/digits"]


def test_an_interrupted_wait_has_a_few_seconds_of_grace(run, hub: ModelHub):
    """An upload that is nearly there arrives; the waiting ends after that time if it does not."""
    hub.add("somebody/digits", {})
    asked, go_on = threading.Event(), threading.Event()
    hub.trouble = lambda method, path: asked.set() or None if go_on.wait(60) else 500
    background, _ = uploads(run)
    background.submit(4096)
    threading.Timer(0.5, go_on.set).start()
    assert background.finish(interrupted=lambda: True, grace=60) is None and asked.is_set()
    assert len(hub.commits) == 1
    hub.trouble = lambda method, path: "hang"
    background, _ = uploads(run, delays=())
    background.submit(4096)
    start = time.monotonic()
    assert background.finish(interrupted=lambda: True, grace=0.5) is not None
    assert 0.4 < time.monotonic() - start < 5
    hub.closing.set()
    background.thread.join()


@pytest.mark.parametrize("kwargs", [{"timeout": 0.3}, {"interrupted": lambda: True, "grace": 0}])
def test_a_hub_that_hangs_does_not_hold_the_run(run, hub: ModelHub, kwargs):
    hub.trouble = lambda method, path: "hang"
    background, _ = uploads(run, delays=())
    background.submit(4096)
    assert background.finish(**kwargs).startswith("The pipeline after 4096 images is not on the Hub yet.")
    hub.closing.set()
    background.thread.join()


def test_a_copy_that_fails_is_reported(run, hub: ModelHub):
    shutil.rmtree(run / "pipeline")
    background, said = uploads(run)
    background.submit(4096)
    assert background.finish() is not None
    assert said[0].startswith("The pipeline after 4096 images was not copied for the Hub: ")
    assert hub.requests == []
