"""Checkpoints: whole or not there, the right ones kept, and only of the same run."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
import torch

import sdpo.training.checkpoint as checkpoint
from sdpo.common.errors import UserError
from sdpo.data.order import Place
from sdpo.training.checkpoint import (
    clear_unfinished,
    load_training,
    load_weights,
    read_progress,
    save_checkpoint,
)
from sdpo.training.checkpoint_paths import (
    checkpoint_dir,
    is_complete,
    latest_checkpoint,
    list_checkpoints,
    step_of,
)
from sdpo.training.state import Models, Progress


@pytest.fixture
def run(make_config, tmp_path):
    """(config, model, optimizer, save): a model trained a little; `save(step)` saves it."""
    config = make_config(output_dir=tmp_path)
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def save(step, limit=None):
        progress = Progress(step, Place(1, 12))
        training = {"optimizer": optimizer.state_dict()}
        models = Models(base=None, unet=model, reference=None, encoder=None)
        limited = replace(config, run=replace(config.run, checkpoints_total_limit=limit))
        return save_checkpoint(limited, progress, models, training)

    return config, model, optimizer, save


def test_round_trip(run, tmp_path):
    config, model, optimizer, save = run
    path = save(7)
    assert path == checkpoint_dir(tmp_path, 7) == tmp_path / "checkpoint-7"
    assert sorted(p.name for p in path.iterdir()) == ["optimizer.pt", "state.json", "unet.pth"]
    assert read_progress(path, config) == Progress(7, Place(1, 12))
    assert isinstance(read_progress(path, config).place, Place)

    other = torch.nn.Linear(3, 2)
    load_weights(path, other)
    restored = torch.optim.AdamW(other.parameters(), lr=0.5)
    restored.load_state_dict(load_training(path)["optimizer"])
    x = torch.randn(4, 3)
    for m, o in ((model, optimizer), (other, restored)):
        m(x).square().mean().backward()
        o.step()
    assert torch.equal(model.weight, other.weight)
    assert torch.equal(model.bias, other.bias)


def test_unet_pth_is_a_plain_state_dict(run):
    _, model, _, save = run
    state = torch.load(save(1) / "unet.pth", weights_only=True)
    assert {k: v.tolist() for k, v in state.items()} == {
        k: v.tolist() for k, v in model.state_dict().items()
    }


def test_state_holds_the_flags(run):
    config, _, _, save = run
    state = json.loads((save(1) / "state.json").read_text())
    assert state["step"] == 1
    assert state["args"]["beta_dpo"] == config.method.beta_dpo
    assert set(state["args"]) == set(config.flags())


def test_only_whole_checkpoints_are_listed(run, tmp_path):
    _, _, _, save = run
    whole = [save(2), save(10), save(9)]
    for name in ("checkpoint-11.tmp", "checkpoint-12", "checkpoint-x", "checkpoint-13-old"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-11.tmp/state.json").write_text("{}")
    (tmp_path / "checkpoint-13-old/state.json").write_text("{}")
    assert list_checkpoints(tmp_path) == [whole[0], whole[2], whole[1]]
    assert latest_checkpoint(tmp_path) == whole[1]
    assert not is_complete(tmp_path / "checkpoint-12")
    assert not is_complete(tmp_path / "checkpoint-99")
    assert list_checkpoints(tmp_path / "gone") == []
    assert latest_checkpoint(tmp_path / "gone") is None
    clear_unfinished(tmp_path)
    assert not (tmp_path / "checkpoint-11.tmp").exists()
    assert list_checkpoints(tmp_path) == [whole[0], whole[2], whole[1]]


@pytest.mark.parametrize("stage", ["unet.pth", "optimizer.pt", "state.json", "rename"])
def test_a_kill_while_writing_leaves_nothing_that_looks_whole(run, tmp_path, monkeypatch, stage):
    _, _, _, save = run
    first = save(1)

    class Killed(BaseException):
        pass

    written = []
    real_save = torch.save

    def torch_save(value, path):
        written.append(path.name)
        if path.name == stage:
            path.write_bytes(b"half")
            raise Killed
        real_save(value, path)

    def killed(*_):
        raise Killed

    monkeypatch.setattr(torch, "save", torch_save)
    if stage == "state.json":
        monkeypatch.setattr(checkpoint, "write_json", killed)
    if stage == "rename":
        monkeypatch.setattr(checkpoint, "rename_complete", killed)
    with pytest.raises(Killed):
        save(2)
    assert written
    assert list_checkpoints(tmp_path) == [first]
    monkeypatch.undo()
    second = save(2)  # over what was left
    assert list_checkpoints(tmp_path) == [first, second]
    assert torch.load(second / "unet.pth", weights_only=True)["weight"].shape == (2, 3)


def test_limit_keeps_the_newest(run, tmp_path):
    save = run[3]
    for step in (5, 10, 15):
        save(step, limit=2)
    assert [step_of(p) for p in list_checkpoints(tmp_path)] == [10, 15]
    save(20, limit=1)
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-20"]
    save(25)
    save(30)
    assert [step_of(p) for p in list_checkpoints(tmp_path)] == [20, 25, 30]


def test_a_kill_while_removing_leaves_nothing_that_looks_whole(run, tmp_path, monkeypatch):
    save = run[3]
    save(1)
    real = checkpoint.shutil.rmtree

    def killed(path, **kwargs):
        if path.exists() and "checkpoint-1" in path.name:
            (path / "optimizer.pt").unlink()
            raise KeyboardInterrupt
        real(path, **kwargs)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        save(2, limit=1)
    assert [step_of(p) for p in list_checkpoints(tmp_path)] == [2]


def test_saving_the_same_step_again_keeps_the_first(run):
    _, model, _, save = run
    path = save(3)
    with torch.no_grad():
        model.weight.zero_()
    assert save(3) == path
    assert torch.load(path / "unet.pth", weights_only=True)["weight"].abs().max() > 0


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("train_method", "dmpo"),
        ("seed", 1),
        ("use_adafactor", True),
        ("streaming", True),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(run, make_config, flag, value):
    path = run[3](1)
    with pytest.raises(UserError, match=rf"--resume_from_checkpoint: .*--{flag} .* has {value}"):
        read_progress(path, make_config(**{flag: value}))


def test_changed_flags_are_named(run, make_config, caplog):
    path = run[3](1)
    with caplog.at_level(logging.WARNING, "sdpo"):
        read_progress(path, make_config(max_train_steps=99))
        assert caplog.text == ""
        read_progress(path, make_config(beta_dpo=7.0, learning_rate=0.5))
    assert "--beta_dpo 5000.0 -> 7.0" in caplog.text
    assert "--learning_rate 1e-08 -> 0.5" in caplog.text


def test_unreadable_parts_are_one_sentence(run):
    path = run[3](1)
    for name, load in (
        ("optimizer.pt", lambda: load_training(path)),
        ("unet.pth", lambda: load_weights(path, torch.nn.Linear(3, 2))),
    ):
        (path / name).write_bytes(b"garbage")
        with pytest.raises(UserError, match=f"cannot read .*{name}"):
            load()


@pytest.mark.parametrize("text", ["", '{"step": 1, "pla', "[]", '{"step": 1}'])
def test_a_damaged_state_is_one_sentence(run, make_config, text):
    path = run[3](1)
    (path / "state.json").write_text(text)
    with pytest.raises(UserError, match=f"^{path / 'state.json'} is damaged .*delete {path}"):
        read_progress(path, make_config())


def test_a_unet_of_another_shape_is_refused(run):
    with pytest.raises(UserError, match="does not fit this UNet"):
        load_weights(run[3](1), torch.nn.Linear(4, 2))


def test_step_of():
    assert step_of(checkpoint_dir(checkpoint.Path("x"), 500)) == 500
    with pytest.raises(ValueError, match="not named checkpoint-N"):
        step_of(checkpoint.Path("checkpoint-5.tmp"))
