"""Weights that two environments can draw alike: a tensor is a function of its name and its shape.

Only numpy, and of numpy only the raw 64 bits of PCG64, which are the same in every version.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np

# Small beside the rest, so that a layer norm with a wrong epsilon shows.
_PATCH_SCALE = 0.02
_BIAS_STD = 0.02
_NORM_STD = 0.1


def random_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draw float32 of `shape`, uniform about 0 (norms' weights: about 1), with a spread that keeps
    activations about constant from layer to layer and attention far from even."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "big")
    count = math.prod(shape)
    raw = np.random.PCG64(seed).random_raw((count + 1) // 2)
    values = raw.view(np.uint32)[:count].astype(np.float32)
    values -= np.float32(2**31)
    values *= np.float32(math.sqrt(3) * _std(name, shape) / 2**31)
    if _is_norm(name) and name.endswith("weight"):
        values += np.float32(1)
    return values.reshape(shape)


def _std(name: str, shape: tuple[int, ...]) -> float:
    if len(shape) < 2:
        return _NORM_STD if _is_norm(name) else _BIAS_STD
    # (out, in), (out, in, height, width), or (1, positions, width).
    fan_in = shape[-1] if len(shape) == 3 else math.prod(shape[1:])
    scale = _PATCH_SCALE if "patch_embed" in name or "visual.conv1" in name else 1.0
    return scale / math.sqrt(fan_in)


def _is_norm(name: str) -> bool:
    return any(part in name.lower() for part in ("norm", "ln_"))
