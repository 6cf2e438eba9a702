"""--push_to_hub of train.py and of export, to a hub on this machine."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import huggingface_hub
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load

from sdpo.common.errors import UserError

from .harness import REPO, base_unet, files, free_port, identical, rank_environments, run_here
from .hub_server import TOKEN, HubServer
from .test_hub import ID, put

EXPORT = "sdpo/training/export.py"
ONE = {"max_train_steps": 1, "learning_rate": 1e-2, "push_to_hub": True}


@pytest.fixture
def hub(monkeypatch):
    """A hub that this process's client talks to."""
    server = HubServer()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.close()


def written(hub, repo, directory):
    """A repository's files, on disk."""
    for name, content in hub.files[repo].items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return directory


def test_a_run_is_uploaded_as_a_pipeline(train, hub, tmp_path):
    flags = {"hub_model_id": "a-lab/tuned", "hub_private_repo": True, "use_ema": True}
    run = train(tmp_path / "run", **ONE, **flags, validation_prompts="a square", validation_steps=1)
    # Older clients send "private", younger ones "visibility".
    assert hub.created[0].get("visibility") == "private" or hub.created[0]["private"]
    assert hub.commits == ["a-lab/tuned"]
    there = written(hub, "a-lab/tuned", tmp_path / "there")
    assert identical(DiffusionPipeline.from_pretrained(there).unet.state_dict(), run.unet())
    average = UNet2DConditionModel.from_pretrained(there, subfolder="unet_ema")
    saved = torch.load(run.out / "checkpoint-1" / "unet_ema.pth", weights_only=True)
    assert identical(average.state_dict(), saved)
    card = (there / "README.md").read_text()
    assert 'DiffusionPipeline.from_pretrained("a-lab/tuned")' in card
    assert "`unet_ema/` holds the moving averages" in card
    assert "![Samples](samples/step-000001.png)" in card
    sheet = run.out / "samples" / "step-000001.png"
    assert (there / "samples" / "step-000001.png").read_bytes() == sheet.read_bytes()
    # Nothing of this machine is in it, and what the run left knows only its own directory.
    assert str(tmp_path) not in card and "a-lab" not in (run.out / "README.md").read_text()


def test_adapters_of_a_base_on_the_hub_go_alone(train, request, tmp_path):
    put(tmp_path / "cache", ID, {"main": train.models["sd15"]})
    flags = {"lora_rank": 2, "cache_dir": tmp_path / "cache", "use_ema": True}
    place = {"pretrained_model_name_or_path": ID, "max_train_steps": 1}
    run = train(tmp_path / "my-run", **flags, **place)
    hub = request.getfixturevalue("hub")
    assert run_here(EXPORT, [run.out, "--push_to_hub"]) == 0
    uploaded = hub.files["someone/my-run"]
    lora = "pytorch_lora_weights.safetensors"
    assert uploaded.keys() == {"README.md", lora, lora.replace(".", "_ema.")}
    assert uploaded[lora] == (run.out / lora).read_bytes()
    card = uploaded["README.md"].decode()
    assert f"base_model: {ID}" in card and "- lora\n" in card
    assert f'load_lora_weights("someone/my-run", weight_name="{lora}")' in card


def test_a_failed_upload_loses_nothing_and_says_how_to_go_on(train, hub, tmp_path, caplog):
    hub.fails = "/commit/"
    argv = train.argv(tmp_path / "run", **ONE, hub_model_id="a-lab/tuned", lora_rank=2)
    assert run_here("train.py", argv) == 1
    run = train.run(tmp_path / "run")
    assert identical(base_unet(run.out / "pipeline"), run.unet())
    before = files(run.out)
    (said,) = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert said.startswith("--push_to_hub: nothing was uploaded (403") and "\n" not in said
    command = said.partition("upload it by: python -m sdpo.training.export ")[2]
    assert run_here(EXPORT, command.split()) == 1
    hub.fails = ""
    assert run_here(EXPORT, command.split()) == 0
    assert files(run.out) == before
    # The base is a directory of this machine: the adapters alone would be of no use.
    names = hub.files["a-lab/tuned"].keys()
    assert {"model_index.json", "unet/config.json", "README.md"} <= names


def test_an_export_is_uploaded(train, hub, tmp_path):
    run = train(tmp_path / "run", max_train_steps=1)
    out = tmp_path / "out" / "tuned.safetensors"
    push = ["--push_to_hub", "--hub_model_id", "tuned"]
    assert run_here(EXPORT, [run.out, "--out", out, *push]) == 0
    uploaded = hub.files["someone/tuned"]
    assert uploaded.keys() == {"README.md", out.name}
    assert load(uploaded[out.name]).keys() == load(out.read_bytes()).keys()
    assert "someone/tuned/blob/main/tuned.safetensors" in uploaded["README.md"].decode()
    own = "My own words.\n"
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "README.md").write_text(own)
    argv = [run.out, "--out", tmp_path / "p", "--format", "diffusers", "--force", *push]
    assert run_here(EXPORT, argv) == 0
    assert hub.files["someone/tuned"]["README.md"].decode() == own
    assert (tmp_path / "p" / "README.md").read_text() == own
    assert identical(base_unet(tmp_path / "p"), run.unet())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"hub_model_id": "a/b/c"}, r"--hub_model_id a/b/c: .*Give NAME or ORG/NAME"),
        ({"hub_model_id": "other/x"}, r"--hub_model_id other/x: the token is of someone"),
        ({"push_to_hub": False, "hub_model_id": "x"}, "--hub_model_id has no meaning without"),
        ({"hub_private_repo": True, "push_to_hub": False}, "--hub_private_repo has no meaning"),
    ],
)
def test_refused_before_anything_is_done(train, hub, tmp_path, flags, said):
    with pytest.raises(UserError, match=said):
        train(tmp_path / "run", **{**ONE, **flags})
    assert not hub.created and not list((tmp_path / "run").glob("[!.]*"))


@pytest.mark.parametrize("how", ["no token", "wrong token", "no network", "offline", "the name"])
def test_a_hub_that_cannot_be_asked(train, hub, tmp_path, monkeypatch, how):
    out = tmp_path / "run"
    if how == "no token":
        monkeypatch.delenv("HF_TOKEN")
        said = "--push_to_hub: there is no token for the hub; log in"
    elif how == "wrong token":
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        said = "--push_to_hub: the hub does not say whose token this is"
    elif how == "no network":
        nowhere = f"http://127.0.0.1:{free_port()}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", nowhere)
        said = "--push_to_hub: .*is there a network.*--push_to_hub` uploads what a run left"
    elif how == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        said = "--push_to_hub: HF_HUB_OFFLINE is set"
    else:
        out = tmp_path / "my--run"
        said = "--hub_model_id my--run, which is the directory's name: "
    with pytest.raises(UserError, match=said) as caught:
        train(out, **ONE)
    assert "\n" not in str(caught.value)
    assert not list(out.glob("checkpoint-*")) and not list(out.glob("config.json"))


def test_what_export_refuses(train, hub, tmp_path):
    run = train(tmp_path / "run", max_train_steps=1, checkpointing_steps=1)
    half = tmp_path / "half" / "checkpoint-1"
    half.parent.mkdir()
    os.rename(run.out / "checkpoint-1", half)
    for argv, said in (
        ([half], "arguments are required: --out"),
        ([half, "--push_to_hub"], "--push_to_hub: .* holds no pipeline/"),
        ([half, "--push_to_hub", "--half"], "have no meaning without --out"),
    ):
        with pytest.raises(UserError, match=said):
            run_here(EXPORT, argv)
    assert not hub.created


def test_of_two_processes_one_uploads(train, hub, tmp_path):
    """As programs, which read the hub's address from the environment."""
    argv = [sys.executable, "train.py", *train.argv(tmp_path / "run", **ONE)]
    own = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
    ranks = [
        subprocess.Popen(
            argv, cwd=REPO, env={**os.environ, **rank, **own}, stderr=subprocess.PIPE, text=True
        )
        for rank in rank_environments(2)
    ]
    said = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert hub.commits == ["someone/run"] and len(hub.created) == 1
