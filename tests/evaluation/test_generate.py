"""generate.py: names, manifest, EXIF, going on, settings that must not be mixed, bad input."""

from __future__ import annotations

import json
import shutil
from functools import partial

import numpy as np
import pytest
from e2e.harness import generation_argv, run_here
from PIL import Image

from sdpo.common.errors import UserError
from sdpo.evaluation.generate.manifest import read_manifest
from sdpo.evaluation.generate.run import check_all_there, claim

PROMPTS = ["a red circle", " outer blanks ", "café 猫 <b>&amp;", "a red circle", "x" * 500]
STEM = "mine_seed0_32x32_2s_7.5cfg"


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    path = tmp_path_factory.mktemp("suite") / "mine.json"
    categories = ["one", "two", None, "one", "two"]
    rows = [
        {"prompt": p, **({"category": c} if c else {})}
        for p, c in zip(PROMPTS, categories, strict=True)
    ]
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="module")
def flags(tiny_sd15, suite):
    """Tiny ones."""
    return partial(generation_argv, tiny_sd15, suite)


@pytest.fixture(scope="module")
def made(flags, tmp_path_factory):
    """A whole run's directory; not to be changed."""
    out = tmp_path_factory.mktemp("generated")
    assert run_here("eval/generate.py", flags(out)) == 0
    return out


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def test_names_manifest_and_exif(made):
    assert sorted(p.name for p in made.iterdir()) == [STEM, f"{STEM}.json"]
    rows = json.loads((made / f"{STEM}.json").read_text())
    assert [set(row) for row in rows] == [
        {"prompt", "gen_image_path", "raw_image_path", "metadata"}
    ] * 5
    assert [row["prompt"] for row in rows] == PROMPTS
    for index, row in enumerate(rows):
        assert row["gen_image_path"] == f"{STEM}/{index}_32x32.png"
        with Image.open(made / row["gen_image_path"]) as image:
            assert image.size == (32, 32)
            assert image.format == "PNG"
            # Pillow decodes EXIF's text as Latin-1.
            said = image.getexif()[0x010E].encode("latin-1").decode("utf-8")
        assert said == row["prompt"]
    metadata = rows[3]["metadata"]
    expected = {
        "protocol": "paper",
        "unet": "base",
        "suite": "mine",
        "prompts": 5,
        "steps": 2,
        "cfg": 7.5,
        "guidance_scale_diffusers": 8.5,
        "seed": 0,
        "height": 32,
        "width": 32,
        "dtype": "bf16",
        "vae_dtype": "torch.float32",
        "scheduler": "EulerDiscreteScheduler",
        "negative_prompt": "",
        "family": "sd15",
        "index": 3,
        "category": "one",
    }
    assert {k: metadata[k] for k in expected} == expected
    assert "category" not in rows[2]["metadata"]
    assert len(metadata["unet_sha256"]) == len(metadata["prompts_sha256"]) == 64


def test_one_noise_for_all_prompts(made):
    images = [pixels(made / STEM / f"{i}_32x32.png") for i in range(5)]
    assert np.array_equal(images[0], images[3])
    assert not np.array_equal(images[0], images[1])


def test_paths_hold_after_a_move(made, tmp_path, monkeypatch):
    moved = tmp_path / "elsewhere"
    shutil.copytree(made, moved)
    monkeypatch.chdir(tmp_path)
    manifest = read_manifest(moved / f"{STEM}.json")
    assert [e.image for e in manifest.entries] == [
        moved / STEM / f"{i}_32x32.png" for i in range(5)
    ]
    # As published manifests are: absolute paths of another machine.
    rows = json.loads((moved / f"{STEM}.json").read_text())
    for row in rows:
        row["gen_image_path"] = f"/nowhere/{row['gen_image_path']}"
    (moved / f"{STEM}.json").write_text(json.dumps(rows))
    manifest = read_manifest(moved / f"{STEM}.json")
    assert manifest.entries[4].image == moved / STEM / "4_32x32.png"
    assert manifest.entries[4].category == "two"


def test_only_what_is_missing_or_broken_is_made_again(flags, made, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(made, out)
    folder = out / STEM
    (folder / "1_32x32.png").unlink()
    whole = (folder / "2_32x32.png").read_bytes()
    (folder / "2_32x32.png").write_bytes(whole[:-40])
    (folder / "4_32x32.png.tmp").write_bytes(b"half")
    (out / f"{STEM}.json").unlink()
    before = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.png")}
    assert run_here("eval/generate.py", flags(out)) == 0
    after = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.png")}
    assert {n for n in after if after[n] != before.get(n)} == {"1_32x32.png", "2_32x32.png"}
    for index in range(5):
        name = f"{index}_32x32.png"
        difference = pixels(folder / name).astype(int) - pixels(made / STEM / name)
        assert np.abs(difference).max() <= 24  # bf16, in another batch
    assert (out / f"{STEM}.json").read_text() == (made / f"{STEM}.json").read_text()


def test_offloaded_text_encoders_go_on_with_it(flags, made, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(made, out)
    last = out / STEM / "4_32x32.png"
    before = last.read_bytes()
    last.unlink()
    (out / f"{STEM}.json").unlink()
    assert run_here("eval/generate.py", flags(out, "--offload_text_encoders")) == 0
    # The last batch is of this image alone.
    assert last.read_bytes() == before
    assert (out / f"{STEM}.json").read_text() == (made / f"{STEM}.json").read_text()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--dtype", "fp32"), "dtype"),
        (("--revision", "v2"), "revision"),
        (("--unet", "OTHER"), "unet_sha256"),
        (("--limit", 2), "prompts"),
    ],
)
def test_settings_are_not_mixed(flags, made, tmp_path, tiny_sd15, more, said):
    from sdpo.tinyworld.architecture import build_pipeline

    if "OTHER" in more:
        build_pipeline("sd15", "micro", seed=9).unet.save_pretrained(tmp_path / "other")
        more = ("--unet", tmp_path / "other")
    out = tmp_path / "out"
    shutil.copytree(made, out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=f"--outdir.*{said}"):
        run_here("eval/generate.py", flags(out, *more))
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_the_same_base_by_another_path_goes_on(tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    (tmp_path / "inner" / "base").mkdir(parents=True)
    folder = tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    claim(folder, {"base": "base", "vae": "the base's own"})
    (folder / "0.png").write_bytes(b"")
    monkeypatch.chdir(tmp_path / "inner")
    claim(folder, {"base": "../base", "vae": "the base's own"})
    with pytest.raises(UserError, match=r"another base \(e\.g\. base: \.\./base, now base\)"):
        claim(folder, {"base": "base", "vae": "the base's own"})
    monkeypatch.chdir(tmp_path)
    claim(folder, {"base": str(tmp_path / "base"), "vae": "the base's own"})


def test_the_same_weights_by_another_name_go_on(flags, made, tmp_path, tiny_sd15):
    """A UNet is told by its weights, not by its file: all forms of it are the base's."""
    import torch
    from safetensors.torch import load_file

    out = tmp_path / "out"
    shutil.copytree(made, out)
    state = load_file(tiny_sd15 / "unet" / "diffusion_pytorch_model.safetensors")
    checkpoint = tmp_path / "run" / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    torch.save(state, checkpoint / "unet.pth")
    (checkpoint / "state.json").write_text("{}")
    forms = (
        tiny_sd15,
        tiny_sd15 / "unet",
        tiny_sd15 / "unet" / "diffusion_pytorch_model.safetensors",
        checkpoint / "unet.pth",
        checkpoint,
        checkpoint.parent,
    )
    for form in forms:
        (out / f"{STEM}.json").unlink()
        assert run_here("eval/generate.py", flags(out, "--unet", form)) == 0
        rows = json.loads((out / f"{STEM}.json").read_text())
        assert rows[0]["metadata"]["unet"] == str(form)


def test_diffusers_protocol(flags, made, tmp_path):
    assert run_here("eval/generate.py", flags(tmp_path, "--protocol", "diffusers")) == 0
    rows = json.loads((tmp_path / f"{STEM}_diffusers.json").read_text())
    assert [row["metadata"]["seed"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[0]["metadata"]["scheduler"] == "PNDMScheduler"
    assert rows[0]["metadata"]["guidance_scale_diffusers"] == 7.5
    first, fourth = (pixels(tmp_path / rows[i]["gen_image_path"]) for i in (0, 3))
    assert not np.array_equal(first, fourth)


def test_sdxl(flags, tmp_path, tiny_sdxl, capsys):
    more = ("--sdxl", "--pretrained_model_name_or_path", tiny_sdxl)
    more += ("--pretrained_vae_model_name_or_path", "base", "--limit", 2)
    assert run_here("eval/generate.py", flags(tmp_path, *more)) == 0
    assert f"wrote {tmp_path / STEM}.json\n" in capsys.readouterr().out
    manifest = read_manifest(tmp_path / f"{STEM}.json")
    assert len(manifest) == 2
    assert manifest.entries[0].metadata["family"] == "sdxl"
    assert manifest.entries[0].metadata["vae"] == "the base's own"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--unet", "nowhere/unet.pth"), "--unet: there is no file or directory nowhere/unet.pth"),
        (("--unet", "TRUNCATED"), "cannot read UNet weights from .*unet.pth"),
        (("--unet", "FOREIGN"), "does not fit this UNet"),
        (("--unet", "EMPTY"), "--unet: .* holds no unet.pth"),
        (("--unet", "TEXT"), "--unet: .*notes.txt is none of"),
        (("--unet", "SDXL"), "--unet .*SDXL UNet, but the base is of SD1.5: .*add --sdxl"),
        (("--unet", "org/repo:a/unet.pth"), "--unet: cannot get a/unet.pth from org/repo .*PATH"),
        (("--pretrained_model_name_or_path", "org/repo"), "--pretrained_model_name_or_path"),
        (("--sdxl",), "leave --sdxl out"),
        (("--suites", "nowhere.json"), "nowhere.json"),
        (("--suites", "NONE"), "none.txt"),
        (("--steps", 0), "--steps must be at least 1"),
        (("--resolution", 30), "--resolution must be a multiple of 8"),
        (("--cfg", "nan"), "--cfg"),
        (("--seed", -1), "--seed"),
        (("--seed", 2**64), "--seed must be below"),
        (("--steps", 1001), "--steps 1001: the base's schedule has 1000 timesteps"),
        (("--steps", 1001, "--protocol", "diffusers"), "--steps 1001"),
        (("--unet", "NAN"), "unet.pth is broken: its weight conv_out.bias"),
        (("--unet", "HUGE"), "--unet: what it made of prompt 0 is not finite"),
        (("--unet", "HUGE", "--protocol", "diffusers"), "--unet: what it made of prompt 0"),
        (("--dtype", "fp16"), "--dtype fp16 needs a GPU"),
        (("--protocol", "mine"), "--protocol"),
        (("--outdir", "FILE"), "--outdir: .* is not a directory"),
        (("--prompt_source", "nowhere", "--suites", "papv2"), "--prompt_source"),
    ],
)
def test_bad_input(flags, tmp_path, tiny_sd15, tiny_sdxl, more, said):
    import torch
    from safetensors.torch import load_file

    def stand_in(word):
        if word == "TRUNCATED":
            state = load_file(tiny_sd15 / "unet" / "diffusion_pytorch_model.safetensors")
            torch.save(state, tmp_path / "unet.pth")
            (tmp_path / "unet.pth").write_bytes((tmp_path / "unet.pth").read_bytes()[:-5000])
            return tmp_path / "unet.pth"
        if word in ("NAN", "HUGE"):
            state = load_file(tiny_sd15 / "unet" / "diffusion_pytorch_model.safetensors")
            state["conv_out.bias"][:] = float("nan") if word == "NAN" else 3e38
            torch.save(state, tmp_path / "unet.pth")
            return tmp_path / "unet.pth"
        if word == "FOREIGN":
            torch.save({"a": torch.zeros(1)}, tmp_path / "unet.pth")
            return tmp_path / "unet.pth"
        files = {"TEXT": "notes.txt", "NONE": "none.txt", "FILE": "file"}
        if word in files:
            (tmp_path / files[word]).write_text("\n")
            return tmp_path / files[word]
        if word == "EMPTY":
            (tmp_path / "empty").mkdir()
            return tmp_path / "empty"
        return tiny_sdxl if word == "SDXL" else word

    out = tmp_path / "out"
    with pytest.raises(UserError, match=said):
        run_here("eval/generate.py", flags(out, *map(stand_in, more)))
    assert not list(out.rglob("*.png"))


def test_processes_without_a_common_disk(tmp_path):
    rows = [("p", f"m/{i}.png", {}) for i in range(3)]
    (tmp_path / "m").mkdir()
    for i in (0, 2):
        (tmp_path / "m" / f"{i}.png").touch()
    with pytest.raises(UserError, match=r"--outdir: 1 images \(e\.g\. m/1\.png\).*one directory"):
        check_all_there(rows, tmp_path)
