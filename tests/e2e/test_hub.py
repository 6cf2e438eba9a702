"""Hub ids, --revision and --cache_dir, from a cache laid out as the hub's own client leaves it."""

from __future__ import annotations

import shutil

import pytest

from .harness import identical

ID = "someone/tiny"


def put(cache, name, refs):
    """Models as a cache holds them: `refs` maps a revision's name to a directory."""
    home = cache / f"models--{name.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    for i, (ref, directory) in enumerate(refs.items()):
        commit = f"{i:040x}"
        shutil.copytree(directory, home / "snapshots" / commit)
        (home / "refs" / ref).write_text(commit)


def weights(directory):
    """All weights below a directory."""
    from safetensors.torch import load_file

    return load_file(next(directory.glob("*.safetensors")))


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def hub(request, train, tmp_path_factory):
    """(flags of the family, cache, the directory that revision v2 holds)."""
    from sdpo.tinyworld.architecture import build_pipeline, save_pipeline

    root = tmp_path_factory.mktemp(request.param)
    save_pipeline(build_pipeline(request.param, "micro", seed=7), root / "newer")
    base = train.models[request.param]
    put(root / "cache", ID, {"main": base, "v2": root / "newer"})
    put(root / "cache", "someone/vae", {"main": root / "newer" / "vae"})
    flags = {"sdxl": request.param == "sdxl", "max_train_steps": 1}
    return flags, root / "cache", root / "newer"


def test_revisions(train, hub, tmp_path):
    flags, cache, newer = hub
    here = {"pretrained_model_name_or_path": ID, "cache_dir": cache, **flags}
    latest = train(tmp_path / "a", **here)
    named = train(tmp_path / "b", **here, revision="v2")
    assert identical(latest.unet(), train(tmp_path / "c", **flags).unet())
    local = train(tmp_path / "d", **flags, pretrained_model_name_or_path=newer)
    assert identical(named.unet(), local.unet())
    assert not identical(named.unet(), latest.unet())
    # So are the other parts of the exported pipeline.
    for part in ("vae", "text_encoder"):
        exported = weights(named.out / "pipeline" / part)
        assert identical(exported, weights(local.out / "pipeline" / part))
        assert not identical(exported, weights(latest.out / "pipeline" / part))
    line = train.fails(tmp_path / "e", **here, revision="v3")
    assert "--pretrained_model_name_or_path" in line


def test_vae_and_unet_init(train, hub, tmp_path):
    flags, cache, newer = hub
    there = train(
        tmp_path / "a",
        **flags,
        cache_dir=cache,
        pretrained_vae_model_name_or_path="someone/vae",
        unet_init=ID,
    )
    here = train(tmp_path / "b", **flags, pretrained_vae_model_name_or_path=newer / "vae")
    assert identical(there.unet(), here.unet())
