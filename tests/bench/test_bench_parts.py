"""safeguard.py, data.py, score.py and cost_model.py at their smallest: what their files promise."""

from __future__ import annotations

import contextlib
import io
import json

import pytest
from e2e.harness import run_here

from scripts.bench import cost_model, evaluate, score, score_worker
from sdpo.common.errors import UserError
from sdpo.evaluation import evaluate as evaluate_program

ABOUT = {"benchmark", "machine", "command", "date", "versions"}
SPREAD = {"median", "quartile_1", "quartile_3", "least", "largest", "count"}


def run(name, out, *argv):
    assert run_here(f"scripts/bench/{name}.py", [*argv, "--out", out]) == 0
    found = json.loads(out.read_text())
    assert found.keys() >= ABOUT
    return found


def test_safeguard(tmp_path):
    step = {
        "settings": {"base": "sd15", "batch": 1, "resolution": 64},
        "variants": {"plain": {"seconds": {"median": 2.0}}},
    }
    (tmp_path / "step.json").write_text(json.dumps(step))
    argv = ["--shapes", "2x8", "1x8", "--repeats", 3, "--step_repeats", 2]
    found = run("safeguard", tmp_path / "x.json", *argv, "--step_json", tmp_path / "step.json")
    first, second = found["shapes"]
    assert (first["pairs"], first["side"]) == (2, 8)
    assert first["loss_seconds"].keys() == first["steps"]["tiny"].keys() == SPREAD
    assert first["share_of_step"].keys() == {"tiny"}
    # The true step is looked up by its size.
    share = second["share_of_step"]["step.py sd15"]
    for scope in ("batch", "pair"):
        rule = second["rule_seconds"][scope]["median"]
        assert rule > 0 and share[scope] == pytest.approx(rule / 2.0)
        assert second["overhead_seconds"][scope].keys() == SPREAD


def test_data(tmp_path):
    argv = ["--resolution", 64, "--rows", 8, "--batch", 2, "--batches", 1, "--turns", 2]
    found = run("data", tmp_path / "x.json", *argv)
    sources = {entry["source"]: entry for entry in found["sources"]}
    assert set(sources) == {"parquet", "streaming", "cache"}
    for entry in sources.values():
        assert entry["pairs_per_s"]["median"] > 0 and entry["pairs_per_s"]["count"] == 2
        assert entry["kib_per_pair_on_disk"] > 1
    assert sources["parquet"]["to_parquet"]["median"] == 1.0


def test_generate(tiny_sd15, tmp_path):
    argv = ["--base", tiny_sd15, "--prompts", 2, "--batch_size", 2, "--steps", 2, "--turns", 2]
    found = run("generate", tmp_path / "x.json", *argv, "--resolution", 32)["ways"]
    assert found.keys() == {"one by one", "pipeline", "paper"}
    for way in found.values():
        assert way["seconds_an_image"]["median"] > 0
        assert way["to_one_by_one"].keys() == SPREAD
    assert found["one by one"]["to_one_by_one"]["median"] == 1


def test_generate_takes_sides_of_the_base_alone(tiny_sd3):
    argv = ["--base", tiny_sd3, "--resolution", 72]
    with pytest.raises(UserError, match="must be a multiple of 16 with a base of SD3, got 72"):
        run_here("scripts/bench/generate.py", argv)


def test_losers(tiny_sd15, tmp_path):
    argv = ["--base", tiny_sd15, "--pairs", 4, "--resolution", 32, "--turns", 2, "--batches", 4]
    found = run("losers", tmp_path / "x.json", *argv)["one_in"]
    assert found.keys() == {"1", "2", "4"}
    assert found["1"]["added_variance"] == 0 < found["2"]["added_variance"]
    assert found["2"]["added_variance"] < found["4"]["added_variance"]
    assert found["4"]["to_all"].keys() == SPREAD


def test_score(tmp_path, monkeypatch):
    def here(manifest, scorers, weights):
        """`score.run` without the seconds of starting a process."""
        mine = [w for w in weights if w.partition("=")[0].partition(".")[0] in scorers]
        argv = [manifest, "--outdir", manifest.parent / "s", "--scorers", *scorers]
        output = io.StringIO()
        with contextlib.redirect_stdout(output), monkeypatch.context() as patch:
            patch.setattr("sys.argv", ["score.py", *map(str, argv), "--weights", *mine])
            assert score_worker.main() == 0
        return {**json.loads(output.getvalue().splitlines()[-1]), "wall": 1.0}

    monkeypatch.setattr(score, "run", here)
    argv = ["--images", 2, "--resolution", 32, "--turns", 1, "--scorers", "pickscore", "aesthetics"]
    found = run("score", tmp_path / "x.json", *argv)
    one, apart = found["ways"]["one pass"], found["ways"]["one process each"]
    assert (one["decoded"], apart["decoded"]) == (2, 4)
    assert one["wall_to_apart"]["median"] == 0.5
    assert one["seconds"].keys() == SPREAD


def test_evaluate(tmp_path, monkeypatch):
    seen = []

    def here(argv, outdir):
        """One that does not start processes, of which tests/evaluation/test_beside.py are."""
        assert evaluate_program.parse_args([*argv, "--outdir", str(outdir)])
        seen.append("--score_beside" in argv)

    monkeypatch.setattr(evaluate, "evaluate", here)
    found = run("evaluate", tmp_path / "x.json", "--images", 2, "--turns", 2, "--scorers", "oracle")
    assert seen == [False, True, True, False]
    assert found["ways"]["scored beside"]["to_afterwards"].keys() == SPREAD
    assert found["ways"]["scored afterwards"]["to_afterwards"]["median"] == 1


def test_cost_model_agrees_with_known_counts():
    flops = cost_model.count("sd15")
    # Published multiply-adds of SD1.5's UNet at 64 x 64 latents are about 0.4e12 a sample.
    assert flops.unet == pytest.approx(0.80e12, rel=0.02)
    # A convolution of the VAE's first level: 128 x 128 x 3 x 3 multiply-adds a pixel.
    assert flops.vae > 4 * 2 * 128 * 128 * 9 * 512**2
    assert flops.text == pytest.approx(2 * 77 * 85e6, rel=0.1)  # 85 M weights beside embeddings


def test_what_a_pair_s_samples_have_in_common():
    # Keys and values of 77 tokens of 768 numbers in 16 blocks, 12,480 channels in all; a sample's
    # time through two layers of 1280 and one more in each of 22 residual blocks.
    keys = 2 * 2 * 77 * 768 * 12_480
    time = 2 * (320 * 1280 + 1280 * 1280 + 1280 * 20_160)
    share = cost_model.common_share("sd15")
    assert share == pytest.approx((keys + time) / cost_model.count("sd15").unet, rel=0.02)


def test_what_scoring_costs():
    found = cost_model.scorer_flops()
    # ViT-H/14: 257 patches through 632 M weights, 77 tokens through the 302 M of the text's layers,
    # and in each layer the products of queries with keys and of shares with values.
    attention = 32 * 4 * 257**2 * 1280 + 24 * 4 * 77**2 * 1024
    expected = 2 * 257 * 632e6 + 2 * 77 * 302e6 + attention
    assert found["clip"] == found["pickscore"] == found["hpsv2"]
    assert found["clip"] == pytest.approx(expected, rel=0.02)
    assert found["aesthetics"] == pytest.approx(2 * 257 * 303e6 + 24 * 4 * 257**2 * 1024, rel=0.02)
    # ViT-L/16, and BERT-base over 35 tokens, whose cross attention takes keys of all patches.
    vision = 2 * 197 * 303e6 + 24 * 4 * 197**2 * 1024
    text = 12 * (2 * 35 * (6 * 768**2 + 2 * 768 * 3072) + 2 * 197 * 2 * 1024 * 768)
    assert found["imagereward"] == pytest.approx(vision + text, rel=0.03)
    f = cost_model.Flops(unet=10.0, vae=7.0, text=1.0)
    one, two = (cost_model.image_flops("sd15", f, steps) for steps in (1, 2))
    assert two - one == 20 and one > 1e12


def test_cost_model_arithmetic():
    f = cost_model.Flops(unet=10.0, vae=7.0, text=1.0)
    plain = cost_model.pair_flops(f, checkpointing=False, cached=False, lora=False)
    assert plain == 2 * 10 * (3 + 1) + 2 * 7 + 1
    assert cost_model.pair_flops(f, True, True, False) == 2 * 10 * (4 + 1)
    assert cost_model.pair_flops(f, False, True, True) == 2 * 10 * (2 + 1)
    assert cost_model.PAIRS == 2000 * 2048
    hours = cost_model._hours(8 * 989e12 * 0.4 * 3600 * 2, 0.4)
    assert hours["H100"] == pytest.approx(2)


@pytest.mark.parametrize(
    ("name", "argv", "sentence"),
    [
        ("safeguard", ["--shapes", "8by64"], "--shapes: 8by64 is not PAIRSxSIDE"),
        ("safeguard", ["--step_json", "nowhere.json"], "--step_json: there is no file"),
        ("data", ["--rows", 3], "--rows must be at least"),
        ("data", ["--resolution", 100], "--resolution must be a multiple of 16"),
        ("score", ["--turns", 0], "--turns must be at least 1"),
        ("cost_model", ["--utilisation", 0], "--utilisation must be above 0"),
        ("losers", ["--out", "."], r"--out: \. is a directory; give a file"),
        ("gpu", ["--tiny", "--out", __file__], r"--out: cannot make \S+ \(File exists\)"),
    ],
)
def test_bad_bench_flags(name, argv, sentence):
    with pytest.raises(UserError, match=sentence):
        run_here(f"scripts/bench/{name}.py", argv)
