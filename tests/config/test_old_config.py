"""A config.json that the version before the typed settings wrote (commit 6175d9c)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from sdpo.common.flags import flag_names
from sdpo.config import TrainConfig
from sdpo.evaluation.heldout import HeldoutConfig, run_config
from sdpo.training.checkpoint import read_progress

OLD = Path(__file__).with_name("config-6175d9c.json")
ARGS = json.loads(OLD.read_text(encoding="utf-8"))["args"]
# Flags that came since, at their defaults.
NOW = {
    **ARGS,
    "lora_init": None,
    "single_file_config": None,
    "columns": [],
    "image_root": None,
    "min_agreement": None,
    "push_to_hub": False,
    "hub_model_id": None,
    "hub_private_repo": False,
    "resize": "crop",
    "cache_reference": None,
    "quantize_base": None,
    "offload_text_encoders": False,
    "losers_one_in": 1,
    **dict.fromkeys(("time_sampling", "time_mean", "time_std", "time_shift")),
}


def test_its_flags_are_today_s_and_say_the_same():
    assert set(ARGS) <= set(flag_names(TrainConfig))
    assert TrainConfig.from_flags(ARGS).flags() == NOW


def test_flags_that_it_lacks_have_their_defaults():
    fewer = {name: value for name, value in ARGS.items() if name not in ("dspo_form", "use_ema")}
    fewer["a_flag_that_went"] = 3
    assert TrainConfig.from_flags(fewer).flags() == NOW


def test_heldout_evaluation_reads_it(tmp_path):
    (tmp_path / "config.json").write_bytes(OLD.read_bytes())
    asked = HeldoutConfig(run=tmp_path, train_data_dir="elsewhere", split="heldout", max_pairs=7)
    found = run_config(asked).flags()
    changed = {name: found[name] for name in found if found[name] != NOW[name]}
    assert changed == {
        "train_data_dir": "elsewhere",
        "split": "heldout",
        "max_train_samples": 7,
        "streaming": True,  # "elsewhere" is no directory here
        "proportion_empty_prompts": 0.0,
    }


def test_its_checkpoints_are_of_the_same_run(tmp_path, caplog):
    state = {"step": 144, "place": [1, 724], "args": ARGS}
    (tmp_path / "state.json").write_text(json.dumps(state))
    config = TrainConfig.from_flags(ARGS)
    assert read_progress(tmp_path, config).step == 144
    assert caplog.text == ""
    # The same command today leaves the kernel to torch: it goes on, and says so.
    today = replace(config, optim=replace(config.optim, fused_optimizer=None))
    assert read_progress(tmp_path, today).step == 144
    assert "--fused_optimizer False -> None" in caplog.text
    longer = replace(config, optim=replace(config.optim, max_train_steps=200))
    assert read_progress(tmp_path, longer).place == (1, 724)
