"""train.py against a straight-line implementation of the same two optimizer steps.

It shares nothing with the product but the generators of `sdpo.common.randomness`, so that the draws
are the same. The gradient is written out by hand instead of with a scaled error.
"""

from __future__ import annotations

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from sdpo.common.randomness import generator

from .harness import base_unet, distance

BETA, MU, LR, SEED, SIZE, BATCH, ACCUMULATION, STEPS = 500.0, 0.7, 1e-4, 3, 32, 3, 2, 2
EMPTY = 0.4


def decided_rows(pairs_dir):
    """Rows of the train split without ties, winner's bytes first."""
    rows = []
    for path in sorted(pairs_dir.glob("train-*.parquet")):
        for row in pq.read_table(path).to_pylist():
            if row["label_0"] == 1.0:
                rows.append((row["jpg_0"], row["jpg_1"], row["caption"]))
            elif row["label_0"] == 0.0:
                rows.append((row["jpg_1"], row["jpg_0"], row["caption"]))
    return rows


def draw(key, stream, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=generator(*key, stream), dtype=dtype)


def coin(key, stream):
    return torch.rand((), generator=generator(*key, stream), dtype=torch.float64).item()


def pixels(data, flip):
    image = Image.open(io.BytesIO(data)).convert("RGB").resize((SIZE, SIZE), Image.BILINEAR)
    array = np.asarray(image, dtype=np.float32)
    if flip:
        array = array[:, ::-1]
    return torch.from_numpy(array.copy()).permute(2, 0, 1) / 127.5 - 1.0


def load(model, xl):
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    parts = {
        "vae": AutoencoderKL.from_pretrained(model, subfolder="vae"),
        "unet": UNet2DConditionModel.from_pretrained(model, subfolder="unet"),
        "reference": UNet2DConditionModel.from_pretrained(model, subfolder="unet"),
        "schedule": DDPMScheduler.from_pretrained(model, subfolder="scheduler"),
        "tokenizer": CLIPTokenizer.from_pretrained(model, subfolder="tokenizer"),
        "text": CLIPTextModel.from_pretrained(model, subfolder="text_encoder").eval(),
    }
    if xl:
        parts["text_2"] = CLIPTextModelWithProjection.from_pretrained(
            model, subfolder="text_encoder_2"
        ).eval()
    return parts


@torch.no_grad()
def condition(parts, caption, xl):
    ids = parts["tokenizer"](
        caption, padding="max_length", max_length=24, truncation=True, return_tensors="pt"
    ).input_ids
    if not xl:
        return {"encoder_hidden_states": parts["text"](ids)[0]}
    first = parts["text"](ids, output_hidden_states=True).hidden_states[-2]
    second = parts["text_2"](ids, output_hidden_states=True)
    time_ids = torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]], dtype=torch.float32)
    return {
        "encoder_hidden_states": torch.cat([first, second.hidden_states[-2]], -1),
        "added_cond_kwargs": {"text_embeds": second.text_embeds, "time_ids": time_ids},
    }


def pair_gradient(parts, row, key, xl):
    """Backpropagate one pair's share of diffusion-dpo with the pair-scope safeguard; returns its
    loss."""
    winner, loser, caption = row
    flip = coin(key, "flip") < 0.5
    if coin(key, "caption-dropout") < EMPTY:
        caption = ""
    t = torch.randint(1000, (), generator=generator(*key, "timestep"))
    noise = draw(key, "noise", 4, SIZE // 4, SIZE // 4)
    kept = parts["schedule"].alphas_cumprod[t]
    kwargs = condition(parts, caption, xl)
    residuals, errors, reference_errors = [], [], []
    for data, stream in ((winner, "posterior-winner"), (loser, "posterior-loser")):
        with torch.no_grad():
            posterior = parts["vae"].encode(pixels(data, flip)[None]).latent_dist
            latent = posterior.mean + posterior.std * draw(key, stream, *noise.shape)
            latent = latent * parts["vae"].config.scaling_factor
            noisy = kept.sqrt() * latent + (1 - kept).sqrt() * noise
            reference = parts["reference"](noisy, t[None], **kwargs).sample
        prediction = parts["unet"](noisy, t[None], **kwargs).sample
        residuals.append(prediction - noise)
        errors.append((prediction - noise).square().mean())
        reference_errors.append((reference - noise).square().mean())
    r_w, r_l = (r.detach() for r in residuals)
    inner = (r_w * r_l).sum()
    lam = ((1 - MU) * r_w.square().sum() / inner).clamp(0, 1) if inner > 0 else torch.tensor(1.0)
    margin = (errors[0] - errors[1]) - (reference_errors[0] - reference_errors[1])
    u = (-0.5 * BETA * margin).detach()
    # d(-log sigmoid(u)) = -(1 - sigmoid(u)) du,  du = -beta/2 (dL_w - lam dL_l)
    weight = (1 - torch.sigmoid(u)) * 0.5 * BETA
    (weight * (errors[0] - lam * errors[1]) / (BATCH * ACCUMULATION)).backward()
    return -torch.log(torch.sigmoid(u)).item()


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_two_steps(train, tmp_path, pairs_dir, family):
    xl = family == "sdxl"
    run = train(
        tmp_path / "run",
        sdxl=xl,
        beta_dpo=BETA,
        use_winner_preserving=True,
        winner_preserving_mu=MU,
        winner_preserving_scope="pair",
        learning_rate=LR,
        seed=SEED,
        train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        max_train_steps=STEPS,
        proportion_empty_prompts=EMPTY,
        max_grad_norm=1.0,
    )
    parts = load(train.models[family], xl)
    unet = parts["unet"].train()
    # Weight by weight, against the run's fused kernel.
    settings = {"betas": (0.9, 0.999), "weight_decay": 1e-2, "eps": 1e-8, "foreach": False}
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LR, **settings)
    rows = decided_rows(pairs_dir)
    order = torch.randperm(len(rows), generator=generator(SEED, 0, "order")).tolist()
    position = 0
    for step in range(STEPS):
        losses = []
        for _ in range(BATCH * ACCUMULATION):
            losses.append(pair_gradient(parts, rows[order[position]], (SEED, 0, position), xl))
            position += 1
        norm = torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert run.metrics[step]["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
        assert run.metrics[step]["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    moved = distance(base_unet(train.models[family]), run.unet())
    apart = {name: (run.unet()[name] - value).abs() for name, value in unet.state_dict().items()}
    # Adam's first steps divide a gradient by its size: where it is close to zero, rounding decides.
    far = sum((diff > 0.02 * LR).sum().item() for diff in apart.values())
    assert far < 0.002 * sum(diff.numel() for diff in apart.values())
    assert moved > LR
