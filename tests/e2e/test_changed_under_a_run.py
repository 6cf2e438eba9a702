"""A run that resumes tells other data, and refuses another reference."""

from __future__ import annotations

import json
import shutil

import pyarrow.parquet as pq
import pytest
import torch

from .harness import Run, base_unet, files

FLAGS = {"max_train_steps": 2, "checkpointing_steps": 1}


@pytest.fixture(scope="module")
def begun(train, tmp_path_factory):
    """A run of two steps on a copy of the pairs, and a function that changes the copy's rows."""
    data = tmp_path_factory.mktemp("data") / "pairs"
    shutil.copytree(train.pairs, data)
    out = tmp_path_factory.mktemp("run") / "run"
    return train(out, **FLAGS, train_data_dir=data)


def resumed(train, begun, tmp_path, data, **flags) -> str:
    """What is said where the run goes on, on other data in the place of its own."""
    out = tmp_path / "run"
    shutil.copytree(begun.out, out)
    fork = train.fork(out, **{**FLAGS, "max_train_steps": 3, "train_data_dir": data, **flags})
    assert fork.wait() == 0, fork.stderr
    assert Run(out).checkpoints == [1, 2, 3]
    return fork.stderr


def changed(train, path, change):
    """The pairs with `change(table)` made to every file of the split train."""
    shutil.copytree(train.pairs, path)
    for file in path.rglob("*train*.parquet"):
        pq.write_table(change(pq.read_table(file)), file)
    return path


def other_column(name, value):
    def change(table):
        import pyarrow as pa

        values = table.column(name).to_pylist()
        values[3] = value(values[3])
        column = pa.array(values, table.schema.field(name).type)
        return table.set_column(table.column_names.index(name), table.schema.field(name), column)

    return change


def test_same_data_is_not_mentioned(train, begun, tmp_path):
    data = changed(train, tmp_path / "pairs", lambda table: table)
    assert "the data is not what" not in resumed(train, begun, tmp_path, data)


def test_a_stream_is_told_by_its_files(train, tmp_path):
    out, data = tmp_path / "run", tmp_path / "pairs"
    shutil.copytree(train.pairs, data)
    flags = {"streaming": True, "train_data_dir": data, "checkpointing_steps": 1}
    train(out, **flags, max_train_steps=1)
    shutil.copytree(data, tmp_path / "moved")
    fork = train.fork(out, **{**flags, "train_data_dir": tmp_path / "moved"}, max_train_steps=2)
    assert fork.wait() == 0
    assert "the data is not what" not in fork.stderr
    file = min(data.glob("train-*.parquet"))
    pq.write_table(other_column("caption", lambda text: text + " more")(pq.read_table(file)), file)
    fork = train.fork(out, **flags, max_train_steps=3)
    assert fork.wait() == 0
    assert f"the data is not what {out / 'checkpoint-2'} was trained on: " in fork.stderr
    assert " bytes, now " in fork.stderr


def test_fewer_rows(train, begun, tmp_path):
    data = changed(train, tmp_path / "pairs", lambda table: table.slice(0, table.num_rows - 4))
    now = Run(begun.out).config["resolved"]["pairs"]
    said = resumed(train, begun, tmp_path, data)
    assert (
        f"the data is not what {tmp_path / 'run' / 'checkpoint-2'} was trained on: {now} pairs, now"
        in said
    )


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("caption", lambda text: text + " more", "characters of captions, now"),
        ("caption", lambda text: text[::-1], "pairs, but other rows, labels, captions or images"),
        ("jpg_0", None, "bytes of image data, now"),
    ],
)
def test_other_content(train, begun, tmp_path, column, value, said):
    def longer(image):
        if isinstance(image, dict):
            return {**image, "bytes": image["bytes"] + b"\0"}
        return image + b"\0"

    data = changed(train, tmp_path / "pairs", other_column(column, value or longer))
    assert said in resumed(train, begun, tmp_path, data)


def test_another_reference_is_refused(train, begun, tmp_path):
    state = base_unet(train.models["sd15"])
    state["conv_out.weight"].view(-1)[77] += 1e-3
    torch.save(state, tmp_path / "other.pth")
    before = files(begun.out)
    flags = {**FLAGS, "max_train_steps": 3}
    line = train.fails(begun.out, **flags, unet_init=tmp_path / "other.pth")
    assert "checkpoint-2 was trained against another reference" in line
    assert "--unet_init None" in line
    base = tmp_path / "base"
    shutil.copytree(train.models["sd15"], base)
    from safetensors.torch import save_file

    save_file(state, base / "unet" / "diffusion_pytorch_model.safetensors")
    line = train.fails(begun.out, **flags, pretrained_model_name_or_path=base)
    assert str(train.models["sd15"]) in line
    assert files(begun.out) == before


@pytest.mark.parametrize(
    ("file", "name", "value", "said"),
    [
        ("scheduler/scheduler_config.json", "prediction_type", "v_prediction", "epsilon"),
        ("scheduler/scheduler_config.json", "beta_end", 0.02, "0.012"),
        ("unet/config.json", "norm_eps", 1e-4, "1e-05"),
    ],
)
def test_the_same_weights_with_other_settings_are_refused(
    train, begun, tmp_path, file, name, value, said
):
    base = tmp_path / "base"
    shutil.copytree(train.models["sd15"], base)
    config = json.loads((base / file).read_text())
    (base / file).write_text(json.dumps({**config, name: value}))
    before = files(begun.out)
    flags = {**FLAGS, "max_train_steps": 3, "pretrained_model_name_or_path": base}
    line = train.fails(begun.out, **flags)
    assert f"whose {name} is {said}, and the base's is {value} now" in line
    assert files(begun.out) == before


def test_the_same_weights_under_another_name_go_on(train, begun, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(train.models["sd15"], base)
    resumed(train, begun, tmp_path, train.pairs, pretrained_model_name_or_path=base)


def test_checkpoints_from_before_go_on(train, begun, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(begun.out, out)
    path = out / "checkpoint-2" / "state.json"
    state = json.loads(path.read_text())
    assert state.pop("reference") and state.pop("base") and state.pop("data")
    path.write_text(json.dumps(state))
    assert train(out, **{**FLAGS, "max_train_steps": 3}).checkpoints == [1, 2, 3]
