"""`python -m sdpo.lab audit`: against the training that it looks ahead of."""

from __future__ import annotations

import json

import pytest
import torch
from micro_bases import save_base

from sdpo.common.errors import UserError
from sdpo.lab.audit import run as audit
from sdpo.lab.audit.config import parse_config
from sdpo.lab.audit.measure import load
from sdpo.lab.audit.updates import UPDATES, WinnerErrors
from sdpo.models.loading import load_strictly

from .harness import as_argv, files

FLAGS = {
    "use_winner_preserving": True,
    "winner_preserving_mu": 0.7,
    "beta_dpo": 500,
    "learning_rate": 1e-3,
    "adam_epsilon": 1e-3,
    "checkpointing_steps": 2,
    "train_batch_size": 3,
}
SMALL = {
    "steps": 2,
    "fixed_scales": [0.5],
    "jacobian_pairs": 5,
    "spectrum_pairs": 1,
    "probes": 2,
    "lanczos": 3,
}


@pytest.fixture(scope="module")
def run(train, tmp_path_factory):
    """Three steps, with checkpoints after the second and the third."""
    return train(tmp_path_factory.mktemp("run"), **FLAGS, max_train_steps=3)


def argv(train, out, sdxl=False, **flags):
    known = train.argv(out, **FLAGS, sdxl=sdxl)
    return [*known, *as_argv({**SMALL, **flags})]


@pytest.fixture(scope="module")
def audited(train, run, tmp_path_factory):
    out = tmp_path_factory.mktemp("audit")
    assert audit.main(argv(train, out, checkpoint=run.out / "checkpoint-2")) == 0
    return out


def lines(out, name):
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


def record(batch, mode, update):
    (found,) = (r for r in batch["records"] if (r["mode"], r["update"]) == (mode, update))
    return found


def test_the_next_batch_is_that_of_the_next_step(run, audited):
    first = lines(audited, "updates")[0]
    assert sum(first["own"]["winner_error"]) / 3 == pytest.approx(
        run.column("winner_mse")[2], rel=1e-5
    )
    assert record(first, "batch", "adam")["scale"] == pytest.approx(
        run.column("loser_scale")[2], rel=1e-4
    )


def test_realised_change_is_that_of_the_step_that_training_took(train, run, audited, tmp_path):
    config = parse_config(argv(train, tmp_path, checkpoint=run.out / "checkpoint-2"))
    subject = load(config)
    inputs = subject.noised(next(iter(subject.loader)))
    load_strictly(subject.models.unet, run.unet(3), "checkpoint-3")
    after = WinnerErrors(subject.network, inputs).before
    first = lines(audited, "updates")[0]
    expected = after - torch.tensor(first["own"]["winner_error"])
    found = torch.tensor(record(first, "batch", "adam")["own"]["realised"])
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=2e-6)


def test_every_mode_and_update_is_there(audited):
    summary = json.loads((audited / "summary.json").read_text())
    modes = ["none", "fixed 0.5", "batch", "pair", "parameter", "weighted"]
    assert [(r["mode"], r["update"], r["on"]) for r in summary["updates"]] == [
        (mode, update, on) for mode in modes for update in UPDATES for on in ("own", "next")
    ]
    batches = lines(audited, "updates")
    key = ("pair", "gradient", "next")
    row = next(r for r in summary["updates"] if (r["mode"], r["update"], r["on"]) == key)
    change = [sum(record(b, "pair", "gradient")["next"]["first_order"]) for b in batches]
    error = [sum(b["next"]["winner_error"]) for b in batches]
    percent = [100 * c / e for c, e in zip(change, error, strict=True)]
    assert row["first_order"] == pytest.approx(sum(percent) / 2)
    assert row["rising_first_order"] == pytest.approx(50.0 * sum(p > 0 for p in percent))
    assert summary["jacobian"]["pairs"] == len(lines(audited, "jacobian")) == 5
    assert len(summary["spectrum"]) == 1
    pictures = ["jacobian", "spectrum"]
    pictures += [f"updates_{on}{more}" for on in ("own", "next") for more in ("", "_by_timestep")]
    for name in pictures:
        assert (audited / f"{name}.png").stat().st_size > 10_000


def test_the_next_batch_of_one_is_the_own_of_another(audited):
    first, second = lines(audited, "updates")
    assert first["next"] == second["own"]


def test_pairs_cover_the_schedule(audited):
    timesteps = [pair["timestep"] for pair in lines(audited, "jacobian")]
    assert [t // 200 for t in timesteps] == [0, 1, 2, 3, 4]


def test_goes_on_where_it_was_killed(train, run, audited, tmp_path):
    out = tmp_path / "audit"
    flags = {"checkpoint": run.out / "checkpoint-2"}
    out.mkdir()
    for name in ("updates", "jacobian"):
        text = (audited / f"{name}.jsonl").read_text()
        first, rest = text.split("\n", 1)
        # The second line was being written.
        (out / f"{name}.jsonl").write_text(first + "\n" + rest[: len(rest) // 3])
    assert audit.main(argv(train, out, **flags)) == 0
    for name in ("updates", "jacobian", "spectrum"):
        assert lines(out, name) == lines(audited, name)


def test_other_flags_are_refused_and_nothing_is_touched(train, run, audited):
    before = files(audited)
    with pytest.raises(UserError, match=r"--output_dir: .* holds an audit with --steps 2"):
        audit.main(argv(train, audited, checkpoint=run.out / "checkpoint-2", steps=3))
    assert files(audited) == before


def test_weights_without_moments(train, run, tmp_path):
    """A file of weights alone: moments are made from batches, which are then not audited."""
    flags = {"checkpoint": run.out / "checkpoint-3" / "unet.pth", "moment_batches": 2}
    assert audit.main(argv(train, tmp_path / "a", **flags, spectrum_pairs=0, steps=1)) == 0
    assert not (tmp_path / "a" / "spectrum.png").exists()
    (found,) = lines(tmp_path / "a", "updates")
    assert record(found, "none", "adam")["own"] != record(found, "none", "preconditioned")["own"]


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_from_its_base(train, family, tmp_path):
    flags = {"sdxl": family == "sdxl", "steps": 1, "moment_batches": 1, "jacobian_pairs": 2}
    if family != "sdxl":
        save_base(family, tmp_path / "base")
        flags |= {"pretrained_model_name_or_path": tmp_path / "base"}
        flags |= {"winner_preserving_scope": "batch"}
    out = tmp_path / "audit"
    assert audit.main(argv(train, out, **flags, winner_preserving_space="parameter")) == 0
    (found,) = lines(out, "updates")
    assert record(found, "batch", "gradient")["scale"] < 1
    # Model and reference are the same, and all pairs have one weight: the two demands are one.
    scales = [record(found, mode, "gradient")["scale"] for mode in ("parameter", "weighted")]
    assert scales[0] == pytest.approx(scales[1], rel=1e-4)
    longest = 1000 if family == "sdxl" else 1
    pairs = lines(out, "jacobian")
    assert [pair["bin"] for pair in pairs] == [int(p["timestep"] / longest * 10) for p in pairs]
    assert 0 < pairs[0]["timestep"] < pairs[1]["timestep"] < longest


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"steps": 0}, r"--steps must be at least 1, got 0"),
        ({"fixed_scales": [0.5, 1.5]}, r"--fixed_scales must lie between 0 and 1, got 1.5"),
        ({"spectrum_pairs": -1}, r"--spectrum_pairs must be at least 0"),
        ({"checkpoint": "nowhere"}, r"--checkpoint: nowhere is neither"),
        ({"checkpoint": "tests"}, r"--checkpoint: tests is not a complete checkpoint-N"),
        (
            {"winner_preserving_space": "parameter", "winner_preserving_scope": "pair"},
            r"--winner_preserving_scope pair",
        ),
        ({"lora_rank": 2}, r"--lora_rank: the audit does not serve it"),
        ({"use_adafactor": True}, r"--use_adafactor: the audit does not serve it"),
    ],
)
def test_bad_flags(train, tmp_path, flags, sentence, monkeypatch, repo):
    monkeypatch.chdir(repo)
    with pytest.raises(UserError, match=sentence):
        parse_config(argv(train, tmp_path, **flags))


def test_checkpoint_of_another_method_is_refused(train, run, tmp_path):
    flags = {"checkpoint": run.out / "checkpoint-2", "train_method": "dmpo"}
    sentence = "--checkpoint: .* was made with --train_method .* the file unet.pth in it"
    with pytest.raises(UserError, match=sentence):
        audit.main(argv(train, tmp_path, **flags))
