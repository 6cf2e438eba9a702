"""Flags that change what is trained, on what, and what is written."""

from __future__ import annotations

import math
import re
import shutil

import pytest
import torch

from .harness import base_unet, distance, identical

GUARDED = {"use_winner_preserving": True}


@pytest.fixture(scope="module")
def plain(train, tmp_path_factory):
    """A run with nothing but the defaults of these tests, to compare with."""
    return train(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def wide_pairs(pairs_dir, tmp_path_factory):
    """Pairs of 96 x 64 pixels, which have to be cropped."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    rows = pq.read_table(sorted(pairs_dir.glob("train-*.parquet"))[0]).to_pylist()
    for row in rows:
        for name in ("jpg_0", "jpg_1"):
            buffer = io.BytesIO()
            Image.open(io.BytesIO(row[name])).resize((96, 64)).save(buffer, format="PNG")
            row[name] = buffer.getvalue()
    path = tmp_path_factory.mktemp("wide")
    pq.write_table(pa.Table.from_pylist(rows), path / "train.parquet")
    return path


@pytest.mark.parametrize(
    "flags",
    [
        {"noise_offset": 0.1},
        {"input_perturbation": 0.1},
        {"no_hflip": True},
        {"proportion_empty_prompts": 1},
        {"seed": 1},
        {"beta_dpo": 100},
        {"max_train_samples": 8},
        {"adam_weight_decay": 0.5},
        {"adam_beta1": 0.5},
        {"adam_beta2": 0.5},
        {"adam_epsilon": 0.1},
        {"max_grad_norm": 1e-12},
        {"use_adafactor": True},
        {"gradient_accumulation_steps": 2},
    ],
    ids=str,
)
def test_changes_what_is_trained(train, plain, tmp_path, flags):
    run = train(tmp_path / "run", **flags)
    assert distance(run.unet(), plain.unet()) > 1e-7
    assert run.column("step") == [1, 2, 3]
    assert run.config["args"].items() >= flags.items()


@pytest.mark.parametrize("flags", [{"allow_tf32": True}, {"dmpo_alpha": 0.3}], ids=str)
def test_changes_nothing_here(train, plain, tmp_path, flags):
    assert identical(train(tmp_path / "run", **flags).unet(), plain.unet())


def test_mu_and_alpha(train, tmp_path):
    strict, mild = (
        train(tmp_path / str(mu), **GUARDED, winner_preserving_mu=mu) for mu in (0.9, 0.3)
    )
    assert strict.metrics[0]["loser_scale"] == pytest.approx(
        mild.metrics[0]["loser_scale"] * 0.1 / 0.7, rel=1e-3
    )
    a, b = (
        train(tmp_path / f"dmpo-{alpha}", train_method="dmpo", dmpo_alpha=alpha)
        for alpha in (0.01, 0.2)
    )
    assert a.metrics[0]["loss"] > b.metrics[0]["loss"]
    assert not identical(a.unet(), b.unet())


def test_dspos_form(train, tmp_path):
    """Of the base model's family where none is named. At the start u = 0 and d = 0: the SD1.5 form
    is then the winner's own error, the SDXL form (1 / 2)^2."""
    default, sd15, sdxl = (
        train(tmp_path / name, train_method="dspo", **flags)
        for name, flags in (
            ("default", {}),
            ("sd15", {"dspo_form": "sd15"}),
            ("sdxl", {"dspo_form": "sdxl"}),
        )
    )
    assert identical(default.unet(), sd15.unet())
    assert sd15.metrics[0]["loss"] == pytest.approx(sd15.metrics[0]["winner_mse"], rel=1e-5)
    assert sdxl.metrics[0]["loss"] == pytest.approx(0.25, rel=1e-6)
    other = train(tmp_path / "other", sdxl=True, train_method="dspo", dspo_form="sd15")
    assert other.metrics[0]["loss"] == pytest.approx(other.metrics[0]["winner_mse"], rel=1e-5)


def test_random_crop(train, tmp_path, wide_pairs):
    centre = train(tmp_path / "centre", train_data_dir=wide_pairs)
    random = train(tmp_path / "random", train_data_dir=wide_pairs, random_crop=True)
    assert not identical(centre.unet(), random.unet())


def test_empty_prompts_make_captions_irrelevant(train, tmp_path, wide_pairs):
    import pyarrow.parquet as pq

    other = tmp_path / "other"
    other.mkdir()
    table = pq.read_table(wide_pairs / "train.parquet")
    captions = table.column_names.index("caption")
    table = table.set_column(captions, "caption", [["a blue square"] * len(table)])
    pq.write_table(table, other / "train.parquet")
    for share, same in ((1, True), (0, False)):
        runs = [
            train(tmp_path / f"{i}-{share}", train_data_dir=data, proportion_empty_prompts=share)
            for i, data in enumerate((wide_pairs, other))
        ]
        assert identical(runs[0].unet(), runs[1].unet()) is same


def test_epochs(train, tmp_path):
    run = train(
        tmp_path / "run",
        num_train_epochs=3,
        max_train_samples=11,
        gradient_accumulation_steps=2,
    )
    # 5 batches of 2 an epoch, 15 in all, 2 a step
    assert run.column("step") == list(range(1, 9))
    assert run.config["resolved"]["max_train_steps"] == 8
    assert run.config["resolved"]["pairs"] == 11


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [1.0] * 6),
        ("constant_with_warmup", [0, 0.5, 1, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0, 0.5, *(0.5 + 0.5 * math.cos(math.pi * i / 4) for i in range(4))]),
        (
            "cosine_with_restarts",
            [0, 0.5, *(0.5 + 0.5 * math.cos(math.pi * i / 4) for i in range(4))],
        ),
        ("polynomial", [0, 0.5, 1, 0.75, 0.5, 0.25]),
    ],
)
def test_lr_scheduler(train, tmp_path, name, expected):
    run = train(
        tmp_path / "run",
        lr_scheduler=name,
        lr_warmup_steps=2,
        max_train_steps=6,
        gradient_accumulation_steps=2,
        train_batch_size=1,
    )
    assert run.column("lr") == pytest.approx([1e-4 * x for x in expected], abs=2e-7)


def test_scale_lr(train, tmp_path):
    run = train(tmp_path / "run", scale_lr=True, learning_rate=1e-6, gradient_accumulation_steps=3)
    assert run.column("lr") == pytest.approx([6e-6] * 3)


@pytest.mark.parametrize("sdxl", [False, True])
def test_gradient_checkpointing_changes_memory_alone(train, tmp_path, sdxl):
    flags = {"sdxl": sdxl, "adam_epsilon": 1e-3}
    off, on = (
        train(tmp_path / str(value), gradient_checkpointing=value, **flags)
        for value in (False, True)
    )
    base = base_unet(train.models["sdxl" if sdxl else "sd15"])
    assert distance(off.unet(), on.unet()) < 1e-3 * distance(off.unet(), base)


@pytest.mark.parametrize("sdxl", [False, True])
def test_bf16(train, tmp_path, sdxl):
    run = train(tmp_path / "run", mixed_precision="bf16", sdxl=sdxl, **GUARDED)
    full = train(tmp_path / "full", sdxl=sdxl, **GUARDED)
    first = run.metrics[0]
    # The reference, cast to bf16, computes exactly what the float32 weights under autocast do.
    assert first["margin"] == first["winner_drift"] == first["loser_drift"] == 0
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["winner_mse"] == pytest.approx(full.metrics[0]["winner_mse"], rel=0.02)
    assert first["winner_mse"] != full.metrics[0]["winner_mse"]
    weights = run.unet()
    assert {v.dtype for v in weights.values()} == {torch.float32}
    # The weights themselves are kept in float32: an update far below bf16's resolution stays.
    assert 0 < distance(weights, base_unet(train.models["sdxl" if sdxl else "sd15"])) < 1e-3


def test_fp16_without_a_device_that_can(train, tmp_path):
    line = train.fails(tmp_path / "run", mixed_precision="fp16")
    assert "--mixed_precision fp16" in line


def test_unet_init(train, plain, tmp_path):
    """A previous run's unet.pth, and its exported pipeline, as start and as reference."""
    checkpoint = plain.out / "checkpoint-3" / "unet.pth"
    runs = [
        train(tmp_path / name, unet_init=path)
        for name, path in (
            ("pth", checkpoint),
            ("pipeline", plain.out / "pipeline"),
            ("unet", plain.out / "pipeline" / "unet"),
            (
                "safetensors",
                plain.out / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors",
            ),
        )
    ]
    for run in runs:
        assert identical(run.unet(), runs[0].unet())
    first = runs[0].metrics[0]
    assert first["margin"] == pytest.approx(0, abs=1e-6)
    assert first["ref_winner_mse"] != pytest.approx(plain.metrics[0]["ref_winner_mse"], abs=1e-7)
    assert 0 < distance(runs[0].unet(), plain.unet()) < 0.01


def test_other_vae(train, plain, tmp_path, tiny_sd15):
    from sdpo.tinyworld.architecture import build_pipeline

    same = train(tmp_path / "same", pretrained_vae_model_name_or_path=tiny_sd15 / "vae")
    assert identical(same.unet(), plain.unet())
    build_pipeline("sd15", "micro", seed=9).vae.save_pretrained(tmp_path / "vae")
    other = train(tmp_path / "other", pretrained_vae_model_name_or_path=tmp_path / "vae")
    assert not identical(other.unet(), plain.unet())
    exported = base_unet_of_vae(other.out / "pipeline")
    assert identical(exported, base_unet_of_vae(tmp_path, "vae"))


def base_unet_of_vae(path, part="vae"):
    from safetensors.torch import load_file

    return load_file(path / part / "diffusion_pytorch_model.safetensors")


def test_dataset_name_may_be_a_directory(train, plain, tmp_path, pairs_dir):
    run = train(tmp_path / "run", dataset_name=pairs_dir)
    assert identical(run.unet(), plain.unet())
    assert run.numbers == plain.numbers


def test_split(train, plain, tmp_path):
    run = train(tmp_path / "run", split="heldout", train_batch_size=2)
    assert run.config["resolved"]["pairs"] <= 16 < plain.config["resolved"]["pairs"]
    assert not identical(run.unet(), plain.unet())


def test_caption_column(train, tmp_path, wide_pairs):
    import pyarrow.parquet as pq

    table = pq.read_table(wide_pairs / "train.parquet")
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    names = ["said" if name == "caption" else name for name in table.column_names]
    pq.write_table(table.rename_columns(names), renamed / "train.parquet")
    original = train(tmp_path / "a", train_data_dir=wide_pairs)
    run = train(tmp_path / "b", train_data_dir=renamed, caption_column="said")
    assert identical(run.unet(), original.unet())
    assert "--caption_column" in train.fails(tmp_path / "c", train_data_dir=renamed)


def test_dreamlike_pairs_only(train, tmp_path, wide_pairs):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pq.read_table(wide_pairs / "train.parquet").to_pylist()
    rows = [row for row in rows if row["label_0"] != 0.5]
    for i, row in enumerate(rows):
        row["model_0"] = "dreamlike-art/dreamlike-photoreal-2.0"
        row["model_1"] = row["model_0"] if i < 6 else "stabilityai/stable-diffusion-2-1"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    run = train(tmp_path / "run", train_data_dir=tmp_path, dreamlike_pairs_only=True)
    assert run.config["resolved"]["pairs"] == 6


def test_streaming(train, tmp_path):
    run = train(tmp_path / "run", streaming=True, max_train_samples=6, max_train_steps=5)
    assert run.column("epoch") == [0, 0, 0, 1, 1]
    assert run.config["resolved"]["pairs"] is None
    assert run.metrics[0]["margin"] == pytest.approx(0, abs=1e-6)


def test_home_directory(train, tmp_path, monkeypatch):
    """`--flag=~/dir` reaches the program unexpanded."""
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(train.models["sd15"], tmp_path / "base")
    train("~/run", pretrained_model_name_or_path="~/base", max_train_steps=1)
    assert (tmp_path / "run" / "checkpoint-1" / "unet.pth").is_file()


def test_config(plain, train):
    config = plain.config
    from sdpo.common.flags import build_parser
    from sdpo.config import TrainConfig

    # What says where settings come from, or that nothing is to be done, is no setting of a run.
    flags = {action.dest for action in build_parser(TrainConfig, "train.py")._actions}
    flags -= {"help", "config_file", "check_only"}
    assert config["args"].keys() == flags
    assert config["args"]["learning_rate"] == 1e-4
    assert config["args"]["resolution"] == 32
    assert config["resolved"]["family"] == "sd15"
    assert config["resolved"]["unet_parameters"] == sum(v.numel() for v in plain.unet().values())
    for package in ("torch", "diffusers", "transformers", "accelerate", "datasets"):
        assert re.match(r"\d+\.\d+", config["packages"][package])
    # None where the sources are no git checkout.
    assert config["git_revision"] is None or re.match(r"[0-9a-f]{40}", config["git_revision"])
    assert config["command"][1:] == train.argv(plain.out)
