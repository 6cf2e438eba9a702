"""The six recipes under scripts/train, with tiny stand-ins for what they would download."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sdpo.config import parse_train

from .harness import REPO, Run, as_argv, free_port, program

ALL = {
    "dataset_config_name": None,
    "split": "train",
    "caption_column": "caption",
    "proportion_empty_prompts": 0.2,
    "random_crop": False,
    "no_hflip": False,
    "noise_offset": 0.0,
    "input_perturbation": 0.0,
    "train_batch_size": 8,
    "gradient_accumulation_steps": 32,
    "max_train_steps": 2000,
    "num_train_epochs": None,
    "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": 500,
    "scale_lr": True,
    "mixed_precision": "bf16",
    "allow_tf32": True,
    "checkpointing_steps": 500,
    "max_grad_norm": 1.0,
    "adam_weight_decay": 1e-2,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "use_winner_preserving": True,
    "winner_preserving_scope": "batch",
}
SD15 = {
    "sdxl": False,
    "pretrained_model_name_or_path": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "pretrained_vae_model_name_or_path": None,
    "resolution": 512,
    "learning_rate": 1e-8,
    "use_adafactor": False,
    "gradient_checkpointing": False,
}
SDXL = {
    "sdxl": True,
    "pretrained_model_name_or_path": "stabilityai/stable-diffusion-xl-base-1.0",
    "pretrained_vae_model_name_or_path": "madebyollin/sdxl-vae-fp16-fix",
    "resolution": 1024,
    "learning_rate": 1e-9,
    "use_adafactor": True,
    "gradient_checkpointing": True,
}


def own(method: str, beta: float, mu: float) -> dict:
    return {"train_method": method, "beta_dpo": beta, "winner_preserving_mu": mu}


RECIPES = {
    "sd15_diffusion_dpo": {**ALL, **SD15, **own("diffusion-dpo", 5000, 0.9)},
    "sd15_dspo": {**ALL, **SD15, **own("dspo", 0.001, 0.2)},
    "sd15_dmpo": {**ALL, **SD15, **own("dmpo", 2000, 0.9), "dmpo_alpha": 0.01},
    "sdxl_diffusion_dpo": {**ALL, **SDXL, **own("diffusion-dpo", 5000, 0.6)},
    "sdxl_dspo": {**ALL, **SDXL, **own("dspo", 5000, 0.6)},
    "sdxl_dmpo": {**ALL, **SDXL, **own("dmpo", 6000, 0.6), "dmpo_alpha": 0.01},
}


def script(name: str, *arguments, **environment: str):
    env = {k: v for k, v in os.environ.items() if not k.startswith("SDPO_")}
    env |= {"SDPO_PYTHON": sys.executable, "SDPO_SKIP_INSTALL": "1", **environment}
    return program("bash", f"scripts/train/{name}.sh", *arguments, env=env)


def tiny(train, out, family: str, **flags) -> list[str]:
    """What stands in for the recipe's models, data and length."""
    return as_argv(
        {
            "pretrained_model_name_or_path": train.models[family],
            "pretrained_vae_model_name_or_path": "",
            "train_data_dir": train.pairs,
            "cache_dir": train.cache,
            "resolution": 32,
            "gradient_accumulation_steps": 1,
            "max_train_steps": 2,
            "dataloader_num_workers": 0,
            "output_dir": out,
            **flags,
        }
    )


REPLACED = {
    "pretrained_model_name_or_path",
    "pretrained_vae_model_name_or_path",
    "resolution",
    "gradient_accumulation_steps",
    "max_train_steps",
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(train, tmp_path, name):
    recipe = RECIPES[name]
    family = name.split("_")[0]
    out = tmp_path / "run"
    done = script(name, *tiny(train, out, family))
    assert done.returncode == 0, done.stderr
    run = Run(out)
    found = run.config["args"]
    for flag in recipe.keys() - REPLACED:
        assert found[flag] == recipe[flag], flag
    assert found["dataset_name"] is None
    assert run.column("step") == [1, 2]
    # 8 pairs a step; the second of 500 warm-up steps
    assert run.config["resolved"]["learning_rate"] == pytest.approx(8 * recipe["learning_rate"])
    assert run.column("lr") == pytest.approx([0, 8 * recipe["learning_rate"] / 500])
    assert (out / "pipeline" / "model_index.json").is_file()
    assert list((out / "logs").rglob("events.out.tfevents.*"))


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_as_it_stands(name, repo, tmp_path, monkeypatch):
    """The flags a recipe gives when nothing is overridden: `python` only prints them."""
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\ncase "$1" in sdpo/launch.py|train.py) '
        f'echo "$@" >>{tmp_path}/calls; exit 0;; esac\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    done = script(name, SDPO_PYTHON=str(python))
    assert done.returncode == 0, done.stderr
    checked, started = (tmp_path / "calls").read_text().splitlines()
    assert checked.split()[:2] == ["train.py", "--check_only"]
    assert started.split()[:2] == ["sdpo/launch.py", "train.py"]
    assert checked.split()[2:] == started.split()[2:]

    monkeypatch.chdir(repo)
    args = parse_train(started.split()[2:]).flags()
    for flag, value in RECIPES[name].items():
        assert args[flag] == value, flag
    assert args["dataset_name"] == "yuvalkirstain/pickapic_v2"
    assert args["train_data_dir"] is None
    assert args["output_dir"] == f"output/{name}"


@pytest.mark.parametrize(
    ("name", "machines", "processes"),
    [("1gpu", 1, 1), ("8gpu", 1, 8), ("2x8gpu", 2, 16), ("fsdp2", 1, 8), ("zero2", 1, 8)],
)
def test_configs(tmp_path, repo, name, machines, processes):
    """--config gives accelerate the file and nothing that would win over it."""
    from accelerate.commands.config.config_args import load_config_from_file

    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\ncase "$*" in *sys.version*) exit;; esac\n'
        f'echo "$SDPO_LAUNCH_ARGS:$@" >>{tmp_path}/calls\n'
    )
    python.chmod(0o755)
    for given in (["--config", name], [f"--config={name}"]):
        done = script("sd15_dspo", *given, "--seed", "3", SDPO_PYTHON=str(python))
        assert done.returncode == 0, done.stderr
        checked, started = (tmp_path / "calls").read_text().splitlines()[-2:]
        file = f"scripts/configs/{name}.yaml"
        assert started.startswith(f"--config_file '{file}' :sdpo/launch.py train.py --config_file ")
        assert started.endswith("--seed 3")
        assert checked.endswith("--seed 3")
    config = load_config_from_file(str(repo / file))
    assert (config.num_machines, config.num_processes) == (machines, processes)
    done = script("sd15_dspo", "--config", "16gpu", SDPO_PYTHON=str(python))
    assert done.returncode == 2
    assert "--config: there is no scripts/configs/16gpu.yaml" in done.stderr


def test_arguments_win_and_processes_are_launched(train, tmp_path):
    out = tmp_path / "run"
    extra = ("--no-use_winner_preserving", "--no-scale_lr", "--no-allow_tf32")
    flags = {"beta_dpo": 123, "learning_rate": 1e-5, "num_train_epochs": 1, "report_to": "none"}
    flags |= {"max_train_samples": 33, "max_train_steps": None}
    done = script(
        "sd15_dmpo",
        *tiny(train, out, "sd15", **flags),
        *extra,
        SDPO_LAUNCH_ARGS=f"--multi_gpu --num_processes 2 --main_process_port {free_port()}",
        ACCELERATE_USE_CPU="true",
    )
    assert done.returncode == 0, done.stderr
    run = Run(out)
    args = run.config["args"]
    assert args["use_winner_preserving"] is args["scale_lr"] is args["allow_tf32"] is False
    assert args["beta_dpo"] == 123
    assert args["max_train_steps"] is None
    assert run.config["resolved"]["processes"] == 2
    assert run.config["resolved"]["pairs_per_step"] == 16
    assert run.config["resolved"]["learning_rate"] == 1e-5
    assert run.column("step") == [1, 2]
    assert run.column("loser_scale") == [1.0, 1.0]
    assert not (out / "logs").exists()


def test_the_command_trains_as_the_script_does(train, tmp_path):
    """`sdpo train --recipe NAME` in two processes, from another folder."""
    launch = f"--multi_gpu --num_processes 2 --main_process_port {free_port()}"
    environment = {"SDPO_LAUNCH_ARGS": launch, "ACCELERATE_USE_CPU": "true"}
    argv = tiny(train, "run", "sd15", report_to="none", beta_dpo=123)
    done = subprocess.run(
        [sys.executable, "-m", "sdpo.cli", "train", "--recipe", "sd15_dmpo", *argv],
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    run = Run(tmp_path / "run")
    assert run.config["resolved"]["processes"] == 2
    assert run.column("step") == [1, 2]
    found = run.config["args"]
    assert found["beta_dpo"] == 123
    for flag in RECIPES["sd15_dmpo"].keys() - REPLACED - {"beta_dpo"}:
        assert found[flag] == RECIPES["sd15_dmpo"][flag], flag


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--betadpo", "3"], "--betadpo"),
        (["--winner_preserving_mu", "3"], "--winner_preserving_mu"),
        (["--train_data_dir", "nowhere"], "--train_data_dir"),
        (["--sdxl", "--pretrained_model_name_or_path", "SD15"], "leave --sdxl out"),
    ],
)
def test_mistakes(train, tmp_path, arguments, said):
    arguments = [str(train.models["sd15"]) if a == "SD15" else a for a in arguments]
    out = tmp_path / "run"
    for launch in ("", "--cpu --num_processes 2"):
        done = script("sd15_dspo", "--output_dir", out, *arguments, SDPO_LAUNCH_ARGS=launch)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith("train.py: error: ")
        assert said in done.stderr
        assert not out.exists()


def test_python_that_is_not_there():
    done = script("sd15_dspo", SDPO_PYTHON="no-such-python")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "sd15_dspo.sh: error: SDPO_PYTHON: there is no program no-such-python"
    ]


@pytest.mark.parametrize("linked", [False, True])
def test_called_from_another_folder(train, tmp_path, linked):
    """Paths are the caller's, the default of --output_dir too; a link to the script will do."""
    here = tmp_path / "a folder"
    here.mkdir()
    (here / "pairs").symlink_to(train.pairs)
    (here / "base").symlink_to(train.models["sd15"])
    path = REPO / "scripts" / "train" / "sd15_dmpo.sh"
    if linked:
        (here / "train_it").symlink_to(path)
        path = here / "train_it"
    flags = {"pretrained_model_name_or_path": "base", "train_data_dir": "pairs"}
    flags |= {"output_dir": None, "report_to": "none", "max_train_steps": 1}
    env = {k: v for k, v in os.environ.items() if not k.startswith("SDPO_")}
    env |= {"SDPO_PYTHON": sys.executable, "SDPO_SKIP_INSTALL": "1"}
    command = ["bash", str(path), *tiny(train, None, "sd15", **flags)]
    done = subprocess.run(command, cwd=here, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    run = Run(here / "output" / "sd15_dmpo")
    assert run.column("step") == [1]
    assert run.config["args"]["train_data_dir"] == "pairs"
    assert run.config["args"]["dmpo_alpha"] == RECIPES["sd15_dmpo"]["dmpo_alpha"]


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("eval/test_sd15.sh", ["nowhere.pth"], "nowhere.pth"),
        ("eval/test_vs.sh", ["--json_a", "a.json", "--json_b", "b.json"], "a.json"),
        ("data/relabel.sh", ["--choice_model", "clip", "--train_data_dir", "none"], "none"),
        ("data/cache_latents.sh", ["--config_file", "none.yaml"], "none.yaml"),
        ("quickstart.sh", ["--nothing"], "--nothing"),
        ("lab.sh", ["--nothing"], "--nothing"),
        ("bench/step.sh", ["--nothing"], "--nothing"),
        ("bench/gpu.sh", ["--minutes", "0"], "--minutes"),
        ("pretrain_tinyworld.sh", ["--nothing"], "--nothing"),
    ],
)
def test_every_script_runs_through_a_link(tmp_path, name, arguments, said):
    (tmp_path / "link").symlink_to(REPO / "scripts" / name)
    env = {**os.environ, "SDPO_PYTHON": sys.executable, "SDPO_SKIP_INSTALL": "1"}
    command = ["bash", "link", *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "No such file" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link"]
