"""Flags: which there are, what is refused and how, all without importing torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from sdpo.common.errors import UserError
from sdpo.common.flags import build_parser
from sdpo.config import TrainConfig, parse_train
from sdpo.losses import method_names
from sdpo.training.places import check_places

FLAGS = [
    "--pretrained_model_name_or_path",
    "--pretrained_vae_model_name_or_path",
    "--revision",
    "--dataset_name",
    "--dataset_config_name",
    "--train_data_dir",
    "--caption_column",
    "--split",
    "--max_train_samples",
    "--cache_dir",
    "--output_dir",
    "--seed",
    "--resolution",
    "--random_crop",
    "--no_hflip",
    "--train_batch_size",
    "--num_train_epochs",
    "--max_train_steps",
    "--gradient_accumulation_steps",
    "--gradient_checkpointing",
    "--learning_rate",
    "--scale_lr",
    "--lr_scheduler",
    "--lr_warmup_steps",
    "--use_adafactor",
    "--adam_beta1",
    "--adam_beta2",
    "--adam_weight_decay",
    "--adam_epsilon",
    "--max_grad_norm",
    "--mixed_precision",
    "--allow_tf32",
    "--dataloader_num_workers",
    "--report_to",
    "--logging_dir",
    "--tracker_project_name",
    "--checkpointing_steps",
    "--checkpoints_total_limit",
    "--resume_from_checkpoint",
    "--noise_offset",
    "--input_perturbation",
    "--sdxl",
    "--unet_init",
    "--proportion_empty_prompts",
    "--dreamlike_pairs_only",
    "--train_method",
    "--beta_dpo",
    "--dmpo_alpha",
    "--use_winner_preserving",
    "--winner_preserving_mu",
    "--winner_preserving_scope",
    "--winner_preserving_space",
    "--loser_scale_fixed",
    "--streaming",
    "--validation_prompts",
    "--validation_steps",
    "--max_bad_fraction",
    "--max_nonfinite_steps",
    "--channels_last",
    "--compile",
    "--fused_optimizer",
    "--use_8bit_adam",
    "--lora_rank",
    "--lora_alpha",
    "--lora_dropout",
    "--lora_target_modules",
    "--use_dora",
    "--use_ema",
    "--ema_decay",
    "--offload_reference",
    "--offload_text_encoders",
    "--quantize_base",
]


def run(repo, *arguments):
    return subprocess.run(
        [sys.executable, *arguments], cwd=repo, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def help_text(repo):
    answer = run(repo, "train.py", "--help")
    assert answer.returncode == 0
    return answer.stdout


@pytest.mark.parametrize("flag", FLAGS)
def test_flag_exists_and_is_listed(flag, help_text):
    known = {
        s
        for action in build_parser(TrainConfig, "train.py")._actions
        for s in action.option_strings
    }
    assert flag in known
    assert re.search(rf"{flag}\b", help_text)


def test_methods_are_listed(help_text):
    assert "{" + ",".join(method_names()) + "}" in help_text
    assert {"diffusion-dpo", "dspo", "dmpo", "sft"} <= set(method_names())


def test_the_old_name_answers_help_with_the_same_text(repo, help_text):
    assert run(repo, "-m", "sdpo.args", "--help").stdout == help_text


def test_parsing_imports_no_torch(repo, tiny_sdxl, pairs_dir, tmp_path):
    program = """
import json, sys
import train
from sdpo.common.errors import UserError
from sdpo.config import parse_train
from sdpo.training.places import check_places
config = check_places(parse_train(json.loads(sys.argv[1])))
try:
    where = ["--pretrained_model_name_or_path", "./none", "--train_data_dir", "x"]
    check_places(parse_train(where))
except UserError:
    pass
else:
    raise SystemExit("not refused")
heavy = {"torch", "numpy", "datasets", "diffusers", "transformers", "accelerate"}
print(json.dumps([config.data.resolution, sorted(heavy & set(sys.modules))]))
"""
    argv = ["--pretrained_model_name_or_path", str(tiny_sdxl), "--sdxl"]
    argv += ["--train_data_dir", str(pairs_dir), "--output_dir", str(tmp_path)]
    answer = run(repo, "-c", program, json.dumps(argv))
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout) == [64, []]


def test_defaults(tiny_sd15, pairs_dir, tmp_path):
    where = ["--pretrained_model_name_or_path", str(tiny_sd15), "--output_dir", str(tmp_path)]
    parsed = parse_train([*where, "--train_data_dir", str(pairs_dir)])
    assert (parsed.data.resolution, parsed.safeguard.winner_preserving_scope) == (None, None)
    config = check_places(parsed)
    assert config.data.resolution == 64
    assert config.optim.max_train_steps == 2000
    assert config.method.train_method == "diffusion-dpo"
    assert (config.safeguard.use_winner_preserving, config.safeguard.winner_preserving_scope) == (
        False,
        "batch",
    )
    assert (config.safeguard.winner_preserving_space, config.safeguard.loser_scale_fixed) == (
        "output",
        None,
    )
    assert config.run.resume_from_checkpoint == "latest"
    assert config.run.validation_prompts == ()


def test_the_last_of_two_flags_that_exclude_each_other_counts(make_config, pairs_dir):
    config = make_config(num_train_epochs=3)
    assert (config.optim.num_train_epochs, config.optim.max_train_steps) == (3, None)
    config = make_config(dataset_name=str(pairs_dir))
    assert (config.data.dataset_name, config.data.train_data_dir) == (str(pairs_dir), None)


def test_a_switch_can_be_taken_back(tiny_sd15, pairs_dir, tmp_path):
    argv = ["--pretrained_model_name_or_path", str(tiny_sd15), "--train_data_dir", str(pairs_dir)]
    argv += ["--output_dir", str(tmp_path), "--use_winner_preserving"]
    assert parse_train(argv).safeguard.use_winner_preserving is True
    assert (
        parse_train([*argv, "--no-use_winner_preserving"]).safeguard.use_winner_preserving is False
    )


BAD = [
    *[(name, value) for name in ("train_batch_size", "max_train_steps") for value in (0, -1)],
    *[
        (name, 0)
        for name in (
            "gradient_accumulation_steps",
            "num_train_epochs",
            "max_train_samples",
            "checkpointing_steps",
            "checkpoints_total_limit",
            "validation_steps",
            "max_nonfinite_steps",
            "learning_rate",
            "beta_dpo",
            "adam_epsilon",
            "max_grad_norm",
            "resolution",
        )
    ],
    *[
        (name, "nan")
        for name in ("beta_dpo", "learning_rate", "winner_preserving_mu", "loser_scale_fixed")
    ],
    *[(name, "inf") for name in ("beta_dpo", "noise_offset", "max_grad_norm")],
    *[(name, -1) for name in ("seed", "lr_warmup_steps", "dataloader_num_workers")],
    *[(name, -0.1) for name in ("noise_offset", "input_perturbation", "adam_weight_decay")],
    *[
        (name, value)
        for name in (
            "winner_preserving_mu",
            "loser_scale_fixed",
            "dmpo_alpha",
            "proportion_empty_prompts",
            "max_bad_fraction",
        )
        for value in (-0.01, 1.01)
    ],
    ("adam_beta1", 1.0),
    ("adam_beta2", -0.1),
    ("resolution", 100),
    ("train_method", "ppo"),
    ("winner_preserving_scope", "image"),
    ("winner_preserving_space", "latent"),
    ("mixed_precision", "fp8"),
    ("lr_scheduler", "steps"),
    ("report_to", "paper"),
    ("seed", "zero"),
    ("learning_rate", "fast"),
    ("pretrained_model_name_or_path", "./no/such/model"),
    ("pretrained_vae_model_name_or_path", "./no/such/vae"),
    ("unet_init", "no-such-file.pth"),
    ("unet_init", "no-such-file.safetensors"),
    ("unet_init", "./no/such/dir"),
    ("train_data_dir", "./no/such/data"),
    ("dataset_name", "./no/such/data"),
    ("resume_from_checkpoint", "checkpoint-500"),
    ("validation_prompts", "no-such-prompts.txt"),
    ("split", "validation"),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_value_is_refused_naming_its_flag(make_config, name, value):
    with pytest.raises(UserError) as caught:
        make_config(**{name: value})
    message = str(caught.value)
    assert f"--{name}" in message
    assert "\n" not in message


def test_bad_combinations(make_config, tiny_sd15, tmp_path):
    with pytest.raises(UserError, match=r"--use_winner_preserving .* sft"):
        make_config(train_method="sft", use_winner_preserving=True)
    with pytest.raises(UserError, match=r"--loser_scale_fixed .* sft"):
        make_config(train_method="sft", loser_scale_fixed=0)
    with pytest.raises(UserError, match=r"--loser_scale_fixed .* --use_winner_preserving"):
        make_config(loser_scale_fixed=0.5, use_winner_preserving=True)
    with pytest.raises(UserError, match=r"--winner_preserving_space .* --use_winner_preserving"):
        make_config(winner_preserving_space="parameter")
    with pytest.raises(UserError, match=r"--streaming .* --max_train_steps"):
        make_config(streaming=True, num_train_epochs=1)
    with pytest.raises(UserError, match="--dataloader_num_workers must be 0 or 1"):
        make_config(streaming=True, dataloader_num_workers=2)
    with pytest.raises(UserError, match="--dataset_name or --train_data_dir"):
        make_config(train_data_dir=None)
    with pytest.raises(UserError, match="unrecognized arguments: --made_up"):
        make_config(made_up=1)
    with pytest.raises(UserError, match="did you mean --lora_rank or --learning_rate"):
        make_config(lr=1)
    with pytest.raises(UserError, match="--pretrained_model_name_or_path"):
        parse_train(["--train_data_dir", str(tmp_path)])


def test_paths_of_the_wrong_kind(make_config, tmp_path):
    file, empty = tmp_path / "file", tmp_path / "empty"
    file.write_text("x")
    empty.mkdir()
    for name in ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path"):
        with pytest.raises(UserError, match=f"--{name}: .* is a file"):
            make_config(**{name: file})
        with pytest.raises(UserError, match=f"--{name}: .* no .*config.json"):
            make_config(**{name: empty})
    with pytest.raises(UserError, match=r"--train_data_dir: .* is a file"):
        make_config(train_data_dir=file)
    with pytest.raises(UserError, match=r"--train_data_dir: .* nothing that is read as pairs"):
        make_config(train_data_dir=empty)
    with pytest.raises(UserError, match=r"--output_dir: .* not a directory"):
        make_config(output_dir=file)
    broken = tmp_path / "broken" / "unet"
    broken.mkdir(parents=True)
    (broken / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*config\.json"):
        make_config(pretrained_model_name_or_path=broken.parent)


def test_sdxl_flag_must_fit_the_base(make_config, tiny_sd15):
    with pytest.raises(UserError, match=r"SD1\.5 UNet: leave --sdxl out"):
        make_config(pretrained_model_name_or_path=tiny_sd15, sdxl=True)
    assert make_config(sdxl=True).model.sdxl is True
    assert make_config().model.sdxl is False


def test_resume_none_refuses_an_output_dir_with_checkpoints(make_config, tmp_path):
    done = tmp_path / "run" / "checkpoint-5"
    done.mkdir(parents=True)
    assert make_config(resume_from_checkpoint="none").run.resume_from_checkpoint == "none"
    (done / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"--resume_from_checkpoint none: .* already holds"):
        make_config(resume_from_checkpoint="none")
    assert make_config(resume_from_checkpoint=done).run.resume_from_checkpoint == str(done)


def test_resuming_from_before_the_newest_checkpoint_is_refused(make_config, tmp_path):
    for step in (5, 10):
        (tmp_path / f"run/checkpoint-{step}").mkdir(parents=True)
        (tmp_path / f"run/checkpoint-{step}/state.json").write_text("{}")
    early, late = tmp_path / "run/checkpoint-5", tmp_path / "run/checkpoint-10"
    with pytest.raises(UserError, match=r"--resume_from_checkpoint: .* holds checkpoint-10, "):
        make_config(resume_from_checkpoint=early)
    assert make_config(resume_from_checkpoint=late).run.resume_from_checkpoint == str(late)
    elsewhere = make_config(resume_from_checkpoint=early, output_dir=tmp_path / "new")
    assert elsewhere.run.resume_from_checkpoint == str(early)


def test_home_is_expanded_in_paths(make_config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert make_config(output_dir="~/out").run.output_dir == str(tmp_path / "out")
    with pytest.raises(UserError, match=f"--train_data_dir: .*{tmp_path}/none"):
        make_config(train_data_dir="~/none")
    with pytest.raises(UserError, match=r"--train_data_dir: .*~nobody-of-that-name/none"):
        make_config(train_data_dir="~nobody-of-that-name/none")


def test_validation_prompts_from_a_file(make_config, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red square\n\n  spaced \n", encoding="utf-8")
    assert make_config(validation_prompts=path).run.validation_prompts == (
        "a red square",
        "  spaced ",
    )
    assert make_config(validation_prompts=["a", "b"]).run.validation_prompts == ("a", "b")
    path.write_text("\n \n")
    with pytest.raises(UserError, match="holds no prompt"):
        make_config(validation_prompts=path)


@pytest.mark.parametrize("program", [["-m", "sdpo.args"], ["train.py"]])
@pytest.mark.parametrize("argv", [["--seed", "zero"], ["--pretrained_model_name_or_path", "./no"]])
def test_a_mistake_is_one_line_on_stderr_and_code_two(repo, program, argv):
    answer = run(repo, *program, *argv)
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert re.fullmatch(r"train\.py: error: [^\n]+\n", answer.stderr)
