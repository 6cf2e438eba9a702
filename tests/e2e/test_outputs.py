"""Sample grids, trackers and the exported pipeline."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from .harness import files, identical

PROMPTS = ["a red circle at the center on a white background", "a blue square", "a green triangle"]


def scalars(log_dir):
    """Tag to {step: value}, and image tags to their steps, from TensorBoard's files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(log_dir))
    events.Reload()
    tags = events.Tags()
    return (
        {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in tags["scalars"]},
        {tag: [e.step for e in events.Images(tag)] for tag in tags["images"]},
    )


@pytest.fixture(scope="module")
def sampled(train, tmp_path_factory):
    return train(
        tmp_path_factory.mktemp("sampled"),
        validation_prompts=PROMPTS,
        validation_steps=2,
        max_train_steps=4,
        learning_rate=1e-2,
        report_to="tensorboard",
        tracker_project_name="named",
        logging_dir="events",
    )


def test_grids(sampled):
    grids = sorted((sampled.out / "samples").iterdir())
    assert [g.name for g in grids] == [f"step-{n:06d}.png" for n in (0, 2, 4)]
    images = [np.asarray(Image.open(g)) for g in grids]
    # Two rows of two 32 px images with a gap of 2; the fourth place stays white.
    assert all(image.shape == (66, 66, 3) for image in images)
    assert all((image[34:, 34:] == 255).all() for image in images)
    assert not (images[0] == images[2]).all()


def test_tensorboard(sampled):
    found, images = scalars(sampled.out / "events" / "named")
    for name in ("loss", "winner_drift", "loser_scale", "lr", "grad_norm"):
        expected = dict(zip(sampled.column("step"), sampled.column(name), strict=True))
        assert found[name] == pytest.approx(expected, rel=1e-6)
    assert images["samples"] == [0, 2, 4]
    for entry in sampled.metrics:
        for k, drift in enumerate(entry["by_timestep"]["winner_drift"]):
            logged = found.get(f"winner_drift_by_timestep/{k}00-{k}99", {}).get(entry["step"])
            assert logged == (drift if drift is None else pytest.approx(drift, rel=1e-6))


def test_grids_from_a_file_and_for_equal_weights(train, sampled, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n\n")
    run = train(
        tmp_path / "run",
        validation_prompts=[prompts],
        validation_steps=2,
        max_train_steps=2,
        learning_rate=1e-2,
    )
    assert run.config["args"]["validation_prompts"] == PROMPTS
    for step in (0, 2):
        name = f"samples/step-{step:06d}.png"
        assert (run.out / name).read_bytes() == (sampled.out / name).read_bytes()
    # --report_to none
    assert not (run.out / "logs").exists()
    # Drawing samples leaves the training as it is.
    assert identical(
        run.unet(2), train(tmp_path / "b", max_train_steps=2, learning_rate=1e-2).unet()
    )


def test_grids_of_sdxl_in_bf16(train, tmp_path):
    run = train(
        tmp_path / "run",
        sdxl=True,
        validation_prompts=PROMPTS[:1],
        validation_steps=1,
        max_train_steps=1,
        mixed_precision="bf16",
    )
    names = sorted(p.name for p in (run.out / "samples").iterdir())
    assert names == ["step-000000.png", "step-000001.png"]
    assert Image.open(run.out / "samples" / names[0]).size == (32, 32)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_pipeline(train, tmp_path, family):
    import torch
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    cls = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    run = train(tmp_path / "run", sdxl=family == "sdxl", mixed_precision="bf16")
    path = run.out / "pipeline"
    names = set(files(path))
    assert not [n for n in names if n.endswith((".bin", ".pth", ".pt", ".ckpt", ".tmp"))]
    pipeline = (
        cls.from_pretrained(path, safety_checker=None)
        if family == "sd15"
        else (cls.from_pretrained(path))
    )
    assert {p.dtype for p in pipeline.unet.parameters()} == {torch.float32}
    assert identical(pipeline.unet.state_dict(), run.unet())

    base = cls.from_pretrained(train.models[family])
    for part in ("vae", "text_encoder", "text_encoder_2"):
        if hasattr(base, part):
            kept, original = (getattr(p, part).state_dict() for p in (pipeline, base))
            assert identical(kept, original), part
    assert type(pipeline.scheduler) is type(base.scheduler)
    assert (
        dict(pipeline.scheduler.config).items()
        >= {k: v for k, v in base.scheduler.config.items() if not k.startswith("_")}.items()
    )
    assert pipeline.tokenizer("a red circle").input_ids == base.tokenizer("a red circle").input_ids
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(PROMPTS[0], height=32, width=32, num_inference_steps=2).images[0]
    assert image.size == (32, 32)
