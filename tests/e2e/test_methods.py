"""Every method, with and without the safeguard, on both families: what a short run leaves."""

from __future__ import annotations

import math

import pytest

from .harness import base_unet, distance, identical

METRICS = {
    "step",
    "epoch",
    "loss",
    "winner_mse",
    "loser_mse",
    "ref_winner_mse",
    "ref_loser_mse",
    "winner_drift",
    "loser_drift",
    "margin",
    "implicit_acc",
    "loser_scale",
    "loser_scale_min",
    "lr",
    "grad_norm",
    "pairs_per_s",
    "peak_memory_gib",
    "nonfinite_steps",
    "bad_rows",
}
# DSPO's SD1.5 form wants a small beta; here large enough for the loser to be felt.
BETA = {"diffusion-dpo": 5000, "dmpo": 2000, "dspo": 20, "sft": 5000}
SAFEGUARDS = {
    "off": {},
    "batch": {
        "use_winner_preserving": True,
        "winner_preserving_mu": 0.9,
        "winner_preserving_scope": "batch",
    },
    "pair": {
        "use_winner_preserving": True,
        "winner_preserving_mu": 0.9,
        "winner_preserving_scope": "pair",
    },
}
FIRST_LOSS = {
    "diffusion-dpo": math.log(2),
    # KL(Bernoulli(1/2) || Bernoulli(0.99))
    "dmpo": 0.5 * math.log(0.5 / 0.99) + 0.5 * math.log(0.5 / 0.01),
}
FAMILIES = ("sd15", "sdxl", "sd3")


@pytest.fixture(scope="module")
def runs(train, tmp_path_factory):
    """`runs(family, method, safeguard)`: a run of 3 steps, made once. Without weight decay, a
    weight only moves where a gradient reaches it."""
    made = {}

    def run(family: str, method: str, safeguard: str = "off"):
        key = (family, method, safeguard)
        if key not in made:
            made[key] = train(
                tmp_path_factory.mktemp("run"),
                pretrained_model_name_or_path=train.models[family],
                train_method=method,
                beta_dpo=5000 if (family, method) == ("sdxl", "dspo") else BETA[method],
                train_batch_size=4,
                gradient_accumulation_steps=2,
                adam_weight_decay=0,
                **SAFEGUARDS[safeguard],
            )
        return made[key]

    return run


def check_metrics(run, pairs_per_step: int) -> None:
    """What holds in every run, whatever the method."""
    metrics = run.metrics
    assert [entry["step"] for entry in metrics] == [1, 2, 3]
    for entry in metrics:
        assert set(entry) >= METRICS
        assert all(math.isfinite(v) for v in entry.values() if not isinstance(v, dict | list))
        check_by_timestep(entry, pairs_per_step)
        assert entry["winner_drift"] == pytest.approx(
            entry["winner_mse"] - entry["ref_winner_mse"], abs=1e-6
        )
        assert entry["loser_drift"] == pytest.approx(
            entry["loser_mse"] - entry["ref_loser_mse"], abs=1e-6
        )
        assert entry["margin"] == pytest.approx(
            entry["winner_drift"] - entry["loser_drift"], abs=1e-6
        )
        assert entry["implicit_acc"] * pairs_per_step == pytest.approx(
            round(entry["implicit_acc"] * pairs_per_step)
        )
        assert 0.0 <= entry["implicit_acc"] <= 1.0
        assert entry["lr"] == pytest.approx(1e-4)
        assert entry["grad_norm"] > 0
        assert entry["pairs_per_s"] > 0
        assert 0.01 < entry["peak_memory_gib"] < 1000
        assert entry["nonfinite_steps"] == entry["bad_rows"] == entry["epoch"] == 0
    first = metrics[0]
    assert first["margin"] == pytest.approx(0, abs=1e-6)
    assert first["winner_mse"] == pytest.approx(first["ref_winner_mse"], abs=1e-6)
    assert abs(metrics[1]["winner_drift"]) + abs(metrics[1]["loser_drift"]) > 1e-5


def check_by_timestep(entry, pairs_per_step: int) -> None:
    """The ten bins together are the step: their means, weighted, give its means."""
    bins = entry["by_timestep"]
    assert sum(bins["pairs"]) == pairs_per_step
    for name in ("winner_drift", "loser_drift", "loser_scale"):
        assert [v is None for v in bins[name]] == [n == 0 for n in bins["pairs"]]
        total = sum(n * v for n, v in zip(bins["pairs"], bins[name], strict=True) if n)
        assert total / pairs_per_step == pytest.approx(entry[name], abs=1e-6)


@pytest.mark.parametrize("safeguard", SAFEGUARDS)
@pytest.mark.parametrize("method", ["diffusion-dpo", "dspo", "dmpo"])
@pytest.mark.parametrize("family", FAMILIES)
def test_preference_method(runs, train, family, method, safeguard):
    run = runs(family, method, safeguard)
    check_metrics(run, pairs_per_step=8)

    first = run.metrics[0]
    if method in FIRST_LOSS:
        assert first["loss"] == pytest.approx(FIRST_LOSS[method], abs=1e-5)
    elif family != "sdxl":
        assert first["loss"] == pytest.approx(first["winner_mse"], rel=1e-5)
    else:
        assert first["loss"] == pytest.approx(0.25, abs=1e-5)

    scales, least = run.column("loser_scale"), run.column("loser_scale_min")
    if safeguard == "off":
        assert scales == least == [1.0] * 3
    else:
        assert all(0 < low <= mean < 1 for low, mean in zip(least, scales, strict=True))
        # Winner, loser and noise are alike at random weights, so lam is close to 1 - mu.
        assert scales[0] == pytest.approx(0.1, abs=0.05)
    if safeguard == "pair":
        assert least[0] < scales[0]
    # A scale a pair, or one for each of two micro-batches.
    for entry in run.metrics:
        assert sum(entry["loser_scale_histogram"]) == (8 if safeguard == "pair" else 2)
    if safeguard == "off":
        assert run.metrics[0]["loser_scale_histogram"][-1] == 2

    base = base_unet(train.models[family])
    trained = run.unet()
    assert trained.keys() == base.keys()
    moved = [name for name in base if not trained[name].equal(base[name])]
    # Of a transformer the last block leaves the captions alone, and the positions are fixed.
    assert len(moved) > 0.94 * len(base), sorted(base.keys() - set(moved))
    assert distance(trained, base) < 10 * 3 * 1e-4

    # The reference stays what it was: its errors are those that any other run sees.
    other = runs(family, "sft")
    for name in ("ref_winner_mse", "ref_loser_mse"):
        assert run.column(name) == pytest.approx(other.column(name), rel=1e-5)
    if safeguard != "off":
        assert not identical(trained, runs(family, method, "off").unet())


@pytest.mark.parametrize("family", FAMILIES)
def test_scopes_differ(runs, family):
    batch, pair = (runs(family, "diffusion-dpo", scope) for scope in ("batch", "pair"))
    assert not identical(batch.unet(), pair.unet())


@pytest.mark.parametrize("family", FAMILIES)
def test_sft(runs, family):
    run = runs(family, "sft")
    check_metrics(run, pairs_per_step=8)
    assert run.column("loss") == pytest.approx(run.column("winner_mse"), rel=1e-6)
    assert run.column("loser_scale") == [1.0] * 3
    assert not identical(run.unet(), runs(family, "diffusion-dpo").unet())


def test_sft_refuses_the_safeguard(train, tmp_path):
    line = train.fails(tmp_path / "run", train_method="sft", use_winner_preserving=True)
    assert "--use_winner_preserving" in line
    assert not (tmp_path / "run").exists()


def test_safeguard_holds_winners_where_the_plain_loss_lets_them_go(train, tmp_path):
    """Averaged over the later steps of the same course of pairs, timesteps and noise."""
    common = {"max_train_steps": 40, "train_batch_size": 8, "max_train_samples": 32}
    plain = train(tmp_path / "plain", **common)
    guarded = train(
        tmp_path / "guarded",
        use_winner_preserving=True,
        winner_preserving_mu=1.0,
        winner_preserving_scope="pair",
        **common,
    )

    def late_drift(run):
        return sum(run.column("winner_drift")[20:]) / 20

    assert late_drift(guarded) < late_drift(plain)
    assert late_drift(guarded) < 0
    assert guarded.column("loser_scale") == [0.0] * 40
