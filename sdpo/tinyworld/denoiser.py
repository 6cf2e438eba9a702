"""Fit a tiny pipeline's denoiser and text encoders: noise of a UNet, velocity of a transformer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdpo.tinyworld import world

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sdpo.tinyworld.architecture import Pipeline

CAPTION_DROPOUT = 0.15
EMA_DECAY = 0.998
LEARNING_RATES = {"unet": 1.5e-3, "transformer": 1e-3}


def part_of(pipeline: Pipeline) -> str:
    """Name the denoiser among a pipeline's parts."""
    return "unet" if hasattr(pipeline, "unet") else "transformer"


def denoiser_of(pipeline: Pipeline) -> Any:
    """Give a pipeline's UNet or transformer."""
    return getattr(pipeline, part_of(pipeline))


def sampling_options(pipeline: Pipeline) -> dict[str, Any]:
    """Give what a pipeline's call needs so that captions are as long as in training."""
    if part_of(pipeline) == "unet":
        return {}
    return {"max_sequence_length": pipeline.tokenizer_max_length}


def predict(pipeline: Pipeline, noisy: Tensor, times: Tensor, token_ids: Tensor) -> Tensor:
    """Call the denoiser on latents (B, 4, 16, 16), as the family's own pipeline does.

    Args:
        times: (B,) as the model is told them.
        token_ids: (B, 24).
    """
    import torch

    first = pipeline.text_encoder(token_ids, output_hidden_states=True)
    model = denoiser_of(pipeline)
    if not hasattr(pipeline, "text_encoder_2"):
        return model(noisy, times, encoder_hidden_states=first[0], return_dict=False)[0]
    second = pipeline.text_encoder_2(token_ids, output_hidden_states=True)
    states = torch.cat((first.hidden_states[-2], second.hidden_states[-2]), dim=-1)
    if part_of(pipeline) == "transformer":
        return model(
            noisy,
            timestep=times,
            # T5's tokens, which it has not, are zeros.
            encoder_hidden_states=torch.cat((states, torch.zeros_like(states)), dim=1),
            pooled_projections=torch.cat((first[0], second[0]), dim=-1),
            return_dict=False,
        )[0]
    side = world.IMAGE_SIZE
    time_ids = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32)
    added = {"text_embeds": second[0], "time_ids": time_ids.expand(len(token_ids), -1)}
    return model(
        noisy,
        times,
        encoder_hidden_states=states,
        added_cond_kwargs=added,
        return_dict=False,
    )[0]


def _noised(
    pipeline: Pipeline, schedule: Any, clean: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Noised latents, the times as the model is told them, and the target."""
    import torch

    noise = torch.randn(clean.shape, generator=generator)
    if part_of(pipeline) == "unet":
        times = torch.randint(1000, (len(clean),), generator=generator)
        return schedule.add_noise(clean, noise, times), times, noise
    sigma = torch.sigmoid(torch.randn(len(clean), generator=generator))
    share = sigma[:, None, None, None]
    return (1 - share) * clean + share * noise, 1000 * sigma, noise - clean


def train_denoiser(
    pipeline: Pipeline,
    latents: Tensor,
    captions: list[str],
    *,
    steps: int,
    batch: int,
    seed: int,
    learning_rate: float | None = None,
) -> float:
    """Fit denoiser and text encoders in place; leaves averaged (EMA) weights.

    Args:
        latents: scaled, (N, 4, 16, 16), one for each of the ``captions``.
        steps: optimizer steps.
        batch: images a step.
        learning_rate: default: that of `LEARNING_RATES`.

    Returns: the mean loss of the last tenth of the steps.
    """
    import torch
    from diffusers import DDPMScheduler

    from sdpo.tinyworld.autoencoder import cosine_optimizer

    generator = torch.Generator().manual_seed(seed)
    part = part_of(pipeline)
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config) if part == "unet" else None
    tokenize = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    token_ids = pipeline.tokenizer(captions, **tokenize).input_ids
    empty_ids = pipeline.tokenizer([""], **tokenize).input_ids
    modules = [denoiser_of(pipeline), pipeline.text_encoder]
    modules += [pipeline.text_encoder_2] if hasattr(pipeline, "text_encoder_2") else []
    modules[0].to(memory_format=torch.channels_last)
    parameters = [p for module in modules for p in module.train().parameters()]
    average = [p.detach().clone() for p in parameters]
    losses = []
    rate = LEARNING_RATES[part] if learning_rate is None else learning_rate
    with cosine_optimizer(parameters, rate, steps, "denoiser") as step:
        for i in range(steps):
            index = torch.randint(len(latents), (batch,), generator=generator)
            noisy, times, target = _noised(pipeline, schedule, latents[index], generator)
            dropped = torch.rand(len(index), generator=generator) < CAPTION_DROPOUT
            ids = torch.where(dropped[:, None], empty_ids, token_ids[index])
            predicted = predict(pipeline, noisy, times, ids)
            loss = torch.nn.functional.mse_loss(predicted, target)
            step(loss)
            losses.append(loss.item())
            decay = min(EMA_DECAY, (i + 1) / (i + 10))
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1.0 - decay)
    with torch.no_grad():
        for parameter, value in zip(parameters, average, strict=True):
            parameter.copy_(value)
    for module in modules:
        module.eval()
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)
