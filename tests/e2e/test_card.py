"""README.md of a run: what it says is so, and its programs make images."""

from __future__ import annotations

import json
import re

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image

from sdpo.config import parse_train
from sdpo.training.card import card_text, is_own, write_run_card
from sdpo.training.card_use import Weights
from sdpo.training.made import base_licence, read_made

from .harness import run_here
from .test_hub import ID, put

EXPORT = "sdpo/training/export.py"
HELDOUT = "sdpo/evaluation/heldout.py"
RUN = {
    "max_train_steps": 2,
    "checkpointing_steps": 1,
    "learning_rate": 1e-2,
    "lora_rank": 2,
    "beta_dpo": 500,
    "train_method": "dmpo",
    "use_winner_preserving": True,
    "winner_preserving_scope": "pair",
    "validation_prompts": ["a square", "a circle"],
    "validation_steps": 1,
}


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def run(request, train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("run"), **RUN, sdxl=request.param == "sdxl")


def front(text):
    """The hub's metadata, and what stands below."""
    head, body = re.fullmatch(r"---\n(.*?)---\n(.*)", text, re.DOTALL).groups()
    return yaml.safe_load(head), body


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def images_of(programs, directory, monkeypatch):
    """The image that each program leaves, and the UNet that it used."""
    monkeypatch.chdir(directory)
    found = []
    for program in programs:
        names = {}
        torch.manual_seed(0)
        assert program.count(", height=") == 1
        # Of the sampler's fifty steps two are enough.
        exec(program.replace(", height=", ", num_inference_steps=2, height="), names)
        assert Image.open("image.png").size == (32, 32)
        (directory / "image.png").unlink()
        found.append((names["image"], names["pipeline"].unet))
    return found


def test_metadata_and_tables(run, train):
    meta, body = front((run.out / "README.md").read_text())
    sdxl = run.config["args"]["sdxl"]
    assert meta["license"] == "other" and meta["pipeline_tag"] == "text-to-image"
    assert meta["library_name"] == "diffusers"
    assert {"lora", "dmpo", "stable-diffusion-xl" if sdxl else "stable-diffusion"} <= set(
        meta["tags"]
    )
    # Base and pairs are directories of this machine.
    assert not {"base_model", "datasets"} & meta.keys()
    for said in (
        f"{'sdxl' if sdxl else 'sd15'} (local)",
        f"{run.config['resolved']['pairs']} decided pairs; images resized and cropped (centre)",
        "Divergence Minimization Preference Optimization",
        "winner-preserving (arXiv 2511.03317), mu 0.9, scope pair",
        "LoRA, rank 2, alpha 2",
        "2 steps of 2 pairs, processes: 1",
        "(samples/step-000002.png)",
        "row by row: a square; a circle",
        f"torch {torch.__version__.partition('+')[0]}",
        "## Held-out pairs\n\nNot measured.",
    ):
        assert said in body, said
    assert (run.out / "samples" / "step-000002.png").is_file()


def test_the_recipe_is_the_runs(run):
    (text,) = blocks((run.out / "README.md").read_text(), "yaml")
    path = run.out.parent / f"{run.out.name}.yaml"
    path.write_text(text)
    places = ["--pretrained_model_name_or_path", "x/y", "--dataset_name", "x/z"]
    found = parse_train(["--config_file", str(path), *places]).flags()
    kept = {k: v for k, v in run.config["args"].items() if k in yaml.safe_load(text)}
    assert {"beta_dpo", "lora_rank", "winner_preserving_scope", "seed"} <= kept.keys()
    assert {k: found[k] for k in kept} == kept
    # What it leaves out is the default, or where things lie.
    unlike = {k for k, v in run.config["args"].items() if json.dumps(found[k]) != json.dumps(v)}
    assert unlike == {
        *("pretrained_model_name_or_path", "train_data_dir", "dataset_name", "output_dir"),
        *("cache_dir", "report_to", "validation_prompts", "validation_steps"),
        *("checkpointing_steps",),
    }


def test_its_programs_make_images(run, monkeypatch):
    programs = blocks((run.out / "README.md").read_text(), "python")
    assert len(programs) == 3  # pipeline, adapters, checkpoint
    images = images_of(programs, run.out, monkeypatch)
    pixels = [torch.tensor(list(image.tobytes())).float() for image, _ in images]
    for found in pixels[1:]:
        assert (found - pixels[0]).abs().max() <= 1
    for _, unet in (images[0], images[2]):
        assert all(torch.equal(v, run.unet()[k]) for k, v in unet.state_dict().items())


def test_programs_of_exports_make_images(run, train, tmp_path, monkeypatch):
    """As they stand on the hub's card, where the repository's id is that of the directory."""
    monkeypatch.chdir(tmp_path)
    made = read_made(run.out / "checkpoint-2")
    for kind, name, form in (
        ("lora", "k.safetensors", "lora_kohya"),
        ("single_file", "a.safetensors", "original"),
    ):
        assert run_here(EXPORT, [run.out, "--out", name, "--format", form]) == 0
        programs = blocks(card_text(made, [Weights(kind, name)]), "python")
        ((_, unet),) = images_of(programs, tmp_path, monkeypatch)
        if kind == "single_file":
            assert all(torch.equal(v, run.unet()[k]) for k, v in unet.state_dict().items())
    argv = [run.out / "checkpoint-1", "--out", "p", "--format", "diffusers"]
    assert run_here(EXPORT, argv) == 0
    card = (tmp_path / "p" / "README.md").read_text()
    assert "for 1 optimizer step on pairs" in card and "(samples/step-000001.png)" in card
    assert (tmp_path / "p" / "samples" / "step-000001.png").is_file()
    ((_, unet),) = images_of(blocks(card, "python"), tmp_path / "p", monkeypatch)
    assert all(torch.equal(v, run.unet(1)[k]) for k, v in unet.state_dict().items())


def test_held_out_errors_become_a_table(run, train, tmp_path):
    argv = [run.out, "--split", "heldout", "--max_pairs", 4, "--timesteps", 2]
    assert run_here(HELDOUT, argv) == 0
    text = (run.out / "README.md").read_text()
    assert is_own(text)
    rows = [json.loads(line) for line in (run.out / "heldout.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert "on 4 pairs at 2 timesteps each" in text
    for row in rows:
        drift, loser = f"{row['winner_drift_percent']:+.3g}", f"{row['loser_drift_percent']:+.3g}"
        error, share = f"{row['winner_drift_percent_se']:.2g}", f"{row['implicit_acc']:.3f}"
        assert f"| {row['step']} | {drift} ± {error} | {loser} | {share} |" in text
    # Of an earlier checkpoint, what was measured up to it.
    early = card_text(read_made(run.out / "checkpoint-1"), [Weights("pipeline", "")])
    assert "\n| 1 | " in early and "\n| 2 | " not in early


def test_a_card_that_somebody_wrote_stays(train, tmp_path, caplog):
    run = train(tmp_path / "run", max_train_steps=1)
    card = run.out / "README.md"
    first = card.read_text()
    card.write_text(first.replace("## Use", "Not for faces.\n\n## Use"))
    edited = card.read_text()
    assert is_own(first) and not is_own(edited)
    train(tmp_path / "run", max_train_steps=2)
    assert card.read_text() == edited
    assert f"{card} was written or edited by somebody: it is left as it is" in caplog.text
    card.write_text("Mine.\n")
    assert write_run_card(run.out) is None and card.read_text() == "Mine.\n"
    card.unlink()
    assert write_run_card(run.out) == card
    assert "for 2 optimizer steps" in card.read_text()


@pytest.mark.parametrize("place", ["directory", "cache"])
def test_the_bases_own_card_tells_the_licence(train, tmp_path, place):
    base = tmp_path / "base"
    DiffusionPipeline.from_pretrained(train.models["sd15"]).save_pretrained(base)
    licence = {"license": "other", "license_name": "own-1", "license_link": "https://x.org/own-1"}
    (base / "README.md").write_text(f"---\n{yaml.safe_dump({**licence, 'tags': ['a']})}---\n\n# B")
    flags = {"max_train_steps": 1}
    if place == "cache":
        put(tmp_path / "cache", ID, {"main": base})
        flags |= {"cache_dir": tmp_path / "cache"}
    named = ID if place == "cache" else base
    run = train(tmp_path / "run", **flags, pretrained_model_name_or_path=named)
    meta, body = front((run.out / "README.md").read_text())
    assert {k: meta[k] for k in licence} == licence
    assert body.endswith("## Licence\n\nThat of the base: own-1.\n")
    assert meta.get("base_model") == (ID if place == "cache" else None)
    for broken in (
        "no front matter",
        "---\n: [\n---\n",
        "---\nlicense: [a]\n---\n",
        "---\n- a\n---\n",
    ):
        (base / "README.md").write_text(broken)
        config = parse_train(
            ["--pretrained_model_name_or_path", str(base), "--train_data_dir", "x"]
        )
        assert base_licence(config) is None


def test_an_unknown_licence_of_a_base_on_the_hub(train, tmp_path):
    put(tmp_path / "cache", ID, {"main": train.models["sd15"]})
    place = {"pretrained_model_name_or_path": ID, "cache_dir": tmp_path / "cache"}
    run = train(tmp_path / "run", max_train_steps=1, **place)
    meta, body = front((run.out / "README.md").read_text())
    assert meta["license"] == "other" and meta["base_model"] == ID
    assert body.endswith(f"The base's licence: see https://huggingface.co/{ID}\n")
