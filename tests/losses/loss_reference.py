"""The losses a second way: float64 numpy, pair by pair, from the papers' formulas."""

from __future__ import annotations

import math

import numpy as np
import torch


def log_sigmoid(x: float) -> float:
    """log(1 / (1 + exp(-x))) without overflow."""
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)) without overflow."""
    return math.exp(log_sigmoid(x))


def errors(pred: np.ndarray, target: np.ndarray) -> list[float]:
    """Mean squared residual of each sample."""
    return [float(((p - t) ** 2).sum() / p.size) for p, t in zip(pred, target, strict=True)]


def logits(pred: np.ndarray, ref: np.ndarray, target: np.ndarray, beta: float) -> list[float]:
    """u of each pair: beta / 2 times how much more the model gained on the winner than the loser,
    both against the reference."""
    model, frozen = errors(pred, target), errors(ref, target)
    pairs = len(model) // 2
    gained = [frozen[i] - model[i] for i in range(2 * pairs)]
    return [beta / 2 * (gained[i] - gained[pairs + i]) for i in range(pairs)]


def diffusion_dpo(pred, ref, target, beta, alpha, form) -> float:
    """-log sigmoid(u)."""
    return float(np.mean([-log_sigmoid(u) for u in logits(pred, ref, target, beta)]))


def dspo(pred, ref, target, beta, alpha, form) -> float:
    """Both forms; the SDXL form chooses by the batch mean of d^2."""
    us = logits(pred, ref, target, beta)
    pairs = len(us)
    d = pred[:pairs] - ref[:pairs]
    lost = [1.0 - sigmoid(u) for u in us]
    if form == "sd15":
        per_pair = [
            ((pred[i] - target[i] - beta * lost[i] * d[i]) ** 2).mean() for i in range(pairs)
        ]
    elif (d**2).mean() >= 0.1:
        per_pair = [lost[i] ** 2 * (d[i] ** 2).mean() for i in range(pairs)]
    else:
        per_pair = [x**2 for x in lost]
    return float(np.mean(per_pair))


def dmpo(pred, ref, target, beta, alpha, form) -> float:
    """KL(Bernoulli(sigmoid(u)) || Bernoulli(1 - alpha)) as a sum over the two outcomes."""
    q = min(1 - 1e-6, max(1e-6, 1 - alpha))
    per_pair = []
    for u in logits(pred, ref, target, beta):
        outcomes = ((log_sigmoid(u), q), (log_sigmoid(-u), 1 - q))
        per_pair.append(sum(math.exp(lp) * (lp - math.log(other)) for lp, other in outcomes))
    return float(np.mean(per_pair))


def sft(pred, ref, target, beta, alpha, form) -> float:
    """The winners' error."""
    found = errors(pred, target)
    return float(np.mean(found[: len(found) // 2]))


METHODS = {"diffusion-dpo": diffusion_dpo, "dspo": dspo, "dmpo": dmpo, "sft": sft}


def value(method, pred, ref, target, *, beta, alpha=0.0, form="sd15") -> float:
    """The loss of tensors of any dtype, computed in float64."""
    arrays = [x.detach().double().numpy() for x in (pred, ref, target)]
    return METHODS[method](*arrays, beta, alpha, form)


def tensors(pairs=3, seed=0, dtype=torch.float64, drift=0.1, shape=(2, 4, 4)):
    """(pred, ref, target) of stacked winners and losers whose residuals conflict."""
    g = torch.Generator().manual_seed(seed)

    def draw(count):
        return torch.randn((count, *shape), generator=g, dtype=torch.float64)

    noise = draw(pairs)
    target = torch.cat([noise, noise])
    shared = draw(pairs)
    residual = torch.cat([shared, 2 * shared]) + 0.5 * draw(2 * pairs)
    ref = target + residual + drift * draw(2 * pairs)
    pred = target + residual
    return pred.to(dtype), ref.to(dtype), target.to(dtype)


def numeric_gradient(function, x: torch.Tensor, step=1e-5) -> torch.Tensor:
    """Central differences of a scalar function of a float64 tensor."""
    flat = x.detach().clone().flatten()
    gradient = torch.zeros_like(flat)
    for i in range(len(flat)):
        ends = []
        for sign in (1, -1):
            moved = flat.clone()
            moved[i] += sign * step
            ends.append(function(moved.reshape(x.shape)))
        gradient[i] = (ends[0] - ends[1]) / (2 * step)
    return gradient.reshape(x.shape)
