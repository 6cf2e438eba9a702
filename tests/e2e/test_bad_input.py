"""Mistakes are answered with one sentence and exit code 2, and lose nothing."""

from __future__ import annotations

import io
import pickle
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from .harness import Run, base_unet, files, identical, last_sentence, program


def early(train, out, **flags) -> str:
    """Run as a program; a mistake found before the heavy imports is the only line there is."""
    done = program(sys.executable, "train.py", *train.argv(out, **flags))
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert not out.exists() or out.is_file()
    return last_sentence(done.stderr)


@pytest.fixture(scope="module")
def rows(pairs_dir):
    """Decided rows of the train split."""
    found = pq.read_table(sorted(pairs_dir.glob("train-*.parquet"))[0]).to_pylist()
    return [row for row in found if row["label_0"] != 0.5]


def written(directory, rows, name="train.parquet"):
    directory.mkdir(parents=True, exist_ok=True)
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
    pq.write_table(table, directory / name)
    return directory


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"pretrained_model_name_or_path": "./nowhere"}, "--pretrained_model_name_or_path"),
        ({"sdxl": True, "pretrained_model_name_or_path": "SD15"}, "leave --sdxl out"),
        ({"pretrained_vae_model_name_or_path": "./nowhere"}, "--pretrained_vae_model_name_or_path"),
        ({"train_data_dir": "./nowhere"}, "--train_data_dir"),
        ({"dataset_name": "./nowhere"}, "--dataset_name"),
        ({"split": "validation"}, "--split"),
        ({"unet_init": "missing.pth"}, "--unet_init"),
        ({"use_winner_preserving": True, "winner_preserving_mu": 1.5}, "--winner_preserving_mu"),
        ({"winner_preserving_mu": -0.1}, "--winner_preserving_mu"),
        ({"winner_preserving_mu": "nan"}, "--winner_preserving_mu"),
        ({"winner_preserving_scope": "image"}, "--winner_preserving_scope"),
        ({"beta_dpo": 0}, "--beta_dpo"),
        ({"beta_dpo": "inf"}, "--beta_dpo"),
        ({"dmpo_alpha": 2}, "--dmpo_alpha"),
        ({"dspo_form": "sd21", "train_method": "dspo"}, "--dspo_form"),
        ({"dspo_form": "sdxl"}, "--dspo_form has no meaning with --train_method diffusion-dpo"),
        ({"train_method": "ppo"}, "--train_method"),
        ({"learning_rate": -1e-4}, "--learning_rate"),
        ({"train_batch_size": 0}, "--train_batch_size"),
        ({"resolution": 33}, "--resolution"),
        ({"resolution": 10**7}, "--resolution must be at most 16384"),
        ({"dataloader_num_workers": 10**5}, "--dataloader_num_workers must be at most 1024"),
        ({"learning_rate": 1e300}, "--learning_rate must be at most 3.4e38 in size"),
        ({"proportion_empty_prompts": 1.2}, "--proportion_empty_prompts"),
        ({"streaming": True, "num_train_epochs": 1}, "--max_train_steps"),
        ({"streaming": True, "dataloader_num_workers": 2}, "--dataloader_num_workers"),
        ({"validation_prompts": "missing.txt"}, "--validation_prompts"),
        ({"resume_from_checkpoint": "./nowhere"}, "--resume_from_checkpoint"),
        ({"lr_scheduler": "exponential"}, "--lr_scheduler"),
        ({"max_train_steps": "many"}, "--max_train_steps"),
        ({"unheard_of": 1}, "--unheard_of"),
    ],
    ids=str,
)
def test_found_before_the_heavy_imports(train, tmp_path, flags, said):
    for family in ("sd15", "sdxl"):
        if flags.get("pretrained_model_name_or_path") == family.upper():
            flags = {**flags, "pretrained_model_name_or_path": train.models[family]}
    assert said in early(train, tmp_path / "run", **flags)


def test_data_missing_and_empty(train, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "--train_data_dir" in early(train, tmp_path / "run", train_data_dir=None)
    assert "--train_data_dir" in early(train, tmp_path / "run", train_data_dir=tmp_path / "empty")


def test_output_dir_is_a_file(train, tmp_path):
    out = tmp_path / "file"
    out.write_text("kept")
    assert "--output_dir" in early(train, out)
    assert out.read_text() == "kept"


def test_hub_ids_without_network(train, tmp_path):
    line = train.fails(tmp_path / "a", pretrained_model_name_or_path="nobody/no-model")
    assert "--pretrained_model_name_or_path" in line
    assert "nobody/no-model" in line
    line = train.fails(tmp_path / "b", dataset_name="nobody/no-pairs")
    assert "--dataset_name" in line
    assert "nobody/no-pairs" in line
    line = train.fails(tmp_path / "c", pretrained_vae_model_name_or_path="nobody/no-vae")
    assert "--pretrained_vae_model_name_or_path" in line
    line = train.fails(tmp_path / "d", unet_init="nobody/no-unet")
    assert "--unet_init" in line


@pytest.mark.parametrize("streaming", [False, True])
def test_data(train, tmp_path, rows, streaming):
    flags = {"streaming": streaming, "max_train_steps": 3}

    def line(name, table):
        data = written(tmp_path / name, table)
        return train.fails(tmp_path / "run", train_data_dir=data, **flags)

    table = pa.Table.from_pylist(rows)
    assert "jpg_1" in line("column", table.drop_columns(["jpg_1"]))
    assert "label_0" in line("label", table.drop_columns(["label_0"]))
    assert "--caption_column" in line("caption", table.drop_columns(["caption"]))
    ties = [{**row, "label_0": 0.5} for row in rows]
    assert "pair" in line("ties", ties)
    odd = [*rows[:3], {**rows[3], "label_0": 1.7}, *rows[4:]]
    said = line("odd", odd)
    assert "row 3" in said
    assert "1.7" in said
    assert "--train_batch_size" in line("few", rows[:1])
    numbers = table.drop_columns(["caption"]).append_column("caption", pa.array([1.5] * len(table)))
    assert "--caption_column" in line("numbers", numbers)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_truncated_parquet(train, tmp_path, rows):
    data = written(tmp_path / "data", rows)
    whole = (data / "train.parquet").read_bytes()
    (data / "train.parquet").write_bytes(whole[: len(whole) // 2])
    assert "--train_data_dir" in train.fails(tmp_path / "run", train_data_dir=data)


def test_batch_larger_than_the_data(train, tmp_path):
    line = train.fails(tmp_path / "run", train_batch_size=8, max_train_samples=5)
    assert "--train_batch_size" in line
    assert "5" in line


class Evil:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_unet_init(train, tmp_path):
    good = base_unet(train.models["sd15"])
    out = tmp_path / "run"

    def line(name, **flags):
        return train.fails(out, unet_init=tmp_path / name, **flags)

    torch.save(good, tmp_path / "good.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "good.pth").read_bytes()[:5000])
    assert "cut.pth" in line("cut.pth")
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"a": Evil(tmp_path / "ran")}))
    torch.save({"a": Evil(tmp_path / "ran")}, tmp_path / "evil2.pth")
    assert "evil.pth" in line("evil.pth")
    assert "evil2.pth" in line("evil2.pth")
    assert not (tmp_path / "ran").exists()
    assert "family" in line("good.pth", sdxl=True)
    torch.save({k: v for k, v in good.items() if "mid_block" not in k}, tmp_path / "part.pth")
    assert "missing" in line("part.pth")
    torch.save({"step": 3}, tmp_path / "other.pth")
    assert "other.pth" in line("other.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    assert "cut.safetensors" in line("cut.safetensors")
    assert "--unet_init" in train.fails(out, unet_init=train.models["sdxl"])


def test_nonfinite_from_the_start(train, tmp_path):
    bad = base_unet(train.models["sd15"])
    bad["conv_out.bias"][0] = 3e38  # its square is not finite
    torch.save(bad, tmp_path / "bad.pth")
    out = tmp_path / "run"
    flags = {"max_nonfinite_steps": 2, "checkpointing_steps": 1, "max_train_steps": 9}
    line = train.fails(out, unet_init=tmp_path / "bad.pth", **flags)
    assert "3 steps in a row" in line
    assert "--max_nonfinite_steps 2" in line
    assert "none yet" in line
    assert Run(out).checkpoints == []
    # What is known of the steps that failed: they were skipped, and JSON stayed JSON.
    assert Run(out).column("loss") == [None] * len(Run(out).metrics)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_weights_that_are_not_finite(train, tmp_path, value):
    bad = base_unet(train.models["sd15"])
    bad["conv_out.bias"][0] = float(value)
    torch.save(bad, tmp_path / "bad.pth")
    line = train.fails(tmp_path / "run", unet_init=tmp_path / "bad.pth")
    assert "bad.pth is broken: its weight conv_out.bias" in line
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_nonfinite_later_keeps_the_last_good_checkpoint(train, tmp_path):
    out = tmp_path / "run"
    flags = {"checkpointing_steps": 1, "use_adafactor": True, "max_nonfinite_steps": 3}
    good = train(out, **flags, max_train_steps=2)
    before = files(out / "checkpoint-2")
    line = train.fails(out, **flags, learning_rate=1e38, max_train_steps=30)
    assert "4 steps in a row" in line
    run = Run(out)
    last = run.checkpoints[-1]
    assert f"checkpoint-{last}" in line
    assert files(out / "checkpoint-2") == before
    # Every checkpoint that is there was written after a finite step.
    losses = {entry["step"]: entry["loss"] for entry in run.metrics}
    assert losses[last] is not None
    assert any(loss is None for loss in losses.values())
    assert good.unet(2).keys() == run.unet(last).keys()


def test_too_many_bad_images(train, tmp_path, rows):
    broken = [{**row, "jpg_0": row["jpg_0"][:60]} for row in rows]
    data = written(tmp_path / "all", broken)
    line = train.fails(tmp_path / "run", train_data_dir=data)
    assert "cannot be decoded" in line
    data = written(tmp_path / "some", [*broken[:5], *rows[5:]])
    for flags in ({}, {"dataloader_num_workers": 1}, {"streaming": True}):
        line = train.fails(
            tmp_path / "run",
            train_data_dir=data,
            max_train_steps=40,
            checkpointing_steps=5,
            **flags,
        )
        assert "--max_bad_fraction" in line
        for path in (tmp_path / "run").glob("checkpoint-*"):
            for file in path.iterdir():
                file.unlink()
            path.rmdir()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_few_bad_images(train, tmp_path, rows, streaming):
    empty = io.BytesIO()
    Image.new("RGB", (4, 4)).save(empty, format="PNG")
    used = [dict(row) for row in rows[:10]]
    used[4]["jpg_1"] = b"not an image"
    used[7]["jpg_0"] = None
    data = written(tmp_path / "data", used)
    out = tmp_path / "run"
    fork = train.fork(
        out, train_data_dir=data, max_train_steps=10, streaming=streaming, max_bad_fraction=0.01
    )
    assert fork.wait() == 0, fork.stderr
    run = Run(out)
    assert sum(run.column("bad_rows")) == 2
    for row in (4, 7):
        assert fork.stderr.count(f"row {row} skipped") == 1
    assert len(run.metrics) == 10
    again = train(tmp_path / "again", train_data_dir=data, max_train_steps=10, streaming=streaming)
    assert identical(again.unet(), run.unet())


def test_failures_leave_a_run_as_it_was(train, tmp_path):
    out = tmp_path / "run"
    train(out, checkpointing_steps=1)
    before = files(out)
    for flags in (
        {"train_data_dir": "./nowhere"},
        {"pretrained_model_name_or_path": "nobody/no-model"},
        {"dataset_name": "nobody/no-pairs"},
        {"seed": 4},
        {"max_train_samples": 1},
        {"unet_init": "nobody/no-unet"},
        {"mixed_precision": "fp16"},
    ):
        train.fails(out, **flags)
        assert files(out) == before, flags
