"""Sample grids: the same noise every time, laid out in rows, written whole."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sdpo.models import get_family
from sdpo.models.base import ModelSource
from sdpo.models.encoding import ModelEncoder
from sdpo.training.samples import draw_grid, grid, sample, save_image

PROMPTS = ["a red square", "a blue circle", "a green triangle"]


@pytest.fixture(scope="module")
def models(tiny_sd15):
    family, source = get_family("sd15"), ModelSource(str(tiny_sd15))
    return SimpleNamespace(
        base=(family, source),
        unet=family.load_unet(source).eval(),
        encoder=ModelEncoder(family, family.load_frozen(source), 64, torch.device("cpu")),
    )


def pixels(image):
    return np.asarray(image).astype(int)


def test_a_prompts_image_depends_on_seed_and_place_alone(models):
    family, source = models.base
    pipeline = family.pipeline(models.unet, models.encoder.frozen, source)

    def images(prompts, seed=0, batch_size=8):
        return sample(family, pipeline, prompts, seed, 64, steps=2, batch_size=batch_size)

    whole = images(PROMPTS)
    assert [image.size for image in whole] == [(64, 64)] * 3
    for found in (images(PROMPTS), images(PROMPTS, batch_size=2), images(PROMPTS[:2])):
        for one, other in zip(found, whole, strict=False):
            assert np.abs(pixels(one) - pixels(other)).max() <= 1
    other_seed = images(PROMPTS[:1], seed=1)[0]
    assert np.abs(pixels(other_seed) - pixels(whole[0])).max() > 1
    same_prompt = images([PROMPTS[0], PROMPTS[0]])
    assert np.abs(pixels(same_prompt[0]) - pixels(same_prompt[1])).max() > 1


def test_grid_layout():
    tiles = [Image.new("RGB", (4, 3), (i, i, i)) for i in range(5)]
    sheet = np.asarray(grid(tiles, columns=2, gap=1))
    assert sheet.shape == (3 * 4 - 1, 2 * 5 - 1, 3)
    for i in range(5):
        top, left = i // 2 * 4, i % 2 * 5
        assert (sheet[top : top + 3, left : left + 4] == i).all()
    assert (sheet[:, 4] == 255).all()
    assert (sheet[8:, 5:] == 255).all()


def test_saving_replaces_whole_files(tmp_path, monkeypatch):
    path = tmp_path / "samples" / "a.png"
    save_image(Image.new("RGB", (2, 2), (9, 9, 9)), path)
    assert np.asarray(Image.open(path)).max() == 9

    def killed(self, target, **_):
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        save_image(Image.new("RGB", (2, 2)), path)
    assert np.asarray(Image.open(path)).max() == 9


def test_draw_grid_writes_and_logs(models, make_config, tmp_path):
    logged = []
    writer = SimpleNamespace(add_image=lambda *args, **kwargs: logged.append((args, kwargs)))
    accelerator = SimpleNamespace(trackers=[SimpleNamespace(name="tensorboard", writer=writer)])
    config = make_config(validation_prompts=PROMPTS)
    path = draw_grid(config, models, models.unet, accelerator, 7)
    assert path == tmp_path / "run/samples/step-000007.png"
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (130, 130, 3)
    ((name, logged_pixels, step), kwargs) = logged[0]
    assert (name, step, kwargs) == ("samples", 7, {"dataformats": "HWC"})
    assert np.array_equal(logged_pixels, sheet)


def test_text_encoders_in_the_hosts_memory_draw_the_same(models, make_config):
    family, source = models.base
    frozen = family.load_frozen(source)
    offloading = ModelEncoder(family, frozen, 64, torch.device("cpu"), offload_text=True)
    other = SimpleNamespace(**{**vars(models), "encoder": offloading})
    config = make_config(validation_prompts=PROMPTS[:1])
    silent = SimpleNamespace(trackers=[])
    paths = [draw_grid(config, m, m.unet, silent, i) for i, m in enumerate((models, other))]
    assert paths[0].read_bytes() == paths[1].read_bytes()
