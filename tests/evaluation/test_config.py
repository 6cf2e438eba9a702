"""The evaluation programs' settings: what depends on other flags, and names shared by two flags."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sdpo.common.errors import UserError
from sdpo.config import SourceConfig
from sdpo.evaluation import evaluate
from sdpo.evaluation.generate import run as generate
from sdpo.evaluation.score import relabel
from sdpo.evaluation.score import run as score_run


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), (7.5, 512, None, "base_sd15")),
        (("--sdxl",), (7.5, 1024, "madebyollin/sdxl-vae-fp16-fix", "base_sdxl")),
        (("--sdxl", "--protocol", "diffusers"), (5.0, 1024, "madebyollin/sdxl-vae-fp16-fix", None)),
        (("--sdxl", "--pretrained_vae_model_name_or_path", "base"), (7.5, 1024, None, None)),
        (("--cfg", "0", "--resolution", "64", "--outdir", "x"), (0.0, 64, None, None)),
    ],
)
def test_generation_is_filled_in(flags, expected):
    config = generate.parse_args(["--unet", "base", *flags])
    found = (config.cfg, config.resolution, config.pretrained_vae_model_name_or_path)
    assert found == expected[:3]
    if expected[3]:
        assert config.outdir == Path("output/eval") / expected[3]
    elif "--outdir" in flags:
        assert config.outdir == Path("x")


@pytest.mark.parametrize("below", ["", "checkpoint-2", "checkpoint-2/unet.pth"])
def test_the_base_is_that_of_the_run_that_the_unet_lies_in(
    tiny_sd15, tiny_sdxl, tmp_path, monkeypatch, below
):
    start, elsewhere = tmp_path / "start", tmp_path / "elsewhere"
    checkpoint = start / "output" / "run" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    elsewhere.mkdir()
    for name in ("unet.pth", "state.json"):
        (checkpoint / name).touch()
    (checkpoint.parent / "metrics.jsonl").touch()
    args = {"output_dir": "output/run", "pretrained_model_name_or_path": "tiny/base"}
    args |= {"revision": "v2", "sdxl": True}

    def flags(*more, **changed):
        config = {"args": {**args, **changed}}
        (checkpoint.parent / "config.json").write_text(json.dumps(config))
        return generate.parse_args(["--unet", str(checkpoint.parent / below), *more])

    monkeypatch.chdir(elsewhere)
    # On the hub, for all that is known here.
    with pytest.raises(UserError, match=r"^--unet: .* was trained from tiny/base: --pretrained"):
        flags()
    (start / "tiny").mkdir()
    (start / "tiny" / "base").symlink_to(tiny_sdxl)
    found = flags()
    assert found.family == "sdxl"
    assert found.pretrained_model_name_or_path == str(start / "tiny" / "base")
    assert found.pretrained_vae_model_name_or_path is None  # the base's own, as the run had it
    assert found.revision == "v2"
    given = flags("--pretrained_model_name_or_path", str(tiny_sd15))
    assert (given.family, given.revision) == ("sd15", None)
    monkeypatch.chdir(start)
    assert flags().pretrained_model_name_or_path == "tiny/base"
    with pytest.raises(UserError, match=r"trained from \./gone, which is not there; give --pre"):
        flags(pretrained_model_name_or_path="./gone")


def test_batch_sizes_of_images_and_scores():
    flags = ["--unet", "base", "--batch_size", "3", "--score_batch_size", "5"]
    config = evaluate.parse_args(flags)
    assert (config.generation.batch_size, config.scoring.batch_size) == (3, 5)
    assert score_run.parse_args(["a/m.json", "--batch_size", "7"]).scoring.batch_size == 7
    with pytest.raises(UserError, match="the scorers' batch size must be at least 1, got 0"):
        evaluate.parse_args([*flags, "--score_batch_size", "0"])


def test_score_takes_manifests_and_writes_beside_the_first():
    config = score_run.parse_args(["a/m.json", "b/m.json", "--weights", "clip=x/y"])
    assert config.manifests == (Path("a/m.json"), Path("b/m.json"))
    assert config.outdir == Path("a")
    assert config.scoring.options(None).weights == {"clip": "x/y"}
    with pytest.raises(UserError, match=re.escape("arguments are required: MANIFEST.json")):
        score_run.parse_args([])


def test_choice_model():
    check = relabel.check_choice_model
    assert check(SourceConfig()) == {}
    data = SourceConfig(choice_model="clip", choice_weights=("clip=x/y",))
    assert check(data) == {"clip": "x/y"}
    known = r"argument --choice_model: invalid choice: 'mine' \(choose from 'aesthetics', 'clip', "
    with pytest.raises(UserError, match=known):
        check(SourceConfig(choice_model="mine"))
    with pytest.raises(UserError, match="clip is not a part of oracle"):
        check(SourceConfig(choice_model="oracle", choice_weights=("clip=x/y",)))


def test_flags_need_no_torch(repo):
    code = (
        "import sys; import sdpo.evaluation.evaluate, sdpo.evaluation.score.relabel, "
        "sdpo.evaluation.compare.run; sys.exit('torch' in sys.modules or 'scipy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=repo).returncode == 0


def changed(directory, file, **values):
    """Change a JSON file of a copied model."""
    path = directory / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("how", ["pipeline", "unet"])
@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"cross_attention_dim": 7}, "cross_attention_dim is 7, but "),
        ({"in_channels": 9}, "9 in_channels and 4 out_channels"),
        ({"num_class_embeds": 3}, "num_class_embeds is 3, so the model must be told more"),
        ({"_class_name": "UNet3DConditionModel"}, "is of a UNet3DConditionModel"),
    ],
)
def test_a_unets_configuration_is_checked_before_anything_is_loaded(
    tiny_sd15, tmp_path, how, values, said
):
    other = tmp_path / "other"
    shutil.copytree(tiny_sd15, other)
    changed(other, "unet/config.json", **values)
    unet = other if how == "pipeline" else other / "unet"
    flags = ["--pretrained_model_name_or_path", str(tiny_sd15), "--unet", str(unet)]
    with pytest.raises(UserError, match=rf"^--unet.*{said}"):
        generate.parse_args(flags)


def test_steps_are_those_of_the_bases_schedule(tiny_sd15, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_sd15, base)
    changed(base, "scheduler/scheduler_config.json", num_train_timesteps=20)
    flags = ["--unet", "base", "--pretrained_model_name_or_path", str(base)]
    assert generate.parse_args([*flags, "--steps", "20"]).steps == 20
    with pytest.raises(UserError, match="--steps 50: the base's schedule has 20 timesteps"):
        generate.parse_args(flags)
    file = tmp_path / "base.safetensors"
    file.touch()
    flags = ["--unet", "base", "--pretrained_model_name_or_path", str(file)]
    with pytest.raises(UserError, match="--steps 50: the base's schedule has 20 timesteps"):
        generate.parse_args([*flags, "--single_file_config", str(base)])
