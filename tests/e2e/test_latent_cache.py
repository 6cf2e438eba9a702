"""--cache_dir_latents and scripts/data/cache_latents.sh: the same training without the encoders."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time

import numpy as np
import pytest
from PIL import Image

from sdpo.common.errors import UserError

from .harness import (
    Forked,
    as_argv,
    base_unet,
    distance,
    files,
    identical,
    last_sentence,
    program,
    run_here,
)

# So large an epsilon keeps AdamW from blowing up differences of rounding where gradients are tiny.
FLAGS = {
    "max_train_steps": 4,
    "learning_rate": 1e-3,
    "adam_epsilon": 1.0,
    "use_winner_preserving": True,
    "proportion_empty_prompts": 0.3,
}
FAMILIES = {
    "sd15": {"train_method": "dspo", "beta_dpo": 0.001},
    "sdxl": {"train_method": "diffusion-dpo", "beta_dpo": 100.0, "sdxl": True},
}


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request, train, tmp_path_factory):
    """(flags, cache directory, a run from images, one that built the cache, one that found it)."""
    flags = {**FLAGS, **FAMILIES[request.param]}
    root = tmp_path_factory.mktemp(request.param)
    cached = {**flags, "cache_dir_latents": root / "latents", "cache_dtype": "fp32"}
    plain = train(root / "plain", **flags)
    built = train(root / "built", **cached)
    return cached, root / "latents", plain, built, train(root / "found", **cached)


@pytest.fixture(scope="module")
def sd15(train, tmp_path_factory):
    """Flags of a run from a float32 cache of SD1.5 that is there, and the cache."""
    where = tmp_path_factory.mktemp("sd15")
    flags = {**FLAGS, **FAMILIES["sd15"], "cache_dtype": "fp32"}
    train(where / "run", **flags, cache_dir_latents=where / "latents")
    return flags, where / "latents"


def relative(found, wanted):
    return np.abs(np.array(found) / np.array(wanted) - 1).max()


def test_float32_trains_as_from_images(trained, train):
    """Losses and gradient norms to float32's rounding of sums over pixels (beta 100 times 2^-24
    times the error of order 1 for DPO), weights to a unit in the last place."""
    flags, _, plain, built, found = trained
    assert identical(built.unet(), found.unet())
    assert built.numbers == found.numbers
    assert relative(built.column("loss"), plain.column("loss")) < 2e-5
    assert relative(built.column("grad_norm")[:1], plain.column("grad_norm")[:1]) < 1e-5
    moved = distance(plain.unet(), base_unet(train.models["sdxl" if "sdxl" in flags else "sd15"]))
    assert moved > 3e-5
    assert distance(built.unet(), plain.unet()) < 2e-3 * moved


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_bf16_is_close(trained, train, tmp_path, precision):
    flags, _, plain, _, _ = trained
    changed = {**flags, "cache_dtype": "bf16", "mixed_precision": precision}
    if precision != "no":
        plain = train(tmp_path / "plain", **{**changed, "cache_dir_latents": None})
    run = train(tmp_path / "run", **{**changed, "cache_dir_latents": tmp_path / "latents"})
    # What a VAE gives in bf16 is kept as it is.
    bound = 0.01 if precision == "no" else 1e-3
    assert relative(run.column("loss"), plain.column("loss")) < bound
    if precision == "no":
        assert run.column("grad_norm") != plain.column("grad_norm")


def test_neither_vae_nor_text_encoders_are_loaded(trained, train, tmp_path, monkeypatch):
    import diffusers
    import transformers

    import sdpo.training.checkpoint

    def loaded(cls, *args, **kwargs):
        raise AssertionError(f"{cls.__name__} was loaded")

    flags, _, _, _, found = trained
    frozen = [diffusers.AutoencoderKL, transformers.CLIPTextModel, transformers.CLIPTokenizer]
    frozen.append(transformers.CLIPTextModelWithProjection)
    for cls in frozen:
        monkeypatch.setattr(cls, "from_pretrained", classmethod(loaded))
        monkeypatch.setattr(cls, "from_config", classmethod(loaded), raising=False)
    with pytest.raises(UserError, match="AutoencoderKL was loaded"):
        train(tmp_path / "export", **flags)
    # Its end apart, which writes a whole pipeline: there is no other use of them.
    monkeypatch.setattr(sdpo.training.checkpoint, "export_pipeline", lambda *args: None)
    assert identical(train(tmp_path / "run", **flags).unet(), found.unet())


def test_samples_are_drawn_by_models_loaded_for_them(sd15, train, tmp_path):
    flags, cache = sd15
    prompts = {"validation_prompts": ["a red circle"], "max_train_steps": 1}
    train(tmp_path / "a", **{**flags, **prompts, "cache_dir_latents": cache})
    train(tmp_path / "b", **{**flags, **prompts})
    a, b = (np.asarray(Image.open(tmp_path / x / "samples/step-000000.png")) for x in "ab")
    assert np.array_equal(a, b)


def test_resumed_in_another_way(sd15, train, tmp_path):
    """Killed in a run from the cache; and gone on with from a checkpoint of a run from images."""
    flags, cache = sd15
    flags = {**flags, "cache_dir_latents": cache, "max_train_steps": 8, "checkpointing_steps": 2}
    whole = train(tmp_path / "whole", **flags)
    workers = {"dataloader_num_workers": 1}
    fork = train.fork(tmp_path / "run", **flags, **workers)
    assert fork.send_at_step(signal.SIGKILL, tmp_path / "run", 5) == -signal.SIGKILL
    run = train(tmp_path / "run", **flags)
    assert identical(run.unet(), whole.unet())
    assert run.numbers == whole.numbers
    shutil.copytree(whole.out, tmp_path / "half")
    for step in (6, 8):
        shutil.rmtree(tmp_path / "half" / f"checkpoint-{step}")
    run = train(tmp_path / "half", **{**flags, "cache_dir_latents": None})
    assert distance(run.unet(), whole.unet()) < 1e-6


def test_labels_of_a_scorer(sd15, train, tmp_path):
    flags, cache = sd15
    chosen = {**flags, "choice_model": "oracle"}
    plain = train(tmp_path / "a", **chosen)
    cached = train(tmp_path / "b", **chosen, cache_dir_latents=cache)
    assert distance(plain.unet(), cached.unet()) < 1e-6


def test_the_cache_is_the_same_after_use(sd15, train, tmp_path):
    flags, cache = sd15
    before = files(cache)
    out = tmp_path / "run"
    run = train(out, **{**flags, "cache_dir_latents": cache, "verify_cache": True})
    assert files(cache) == before
    about = {"split": "heldout", "max_pairs": 2, "timesteps": 1, "train_data_dir": train.pairs}
    assert run_here("sdpo/evaluation/heldout.py", [out, *as_argv(about)]) == 0
    assert [json.loads(line)["step"] for line in (out / "heldout.jsonl").open()] == [0, 4]
    # Somewhere else it is the same cache.
    shutil.copytree(cache, tmp_path / "moved")
    again = train(tmp_path / "again", **{**flags, "cache_dir_latents": tmp_path / "moved"})
    assert identical(run.unet(), again.unet())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"resolution": 64}, "--resolution 32 (this run: 64)"),
        ({"cache_dtype": "bf16"}, "--cache_dtype fp32 (this run: bf16)"),
        ({"mixed_precision": "bf16"}, "--mixed_precision no (this run: bf16)"),
        ({"sdxl": True}, "family sd15 (this run: sdxl)"),
        ({"split": "heldout"}, "other images, then of"),
        ({"pretrained_vae_model_name_or_path": "vae"}, "another VAE, then of"),
    ],
)
def test_a_stale_cache_is_refused(sd15, train, tmp_path, changed, said):
    flags, cache = sd15
    if "pretrained_vae_model_name_or_path" in changed:
        from sdpo.tinyworld.architecture import build_vae

        build_vae("small").save_pretrained(tmp_path / "vae")
        changed = {"pretrained_vae_model_name_or_path": tmp_path / "vae"}
    before = files(cache)
    argv = train.argv(tmp_path / "run", **{**flags, "cache_dir_latents": cache, **changed})
    with pytest.raises(UserError) as raised:
        run_here("train.py", argv)
    assert f"--cache_dir_latents: {cache} was made with " in str(raised.value)
    assert said in str(raised.value)
    assert files(cache) == before


def test_damage(sd15, train, tmp_path):
    flags, cache = sd15
    own = tmp_path / "latents"
    shutil.copytree(cache, own)
    argv = train.argv(tmp_path / "run", **{**flags, "cache_dir_latents": own})
    (shard,) = own.glob("latents-*")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=f"{shard} is damaged: it has .* delete it to have it made"):
        run_here("train.py", argv)
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=f"{shard} is damaged: its sha256"):
        run_here("train.py", [*argv, "--verify_cache"])
    shard.unlink()
    assert run_here("train.py", [*argv, "--verify_cache"]) == 0
    assert shard.read_bytes() == whole


def script(*arguments, **environment):
    env = {**os.environ, "SDPO_PYTHON": sys.executable, "SDPO_SKIP_INSTALL": "1", **environment}
    return program("bash", "scripts/data/cache_latents.sh", *arguments, env=env)


def test_built_ahead_by_the_script(sd15, train, tmp_path):
    flags, cache = sd15
    latents = tmp_path / "latents"
    done = script(*train.argv(tmp_path / "unused", **flags, cache_dir_latents=latents))
    assert done.returncode == 0, done.stderr
    counts = json.loads((latents / "manifest.json").read_text())["counts"]
    said = f"{counts['rows']} pairs and {counts['captions']} captions in 2 files"
    assert said in done.stdout
    assert not (tmp_path / "unused").exists()
    found, wanted = files(latents), files(cache)
    assert {name: found[name] for name in wanted} == wanted


def test_two_processes_build_and_train(sd15, train, tmp_path):
    flags, cache = sd15
    own = {**flags, "use_winner_preserving": False, "max_train_steps": 2}
    latents = {"cache_dir_latents": tmp_path / "latents"}
    two = train.processes(tmp_path / "two", 2, **own, **latents, train_batch_size=1)
    assert len(list((tmp_path / "latents").glob("latents-*"))) == 2
    one = train(tmp_path / "one", **own, cache_dir_latents=cache)
    same = train(tmp_path / "same", **own, **latents)
    for run in (one, same):
        assert distance(run.unet(), two.unet()) < 1e-6


def test_a_stale_cache_ends_every_process_with_the_sentence(sd15, train, tmp_path):
    flags, cache = sd15
    own = {**flags, "cache_dir_latents": cache, "resolution": 64}
    for rank in train.start_processes(tmp_path / "run", 2, **own):
        assert rank.wait() == 2, rank.stderr
        assert "--resolution 32 (this run: 64)" in last_sentence(rank.stderr)


def test_a_killed_build_goes_on(sd15, train, tmp_path):
    flags, cache = sd15
    latents = tmp_path / "latents"
    own = {**flags, "cache_dir_latents": latents}
    argv = train.argv(tmp_path / "run", **own, cache_batch_size=1)
    build = "sdpo/data/latents/__main__.py"
    fork = Forked(argv, tmp_path / "stderr", name=build)
    deadline = time.monotonic() + 60
    while not list(latents.glob("text-*.json")) and time.monotonic() < deadline:
        time.sleep(0.002)
    fork.kill()
    assert fork.wait() == -signal.SIGKILL, fork.stderr
    (text,) = latents.glob("text-*.safetensors")
    assert not list(latents.glob("latents-*.json"))
    before = text.stat()
    assert run_here(build, argv) == 0
    assert text.stat().st_mtime_ns == before.st_mtime_ns
    run = train(tmp_path / "a", **own)
    same = train(tmp_path / "b", **{**own, "cache_dir_latents": cache})
    assert distance(run.unet(), same.unet()) < 1e-6


def test_the_script_answers_mistakes_once():
    done = script(*as_argv({"cache_dir_latents": "x", "pretrained_model_name_or_path": "./none"}))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("sdpo.cache: error: ")
